"""The plan language: what can be written, what it means, and what a mistake is answered with."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.exc import BackendCompilerFailed

from vggt_compile import registry
from vggt_compile.backend import Options, vggt_sparse
from vggt_compile.errors import PlanError, UnknownName
from vggt_compile.plan import Layers, Plan, Policy, Setting
from vggt_compile.recipes import DEFAULT, recipes, resolve

FRAME = {"scope": "frame"}


@pytest.fixture
def sample_method(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A method with one parameter of every type, registered for one test."""
    registry.methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @registry.method("keys", "sample")
    def sample(
        site: Any,
        state: Any,
        edit: Any,
        *,
        count: int,
        share: registry.Share = 0.5,
        own: bool = False,
        phase: Literal["fixed", "shifted"] = "fixed",
        stride: tuple[int, int] = (2, 2),
    ) -> Any:
        """Keep some keys."""
        return state

    return "sample"


def plan(layers: object) -> Plan:
    return Plan.read({"layers": layers})


def message(call: Any, *args: Any) -> str:
    with pytest.raises(PlanError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("3", {3}),
        ("0-2", {0, 1, 2}),
        ("2-2", {2}),
        ("6-", {6, 7, 8, 9}),
        ("0,2,4-6", {0, 2, 4, 5, 6}),
        (" 1 , 3 ", {1, 3}),
        ("8-,0", {0, 8, 9}),
        ("*", set(range(10))),
        (4, {4}),
    ],
)
def test_ranges_of_layers(text: object, named: set[int]) -> None:
    layers = Layers.read(text)
    assert {layer for layer in range(10) if layer in layers} == named
    assert Layers.read(str(layers)) == layers
    policies = plan({text: FRAME})
    assert {layer for layer in range(10) if not policies.policy(layer).dense} == named


@pytest.mark.parametrize(
    ("text", "depth", "named"),
    [
        ("0-37.5%", 24, range(9)),
        ("0-55%", 18, range(10)),
        ("0-37.5%", 8, range(3)),
        ("50-100%", 7, range(4, 7)),
        ("0-10%", 4, []),
        ("0,50-100%", 4, [0, 2, 3]),
    ],
)
def test_shares_of_the_depth(text: str, depth: int, named: Iterable[int]) -> None:
    layers = Layers.read(text)
    assert Layers.read(str(layers)) == layers
    assert [layer for layer in range(30) if layer in layers.at(depth)] == list(named)
    placed = plan({text: FRAME}).at(depth)
    assert [layer for layer in range(30) if not placed.policy(layer).dense] == list(named)


@given(st.integers(0, 40), st.lists(st.integers(0, 400), min_size=1, max_size=5, unique=True))
def test_shares_that_meet_leave_no_layer_out(depth: int, cuts: list[int]) -> None:
    ends = [0.0, *(cut / 4 for cut in sorted(cuts) if 0 < cut < 400), 100.0]
    shares = [Layers.read(f"{a:g}-{b:g}%").at(depth) for a, b in itertools.pairwise(ends)]
    assert [sum(layer in share for share in shares) for layer in range(depth)] == [1] * depth


@pytest.mark.parametrize("text", ["50%", "60-40%", "0-101%", "-5-10%", "a-b%", "0-0%"])
def test_a_share_that_cannot_be_meant_shows_how_to_write_one(text: str) -> None:
    assert f"{text!r} is not a share of the layers" in message(Layers.read, text)


def test_shares_and_indices_that_meet_in_a_model_are_an_error() -> None:
    both = plan({"0-50%": FRAME, "5": FRAME})
    assert both.at(8).policy(3) == both.at(8).policy(5)
    assert "layer 5 is named by both" in message(both.at, 12)


@pytest.mark.parametrize(
    ("text", "near"),
    [("0..8", "0-8"), ("0:8", "0-8"), ("8-0", "0-8"), ("1.5", "1-5"), ("0-8-9", "0-8"), ("-3", "'3'")],
)
def test_a_range_that_cannot_be_meant_names_the_nearest(text: str, near: str) -> None:
    assert f"did you mean '{near.strip(chr(39))}'" in message(Layers.read, text)


@pytest.mark.parametrize("text", ["", "early", "0,,1", ",", True, None])
def test_no_range_at_all_shows_how_to_write_one(text: object) -> None:
    assert "'0,2,4-6'" in message(Layers.read, text)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [("0-8", "8", 8), ("0-8", "4-", 4), ("*", "7", 7), ("3-", "5-", 5), ("0,9", "9-10", 9)],
)
def test_a_layer_is_named_once(first: str, second: str, shared: int) -> None:
    for one, other in ((first, second), (second, first)):
        assert f"layer {shared} is named by both" in message(plan, {one: FRAME, other: FRAME})


def test_neighbouring_ranges_do_not_overlap() -> None:
    both = plan({"0-8": FRAME, "9-": {"scope": "global"}})
    assert [both.policy(layer).dense for layer in (0, 8, 9, 30)] == [False, False, True, True]


RANGES = st.tuples(st.integers(0, 30), st.one_of(st.none(), st.integers(0, 5)))


