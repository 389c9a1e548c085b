"""Print what an artifact says of itself: what it serves, where it runs, and what its plan did to each attention."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggt_compile.artifact.manifest import Manifest

HELP = "what an artifact serves, and where it runs"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a file that `export` wrote")
    parser.add_argument("--verify", action="store_true", help="read the whole file and compare its digests")


def run(args: argparse.Namespace) -> int:
    from vggt_compile.artifact.archive import Archive
    from vggt_compile.artifact.manifest import Manifest

    archive = Archive(args.artifact)
    manifest = Manifest.read(archive)
    if args.verify:
        archive.verify(manifest.records)
    show(args.artifact, manifest, args.json, {"verified": True} if args.verify else {})
    return 0


def show(path: Path, manifest: Manifest, as_json: bool, more: dict[str, Any]) -> None:
    """The manifest without its digests, as JSON or in words."""
    facts = {"artifact": str(path), "bytes": path.stat().st_size, **more}
    if as_json:
        content = json.loads(manifest.to_json())
        print(json.dumps(facts | {key: value for key, value in content.items() if key != "records"}, indent=2))
        return
    print(f"{path}: {facts['bytes'] / 2**20:.1f} MiB, for {manifest.device} ({manifest.architecture})")
    print(f"made by vggt_compile {manifest.vggt_compile}, torch {manifest.torch}; {manifest.platform}")
    print(f"plan {manifest.plan_name!r}, precision {manifest.precision}, weights {manifest.weights[:16]}")
    for entry in manifest.entries:
        low, high = entry.span.batch
        batch = f"batch {low}" if low == high else f"batch {low}-{high}"
        rows = entry.report["rows"]
        done = sum(bool(row["axes"]) for row in rows)
        left = f"{entry.report['attention_left']:.1%} of the attention FLOPs left"
        print(f"  {entry.name}: {entry.span}, {batch}; {done} of {len(rows)} attentions rewritten, {left}")
        if entry.check:
            worst = max(one["deviation"] for one in entry.check["outputs"].values())
            print(f"    compared with its program for {entry.check['frames']} frames: outputs at most {worst:.2g} off")
        if entry.seconds:
            print("    made in " + ", ".join(f"{seconds:.0f} s {stage}" for stage, seconds in entry.seconds.items()))
    for name, value in more.items():
        print(f"{name}: {value}")
