"""The published models, unmodified: one graph, every site named, and the numbers of a model changed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import upstream_models
from harness import FRAME, Capture, exported, nodes
from numerics import assert_as_accurate
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from upstream_models import SITES, SPECIAL, same_bits, scene, tensors

from vggt_compile import explain, prepare, registry, unprepare, vggt_sparse
from vggt_compile.families import trace

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

NAMES = ("vggt", "pi3", "omega", "da3")
LAYERS = {"vggt": [0, 1, 2, 3], "pi3": [0, 1, 2], "omega": [0, 1, 3, 4, 5], "da3": [0, 1]}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(name: str) -> Iterator[nn.Module]:
    with upstream_models.model(name) as model, torch.no_grad():
        trace.arm()  # the test before has reset Dynamo, which forgets who wants to hear of a compile
        yield model


@pytest.fixture
def vggt() -> Iterator[nn.Module]:
    with upstream_models.model("vggt") as model, torch.no_grad():
        trace.arm()
        yield model


def compiled(net: nn.Module, x: Tensor, backend: Any, dynamic: bool = False) -> Any:
    return torch.compile(net, backend=backend, dynamic=dynamic)(x)


class ByHand(TorchFunctionMode):
    """Every attention over all tokens of all frames gets an explicit reshape around it."""

    def __init__(self, frames: int, per_frame: int) -> None:
        super().__init__()
        self.frames, self.per_frame, self.changed = frames, per_frame, 0

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (*args, *(kwargs.pop(key) for key in ("query", "key", "value")[len(args) :]))[:3]
        batch, heads, tokens, width = q.shape
        if tokens != self.frames * self.per_frame:
            return func(q, k, v, *args[3:], **kwargs)
        self.changed += 1

        def split(x: Tensor) -> Tensor:
            return x.reshape(batch, heads, self.frames, self.per_frame, width).transpose(1, 2).flatten(0, 1)

        out = func(split(q), split(k), split(v), *args[3:], **kwargs)
        return out.unflatten(0, (batch, self.frames)).transpose(1, 2).reshape(batch, heads, tokens, width)


def by_hand(name: str, net: nn.Module, x: Tensor) -> Any:
    patch = upstream_models.PATCH[name]
    with ByHand(x.shape[1], SPECIAL[name] + (x.shape[-2] // patch) * (x.shape[-1] // patch)) as mode:
        out = net(x)
    assert mode.changed == SITES[name]["global"]
    return out


def test_the_trunk_is_one_graph_with_a_path_on_every_attention(name: str, net: nn.Module) -> None:
    capture = Capture()
    compiled(net, scene(name, 2), capture)
    trunks = [report for report in capture.reports if report.rows]
    assert len(trunks) == 1
    report = trunks[0]
    assert report.family == name
    assert {s: sum(row.scope == s for row in report.rows) for s in ("global", "frame", "other")} == SITES[name]
    modules = dict(net.named_modules())
    assert all(row.path in modules for row in report.rows)
    assert [row.layer for row in report.global_rows] == LAYERS[name]
    assert {(row.batch, row.frames, row.special) for row in report.global_rows} == {(2, 3, SPECIAL[name])}
    assert len(report.rewritten) == SITES[name]["global"]
    assert report.notes == []


def test_the_whole_model_is_one_graph(name: str, net: nn.Module) -> None:
    capture = Capture()
    x = scene(name, 1, 4)
    out = torch.compile(net, backend=capture, dynamic=False, fullgraph=True)(x)
    assert len(capture.graphs) == 1
    assert same_bits(out, by_hand(name, net, x))


def test_dense_plans_and_eager_calls_keep_every_bit(name: str, net: nn.Module) -> None:
    x, untouched = scene(name, 2), copy.deepcopy(net)
    before = untouched(x)
    plain = compiled(net, x, lambda gm, _: gm.forward)
    torch._dynamo.reset()
    capture = Capture(plan="dense")
    dense = compiled(net, x, capture)
    assert [nodes(graph) for graph in capture.graphs] == capture.before
    assert same_bits(dense, plain)
    assert same_bits(dense, before)
    assert same_bits(net(x), before)
    assert same_bits(untouched(x), before)


@pytest.mark.parametrize(
    ("batch", "frames", "grid"), [(1, 2, (5, 2)), (2, 3, (3, 5)), (3, 5, (4, 4))], ids=["portrait", "odd", "square"]
)
def test_scope_frame_is_the_model_changed_by_hand(
    name: str, net: nn.Module, batch: int, frames: int, grid: tuple[int, int]
) -> None:
    x = scene(name, batch, frames, grid)
    dense, hand = net(x), by_hand(name, net, x)
    assert not same_bits(dense, hand)
    assert same_bits(compiled(net, x, Capture(strict=True)), hand)


def test_autocast_keeps_dtypes_and_numbers(name: str, net: nn.Module) -> None:
    if name == "pi3":
        pytest.skip("π³ inverts its poses in bfloat16 under autocast, which PyTorch cannot do on a CPU")
    x = scene(name, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hand = by_hand(name, net, x)
        capture = Capture()
        out = compiled(net, x, capture)
    assert len(capture.reports[0].rewritten) == SITES[name]["global"]
    assert [t.dtype for t in tensors(out)] == [t.dtype for t in tensors(hand)]
    assert same_bits(out, hand)


def test_shapes_alone_tell_what_names_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vggt", "pi3"):
        with upstream_models.model(name) as net, torch.no_grad():
            trace.arm()
            x = scene(name, 2)
            named = explain(net, x, plan=FRAME, dynamic=False)
            with monkeypatch.context() as patch:
                patch.setattr(registry, "families", list)
                torch._dynamo.reset()
                generic = explain(net, x, plan=FRAME, dynamic=False)
        assert (named.family, generic.family) == (name, "generic")
        assert generic.rows == named.rows


def test_prepare_names_what_stood_in_the_way(name: str, net: nn.Module) -> None:
    shims = prepare(net)
    said = " ".join(shim.what for shim in shims)
    assert ("rotary angles" in said) == (name in ("vggt", "pi3", "da3"))
    assert all(vars(shim.owner)[shim.method] is not shim.original for shim in shims)
    unprepare(net)
    assert all(vars(shim.owner)[shim.method] is shim.original for shim in shims)


def test_export_leaves_the_model_clean(vggt: nn.Module) -> None:
    x, untouched = scene("vggt", 1, 4), copy.deepcopy(vggt)
    want = untouched(x)
    prepare(vggt)
    gm, report = exported(vggt, x, {})
    assert len(report.global_rows) == 4
    assert same_bits(vggt(x), want)
    assert same_bits(gm(x), want)
    for module in vggt.modules():
        for cache in (value for value in vars(module).values() if isinstance(value, dict)):
            assert not any(isinstance(leaf, FakeTensor) for leaf in tree_flatten(list(cache.values()))[0])


def test_exported_vggt_takes_a_plan(vggt: nn.Module) -> None:
    x = scene("vggt", 2, 4)
    hand = by_hand("vggt", vggt, x)
    prepare(vggt)
    gm, report = exported(vggt, x)
    assert len(report.rewritten) == 4
    assert same_bits(gm(x), hand)


@pytest.mark.slow
def test_twenty_frame_counts_compile_at_most_twice(vggt: nn.Module) -> None:
    capture = Capture()
    call = torch.compile(vggt, backend=capture, dynamic=True)
    for frames in range(4, 24):  # 3 is also the number of colours, and Dynamo would take one for the other
        x = scene("vggt", 1, frames, (2, 3))
        out = call(x)
        if frames in (4, 9, 23):
            hand = by_hand("vggt", vggt, x)
            assert same_bits(out["pose_enc"], hand["pose_enc"])
    assert len([report for report in capture.reports if report.rows]) <= 2


@pytest.mark.slow
def test_inductor_compiles_a_dense_plan_to_the_same_numbers(vggt: nn.Module) -> None:
    x = scene("vggt", 1, 2, (2, 2))
    trunk = vggt.aggregator
    want = trunk(x)[0][-1]
    got = torch.compile(trunk, backend=vggt_sparse, options={"plan": "dense"}, dynamic=False)(x)[0][-1]
    exact = trunk.double()(x.double())[0][-1]
    assert_as_accurate(got, want, exact.double(), roundings=64)
