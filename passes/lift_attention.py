"""Attention spelled out as softmax(q kᵀ) v is attention: read it as one call, so that every pass can see it.

Anchored on the softmax: its input must be a product of queries and transposed keys, scaled by numbers at most, and its
only use, through inert nodes, a product with values. π³'s encoder, FastVGGT's fallback and most teaching code are
written so. Where the pattern is almost there, the answer is a Skip that says what stands in the way.

`expand` writes PyTorch's functional multi-head attention as the projections and the attention that it stands for.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from vggt_compile.graph import dialect
from vggt_compile.graph.edit import Editor
from vggt_compile.site import AttentionCall, Skip


def lift(softmax: Node) -> AttentionCall | Skip | None:
    """The attention around a softmax over the last dimension, a Skip where it is one but cannot be lifted."""
    logits = dialect.softmax_input(softmax)
    if logits is None:
        return None
    *scalings, product = _peel(logits)
    operands = dialect.matmul_operands(product)
    if operands is None:
        return Skip("a mask or bias is added to its logits") if _adds_to_product(product) else None
    *k_scalings, keys = _peel(operands[1], pure=True)
    k = dialect.transposed(keys)
    if k is None:
        meant = _mixes_last(keys) and any(dialect.matmul_operands(user) for user in softmax.users)
        return Skip("its keys are transposed by a permutation of other dimensions too") if meant else None
    if any(len(node.users) != 1 for node in (*scalings, product)):
        return Skip("its logits are changed in place or used elsewhere")
    *q_scalings, q = _peel(operands[0], pure=True)
    read = min((*q_scalings, *k_scalings, product))
    if any(dialect.in_place(user) and user > read for node in (q, k, keys) for user in node.users):
        return Skip("its queries or keys are changed in place")
    weights = softmax
    while len(weights.users) == 1 and dialect.inert_source(user := next(iter(weights.users))) is weights:
        weights = user
    if len(weights.users) != 1:
        return Skip("its attention weights are used elsewhere")
    out = next(iter(weights.users))
    meeting = dialect.matmul_operands(out)
    if meeting is None or meeting[0] is not weights:
        return Skip(f"its attention weights go through {out.target} before they meet the values")
    factors = (
        factor[1] for node in (*scalings, *q_scalings, *k_scalings) if (factor := dialect.scaled(node)) is not None
    )
    return AttentionCall(out, q, k, meeting[1], scale=math.prod(factors), spelled_out=True)


def _peel(node: Node, *, pure: bool = False) -> list[Node]:
    """The node and what lies under its multiplications with numbers, last what is multiplied.

    `pure` stops where a value is changed in place or used elsewhere, so that what lies under it may be read instead.
    """
    path = [node]
    while (factor := dialect.scaled(node)) is not None and not (
        pure and (dialect.in_place(node) or len(node.users) != 1)
    ):
        node = factor[0]
        path.append(node)
    return path


def _mixes_last(node: Node) -> bool:
    order = dialect.permutation(node)
    return order is not None and order[-1] != len(order) - 1


def _adds_to_product(node: Node) -> bool:
    terms = [term for term in node.all_input_nodes if dialect.matmul_operands(_peel(term)[-1]) is not None]
    return len(node.all_input_nodes) == 2 and len(terms) == 1


def expand(node: Node, given: dict[str, Any], edit: Editor) -> Node | Skip:
    """Functional multi-head attention as projections around one attention; returns the node of its output [L, B, C]."""
    refusal = _refuse(node, given)
    if refusal is not None:
        return Skip(refusal)
    heads, width = given["num_heads"], given["embed_dim_to_check"]
    weights = edit.call(torch.chunk, given["in_proj_weight"], 3)
    biases = edit.call(torch.chunk, given["in_proj_bias"], 3) if given.get("in_proj_bias") is not None else None

    def project(name: str, index: int) -> Node:
        bias = None if biases is None else edit.call(operator.getitem, biases, index)
        x = edit.call(F.linear, given[name], edit.call(operator.getitem, weights, index), bias)  # [L, B, C]
        x = edit.call(torch.unflatten, x, -1, (heads, width // heads))
        return edit.call(torch.permute, x, (1, 2, 0, 3))  # [B, H, L, D]

    q, k, v = (project(name, i) for i, name in enumerate(("query", "key", "value")))
    out = edit.call(F.scaled_dot_product_attention, q, k, v)
    out = edit.call(torch.flatten, edit.call(torch.permute, out, (2, 0, 1, 3)), 2)
    return edit.call(F.linear, out, given["out_proj_weight"], given["out_proj_bias"])


def _refuse(node: Node, given: dict[str, Any]) -> str | None:
    if given.get("attn_mask") is not None or given.get("key_padding_mask") is not None or given.get("is_causal"):
        return "it has an attention mask"
    if given.get("training", True) and given.get("dropout_p"):
        return f"it drops out attention weights (p={given['dropout_p']})"
    if given.get("use_separate_proj_weight") or given.get("bias_k") is not None or given.get("add_zero_attn"):
        return "it has separate projections or extra keys"
    if dialect.value(given["query"]).ndim != 3:
        return "it has no batch dimension"
    if any(user.args[1:] == (1,) and user.users for user in node.users):
        return "its attention weights are used elsewhere"
    return None
