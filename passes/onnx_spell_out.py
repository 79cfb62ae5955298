"""Ops that the exporter has no form for, as the products that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sparsefx.capture.uses import GROUPED_PRODUCTS, op_name

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_CHUNK = torch.ops.aten.chunk.default
_SPLIT = torch.ops.aten.split.Tensor


def spell_out(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with attention over other than four axes as matrix products and softmax, products of groups of rows, one
    matrix each (mixtures of experts), as one product for each matrix, and equal parts of a free axis as slices."""
    table: dict[Any, Callable[..., Any]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _ATTENTION and node.args[0].meta["val"].ndim != 4:
            table[_ATTENTION] = _attention
        elif op_name(node.target) in GROUPED_PRODUCTS and _is_by_rows(node):
            table[node.target] = _grouped_product
        elif node.target in (_CHUNK, _SPLIT) and _is_free(node):
            table |= {_CHUNK: _chunks, _SPLIT: _parts}
    if not table:
        return program
    spelled_out: torch.export.ExportedProgram = program.run_decompositions(table)
    return spelled_out


def _is_by_rows(node: fx.Node) -> bool:
    """Whether rows ``[T, K]`` meet a stack ``[n, K, N]`` in groups whose ends are given; other forms of the op are left alone."""
    shapes = [source.meta["val"].ndim for source in node.args[:2] if isinstance(source, fx.Node)]
    return shapes == [2, 3] and len(node.all_input_nodes) == 3


def _is_free(node: fx.Node) -> bool:
    whole: Any = node.args[0]
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return isinstance(whole.meta["val"].shape[axis], torch.SymInt)


def _grouped_product(rows: Tensor, stack: Tensor, offs: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
    """Row t times the matrix of its group: the first whose end, in ``offs``, lies behind t. Rows behind all groups are zero."""
    place = torch.arange(rows.shape[0], device=rows.device)
    result = torch.zeros(rows.shape[0], stack.shape[-1], dtype=rows.dtype, device=rows.device)
    start = torch.zeros((), dtype=offs.dtype, device=rows.device)
    for matrix, end in zip(stack.unbind(0), offs.unbind(0), strict=True):
        inside = (place >= start) & (place < end)
        result = torch.where(inside.unsqueeze(-1), rows @ matrix, result)
        start = end
    return result


def _chunks(whole: Tensor, chunks: int, dim: int = 0) -> Any:
    return _parts(whole, (whole.shape[dim] + chunks - 1) // chunks, dim)


def _parts(whole: Tensor, split_size: int, dim: int = 0) -> Any:
    """Parts of ``split_size`` along an axis whose size is free; torch.export has fixed how many they are."""
    if isinstance(whole.shape[dim], int):
        return NotImplemented  # ONNX has a form for this one
    count = int((whole.shape[dim] + split_size - 1) // split_size)
    starts = [number * split_size for number in range(count)]
    ends: list[int | None] = [*starts[1:], None]
    return [torch.ops.aten.slice.Tensor(whole, dim, start, end) for start, end in zip(starts, ends, strict=True)]


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
