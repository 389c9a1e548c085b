"""The plan `auto`: every layer has a rule, sensitive ones the milder, and few tokens stay dense."""

from __future__ import annotations

import pytest
import torch

from vggt_compile import explain
from vggt_compile.models import vggt
from vggt_compile.recipes import resolve
from vggt_compile.rules import WORTH


@pytest.mark.parametrize(("depth", "merged"), [(24, {6, 7, 8, 9, 21, 22, 23}), (18, {5, 6, 7, 16, 17}), (8, {2, 7})])
@pytest.mark.parametrize("family", ["vggt", "pi3", "generic"])
def test_layers_known_to_be_sensitive_keep_all_queries(depth: int, merged: set[int], family: str) -> None:
    plan = resolve("auto").at(depth)
    for layer in range(depth):
        policy = plan.policy(layer, family)
        given = policy.to_json()
        assert set(given) == ({"tokens"} if layer in merged else {"keys"})
        setting = given["tokens" if layer in merged else "keys"]
        assert setting["reference" if layer in merged else "keep_first_frame"] == (family != "pi3")


@pytest.mark.filterwarnings("ignore:vggt_compile")
def test_few_tokens_stay_dense_and_many_do_not() -> None:
    model, per_frame = vggt("tiny", outputs=("depth",)).eval(), 5 + 2 * 3
    for frames, rewritten in ((WORTH // per_frame, 0), (WORTH // per_frame + 1, 4)):
        torch.compiler.reset()
        with torch.no_grad():
            report = explain(model, torch.zeros(1, frames, 3, 28, 42), plan="auto", dynamic=False)
        assert len(report.rewritten) == rewritten
    assert [next(iter(row.axes)) for row in report.global_rows] == ["keys", "tokens", "keys", "keys"]
