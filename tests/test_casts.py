"""What autocast casts at each operation stands in the graph: regions written out give the bits of the model's run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._higher_order_ops import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx import GraphModule, Interpreter, Node

from vggt_compile.artifact import program as programs
from vggt_compile.graph import flatten as flattening
from vggt_compile.graph.casts import Unclear, casts_at
from vggt_compile.graph.enclosing import Autocast, enclosure, parts
from vggt_compile.graph.flatten import flatten
from vggt_compile.graph.trial import Casts

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
aten = torch.ops.aten
BF16, FP32 = torch.bfloat16, torch.float32
Function = Callable[..., Any]


def halves(dtype: torch.dtype = BF16, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=enabled)


class Under(nn.Module):
    """A function of x and its double in bf16, with weights, under autocast."""

    def __init__(self, function: Function, dtype: torch.dtype = BF16, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.dtype, self.device = function, dtype, device
        self.linear, self.norm, self.conv = nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(6, 8, 3, padding=1)
        self.table, self.heads = nn.Embedding(10, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        half = (2 * x).to(self.dtype)
        with torch.autocast(self.device, self.dtype):
            return self.function(self, x, half)


class Faithful(Interpreter):
    """Runs a graph, and checks that each value has the dtype and the sizes that the graph says."""

    def run_node(self, node: Node) -> Any:
        out, said = super().run_node(node), node.meta.get("val")
        if isinstance(out, Tensor) and isinstance(said, Tensor) and node.op == "call_function":
            assert (out.dtype, out.ndim) == (said.dtype, said.ndim), node.format_node()
        return out


def exported(model: nn.Module, x: Tensor, dynamic: bool = True) -> Any:
    shapes = ({0: Dim("batch", min=2, max=9)},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model.eval(), (x,), dynamic_shapes=shapes)


def written_out(model: nn.Module, x: Tensor, dynamic: bool = True) -> GraphModule:
    gm = exported(model, x, dynamic).module(check_guards=False)
    flatten(gm)
    assert not any(enclosure(node) for part in parts(gm) for node in part.gm.graph.nodes)
    return gm


def same_bits(got: Any, want: Any) -> None:
    one, other = ([out] if isinstance(out, Tensor) else list(out) for out in (got, want))
    assert [out.dtype for out in one] == [out.dtype for out in other]
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


def check(model: nn.Module, x: Tensor, dynamic: bool = True) -> GraphModule:
    """The graph without regions gives what the model gives, for the sizes that it was traced with and for others."""
    gm = written_out(model, x, dynamic)
    with torch.no_grad():
        for seen in [x, torch.cat([x, x.flip(0)])] if dynamic else [x]:
            same_bits(gm(seen), model(seen))
        Faithful(gm).run(x)
    return gm


OPERATIONS: dict[str, Function] = {
    "linear": lambda m, x, h: m.linear(x),
    "linear of bf16": lambda m, x, h: m.linear(h),
    "convolution": lambda m, x, h: m.conv(x),
    "attention": lambda m, x, h: F.scaled_dot_product_attention(x[:, None], h[:, None], x[:, None]),
    "attention with a mask": lambda m, x, h: F.scaled_dot_product_attention(x, h, x, attn_mask=x[:, :1] @ h.mT),
    "heads": lambda m, x, h: m.heads(x, h, h, need_weights=False)[0],
    "layer norm": lambda m, x, h: (m.norm(x), m.norm(h)),
    "softmax": lambda m, x, h: (x.softmax(-1), h.softmax(-1), h.softmax(-1, dtype=FP32)),
    "concatenation": lambda m, x, h: torch.cat([h, x, h]),
    "stack": lambda m, x, h: torch.stack([h, x]),
    "sum of products": lambda m, x, h: torch.addcmul(x, h, h),
    "promotion by Python": lambda m, x, h: x * h + h / 3,
    "einsum": lambda m, x, h: torch.einsum("bij,bkj->bik", x, h),
    "outer einsum": lambda m, x, h: torch.einsum("bi,bj->bij", x[:, 0], h[:, 0]),
    "einsum of three": lambda m, x, h: torch.einsum("bij,bkj,bkl->bil", x, h, x),
    "matmul": lambda m, x, h: x @ h.mT,
    "bmm of views": lambda m, x, h: torch.bmm(x.mT, h)[:, 1:].reshape(x.shape[0], -1),
    "baddbmm": lambda m, x, h: torch.baddbmm(x @ x.mT, x, h.mT, beta=0.5),
    "embedding": lambda m, x, h: m.table(x.abs().long() % 10),
    "interpolation": lambda m, x, h: F.interpolate(h[None], scale_factor=2, mode="bilinear"),
    "losses": lambda m, x, h: (F.mse_loss(h, x), F.smooth_l1_loss(h, h)),
    "norms": lambda m, x, h: (F.normalize(h, dim=-1), h.norm(), torch.cdist(x, x)),
    "integers": lambda m, x, h: (x.argmax(-1), torch.arange(x.shape[0]), x > h),
    "casts of the model": lambda m, x, h: m.linear(x.to(h.dtype)).float() + m.linear(h.float()).double(),
    "matrices": lambda m, x, h: torch.linalg.inv((x @ x.mT).float() + torch.eye(6, device=x.device)),
    "a grid": lambda m, x, h: F.grid_sample(h[None], x[None, ..., :2], align_corners=False),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    check(Under(OPERATIONS[name], dtype), torch.randn(3, 6, 8))


UNTRACED = pytest.mark.xfail(
    reason="PyTorch's trace gives the half precision that eager widens: it takes this apart before autocast sees it",
    strict=True,
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=UNTRACED if name == "interpolation" else ()) for name in OPERATIONS]
)
def test_an_operation_gives_the_same_bits_on_a_gpu(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", False)  # where it is installed it asks for the batch
    check(Under(OPERATIONS[name], dtype, "cuda").cuda(), torch.randn(3, 6, 8, device="cuda"))


STEPS: dict[str, Function] = {
    "linear": lambda m, a, b: m.linear(a),
    "norm": lambda m, a, b: m.norm(a),
    "attention": lambda m, a, b: F.scaled_dot_product_attention(a, b, b),
    "cat": lambda m, a, b: torch.cat([a, b], 1)[:, ::2],
    "product": lambda m, a, b: (a @ b.mT).softmax(-1) @ b,
    "einsum": lambda m, a, b: torch.einsum("bij,bij->bij", a, b),
    "multiply": lambda m, a, b: a * b,
    "add in place": lambda m, a, b: (a + 1).add_(b),
    "changed before it is read again": lambda m, a, b: (c := b + 1, m.linear(c), c.mul_(2), m.linear(c))[3],
    "round": lambda m, a, b: a.to(BF16),
    "widen": lambda m, a, b: a.float(),
}


class Chain(nn.Module):
    """Steps on the last two values, each inside the regions that it names."""

    def __init__(self, steps: list[tuple[str, bool | None]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.linear, self.norm = steps, nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x, 2 * x
        with halves():
            for name, enabled in self.steps:
                if enabled is None:
                    a, b = STEPS[name](self, a, b), a
                else:
                    with halves(enabled=enabled):
                        a, b = STEPS[name](self, *((a, b) if enabled else (a.float(), b.float()))), a.float()
            return a


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(STEPS)), st.sampled_from([None, None, True, False])), max_size=6))
def test_chains_of_operations_give_the_same_bits(steps: list[tuple[str, bool | None]]) -> None:
    check(Chain(steps), torch.randn(3, 6, 8))


# Regions, loops and branches


def test_a_region_without_autocast_inside_one() -> None:
    def function(m: Under, x: Tensor, h: Tensor) -> Any:
        y = m.linear(x)
        with halves(enabled=False):
            z = m.linear(y.float())
            with halves(torch.float16):
                w = F.linear(z, m.heads.out_proj.weight)
            with torch.enable_grad():
                z = m.norm(z)
        return y, z, w, m.linear(z)

    gm = check(Under(function), torch.randn(3, 6, 8))
    dtypes = [node.meta["val"].dtype for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default)]
    assert dtypes == [BF16, FP32, torch.float16, BF16]


def loop(m: Under, x: Tensor, h: Tensor) -> Any:
    def body(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return carry + m.linear(row), m.linear(row) @ m.linear.weight

    return scan(body, m.norm(x)[0], x)


def branch(m: Under, x: Tensor, h: Tensor) -> Any:
    return m.linear(torch.cond(x.sum() > 0, lambda y: m.linear(y), lambda y: m.linear(m.norm(y)), (x,)))


def until(m: Under, x: Tensor, h: Tensor) -> Any:
    def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, m.linear(y).float()

    return while_loop(lambda i, y: i < 3, step, (torch.zeros((), dtype=torch.long), x))[1]


@pytest.mark.parametrize("function", [loop, branch, until])
def test_bodies_are_cast_too(function: Function) -> None:
    gm = check(Under(function), torch.randn(3, 6, 8), dynamic=False)
    inner = [part.gm for part in parts(gm)][1:]
    assert any(body.graph.find_nodes(op="call_function", target=aten._to_copy.default) for body in inner)


class RegionInLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        def body(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            with halves():
                return carry + 1, self.linear(row)

        return scan(body, x[0], x)


def test_a_region_that_the_trace_did_not_see_is_traced_again(caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch traces bodies of loops once more, without the regions in them, and so notes other dtypes than it runs."""
    model, x = RegionInLoop(), torch.randn(3, 6, 8)
    with pytest.raises(Unclear, match="the trace says"):
        written_out(model, x, dynamic=False)
    with caplog.at_level("INFO"), torch.no_grad():
        same_bits(programs._in_one_graph(exported(model, x, dynamic=False))(x), model(x))
    assert "the trace says" in caplog.text


