"""Artifacts: one file that computes what a compile does, also where this package is not, and that knows its limits."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alternating import build
from bare import bare
from framed import SPEC, by_hand, scene
from harness import FRAME

import vggt_compile
from vggt_compile import errors
from vggt_compile.artifact import manifest as manifests
from vggt_compile.artifact.archive import MANIFEST, Archive
from vggt_compile.artifact.draft import drafted
from vggt_compile.artifact.load import Artifact
from vggt_compile.artifact.manifest import Manifest
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import PRECISIONS, Span
from vggt_compile.plan import Plan

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
MOST = 40
ONE = replace(SPEC, pairs=1)
TRACED = ("trace", "take autocast apart", "rewrite")


@pytest.fixture(scope="module")
def written(vectors: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Two entries, of two frames and of more, and a batch of any size."""
    path = tmp_path_factory.mktemp("artifact") / "model.pt2"
    return path, vggt_compile.export(build(ONE), scene(), plan=FRAME, frames=(2, MOST), path=path)


@pytest.fixture(scope="module")
def made(written: tuple[Path, Manifest]) -> Path:
    return written[0]


@pytest.fixture(scope="module")
def loaded(made: Path) -> Artifact:
    return vggt_compile.load(made)


@pytest.mark.parametrize("frames", [2, 3, 8, 17, MOST])
def test_it_gives_what_the_plan_means(loaded: Artifact, frames: int) -> None:
    x = scene(frames=frames)
    torch.testing.assert_close(loaded(x), by_hand(build(ONE), x), rtol=1e-4, atol=1e-5)


def test_every_graph_of_a_right_compile_passes_its_check(written: tuple[Path, Manifest]) -> None:
    """The second one is given the weights of the first."""
    path, made = written
    assert [(entry.check["frames"], entry.check["batch"]) for entry in made.entries] == [(3, 1), (2, 1)]
    for entry in made.entries:
        assert 0 < entry.check["outputs"]["output"]["deviation"] < 1e-5
    archive = Archive(path)
    assert Manifest.read(archive) == made
    assert "check" in json.loads(bytes(archive.record(MANIFEST)))["entries"][0]


def test_one_scene_needs_no_batch(loaded: Artifact) -> None:
    x = scene(frames=5)
    assert torch.equal(loaded(x[0]), loaded(x))


def test_images_may_lie_in_any_order_of_dimensions(loaded: Artifact) -> None:
    x = scene(frames=5)
    pictures = x.permute(0, 1, 3, 4, 2).contiguous()  # as files are read
    assert torch.equal(loaded(pictures.permute(0, 1, 4, 2, 3)), loaded(x))


def test_weights_are_in_the_file_once_and_in_memory_once(made: Path) -> None:
    artifact, state = vggt_compile.load(made), build(ONE).state_dict()
    artifact(scene(frames=2))
    first, other = (artifact._runners[entry.name].extract_constants_map(False) for entry in artifact.manifest.entries)
    assert set(state) <= set(first)
    assert {name: tensor.data_ptr() for name, tensor in other.items()}.items() <= {
        name: tensor.data_ptr() for name, tensor in first.items()
    }.items()
    content, weight = made.read_bytes(), state[max(state, key=lambda name: state[name].numel())]
    assert content.count(weight.numpy().tobytes()) == 1


def test_it_runs_where_this_package_is_not(made: Path, loaded: Artifact, tmp_path: Path) -> None:
    images = [scene(frames=frames) for frames in (3, 8, 17)]
    for x, out in zip(images, bare(made, images, tmp_path), strict=True):
        torch.testing.assert_close(out, loaded(x))


