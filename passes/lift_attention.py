"""Attention spelled out as softmax(q kᵀ) v is attention: read it as one call, so that every pass can see it.

Anchored on the softmax: its input must be a product of queries and transposed keys, scaled by numbers at most, and its
only use, through inert nodes, a product with values. π³'s encoder, FastVGGT's fallback and most teaching code are
written so. Where the pattern is almost there, the answer is a Skip that says what stands in the way.

`expand` writes PyTorch's functional multi-head attention as the projections and the attention that it stands for.
"""

from __future__ import annotations

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
    logits, scale = _peel(logits)
    product = dialect.matmul_operands(logits)
    if product is None:
        return Skip("a mask or bias is added to its logits") if _adds_to_product(logits) else None
    (q, q_scale), k = _peel(product[0]), dialect.transposed(product[1])
    if k is None:
        return None
    weights = softmax
    while len(weights.users) == 1 and dialect.inert_source(user := next(iter(weights.users))) is weights:
        weights = user
    if len(weights.users) != 1:
        return Skip("its attention weights are used elsewhere")
    out = next(iter(weights.users))
    operands = dialect.matmul_operands(out)
    if operands is None or operands[0] is not weights:
        return Skip(f"its attention weights go through {out.target} before they meet the values")
    return AttentionCall(out, q, k, operands[1], scale=scale * q_scale, spelled_out=True)


def _peel(node: Node) -> tuple[Node, float]:
    """The node under multiplications with numbers, and their product."""
    scale = 1.0
    while (factor := dialect.scaled(node)) is not None:
        node, scale = factor[0], scale * factor[1]
    return node, scale


def _adds_to_product(node: Node) -> bool:
    terms = [term for term in node.all_input_nodes if dialect.matmul_operands(_peel(term)[0]) is not None]
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