# Nodes


def test_a_weight_is_cast_once_until_it_changes() -> None:
    def function(m: Under, x: Tensor, h: Tensor) -> Any:
        y = x + 1
        first = m.linear(y) + m.linear(y)
        y.mul_(2)
        return first + m.linear(y)

    gm = check(Under(function), torch.randn(3, 6, 8))
    casts = gm.graph.find_nodes(op="call_function", target=aten._to_copy.default)
    read = [node.args[0].name for node in casts if "bf" in str(node.kwargs["dtype"])]
    assert read.count("linear_weight") == 2  # before the change, and after it
    assert sorted(set(read)) == ["add", "linear_bias", "linear_weight", "mul_"]
    assert len(read) == 6


def test_casts_have_the_module_path_of_their_reader() -> None:
    gm = written_out(Under(OPERATIONS["linear"]), torch.randn(3, 6, 8))
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    paths = [list(node.meta["nn_module_stack"].values())[-1][0] for node in (linear, *linear.all_input_nodes)]
    assert len(paths) == 4
    assert set(paths) == {"linear"}


def test_asking_adds_no_guard_and_no_symbol() -> None:
    gm = exported(Under(OPERATIONS["bmm of views"]), torch.randn(3, 6, 8)).module(check_guards=False)
    (x,) = gm.graph.find_nodes(op="placeholder")
    env = x.meta["val"].fake_mode.shape_env
    before = len(env.guards), len(env.var_to_range), dict(env.replacements)
    flatten(gm)
    assert (len(env.guards), len(env.var_to_range), dict(env.replacements)) == before


