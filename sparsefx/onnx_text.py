"""What `audit_onnx` found in a file, as a table, as JSON and as an HTML page."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict

from sparsefx.html import Cell, page, section, table, tiles
from sparsefx.onnx_audit import OnnxWeight
from sparsefx.onnx_trtexec import SparsityLog

_WIDTH = 132
_ENCODINGS = ("plain", "compact", "sparse_initializer")
_SHORT = ("name", "op", "axis", "pattern", "density", "eligible", "reason")


def as_table(path: str, weights: Sequence[OnnxWeight], *, log: SparsityLog | None = None, details: bool = False) -> str:
    """Plain text: one row for each weight, then why some would not run sparse.

    Args:
        path: of the file.
        weights: what `audit_onnx` found.
        log: TensorRT's own word, for a column beside ours.
        details: also the bytes in each encoding.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    longest = min(44, max((len(weight.name) for weight in weights), default=0))
    for header in _headers(log, details):
        rows.add_column(
            header,
            justify="right" if header in ("axis", "density", *_ENCODINGS) else "left",
            no_wrap=header in ("axis", "density", "op", "pattern", "picked?"),
            overflow="fold",
            min_width=longest if header == "weight" else None,
        )
    for weight in weights:
        rows.add_row(*(Text(cell.text if isinstance(cell, Cell) else cell) for cell in _row(weight, log, details)))
    stream = io.StringIO()
    width = _WIDTH + (34 if details else 0) + (14 if log else 0)
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False, _environ={})
    for line in _summary(path, weights, log):
        console.print(Text(line))
    if weights:
        console.print(rows)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def as_json_text(path: str, weights: Sequence[OnnxWeight], *, log: SparsityLog | None = None, details: bool = False) -> str:
    """``{"weights": [{"name", "op", "axis", "pattern", "density", "eligible", "reason"}, ...]}``.

    A log adds ``tensorrt`` to each weight; ``details`` gives all fields, and the ``file``.
    """
    rows = []
    for weight in weights:
        every = {**asdict(weight), "eligible": weight.eligible}
        row = {name: every.pop(name) for name in _SHORT}
        rows.append({**row, **(every if details else {}), **({} if log is None else {"tensorrt": log.verdict(weight)})})
    return json.dumps({**({"file": path} if details else {}), "weights": rows}, indent=2, ensure_ascii=False)


def as_page(path: str, weights: Sequence[OnnxWeight], *, log: SparsityLog | None = None) -> str:
    """A self-contained HTML document."""
    fit = sum(weight.eligible for weight in weights)
    sparse = sum(bool(weight.pattern) for weight in weights)
    entries = [
        ("weights", str(len(weights)), "of convolutions and matrix products"),
        ("with an N:M pattern", str(sparse), "along the axis that the op sums over"),
        ("eligible", str(fit), "for Sparse Tensor Cores"),
        ("likely picked", str(sum(weight.likely_picked for weight in weights)), "by TensorRT, by its maintainers' rule of thumb"),
    ]
    rows = [_row(weight, log, True) for weight in weights]
    return page(
        f"Sparsity of {os.path.basename(path)}",
        tiles(entries),
        section("Weights", table(_headers(log, True), rows, filterable=True)),
        subtitle=path,
    )


def _headers(log: SparsityLog | None, details: bool) -> list[str]:
    headers = ["weight", "op", "axis", "shape", "dtype", "pattern", "density", "picked?", "Sparse Tensor Cores"]
    return headers[:-1] + (list(_ENCODINGS) if details else []) + ([] if log is None else ["TensorRT"]) + headers[-1:]


def _summary(path: str, weights: Sequence[OnnxWeight], log: SparsityLog | None) -> list[str]:
    if not weights:
        return [f"{path}: no weight of a convolution or matrix product was found."]
    fit = sum(weight.eligible for weight in weights)
    lines = [f"{path}: {fit} of {len(weights)} weights of convolutions and matrix products are eligible for Sparse Tensor Cores."]
    if fit:
        picked = sum(weight.likely_picked for weight in weights)
        lines.append(f"TensorRT would likely pick its sparse kernel for {picked} of them; what it times on your GPU decides.")
    sizes = [weight.bytes for weight in {weight.name: weight for weight in weights}.values() if weight.bytes]
    plain = sum(size["plain"] or 0 for size in sizes)
    best = sum(size["compact"] or size["plain"] or 0 for size in sizes)
    if best < plain:
        lines.append(
            f"Their data takes {plain / 1e6:.2f} MB as plain initializers and {best / 1e6:.2f} MB where those that are 2:4 are "
            f"in the compact encoding."
        )
    if log is not None:
        lines.append(f"TensorRT's log: {log.eligible_layers} layers eligible, {log.picked_layers} picked.")
    return lines


def _row(weight: OnnxWeight, log: SparsityLog | None, details: bool) -> list[str | Cell]:
    verdict = f"eligible{': ' + weight.note if weight.note else ''}"
    if not weight.eligible:
        verdict = f"no: {weight.reason}{'; ' + weight.note if weight.note else ''}"
    sizes = [weight.bytes.get(encoding) for encoding in _ENCODINGS] if details else []
    return [
        weight.name,
        weight.op,
        Cell("-", -1) if weight.axis is None else Cell(str(weight.axis), weight.axis),
        "x".join(map(str, weight.shape)),
        weight.dtype,
        weight.pattern or "-",
        Cell(f"{weight.density:.3g}", weight.density),
        "likely" if weight.likely_picked else "unlikely" if weight.eligible else "-",
        *(Cell("-", -1) if size is None else Cell(str(size), size) for size in sizes),
        *([] if log is None else [log.verdict(weight)]),
        verdict,
    ]
