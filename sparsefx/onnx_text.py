"""What `audit_onnx` found in a file, as a table, as JSON and as an HTML page."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict

from sparsefx.html import Cell, page, section, table, tiles
from sparsefx.onnx_audit import OnnxWeight

_WIDTH = 132


def as_table(path: str, weights: Sequence[OnnxWeight]) -> str:
    """Plain text: one row for each weight, then why some would not run sparse."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    longest = min(44, max((len(weight.name) for weight in weights), default=0))
    for header in ("weight", "op", "axis", "shape", "dtype", "pattern", "density", "Sparse Tensor Cores"):
        rows.add_column(
            header,
            justify="right" if header in ("axis", "density") else "left",
            no_wrap=header in ("axis", "density", "op", "pattern"),
            overflow="fold",
            min_width=longest if header == "weight" else None,
        )
    for weight in weights:
        rows.add_row(*(Text(cell.text if isinstance(cell, Cell) else cell) for cell in _row(weight)))
    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, color_system=None, force_terminal=False, legacy_windows=False, _environ={})
    console.print(Text(_summary(path, weights)))
    if weights:
        console.print(rows)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def as_json_text(path: str, weights: Sequence[OnnxWeight]) -> str:
    """All fields: ``file`` and ``weights``."""
    rows = [{**asdict(weight), "eligible": weight.eligible} for weight in weights]
    return json.dumps({"file": path, "weights": rows}, indent=2, ensure_ascii=False)


def as_page(path: str, weights: Sequence[OnnxWeight]) -> str:
    """A self-contained HTML document."""
    headers = ["weight", "op", "axis", "shape", "dtype", "pattern", "density", "Sparse Tensor Cores"]
    fit = sum(weight.eligible for weight in weights)
    sparse = sum(bool(weight.pattern) for weight in weights)
    entries = [
        ("weights", str(len(weights)), "of convolutions and matrix products"),
        ("with an N:M pattern", str(sparse), "along the axis that the op sums over"),
        ("eligible", str(fit), "for Sparse Tensor Cores"),
    ]
    return page(
        f"Sparsity of {os.path.basename(path)}",
        tiles(entries),
        section("Weights", table(headers, [_row(weight) for weight in weights], filterable=True)),
        subtitle=path,
    )


def _summary(path: str, weights: Sequence[OnnxWeight]) -> str:
    if not weights:
        return f"{path}: no weight of a convolution or matrix product was found."
    fit = sum(weight.eligible for weight in weights)
    return f"{path}: {fit} of {len(weights)} weights of convolutions and matrix products are eligible for Sparse Tensor Cores."


def _row(weight: OnnxWeight) -> list[str | Cell]:
    verdict = f"eligible{': ' + weight.note if weight.note else ''}" if weight.eligible else f"no: {weight.reason}"
    return [
        weight.name,
        weight.op,
        Cell("-", -1) if weight.axis is None else Cell(str(weight.axis), weight.axis),
        "x".join(map(str, weight.shape)),
        weight.dtype,
        weight.pattern or "-",
        Cell(f"{weight.density:.3g}", weight.density),
        verdict,
    ]
