"""The benchmark page is what its JSON makes it, and the command says what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alternating import build
from framed import SPEC, scene
from harness import FRAME

from vggt_compile import explain, vggt_sparse
from vggt_compile.__main__ import main
from vggt_compile.bench import attention, model, selection, traces
from vggt_compile.bench.model import Settings, cold_counts, warm_counts
from vggt_compile.bench.page import page, speed_table
from vggt_compile.bench.record import read
from vggt_compile.bench.reported import Reported
from vggt_compile.bench.variants import known_variant, split_variant
from vggt_compile.cli.speed import read_variant
from vggt_compile.errors import BadInput, PlanError, UnknownName

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("model", page),
        ("sparse", page),
        ("long", page),
        ("pi3-long", page),
        ("pi3-blocks", page),
        ("recipes", page),
        ("attention", attention.page),
        ("selection", selection.page),
    ],
)
def test_the_committed_page_is_made_from_the_committed_record(name, page):
    assert (BENCHMARKS / f"{name}.md").read_text() == page(json.loads((BENCHMARKS / f"{name}.json").read_text()))


def test_the_page_of_traces_is_made_from_its_record():
    assert (BENCHMARKS / "traces.md").read_text() == traces.page(json.loads((BENCHMARKS / "traces.json").read_text()))


def test_a_run_out_of_memory_has_its_row_and_no_speed():
    rows = {
        "cold": [],
        "warm": [
            {"variant": "eager", "frames": 8, "warm_s": 2.0, "peak_gib": 3.0, "graphs": 0, "deviation": None},
            {
                "variant": "dense",
                "frames": 8,
                "warm_s": 1.0,
                "peak_gib": 1.5,
                "graphs": 1,
                "deviation": {"depth": 1e-3},
            },
            {"variant": "g2f", "frames": 8, "out_of_memory": True, "graphs": 1},
        ],
    }
    text = page({"machine": {"gpu": "none"}, "settings": {"upstream": "", "size": [28, 42]}, **rows})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 8")]
    assert cells[0][:5] == ["8", "eager", "2.000", "1.00×", "3.0"]
    assert cells[1][:5] == ["8", "dense", "1.000", "2.00×", "1.5"]
    assert cells[2][:3] == ["8", "g2f", "out of memory"]


def test_without_eager_speed_is_over_dense():
    rows = [
        {"variant": name, "frames": 8, "warm_s": s, "peak_gib": 1.0, "graphs": 1}
        for name, s in (("dense", 3), ("g2f", 2))
    ]
    table = speed_table(rows)
    assert "speed-up over dense" in table
    assert "1.50×" in table


def test_attention_flops_have_a_column_where_rows_have_them():
    rows = [
        {"variant": name, "frames": 8, "warm_s": 1.0, "peak_gib": 1.0, "graphs": 1} | left
        for name, left in (
            ("dense", {}),
            ("turbo", {"attention_left": 0.25}),
            ("faster_vggt-75", {"attention_left": 0.3, "attention_at_least": True}),
        )
    ]
    lines = speed_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][-2] == "attention FLOPs left"
    assert [row[-2] for row in cells[2:]] == ["", "25.0%", "≥ 30.0%"]
    record = {"machine": {}, "settings": {"upstream": "", "size": [28, 42]}, "cold": []}
    assert "Attention FLOPs left: what" in page(record | {"warm": rows})
    assert "Attention FLOPs left" not in (without := page(record | {"warm": rows[:1]}))
    assert "attention FLOPs left" not in without


def test_what_a_model_leaves_of_its_attention_is_told_at_every_count(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: gm.forward)
    model = build(SPEC)
    options = {"plan": FRAME, "outline": False}
    run = Reported(torch.compile(model, backend=vggt_sparse, options=options, dynamic=True))
    assert run.attention_left(5) == {}
    with torch.no_grad():
        run(scene(frames=5))
        run(scene(frames=4))
        assert len(run.reports) == 1
        for frames in (4, 5, 9):
            want = explain(model, scene(frames=frames), plan=FRAME, dynamic=False).attention_left()
            assert run.attention_left(frames) == {"attention_left": want}
        run(scene(frames=1))
    assert len(run.reports) == 2
    assert run.attention_left(1)["attention_left"] == 1.0
    assert run.attention_left(9)["attention_left"] < 1.0


def test_results_of_both_phases_are_read_in_the_order_of_variants(tmp_path):
    for job in ("g2f.8-32", "sparse-75.8", "compile.100", "compile.32", "eager.8-32"):
        (tmp_path / f"warm.{job}.jsonl").write_text(json.dumps({"job": job}) + "\n")
    order = ["eager.8-32", "compile.32", "compile.100", "g2f.8-32", "sparse-75.8"]
    assert [row["job"] for row in read(tmp_path, "warm", Settings(""))] == order
    assert read(tmp_path, "cold", Settings("")) == []
    (tmp_path / "warm.mine.8.jsonl").write_text(json.dumps({"job": "mine.8"}) + "\n")
    assert [row["job"] for row in read(tmp_path, "warm", Settings("", plans={"mine": {}}))] == [*order, "mine.8"]
    assert [row["job"] for row in read(tmp_path, "warm", Settings(""))] == [*order, "mine.8"]  # of a run before this


def test_passes_can_be_switched_off_in_a_variant(tmp_path):
    name = "avggt@without-hoist_keys,share_tables"
    assert known_variant(name) == name
    assert split_variant(name) == ("avggt", "hoist_keys,share_tables")
    assert split_variant("dense") == ("dense", "")
    (tmp_path / f"warm.{name}.8.jsonl").write_text(json.dumps({"job": name}) + "\n")
    (tmp_path / "warm.avggt.8.jsonl").write_text(json.dumps({"job": "avggt"}) + "\n")
    assert [row["job"] for row in read(tmp_path, "warm", Settings(""))] == ["avggt", name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("avggt@without-hoist_key", "did you mean 'hoist_keys'"),
        ("avgt@without-hoist_keys", "did you mean 'avggt"),
        ("eager@without-hoist_keys", "unknown variant 'eager'"),
    ],
)
def test_a_variant_that_is_not_known_gets_the_nearest(name, message):
    with pytest.raises(PlanError, match=message):
        known_variant(name)


def test_plain_compile_has_a_process_for_every_count_and_ours_one():
    settings = Settings("", frames=(300, 8, 100))
    assert warm_counts("compile", settings) == cold_counts("compile", settings) == [(8,), (100,), (300,)]
    assert warm_counts("dense", settings) == [[8, 100, 300]]
    assert cold_counts("dense", settings) == [(100, 8)]


WORKER = """
import pathlib, sys, time
name, log, compiled = sys.argv[1:]
if name == "broken":
    sys.exit(3)
