"""What the tests marked `gpu` gave on a GPU: the record of a run, and the page that is made from it.

python -m pytest -m gpu --junitxml=gpu.xml tests
python docs/gpu_tests.py gpu.xml --run commit=8e84002 gpu="NVIDIA H200" torch=2.11.0 --note "…"
python docs/gpu_tests.py            # the page anew, from the record
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tabulate import tabulate

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
RECORD, PAGE = BENCHMARKS / "gpu-tests.json", BENCHMARKS / "gpu-tests.md"
OUTCOMES = ("passed", "failed", "skipped", "xfailed")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", help="what pytest wrote with --junitxml")
    parser.add_argument("--run", nargs="*", default=[], metavar="NAME=VALUE", help="what ran where")
    parser.add_argument("--note", nargs="*", default=[], help="paragraphs under the table")
    args = parser.parse_args(argv)
    if args.results:
        run = dict(one.split("=", 1) for one in args.run)
        record = {"run": run, "notes": args.note, "tests": list(tests(args.results))}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RECORD.read_text())))


def tests(results: Path) -> Iterator[dict[str, Any]]:
    """Each test with its file, outcome and seconds; where it did not pass, why."""
    for case in ElementTree.parse(results).iter("testcase"):
        why = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        said = {"why": why.get("message", "").partition("\n")[0][:200]} if why is not None else {}
        file, name = case.attrib["classname"].replace("tests.", ""), case.attrib["name"]
        found = {"file": f"{file}.py", "test": name, "outcome": outcome(why), "seconds": float(case.attrib["time"])}
        yield found | said


def outcome(why: ElementTree.Element | None) -> str:
    """Of a test, by what pytest says of it if it did not pass."""
    if why is None:
        return "passed"
    if why.tag != "skipped":
        return "failed"
    return "xfailed" if why.get("type") == "pytest.xfail" else "skipped"


def page(record: dict[str, Any]) -> str:
    """Markdown: what ran where, a row for each file, what did not pass."""
    by_file: dict[str, list[dict[str, Any]]] = {}
    for one in record["tests"]:
        by_file.setdefault(one["file"], []).append(one)
    rows = [(f"`{file}`", *counts(ones), f"{seconds(ones):.0f}") for file, ones in sorted(by_file.items())]
    rows.append(("all", *counts(record["tests"]), f"{seconds(record['tests']):.0f}"))
    return "\n".join(
        [
            "# Tests on a GPU\n",
            "`python -m pytest -m gpu tests`; the record is made a page by `docs/gpu_tests.py`.\n",
            ", ".join(f"{name} {value}" for name, value in record["run"].items()) + ".\n",
            tabulate(rows, ("file", *OUTCOMES, "seconds"), tablefmt="github"),
            "",
            *(f"- `{one['test']}` of `{one['file']}` failed: {one['why']}" for one in record["tests"] if failed(one)),
            *(f"\n{note}" for note in record["notes"]),
            "",
        ]
    )


def counts(ones: list[dict[str, Any]]) -> list[int | None]:
    return [sum(one["outcome"] == kind for one in ones) or None for kind in OUTCOMES]


def seconds(ones: list[dict[str, Any]]) -> float:
    return sum(one["seconds"] for one in ones)


def failed(one: dict[str, Any]) -> bool:
    return bool(one["outcome"] == "failed")


if __name__ == "__main__":
    main()
