"""What the documentation shows is true: programs run, tables are the registry's, links and reasons exist."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.registry import register_backend

from vggt_compile import registry, vggt_sparse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text()) if found == language]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend by its name, graphs that are rewritten but not compiled, and a registry of one's own."""
    if "vggt_sparse" not in torch.compiler.list_backends():  # not installed
        register_backend(vggt_sparse, name="vggt_sparse")
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: gm.forward)
    registry.methods()
    for name in ("_methods", "_families"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
@pytest.mark.filterwarnings("ignore:vggt_compile")
def test_the_blocks_of_a_page_are_one_program_that_runs(
    page: Path, workplace: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / f"{page.stem}.py"
    program.write_text("\n\n".join(blocks(page, "python")))
    runpy.run_path(str(program), run_name="__main__")
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for shown in blocks(page, "text"):
        if shown.startswith("vggt_compile: "):
            assert set(map(str.rstrip, shown.splitlines())) <= set(printed), "a report that the program does not print"


def test_the_tables_are_what_the_registry_writes() -> None:
    subprocess.run([sys.executable, "docs/tables.py", "--check"], cwd=ROOT, check=True, timeout=120)


def test_the_page_of_tests_on_a_gpu_is_made_from_its_record(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "gpu_tests.py"))
    assert script["PAGE"].read_text() == script["page"](json.loads(script["RECORD"].read_text()))
    results = tmp_path / "gpu.xml"
    results.write_text(JUNIT)
    found = list(script["tests"](results))
    assert [(one["file"], one["outcome"]) for one in found] == [
        ("test_one.py", "passed"), ("test_one.py", "xfailed"), ("test_two.py", "skipped"), ("test_two.py", "failed"),
    ]  # fmt: skip
    rows = script["page"]({"run": {"gpu": "none"}, "notes": ["So be it."], "tests": found}).splitlines()
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("| `")] == [
        ["`test_one.py`", "1", "", "", "1", "2"],
        ["`test_two.py`", "", "1", "1", "", "4"],
    ]
    assert "- `test_d[1]` of `test_two.py` failed: assert 1 == 2" in rows
    assert rows[-1] == "So be it."


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_one" name="test_a" time="1.5" />
<testcase classname="tests.test_one" name="test_b" time="0.5"><skipped type="pytest.xfail" message="known" /></testcase>
<testcase classname="tests.test_two" name="test_c" time="0"><skipped type="pytest.skip" message="no GPU" /></testcase>
<testcase classname="tests.test_two" name="test_d[1]" time="4"><failure message="assert 1 == 2&#10;more" /></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if "benchmarks/" in target:  # written by `make bench`
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_shell_commands_name_what_exists(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in "".join(blocks(page, "sh")).splitlines():
        assert all(target in targets for target in re.findall(r"^make (\w+)", line)), line
        for script, arguments in re.findall(r"python (\S+\.py)(.*)", line):
            text = (ROOT / script).read_text()
            assert all(f'"{option}"' in text for option in re.findall(r"--[\w-]+", arguments)), line


def test_every_reason_on_the_debugging_page_is_one_that_the_code_gives() -> None:
    places = (ROOT / "vggt_compile", ROOT / "passes")
    source = "\n".join(path.read_text() for place in places for path in place.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    reasons = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/debugging.md").read_text(), re.MULTILINE)
    assert len(reasons) > 15
    missing = [part for reason in reasons for part in reason.split("…") if part.strip() not in source]
    assert not missing


@pytest.mark.parametrize("script", ["upstream_vggt.py", "upstream_pi3.py"])
def test_examples_explain_themselves(script: str) -> None:
    command = [sys.executable, f"examples/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True)
    assert "--checkpoint" in done.stdout


def test_quickstart_runs(workplace: None, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/quickstart.py"), run_name="__main__")
    assert "2 of 11 attentions rewritten" in capsys.readouterr().out