def written(entry: tuple[int, int | None]) -> str:
    first, more = entry
    return f"{first}-" if more is None else f"{first}-{first + more}"


def covers(entry: tuple[int, int | None], layer: int) -> bool:
    first, more = entry
    return first <= layer and (more is None or layer <= first + more)


@given(st.lists(RANGES, min_size=1, max_size=3), st.lists(RANGES, min_size=1, max_size=3))
def test_overlap_is_the_first_shared_layer(one: list, other: list) -> None:
    left, right = (Layers.read(",".join(map(written, entries))) for entries in (one, other))
    shared = (n for n in range(80) if any(covers(e, n) for e in one) and any(covers(e, n) for e in other))
    assert left.overlap(right) == right.overlap(left) == next(shared, None)


POLICIES = st.sampled_from(
    [{"scope": "frame"}, {"scope": "global"}, {"scope": {"method": "frame"}}, {}, {"keys": None}]
)
RULES = st.dictionaries(st.integers(0, 30).map(str), POLICIES, max_size=4)
PLANS = st.fixed_dictionaries(
    {},
    optional={
        "layers": RULES,
        "families": st.dictionaries(st.sampled_from(["vggt", "pi3"]), RULES),
        "min_tokens": st.integers(0, 10**9),
    },
)


@given(PLANS)
def test_json_gives_the_plan_back(value: dict) -> None:
    read = Plan.read(value)
    again = Plan.read(json.loads(json.dumps(read.to_json())))
    assert again == read
    assert hash(again) == hash(read)
    assert again.to_json() == read.to_json()


@pytest.mark.parametrize(
    ("value", "near"),
    [
        ({"layer": {}}, "layers"),
        ({"layers": {"0": {"scpe": "frame"}}}, "scope"),
        ({"layers": {"0": {"scope": "fram"}}}, "frame"),
        ({"layers": {"0": {"scope": "globl"}}}, "global"),
        ({"families": {"vgt": {}}}, "vggt"),
        ({"min_token": 3}, "min_tokens"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest(value: dict, near: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean '{near}'"):
        Plan.read(value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "a plan is a dictionary"),
        ({"layers": ["0-8"]}, "layers is a dictionary"),
        ({"layers": {"0": "frame"}}, "a policy is a dictionary"),
        ({"layers": {"0": {"scope": {"stride": 2}}}}, "wants the name of a method"),
        ({"layers": {"0": {"scope": 7}}}, "wants the name of a method"),
        ({"layers": {"0": {"scope": {"method": "global", "size": 3}}}}, "unknown parameter of method 'global'"),
        ({"layers": {"0": {"scope": True}}}, "wants the name of a method"),
        ({"families": ["vggt"]}, "families is a dictionary"),
        ({"families": {"vggt": ["0"]}}, "layers is a dictionary"),
        ({"min_tokens": -1}, "0 or more"),
        ({"min_tokens": True}, "0 or more"),
        ({"min_tokens": 8192.0}, "0 or more"),
        ({"min_tokens": "8192"}, "0 or more"),
    ],
)
def test_a_wrong_value_says_what_is_wanted(value: object, says: str) -> None:
    assert says in message(Plan.read, value)


def test_the_identity_is_dense_however_it_is_written() -> None:
    for identity in ({"scope": "global"}, {"scope": {"method": "global"}}, {"scope": None}, {}):
        same = plan({"*": identity})
        assert same.dense
        assert same.policy(0) == Policy()
    assert not plan({"3": FRAME}).dense
    assert not Plan.read({"families": {"pi3": {"3": FRAME}}}).dense
    assert Plan.read({}) == Plan()


def test_a_family_has_rules_of_its_own() -> None:
    both = Plan.read({"layers": {"0-8": FRAME}, "families": {"pi3": {"10": FRAME}}})
    assert [both.policy(n, "pi3").dense for n in (0, 10)] == [True, False]
    assert [both.policy(n, "vggt").dense for n in (0, 10)] == [False, True]
    assert Plan.read({"families": {"generic": {"1": FRAME}}}).policy(1).dense is False


def test_equality_is_of_content() -> None:
    one, same, other = plan({"0-8": FRAME}), plan({"0-8": {"scope": {"method": "frame"}}}), plan({"0-7": FRAME})
    assert one == same != other
    assert len({one, same, other}) == 2
    assert one == Plan.read(one.to_json(), name="another name")


def test_parameters_are_checked_and_completed(sample_method: str) -> None:
    read = Setting.read("keys", {"method": "sample", "count": 3, "share": 1})
    assert read is not None
    assert dict(read.parameters) == {"count": 3, "share": 1, "own": False, "phase": "fixed", "stride": (2, 2)}
    whole = plan({"0": {"keys": {"method": "sample", "count": 3, "stride": [1, 2]}}})
    again = Plan.read(json.loads(json.dumps(whole.to_json())))
    assert again == whole == Plan.read(whole.to_json())
    assert hash(again) == hash(whole)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "needs count"),
        ({"count": 3, "shar": 1.0}, "did you mean 'share'"),
        ({"count": 2.0}, "'count' of method 'sample' of axis 'keys' must be int, not 2.0"),
        ({"count": True}, "must be int, not True"),
        ({"count": "3"}, "must be int"),
        ({"count": 3, "share": "half"}, "must be float"),
        ({"count": 3, "share": True}, "must be float"),
        ({"count": 3, "own": 1}, "must be bool"),
        ({"count": 3, "phase": "shift"}, "did you mean 'shifted'"),
        ({"count": 3, "stride": 2}, "'stride' of method 'sample' of axis 'keys' must be a list of 2 values, not 2"),
        ({"count": 3, "stride": [2, 2, 2]}, "must be a list of 2 values"),
        ({"count": 3, "stride": [2, 2.5]}, "must be int, not 2.5"),
    ],
)
def test_a_wrong_parameter_says_what_is_wanted(sample_method: str, given: dict, says: str) -> None:
    assert says in message(plan, {"0": {"keys": {"method": "sample", **given}}})


