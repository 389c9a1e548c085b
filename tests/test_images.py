"""Folders of images: how files become pixels, and the one line that says what is wrong with a folder."""

import numpy
import pytest
import torch
from commandline import fails
from PIL import Image

from vggt_compile.cli.images import find, fit, load_folder, read
from vggt_compile.cli.options import nearest_size

PATCH = 14


def demo_fails(capsys, folder, *argv):
    return fails(capsys, "demo", "--images", str(folder.path), "--out", str(folder.path / "out"), *argv)


def test_a_missing_folder_is_named(capsys, tmp_path):
    assert "no such folder" in fails(capsys, "demo", "--images", str(tmp_path / "none"), "--out", str(tmp_path))


def test_an_empty_folder_is_an_error(capsys, folder):
    assert "no images" in demo_fails(capsys, folder)


def test_one_image_is_an_error(capsys, folder):
    folder("a.png")
    assert "one image (a.png), but it takes two or more" in demo_fails(capsys, folder)


def test_an_unreadable_image_is_named(capsys, folder):
    folder("a.png")
    (folder.path / "b.png").write_bytes((folder.path / "a.png").read_bytes()[:40])
    assert "cannot read the image" in (line := demo_fails(capsys, folder))
    assert "b.png" in line


def test_text_named_as_an_image_is_an_error(capsys, folder):
    folder("a.png")
    (folder.path / "b.jpg").write_text("not an image")
    assert "b.jpg" in demo_fails(capsys, folder)


def test_sizes_that_do_not_fit_say_what_resize_does(capsys, folder):
    folder("a.png", (30, 50))
    folder("b.png", (30, 50))
    assert "a.png is 30×50 (height × width), no multiple of the 14 px patch" in (line := demo_fails(capsys, folder))
    assert "--resize would make it 28×56" in line


def test_photographs_are_pointed_to_the_scale_of_training(capsys, folder):
    folder("a.jpg", (1000, 1500))
    folder("b.jpg", (1000, 1500))
    assert "--size 350 518 --resize" in demo_fails(capsys, folder)


def test_mixed_sizes_are_an_error_with_the_way_out(capsys, folder):
    folder("a.png", (28, 42))
    folder("b.png", (42, 28))
    for flags in ((), ("--resize",)):
        assert "a.png is 28×42 (height × width), b.png is 42×28" in (line := demo_fails(capsys, folder, *flags))
        assert "`--size 28 42 --resize`" in line


def test_images_of_another_size_than_asked_for_are_an_error(capsys, folder):
    folder("a.png")
    folder("b.png")
    assert "not the --size 56 84; --resize would make it 56×84" in demo_fails(capsys, folder, "--size", "56", "84")


def test_names_sort_as_people_count(folder):
    for name in ("10.png", "2.png", "b1.png", "1.png"):
        folder(name)
    assert [path.name for path in find(folder.path)[0]] == ["1.png", "2.png", "10.png", "b1.png"]


def test_other_files_are_ignored_with_a_note(folder):
    folder("a.png")
    folder("b.PNG")
    (folder.path / "notes.txt").touch()
    frames = load_folder(folder.path, PATCH)
    assert frames.names == ["a.png", "b.PNG"]
    assert frames.notes == ["ignored what is no image: notes.txt"]


def test_pixels_arrive_as_they_are(folder):
    folder("a.png", value=0)
    folder("b.png", value=51)
    images = load_folder(folder.path, PATCH).images
    assert images.shape == (1, 2, 3, 28, 42)
    assert images.dtype == torch.float32
    assert images[0, 0].eq(0).all()
    assert images[0, 1].eq(51 / 255).all()


def test_limit_takes_the_first(folder):
    for i in range(4):
        folder(f"{i}.png")
    frames = load_folder(folder.path, PATCH, limit=3)
    assert frames.names == ["0.png", "1.png", "2.png"]
    assert frames.notes == ["took the first 3 of 4 images"]


def test_resize_goes_to_the_nearest_multiple_and_says_so(folder):
    folder("a.png", (30, 50))
    folder("b.png", (30, 50))
    frames = load_folder(folder.path, PATCH, resize=True)
    assert frames.images.shape[-2:] == (28, 56)
    assert frames.notes == ["resized 2 images from 30×50 to 28×56"]


def test_size_and_resize_bring_mixed_sizes_together(folder):
    folder("a.png", (28, 42))
    folder("b.png", (42, 28))
    assert load_folder(folder.path, PATCH, size=(56, 56), resize=True).images.shape[-2:] == (56, 56)


def test_nearest_size_is_a_multiple_and_never_empty():
    assert nearest_size((1, 20), PATCH) == (14, 14)
    assert nearest_size((392, 518), PATCH) == (392, 518)


def test_fit_without_resize_keeps_what_fits():
    assert fit(["a", "b"], [(28, 42)] * 2, PATCH, None, False) == (28, 42)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    Image.new("RGB", (42, 28)).save(tmp_path / "a.jpg", exif=exif)
    assert read(tmp_path / "a.jpg").size == (28, 42)


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, rgb):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    image = read(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == rgb


def test_sixteen_bits_keep_their_brightness(tmp_path):
    Image.fromarray(numpy.full((4, 4), 100 * 256, dtype=numpy.uint16)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").getpixel((0, 0)) == (100, 100, 100)
