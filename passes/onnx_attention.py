"""Attention over other than four axes, which the exporter has no form for, as the products that it stands for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def spell_out_attention(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with matrix products and softmax in place of attention, where one of its calls has not four axes."""
    calls = [node for node in program.graph.nodes if node.op == "call_function" and node.target is _ATTENTION]
    if all(node.args[0].meta["val"].ndim == 4 for node in calls):
        return program
    spelled_out: torch.export.ExportedProgram = program.run_decompositions({_ATTENTION: _attention})
    return spelled_out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale * query key^T + mask) value``, as torch documents it; exports are in eval mode, without dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value