def test_methods_take_one_name_for_one_module(sample_method: str) -> None:
    def other(site: Any, state: Any, edit: Any) -> Any:
        return state

    other.__module__ = "elsewhere"
    with pytest.raises(PlanError, match=r"already registered by .*test_plan"):
        registry.method("keys", "sample")(other)
    with pytest.raises(UnknownName, match="did you mean 'keys'"):
        registry.method("key", "sample")
    assert registry.find_method("keys", "sample").summary == "Keep some keys."


def test_methods_come_in_the_order_in_which_axes_act(sample_method: str) -> None:
    axes = [registry.AXES.index(m.axis) for m in registry.methods()]
    assert axes == sorted(axes)


def test_recipes_resolve_by_name_and_know_their_source() -> None:
    known = recipes()
    assert resolve(None) == known[DEFAULT].plan
    for name, recipe in known.items():
        assert resolve(name) == recipe.plan
        assert resolve(name).name == name
        assert recipe.summary
        assert recipe.source
        assert Plan.read(recipe.plan.to_json()) == recipe.plan
    assert known["dense"].plan.dense


@pytest.mark.parametrize("wrong", [3, 1.5, ["g2f"], object()])
def test_only_four_things_are_plans(wrong: object) -> None:
    assert "a plan is a recipe's name" in message(resolve, wrong)


def test_a_plan_is_taken_as_it_is() -> None:
    given = plan({"0": FRAME})
    assert resolve(given) is given
    assert resolve({"layers": {"0": FRAME}}) == given


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "early.json"
    path.write_text(json.dumps({"layers": {"0-8": FRAME}}))
    assert resolve(str(path)) == resolve(path) == plan({"0-8": FRAME})
    assert resolve(path).name == "early"
    assert "cannot read the plan" in message(resolve, str(tmp_path / "missing.json"))
    path.write_text('{"layers": }')
    assert "is not JSON" in message(resolve, path)
    path.write_text("[1]")
    assert "a plan is a dictionary" in message(resolve, path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in message(resolve, path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"plam": "g2f"}, "unknown option 'plam'; did you mean 'plan'"),
        ({"plan": "g2g"}, "unknown recipe 'g2g'; did you mean 'g2f'"),
        ({"strict": 1}, "strict is True or False"),
        ({"strict": None}, "strict is True or False"),
        ({"outline": False, "outline_heads": True}, "outline_heads goes with outline"),
        ({"inductor": "max_autotune"}, "inductor is a dictionary"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
        ({"inductor": {3: True}}, "unknown Inductor setting '3'"),
        ({"plan": {"layers": {"0": {"scope": "fram"}}}}, "did you mean 'frame'"),
    ],
)
def test_wrong_options_reach_the_user_in_our_words(options: dict, says: str) -> None:
    assert says in message(Options.read, options)
    compiled = torch.compile(lambda x: x + 1, backend=vggt_sparse, options=options)
    with pytest.raises(BackendCompilerFailed, match=re.escape(says)) as caught:
        compiled(torch.ones(2))
    assert isinstance(caught.value.inner_exception, PlanError)


def test_inductor_settings_take_both_spellings() -> None:
    read = Options.read({"inductor": {"max-autotune": True, "max_autotune_gemm": False, "triton.cudagraphs": False}})
    assert set(read.inductor) == {"max_autotune", "max_autotune_gemm", "triton.cudagraphs"}


def test_options_default_to_the_default_recipe() -> None:
    assert Options.read(None) == Options.read({}) == Options(resolve(DEFAULT))


@pytest.mark.parametrize(
    ("text", "near"), [("0-1000000000", "0-"), ("7-10000", "7-"), ("10000", "0-"), ("99999-", "0-")]
)
def test_a_range_has_a_bound(text: str, near: str) -> None:
    with pytest.raises(PlanError, match=f"'{text}' names layers beyond 9999; for all up to the last write '{near}'"):
        Layers.read(text)
    assert 9999 in Layers.read("0-9999").closed()


def test_heads_are_outlined_where_blocks_are_unless_told_otherwise() -> None:
    given: list[dict] = [{}, {"outline": False}, {"outline_heads": False}]
    assert [Options.read(options).outline_heads for options in given] == [True, False, False]