time.sleep({"slow": 1.0}.get(name, 0.0))
pathlib.Path(compiled).touch()
sys.stdin.readline()
with open(log, "a") as file:
    print("begin", name, file=file, flush=True)
    time.sleep(0.2)
    print("end", name, file=file, flush=True)
"""


def run_workers(monkeypatch, tmp_path, variants, minutes=1.0):
    """`run_together` on processes that write when they are being timed; the lines that they wrote."""
    log = tmp_path / "log"
    log.touch()

    def start(phase, name, frames, settings, work):
        command = [sys.executable, "-c", WORKER, name, str(log), str(model.compiled(work, name))]
        return subprocess.Popen(command, stdin=subprocess.PIPE)

    monkeypatch.setattr(model, "start", start)
    try:
        model.run_together(variants, Settings("", minutes=minutes), tmp_path)
    except BadInput as error:
        return log.read_text().splitlines(), str(error)
    return log.read_text().splitlines(), ""


def test_variants_that_compile_together_are_timed_one_after_the_other(monkeypatch, tmp_path):
    model.compiled(tmp_path, "slow").touch()  # of a run before this
    lines, said = run_workers(monkeypatch, tmp_path, ["fast", "broken", "slow"])
    assert lines == ["begin fast", "end fast", "begin slow", "end slow"]
    assert said.startswith("not timed: broken (3);")


def test_what_has_not_compiled_in_time_is_not_timed(monkeypatch, tmp_path):
    lines, said = run_workers(monkeypatch, tmp_path, ["slow"], minutes=0.005)
    assert lines == []
    assert "slow (late)" in said


def test_compiling_together_takes_small_counts_of_both_graphs():
    assert model.compiling_counts(Settings("", frames=(300, 8, 32, 100))) == [32, 8]
    assert model.compiling_counts(Settings("", frames=(100, 32))) == [32]
    assert model.compiling_counts(Settings("", frames=(8, 16))) == [8]
    assert model.compiling_counts(Settings("", frames=(800, 1000), compile_for=1000)) == [128]


def test_long_runs_are_repeated_less():
    repeats = Settings("", frames=(8, 100, 300, 1000)).repeats()
    assert repeats["8"] > repeats["100"] > repeats["300"] == 1
    assert repeats["1000"] == 0  # the first call is all


def test_a_variant_is_a_known_name_or_a_plan_with_a_name():
    assert read_variant("eager") == ("eager", None)
    name, plan = read_variant('mine={"layers": {"0": {"scope": "frame"}}}')
    assert name == "mine"
    assert plan is not None
    assert plan.policy(0, "vggt").to_json() == {"scope": "frame"}
    assert read_variant("mine=dense@without-share_tables")[0] == "mine@without-share_tables"
    with pytest.raises(UnknownName, match="did you mean 'eager'"):
        read_variant("eagr")
    with pytest.raises(BadInput, match="letters, digits, - and _"):
        read_variant("my plan=dense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("form", [[], ["speed"], ["--phase", "cold", "--frames", "8", "16"]])
def test_without_a_gpu_the_command_says_so(form, capsys):
    assert main(["bench", *form]) == 1
    assert capsys.readouterr().err == (
        "vggt_compile: error: bench needs a CUDA device; `python -m vggt_compile doctor` says what is missing\n"
    )


@pytest.mark.parametrize(
    "given",
    [
        ("--phase", "warm"),
        ("--phase", "together", "--variants", "compile"),
        ("--phase", "together", "--compile-for", "64"),
    ],
)
def test_code_for_many_frames_is_asked_for_where_it_can_be_made(given, capsys):
    assert main(["bench", "speed", "--compile-for", "1000", *given]) == 1
    assert "needs --phase together, 128 frames or more" in capsys.readouterr().err