# Other devices


@pytest.fixture
def cuda_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast of GPUs where there is none: fake operands need none."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)


GPU = Autocast("cuda", BF16, True, False)
FIRST = {0: FP32}
RULES: list[tuple[Any, tuple[Any, ...], Casts]] = [
    (aten.linear.default, (FP32, FP32, FP32), Casts(dict.fromkeys(range(3), BF16), {})),
    (aten.softmax.int, (BF16, -1), Casts(FIRST, {})),
    (aten.sum.default, (BF16,), Casts({}, {"dtype": FP32})),
    (aten.layer_norm.default, (BF16, [8]), Casts(FIRST, {})),
    (aten.pow.Tensor_Scalar, (BF16, 2), Casts(FIRST, {})),
    (aten.relu.default, (BF16,), Casts({}, {})),
    (aten.atan2.default, (BF16, FP32), Casts(FIRST, {})),
]


def fakes(given: tuple[Any, ...], device: str) -> list[Any]:
    with FakeTensorMode():
        return [torch.empty(8, 8, dtype=one, device=device) if isinstance(one, torch.dtype) else one for one in given]


@pytest.mark.usefixtures("cuda_rules")
@pytest.mark.parametrize(("function", "operands", "want"), RULES, ids=[str(rule[0]) for rule in RULES])
def test_another_device_has_rules_of_its_own(function: Any, operands: tuple[Any, ...], want: Casts) -> None:
    def answer(device: str, *regions: Autocast) -> tuple[Any, ...]:
        return casts_at(function, fakes(operands, device), lambda own: (tuple(own), {}), regions)[:2]

    assert answer("cuda", GPU) == want[:2]
    assert answer("cpu", GPU) == ({}, {})
    assert answer("cuda", Autocast("cpu", BF16, True, None)) == ({}, {})
    assert answer("cuda", GPU, GPU._replace(enabled=False)) == ({}, {})


@pytest.mark.usefixtures("cuda_rules")
def test_what_is_another_operation_under_autocast_is_unclear() -> None:
    with pytest.raises(Unclear, match=r"aten\.norm\.Scalar"):
        casts_at(aten.norm.Scalar, fakes((BF16, 2), "cuda"), lambda own: (tuple(own), {}), [GPU])


def test_where_casts_cannot_say_it_the_model_is_traced_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unclear(function: Any, *rest: Any) -> Casts:
        raise Unclear(f"autocast does at {function} what no cast of an operand does")

    monkeypatch.setattr(flattening, "casts_at", unclear)
    model, x = Under(lambda m, x, h: F.scaled_dot_product_attention(m.linear(x), x, x)), torch.randn(3, 6, 8)
    with caplog.at_level("INFO"):
        gm = programs._in_one_graph(exported(model, x))
    assert "no cast of an operand" in caplog.text
    assert not any(enclosure(node) for node in gm.graph.nodes)
    with torch.no_grad():
        same_bits(gm(x), model(x))