@pytest.fixture(scope="module")
def program_in_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built against the libtorch of this process."""
    missing = [tool for tool in ("cmake", "c++", "ninja") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"building the C++ example needs {', '.join(missing)}")
    built = tmp_path_factory.mktemp("cpp")
    source = Path(__file__).parents[1] / "examples" / "cpp"
    torch_here = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    configure = ["cmake", "-G", "Ninja", "-S", source, "-B", built, torch_here]
    done = subprocess.run(configure, timeout=120, capture_output=True, text=True)
    if "Caffe2 version uses CUDA but I cannot find the CUDA" in done.stderr:
        pytest.skip("this torch was built with CUDA, and its CMake files find no CUDA toolkit here")
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmake", "--build", built], check=True, timeout=300)
    return built / "run_artifact"


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "entry"), [(5, 0), (2, 1)])
def test_a_program_in_cpp_gives_the_same(
    program_in_cpp: Path, made: Path, loaded: Artifact, tmp_path: Path, frames: int, entry: int
) -> None:
    x = scene(frames=frames)
    torch.save(x, tmp_path / "images.pt")
    names = [entry.name for entry in loaded.manifest.entries]
    command = [program_in_cpp, made, tmp_path / "images.pt", tmp_path / "out.pt", *names[entry : entry + 1][:entry]]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert "vggt_compile.plan: custom" in done.stdout
    (out,) = torch.load(tmp_path / "out.pt", weights_only=False)  # a list of the C++ kind
    torch.testing.assert_close(out, loaded(x))


def test_the_manifest_says_what_was_asked_and_done(made: Path) -> None:
    manifest = vggt_compile.load(made).manifest
    assert (manifest.torch, manifest.vggt_compile) == (torch.__version__, vggt_compile.__version__)
    assert (manifest.device, manifest.precision, manifest.plan) == ("cpu", "fp32", Plan.read(FRAME).to_json())
    assert [entry.span.frames for entry in manifest.entries] == [(3, MOST), (2, 2)]
    reports = [entry.report for entry in manifest.entries]
    assert all(row["axes"] for report in reports for row in report["rows"] if row["scope"] == "global")
    assert reports[0]["dynamic"]
    for entry in manifest.entries:
        assert set(entry.seconds) == {*TRACED, "find equal blocks", "compile", "check"}
        assert min(entry.seconds.values()) >= 0 < entry.seconds["compile"]


def test_tracing_leaves_the_model_as_it_was() -> None:
    model, x = build(ONE), scene()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        want = model(x)
        for precision in PRECISIONS:
            program(model, Span((3, 8), (1, 1), x.shape[-2:]), Plan.read(FRAME), precision, x.device, strict=True)
        assert torch.equal(model(x), want)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# What does not fit is said in one line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: scene(frames=1), "frames from 2 to 40, not 1"),
        (lambda: scene(frames=MOST + 1), "frames from 2 to 40, not 41"),
        (lambda: scene(batch=2), "batch from 1 to 1, not 2"),
        (lambda: scene(grid=(3, 3)), "images of 4×6, not 6×6"),
        (lambda: scene().half(), "float32 images, not torch.float16"),
        (lambda: scene().to("meta"), "these images are on meta"),
        (lambda: scene()[0, 0], "takes images"),
    ],
)
def test_images_that_it_was_not_made_for(loaded: Artifact, wrong: Callable[[], torch.Tensor], said: str) -> None:
    with pytest.raises(errors.WrongImages) as caught:
        loaded(wrong())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def not_there(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not an artifact " * 100)


def of_torch(path: Path) -> None:
    path.unlink()
    torch.save({}, path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_bit_of_the_library(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"\x7fELF") + 5000] ^= 1
    path.write_bytes(content)


def a_digit_of_the_manifest(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"fp32"', b'"fp16"'))


def a_hole(path: Path) -> None:
    content = path.read_bytes()
    start = content.index(b"\x7fELF")
    path.write_bytes(content[:start] + content[start + 4096 :])


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (not_there, errors.NotAnArtifact, "cannot be read: No such file"),
        (empty, errors.NotAnArtifact, "is no artifact"),
        (text, errors.NotAnArtifact, "not even a package of torch"),
        (of_torch, errors.NotAnArtifact, "it has no manifest"),
        (cut_off, errors.DamagedArtifact, "is cut off"),
        (half, errors.DamagedArtifact, "is cut off"),
        (a_bit_of_the_library, errors.DamagedArtifact, ".so is not what was written"),
        (a_digit_of_the_manifest, errors.DamagedArtifact, "its manifest is not what was written"),
        (a_hole, errors.DamagedArtifact, "is damaged"),
    ],
)
def test_a_file_that_is_not_what_was_written(
    made: Path, tmp_path: Path, spoil: Callable[[Path], None], error: type[Exception], said: str
) -> None:
    path = tmp_path / "copy.pt2"
    shutil.copy(made, path)
    spoil(path)
    with pytest.raises(error) as caught:
        vggt_compile.load(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("change", "device", "said"),
    [
        ({}, GPU, "was made for cpu and cannot run on cuda"),
        ({"torch": "99.0.1"}, CPU, "was made with torch 99.0.1, this is"),
        ({"platform": "win32-AMD64"}, CPU, "was made for win32-AMD64"),
        ({"device": "cuda", "architecture": "sm_90"}, CPU, "was made for cuda and cannot run on cpu"),
        ({"device": "cuda", "architecture": "sm_80"}, GPU, "was made for sm_80, this device is sm_90"),
        ({"architecture": "AVX2048"}, CPU, "was made for AVX2048"),
    ],
)
def test_a_machine_that_it_was_not_made_for(
    made: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], device: torch.device, said: str
) -> None:
    if change.get("device") == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    manifest = replace(Manifest.read(Archive(made)), **change)
    with pytest.raises(errors.WrongMachine) as caught:
        manifest.check(made, device)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_asks_before_it_loads(made: Path) -> None:
    with pytest.raises(errors.WrongMachine, match="was made for cpu and cannot run on cuda"):
        vggt_compile.load(made, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_artifact_for_a_gpu_says_that_there_is_none(made: Path) -> None:
    manifest = replace(Manifest.read(Archive(made)), device="cuda", architecture="sm_90")
    with pytest.raises(errors.WrongMachine, match="torch sees none here"):
        manifest.check(made, GPU)


def test_a_manifest_of_a_later_format_is_not_guessed_at(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "FORMAT", 0)
    with pytest.raises(errors.NotAnArtifact, match="newer than this"):
        vggt_compile.load(made)


def test_a_manifest_from_before_heads_looped_is_read() -> None:
    span = Span((62, 500), (1, 1), (392, 518))
    before = asdict(span) | {"passes": 9}
    assert manifests._span(before) == manifests._span(asdict(span)) == span


def test_code_for_fewer_vector_instructions_runs_where_there_are_more() -> None:
    assert manifests._runs("AVX2", "AVX512")
    assert not manifests._runs("AVX512", "AVX2")
    assert not manifests._runs("sm_80", "sm_90")


def test_torch_itself_reads_where_an_entry_belongs(made: Path) -> None:
    metadata = torch._inductor.aoti_load_package(str(made)).get_metadata()
    assert metadata["vggt_compile.span"] == "3-40 frames of 4×6"


def test_the_manifest_is_json_in_the_archive(made: Path) -> None:
    content = json.loads(bytes(Archive(made).record(MANIFEST)))
    assert set(content["records"]) | {MANIFEST} <= set(Archive(made).names())


def test_a_file_is_there_when_it_is_whole(made: Path, tmp_path: Path) -> None:
    """Until then there is what was there before, and afterwards nothing else."""
    path, manifest = tmp_path / "model.pt2", Manifest.read(Archive(made))
    path.write_text("from before")
    with drafted(path) as draft:
        draft.add("data/small", b"1234")
        draft.add("data/missing", tmp_path / "missing")
        with pytest.raises(FileNotFoundError):
            draft.finish(manifest)
    assert path.read_text() == "from before"
    (empty := tmp_path / "empty").touch()
    with drafted(path) as draft:
        draft.add("data/small", b"1234")
        draft.add("data/empty", empty)
        draft.add("data/large", made)
        written = draft.finish(manifest)
    archive = Archive(path)
    archive.verify(written.records)
    assert list(written.records) == ["data/small", "data/empty", "data/large"]
    assert bytes(archive.record("data/large")) == made.read_bytes()
    assert Manifest.read(archive) == written
    with zipfile.ZipFile(path) as whole:
        assert whole.testzip() is None
    assert sorted(x.name for x in tmp_path.iterdir()) == ["empty", "model.pt2"]


# What cannot be meant


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"frames": (5, 3)}, "frames is a number from 1 on"),
        ({"frames": 0}, "frames is a number from 1 on"),
        ({"batch": (1, 2, 3)}, "batch is a number from 1 on"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"path": "model.bin"}, "ends in .pt2"),
        ({"plan": "g2ff"}, "did you mean 'g2f'?"),
    ],
)
def test_wishes_that_cannot_be_meant(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.VggtCompileError, match=said.replace("(", r"\(").replace("?", r"\?")):
        vggt_compile.export(build(ONE), scene(), **asked)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(errors.BadInput, match="training mode"):
        vggt_compile.export(build(ONE).train(), scene())


def test_strict_export_names_what_was_left_alone() -> None:
    with pytest.raises(errors.NotRewritten, match="no such layer"):
        vggt_compile.export(build(ONE), scene(), plan={"layers": {"7": {"scope": "frame"}}}, frames=4, strict=True)
