"""Folders of images with known cameras, as the public datasets lay them out: TUM RGB-D, 7-Scenes, COLMAP text.

posed = read("rgbd_dataset_freiburg1_desk")      # paths and cameras; no image is opened
frames = load(posed.take(range(0, 500, 50)))     # tensors at the model's input size
frames.images                                    # [10, 3, 392, 518] in [0, 1]
"""

from vggt_compile.datasets.colmap import read_colmap
from vggt_compile.datasets.load import Frames, load
from vggt_compile.datasets.posed import PosedImages
from vggt_compile.datasets.read import read
from vggt_compile.datasets.seven_scenes import read_seven_scenes
from vggt_compile.datasets.tum import read_tum

__all__ = ["Frames", "PosedImages", "load", "read", "read_colmap", "read_seven_scenes", "read_tum"]
