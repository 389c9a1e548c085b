"""What `analyze` says of attention: operands against the model's own, masses against all pairs, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import alternating
import pytest
import torch
import torch.nn.functional as F
from alternating import Spec, build
from harness import swapped
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vggt_compile.__main__ import main
from vggt_compile.analysis import picture
from vggt_compile.analysis.blocks import Blocks, LayerBlocks, analyze_blocks, true_mass
from vggt_compile.analysis.probe import watch
from vggt_compile.errors import BadInput
from vggt_compile.graph.hilbert import hilbert_order

SPEC = Spec(head_dim=16)
SMALL = Blocks(keep=0.25, q_block=32, k_block=16)


def scene(frames: int = 4, grid: tuple[int, int] = (5, 7)) -> Tensor:
    return alternating.images(SPEC, 1, frames, grid)


# Operands


@pytest.mark.parametrize("core", [alternating.sdpa, alternating.spelled_out])
@pytest.mark.parametrize("names", ["vggt", "hidden"])
def test_the_operands_are_those_that_the_model_has(core: Any, names: str) -> None:
    own: list[tuple[Tensor, Tensor]] = []

    def noting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own.append((q, k))
        return core(q, k, v)

    with torch.no_grad(), swapped(build(Spec(head_dim=16, core=core)), noting) as model:
        want = model(scene())
    seen: list[tuple[Any, Tensor, Tensor]] = []
    out = watch(build(Spec(names, head_dim=16, core=core)), scene(), see=lambda *given: seen.append(given))
    torch.testing.assert_close(out, want)
    assert [site.layer for site, _, _ in seen] == [0, 1]
    for (_, q, k), (own_q, own_k) in zip(seen, own, strict=True):
        torch.testing.assert_close((q, k), (own_q, own_k))


def test_attention_that_no_plan_acts_on_is_not_shown() -> None:
    with pytest.raises(BadInput, match=r"no attention over frames was met; .*explain"):
        watch(build(Spec(core=alternating.causal)), scene(), see=lambda *_: None)


# Masses


@given(
    frames=st.integers(1, 3),
    special=st.integers(0, 3),
    patches=st.integers(1, 12),
    q_block=st.integers(1, 9),
    k_block=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_mass_is_the_attention_of_all_pairs_in_blocks(
    frames: int, special: int, patches: int, q_block: int, k_block: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = frames * (special + patches)
    q, k = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(2))
    places = torch.arange(tokens).view(frames, -1)[:, special:].flatten()
    mass, rest = true_mass(q[:, :, places], k, places, 0.5, Blocks(0.25, q_block, k_block))
    weights = (q @ k.mT * 0.5).softmax(-1)[0][:, places]
    for head in range(2):
        for i, rows in enumerate(range(0, len(places), q_block)):
            block = weights[head, rows : rows + q_block].mean(0)
            want = torch.stack([block[part].sum() for part in places.split(k_block)])
            torch.testing.assert_close(mass[0, head, i], want)
            torch.testing.assert_close(rest[0, head, i] + want.sum(), torch.tensor(1.0))


def layers(blocks: Blocks = SMALL, **spec: Any) -> list[LayerBlocks]:
    return analyze_blocks(build(Spec(head_dim=16, **spec)), scene(), blocks)


def test_the_best_blocks_cover_most_and_all_blocks_everything() -> None:
    for layer in layers():
        best = layer.covered(layer.best)
        assert best >= layer.covered(layer.kept)
        assert best >= layer.covered(layer.drawn)
        assert {float(read.sum(-1).mean()) for read in layer.choices().values()} == {2.0}  # of 9 blocks
    for layer in layers(Blocks(1.0, 32, 16)):
        for read in layer.choices().values():
            assert layer.covered(read) == pytest.approx(1)


def test_curves_go_through_what_the_chosen_blocks_cover() -> None:
    for layer in layers():
        for ranked, read in ((layer.scores, layer.kept), (layer.mass, layer.best)):
            curve = layer.curve(ranked)
            assert curve.shape == (10,)
            assert curve[0] == 0
            assert (curve.diff() >= 0).all()
            assert curve[2] == pytest.approx(layer.covered(read), rel=1e-5)
            assert curve[-1] == pytest.approx(1)


def test_blocks_that_means_tell_apart_are_found() -> None:
    """Patches of a block are equal, so the means say all."""
    blocks = Blocks(0.25, 16, 16)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(_flat(q), _flat(k), v)

    def _flat(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, 16)).mean(3, keepdim=True).expand(-1, -1, -1, 16, -1).flatten(2, 3)

    spec = Spec(head_dim=16, special=0, core=core)
    for layer in analyze_blocks(build(spec), alternating.images(spec, 1, 4, (4, 8)), blocks):
        assert torch.equal(layer.kept, layer.best)
        torch.testing.assert_close(layer.scores, layer.mass)
        assert layer.to_dict()["agree"] == 1
        assert layer.to_dict()["special"] == pytest.approx(0, abs=1e-6)


def test_blocks_along_a_walk() -> None:
    raster, walked = layers(Blocks(1.0, 256, 16)), layers(Blocks(1.0, 256, 16, "hilbert"))
    walk = torch.tensor(hilbert_order(5, 7))
    everywhere = (torch.arange(4)[:, None] * 35 + walk).flatten()
    fine = layers(Blocks(1.0, 256, 1))
    for one, other, single in zip(raster, walked, fine, strict=True):
        torch.testing.assert_close(one.special, other.special)
        want = torch.stack([part.sum(-1) for part in single.mass[..., everywhere].split(16, -1)], -1)
        torch.testing.assert_close(other.mass, want)


def test_what_cannot_be_analyzed_is_an_error() -> None:
    with pytest.raises(BadInput, match="2 scenes at once"):
        analyze_blocks(build(SPEC), scene().expand(2, -1, -1, -1, -1), SMALL)


# The command


def test_the_command_writes_a_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--frames", "2", "--keep", "0.5", "--order", "hilbert", "--head", "1", "--out", str(tmp_path)]
    assert main(["analyze", "blocks", *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "blocks.json").read_text())
    assert [layer["layer"] for layer in record["layers"]] == list(range(8))
    assert all(layer["covered"]["predicted"] > layer["covered"]["random"] for layer in record["layers"])
    assert record["settings"]["scene"] == "orbit/indoor"
    with Image.open(tmp_path / "blocks.png") as image:
        assert image.width > image.height > 500


@pytest.mark.parametrize(("head", "frames"), [(None, 4), (1, 9)])
def test_pictures_of_one_layer_and_of_frames_across_blocks(head: int | None, frames: int, tmp_path: Path) -> None:
    found = analyze_blocks(build(SPEC), scene(frames), SMALL)
    picture.draw(found[:1], SMALL, "a title", tmp_path / "blocks.png", head)
    with Image.open(tmp_path / "blocks.png") as image:
        assert len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ((), "FORM"),
        (("block",), "unknown model 'block'"),
        (("blocks", "--frames", "1"), "two or more"),
        (("blocks", "--keep", "1.5"), "a share of the blocks, from 0 to 1"),
        (("blocks", "--q-block", "100"), "invalid choice"),
        (("blocks", "--scene", "orbitt"), "did you mean 'orbit'?"),
        (("blocks", "--scene", "orbit,video"), "one scene, such as orbit"),
        (("blocks", "--seed", "-1"), "held-out scenes, from 0 on"),
        (("blocks", "--model", "vggt-tiny"), "no trained weights of vggt-tiny come with the package"),
    ],
)
def test_bad_input_is_one_line(argv: tuple[str, ...], part: str, tmp_path: Path, capsys: Any) -> None:
    out = ("--out", str(tmp_path)) if argv[:1] == ("blocks",) else ()
    assert main(["analyze", *argv, *out]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vggt_compile: error: ")
    assert part in line
