"""Rendered views written as the public datasets lay out their recordings, with the digits that those have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vggt_compile.models.pose import matrix_to_quaternion
from vggt_compile.scenes import Views

RATE = 30.0
START = 1305031102.1753


def write_tum(views: Views, folder: Path) -> None:
    """TUM RGB-D: four decimals, and times of images, depth and poses that differ by a few milliseconds."""
    (folder / "rgb").mkdir(parents=True)
    (folder / "depth").mkdir()
    lists = {name: [f"# {name}"] for name in ("rgb", "depth", "groundtruth")}
    to_world = camera_to_world(views)
    for frame, pose in enumerate(to_world):
        when = START + frame / RATE
        write_image(views, frame, folder / f"rgb/{when:.4f}.png")
        write_depth(views, frame, folder / f"depth/{when + 0.004:.4f}.png", 5000)
        lists["rgb"].append(f"{when:.4f} rgb/{when:.4f}.png")
        lists["depth"].append(f"{when + 0.004:.4f} depth/{when + 0.004:.4f}.png")
        numbers = torch.cat((pose[:3, 3], matrix_to_quaternion(pose[:3, :3])))
        lists["groundtruth"].append(" ".join(f"{x:.4f}" for x in (when - 0.003, *numbers.tolist())))
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_seven_scenes(views: Views, folder: Path) -> None:
    """7-Scenes: poses in eight digits, depth in millimetres."""
    folder.mkdir(parents=True)
    for frame, pose in enumerate(camera_to_world(views)):
        write_image(views, frame, folder / f"frame-{frame:06}.color.png")
        write_depth(views, frame, folder / f"frame-{frame:06}.depth.png", 1000)
        lines = ["\t ".join(f"{x: .7e}" for x in row) + "\t " for row in pose.tolist()]
        (folder / f"frame-{frame:06}.pose.txt").write_text("\n".join(lines) + "\n")


def write_colmap(views: Views, folder: Path) -> None:
    """COLMAP's text model in sparse/0: all digits, a camera for each image, images in no order, and no points."""
    (folder / "images").mkdir(parents=True)
    (folder / "sparse/0").mkdir(parents=True)
    height, width = views.images.shape[-2:]
    cameras, images = ["# Camera list"], ["# Image list"]
    for frame, (k, e) in enumerate(zip(views.intrinsics[0].double(), views.extrinsics[0].double(), strict=True)):
        write_image(views, frame, folder / f"images/view {frame}.png")
        x, y, z, w = matrix_to_quaternion(e[:, :3]).tolist()
        parameters = (k[0, 0].item(), k[1, 1].item(), k[0, 2].item(), k[1, 2].item())
        cameras.append(" ".join(map(str, (frame + 1, "PINHOLE", width, height, *parameters))))
        pose = (frame + 1, w, x, y, z, *e[:, 3].tolist(), frame + 1, f"view {frame}.png")
        images[1:1] = [" ".join(map(str, pose)), ""]
    (folder / "sparse/0/cameras.txt").write_text("\n".join(cameras) + "\n")
    (folder / "sparse/0/images.txt").write_text("\n".join(images) + "\n")


def camera_to_world(views: Views) -> Tensor:
    """`[S, 4, 4]` of the first scene."""
    extrinsics = views.extrinsics[0].double()
    bottom = extrinsics.new_tensor([[0, 0, 0, 1]]).expand(len(extrinsics), 1, 4)
    return torch.linalg.inv(torch.cat((extrinsics, bottom), dim=-2))


def write_image(views: Views, frame: int, path: Path) -> None:
    pixels = (views.images[0, frame].permute(1, 2, 0) * 255).round().byte()
    Image.fromarray(pixels.numpy()).save(path)


def write_depth(views: Views, frame: int, path: Path, per_metre: int) -> None:
    raw = (views.depth[0, frame].double() * per_metre).round().clamp(max=2**16 - 1)
    Image.fromarray(raw.numpy().astype(np.uint16)).save(path)
