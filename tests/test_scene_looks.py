"""Scenes: the pictures show something, knobs turn what they name, and rendering is fast."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sceneutils import SMALL, laws, same, seeds

from vggt_compile.scenes import (
    HELD_OUT_SEEDS,
    HELD_OUT_TEXTURES,
    KINDS,
    TEXTURES,
    TRAINING_SEEDS,
    TRAINING_TEXTURES,
    TRAJECTORIES,
    Difficulty,
    render,
)
from vggt_compile.scenes.layout import sample
from vggt_compile.scenes.noise import patch_of, pulse


@pytest.mark.parametrize("name", sorted(TEXTURES))
def test_each_texture_shows(name):
    images = render([1, 2], 1, (60, 60), textures=[name], difficulty=Difficulty(objects=4)).images
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std((-1, -2)).min() > 0.02
    # A picture rather than noise: most of the variance survives a 3 × 3 mean.
    smooth = torch.nn.functional.avg_pool2d(images.flatten(0, 1), 3, 1)
    assert (smooth.std((-1, -2)) > 0.6 * images.flatten(0, 1).std((-1, -2))).all()


def surface_patch(width):
    """4096 points of a surface, each with a footprint of so many cells."""
    u, v = 100 * torch.rand(2, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    salt, width = torch.full_like(u, 77, dtype=torch.int32), torch.full_like(u, width)
    return patch_of(u, v, width, salt)


@pytest.mark.parametrize("name", sorted(TEXTURES))
def test_textures_go_to_their_mean_where_cells_are_too_small_to_see(name):
    fine, coarse = (TEXTURES[name](surface_patch(width)) for width in (0.01, 9.0))
    assert fine.min() > -1e-9
    assert fine.max() < 1 + 1e-9
    assert coarse.std() < 0.1
    assert coarse.mean() == pytest.approx(fine.mean().item(), abs=0.1)


def test_the_held_out_textures_are_never_the_default():
    assert len(TRAINING_TEXTURES) >= 14
    assert len(HELD_OUT_TEXTURES) >= 3
    assert TRAINING_TEXTURES.keys().isdisjoint(HELD_OUT_TEXTURES)
    assert TEXTURES.keys() == TRAINING_TEXTURES.keys() | HELD_OUT_TEXTURES.keys()
    for seed in (TRAINING_SEEDS[3], HELD_OUT_SEEDS[3]):
        assert same(render(seed, 1, (8, 8)), render(seed, 1, (8, 8), textures=list(TRAINING_TEXTURES)))


def test_scenes_are_neither_dark_nor_blown_out():
    images = render(range(12), 1, SMALL, "wide").images
    mean = images.mean((1, 2, 3, 4))
    assert mean.min() > 0.2
    assert mean.max() < 0.85
    assert (images > 0.99).float().mean() < 0.05


def test_shadows_only_darken():
    with_shadows, without = (render([1, 2, 3], 1, SMALL, shadows=shadows).images for shadows in (True, False))
    assert (with_shadows <= without).all()
    assert (with_shadows < without - 0.02).float().mean() > 0.005


@given(st.floats(-20, 20), st.integers(1, 5), st.sampled_from([0.25, 0.5, 0.9]))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_pulse_averaged_over_whole_periods_is_its_duty(x, width, duty):
    value = pulse(torch.tensor(x, dtype=torch.float64), torch.tensor(float(width), dtype=torch.float64), duty)
    assert value.item() == pytest.approx(duty, abs=1e-9)


def test_empty_rooms_and_single_pixels_render():
    for kind, count in itertools.product(KINDS, (0, 1)):
        views = render(0, 1, (1, 9), kind=kind, difficulty=Difficulty(objects=count), textures=["bricks"])
        assert views.images.shape == (1, 1, 3, 1, 9)
    assert render(0, 1, (1, 1), difficulty=Difficulty(objects=0)).depth.item() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trajectory": "orbiting"}, "unknown trajectory 'orbiting'; did you mean 'orbit'"),
        ({"kind": "indoors"}, "unknown kind 'indoors'; did you mean 'indoor'"),
        ({"textures": ["chequer"]}, "unknown texture 'chequer'; did you mean 'checker'"),
        ({"textures": []}, "one texture"),
        ({"frames": 0}, "at least 1"),
        ({"size": (0, 5)}, "at least 1"),
        ({"seed": []}, "seed is empty"),
        ({"seed": -1}, "outside 0"),
        ({"seed": 2**32}, "outside 0"),
        ({"dtype": torch.bfloat16}, "cannot hold exact geometry"),
        ({"fov": (90, 60)}, "fov"),
        ({"pace": (3, 2)}, "pace must be an increasing range of degrees a frame inside 0"),
        ({"difficulty": "harder"}, "unknown difficulty 'harder'; did you mean 'hard'"),
    ],
)
def test_errors_say_what_is_valid(arguments, message):
    with pytest.raises(ValueError, match=message):
        render(**({"seed": 0, "frames": 1, "size": (2, 2)} | arguments))


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"objects": -1}, "objects must be at least 0, got -1"),
        ({"scale": (2, 1)}, "scale must be an increasing range of positive factors"),
        ({"scale": (0, 1)}, "scale must be an increasing range of positive factors"),
        ({"flat": 1.5}, "flat must lie in 0 … 1, got 1.5"),
        ({"repeated": -0.1}, "repeated must lie in 0 … 1"),
        ({"light_change": 2}, "light_change must lie in 0 … 1"),
        ({"fov_jitter": float("nan")}, "fov_jitter must lie in 0 … 1"),
    ],
)
def test_knobs_name_their_range(knob, message):
    with pytest.raises(ValueError, match=message):
        Difficulty(**knob)


@laws
@given(seeds, st.sampled_from(sorted(TRAJECTORIES)), st.floats(0.1, 1))
def test_a_change_of_light_leaves_depth_and_cameras_as_they_are(seed, trajectory, change):
    steady, changed = (
        render(seed, 3, (12, 16), trajectory, difficulty=Difficulty(light_change=c)) for c in (0.0, change)
    )
    for name in ("depth", "world_points", "intrinsics", "extrinsics"):
        assert torch.equal(getattr(steady, name), getattr(changed, name))
    assert (steady.images - changed.images).abs().mean() > 0.01 * change
    assert 0 <= changed.images.min() <= changed.images.max() <= 1


def test_light_changes_between_the_views_of_a_scene():
    still = render(range(6), 3, SMALL, "video", pace=(0, 0), difficulty=Difficulty(light_change=1))
    assert (still.images.mean((2, 3, 4)).std(1)).min() > 0.01


@laws
@given(seeds, st.floats(0, 1))
def test_focal_lengths_of_a_scene_differ_as_much_as_the_knob_says(seed, jitter):
    fixed, jittered = (
        render(seed, 20, (1, 1), difficulty=Difficulty(fov_jitter=j), dtype=torch.float64) for j in (0.0, jitter)
    )
    assert torch.equal(fixed.extrinsics, jittered.extrinsics)
    ratio = (jittered.intrinsics / fixed.intrinsics)[0, :, 0, 0].log() / math.log(1.5)
    assert ratio.abs().max() <= jitter + 1e-12
    assert ratio.max() - ratio.min() >= jitter - 1e-12


@laws
@given(seeds, st.sampled_from(sorted(KINDS)))
def test_repeated_surfaces_share_everything_and_flat_ones_show_little(seed, kind):
    scene, _ = sample([seed], kind, Difficulty(repeated=1, flat=1), list(TEXTURES))
    for name in ("texture", "salt", "cell", "colours"):
        walls, solids = getattr(scene, name).split([6, scene.centre.shape[1] - 1], 1)
        assert (walls == walls[:, :1]).all()
        assert (solids == solids[:, :1]).all()
    first, second = scene.colours.split(3, -1)
    assert (first - second).abs().max() <= 0.2


def test_scale_is_a_factor_on_texture_cells():
    one, scaled = (sample(range(50), "indoor", Difficulty(scale=s), ["dots"])[0].cell for s in ((1, 1), (0.5, 3)))
    factor = scaled / one
    assert 0.5 <= factor.min() < 0.55
    assert 2.8 < factor.max() <= 3


def images_per_second(compile: bool) -> float:
    """Throughput of 224² images in batches of 32 scenes of 8 frames, sampling the scenes included."""
    run = lambda first: render(range(first, first + 32), 8, device="cuda", compile=compile)  # noqa: E731
    run(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(1, 9):
        run(32 * i)
    torch.cuda.synchronize()
    return 8 * 256 / (time.perf_counter() - start)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_two_thousand_images_a_second(compile, capsys):
    rate = images_per_second(compile)
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, {'compiled' if compile else 'eager'}: {rate:.0f} images of 224² / s")
    if "H100" in (name := torch.cuda.get_device_name()) or "H200" in name:
        assert rate >= 2000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_renders_the_scene_that_the_cpu_renders():
    cpu, cuda, again = (render([1, 2], 2, SMALL, "wide", device=device) for device in ("cpu", "cuda", "cuda"))
    assert same(cuda, again)
    cuda = cuda.to("cpu")
    torch.testing.assert_close(cuda.extrinsics, cpu.extrinsics, rtol=0, atol=0)
    assert ((cuda.depth - cpu.depth).abs() < 1e-3).float().mean() > 0.999
    assert ((cuda.images - cpu.images).abs() < 1e-2).float().mean() > 0.99
