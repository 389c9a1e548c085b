"""The package is whole in every form in which it reaches a user: wheel, sdist, editable install, plain checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("vggt_compile", "vggt-compile", "__editable__")
NOT_SHIPPED = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "demo_out")


def on_disk() -> set[str]:
    """Files of the package by the path that they have in an installed tree, the link to `passes` followed."""
    found = set()
    for place, _, names in os.walk(ROOT / "vggt_compile", followlinks=True):
        if Path(place).name != "__pycache__":
            found |= {Path(place, name).relative_to(ROOT).as_posix() for name in names}
    return found


def run(python: Path, code: str, *, cwd: Path, path: Path | None = None) -> str:
    """What a fresh interpreter prints, away from the checkout and from our own PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [python, "-W", "ignore", "-c", textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*arguments: object, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_checkout(target: Path) -> Path:
    """The checkout without what builds leave behind: a build sees none of it, and leaves none in the original."""
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SHIPPED)))


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel that is built from it after unpacking."""
    folder = tmp_path_factory.mktemp("build")
    out, source = folder / "dist", copy_checkout(folder / "checkout")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is installed here but us, so that torch need not be installed again."""
    folder = tmp_path_factory.mktemp("others")
    for place in sys.path:
        if Path(place).name in ("site-packages", "dist-packages") and Path(place).is_dir():
            for entry in Path(place).iterdir():
                if not entry.name.startswith(OURS) and not entry.name.endswith(".pth"):
                    target = folder / entry.name
                    if not target.is_symlink():
                        target.symlink_to(entry)
    return folder


@pytest.fixture
def python(tmp_path: Path, others: Path) -> Path:
    """The interpreter of a fresh environment in which we are not installed."""
    home = tmp_path / "env"
    venv.create(home, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(f"{others}\n")
    return home / "bin" / "python"


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel_files: set[str]) -> None:
    metadata = {name for name in wheel_files if ".dist-info/" in name}
    assert wheel_files - metadata == on_disk()
    assert "vggt_compile/py.typed" in wheel_files
    assert "vggt_compile/passes/scope_to_frame.py" in wheel_files
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_wheel_is_pure_and_holds_real_files(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        links = [info.filename for info in archive.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]
    assert links == []


def test_sdist_holds_the_sources_without_tests_links_or_compiled_files(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    passes = {name.removeprefix("vggt_compile/") for name in on_disk() if name.startswith("vggt_compile/passes/")}
    assert {"pyproject.toml", "README.md", "LICENSE", "vggt_compile/py.typed", "vggt_compile/rewrite.py"} <= names
    assert passes <= names
    assert all(member.isfile() or member.isdir() for member in members)
    assert not [name for name in names if name.startswith("tests") or name.endswith((".pyc", ".so"))]


def test_wheel_of_a_checkout_is_that_of_the_sdist(wheel_files: set[str], tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path / "checkout")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    pip("wheel", "-q", *offline, "-w", tmp_path / "out", copy, cwd=tmp_path)
    with zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))) as archive:
        assert set(archive.namelist()) == wheel_files


def test_packages_in_pyproject_are_those_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in on_disk() if name.endswith(".py")}
    assert sorted(listed) == sorted(folders)
    assert {folder.replace(".", "/") + "/__init__.py" for folder in folders} <= on_disk()


USE = """
    import sys, torch, vggt_compile, vggt_compile.passes.scope_to_frame as scope
    backend = {backend}
    model = torch.nn.Linear(4, 4).eval()
    with torch.no_grad(), vggt_compile.collect_reports() as reports:
        x = torch.ones(2, 4)
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert len(reports) == 1
    print("vggt_sparse" in torch._dynamo.list_backends(), scope.__file__)
"""


def test_installed_wheel_is_found_by_name(wheel: Path, python: Path, tmp_path: Path) -> None:
    pip("--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    found, _, passes = run(python, USE.format(backend='"vggt_sparse"'), cwd=tmp_path).partition(" ")
    assert found == "True"
    assert Path(passes.strip()).is_relative_to(python.parents[1])
    assert (python.parent / "vggt_compile").exists(), "the command line is not installed"


def test_editable_install_is_found_by_name_and_follows_edits(python: Path, tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path / "checkout")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    pip("--python", python, "install", "-q", *offline, "-e", copy, cwd=tmp_path)
    (copy / "passes" / "edited.py").write_text("answer = 42\n")
    code = """
        import torch, vggt_compile.passes.edited, vggt_compile.passes.scope_to_frame
        print("vggt_sparse" in torch._dynamo.list_backends(), vggt_compile.passes.edited.answer)
    """
    assert run(python, code, cwd=tmp_path).split() == ["True", "42"]


def test_checkout_without_an_install_offers_the_callable(python: Path, tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path / "checkout")
    use = USE.format(backend="vggt_compile.vggt_sparse")
    found, _, passes = run(python, use, cwd=tmp_path, path=copy).partition(" ")
    assert found == "False"
    assert Path(passes.strip()).is_relative_to(copy)


def test_importing_the_package_does_no_work(tmp_path: Path) -> None:
    code = """
        import sys, vggt_compile
        heavy = {"torch", "numpy", "networkx", "tabulate", "triton", "sympy"} & set(sys.modules)
        print(sorted(heavy), sorted(set(vggt_compile.__all__) - set(dir(vggt_compile))))
    """
    assert run(Path(sys.executable), code, cwd=tmp_path, path=ROOT).split() == ["[]", "[]"]


def test_without_triton_and_a_gpu_every_module_but_kernels_imports_and_operators_run(tmp_path: Path) -> None:
    """A `…_kernel` module is imported where its operator meets a CUDA tensor, and nowhere else."""
    code = """
        import importlib, os, pkgutil, sys
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoTriton())
        import vggt_compile
        for info in pkgutil.walk_packages(vggt_compile.__path__, "vggt_compile."):
            if not info.name.endswith(("__main__", "_kernel")):
                importlib.import_module(info.name)
        for name in vggt_compile.__all__:
            getattr(vggt_compile, name)
        import torch
        x = torch.ones(1, 1, 256, 32)
        index, count = torch.ops.vggt_compile.select_blocks(x, x, 0.5)
        out = torch.ops.vggt_compile.attention(x, x, x, index, count)
        print("triton" in sys.modules, "vggt_compile.passes.scope_to_frame" in sys.modules, torch.equal(out, x))
    """
    assert run(Path(sys.executable), code, cwd=tmp_path, path=ROOT).split() == ["False", "True", "True"]
