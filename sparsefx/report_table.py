"""An Audit as text: totals, a table in which blocks that repeat share a row, and the reasons for what stays dense."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from sparsefx.report import LayerReport, Totals, sum_up

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sparsefx.report import Audit

Item = TypeVar("Item")
_NUMBER = re.compile(r"\d+")
# In a module path: numbers of every part but the last, which tells layers of one block apart (conv1, conv2), unless that
# part is nothing but a number.
_PATH_NUMBER = re.compile(r"\d+(?=.*\.)|(?<![^.])\d+$")
_WIDTH = 132
# A model with more layers than this is shown with one row for each kind of block.
_ROWS_SHOWN_ONE_BY_ONE = 40
_UNSEEN_SHOWN = 8
NOT_FOR_HARDWARE = "Sparse, but not for Sparse Tensor Cores"
TRAINS = "Sparse, and trained by"


def as_text(audit: Audit, width: int = _WIDTH) -> str:
    """The audit as plain text, the same on every terminal."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False, _environ={})
    console.print(*renderables(audit), sep="\n", highlight=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def renderables(audit: Audit) -> Iterator[RenderableType]:
    """The parts of the text, for a rich console of any width."""
    from rich.padding import Padding
    from rich.text import Text

    yield Text(headline(audit), style="bold")
    for line in total_lines(audit):
        yield Text(line)
    if audit.layers:
        yield _table(audit)
    sections = (
        ("Dense, and why", dense_reasons(audit)),
        (NOT_FOR_HARDWARE, hardware_reasons(audit)),
        (TRAINS, backend_reasons(audit)),
    )
    for heading, reasons in sections:
        if reasons:
            yield Text(heading, style="bold")
            for share, reason, names in reasons:
                yield Padding(Text(f"{share}: {reason} {names}"), (0, 0, 0, 2))
    if audit.unseen:
        more = len(audit.unseen) - _UNSEEN_SHOWN
        names = ", ".join(audit.unseen[:_UNSEEN_SHOWN]) + (f" and {more} more" if more > 0 else "")
        yield Text("Weights that no call was seen to use", style="bold")
        yield Padding(Text(f"{names}: pass example_inputs that reach them"), (0, 0, 0, 2))


def headline(audit: Audit) -> str:
    """Title and settings in one line."""
    told = ", ".join(f"{name} {value}" for name, value in audit.settings.items() if name != "sparsified")
    return f"{audit.title or 'model'}: {told}" if told else audit.title or "model"


def total_lines(audit: Audit) -> list[str]:
    """How much is sparse, in sentences."""
    totals = audit.totals
    if not totals.layers:
        return ["The model has no Linear or Conv weight."]
    would = "would be sparse" if audit.settings.get("sparsified") is False else "are sparse"
    lines = [
        f"{totals.sparse_layers} of {totals.layers} Linear/Conv weights {would}, with {quantity(totals.sparse_weights)} of "
        f"{quantity(totals.weights)} values ({percent(totals.sparse_weights, totals.weights)}); "
        f"{percent(totals.participating, totals.weights)} of all values participate."
    ]
    if totals.flops:
        lines.append(
            f"They do {percent(totals.sparse_flops or 0, totals.flops)} of {quantity(totals.flops)} FLOPs; "
            f"{quantity(totals.effective_flops or 0)} ({percent(totals.effective_flops or 0, totals.flops)}) are left "
            "where only participating weights are counted."
        )
    else:
        lines.append("FLOPs are not known: pass example_inputs to count them.")
    if totals.sparse_layers:
        lines.append(
            f"{totals.fit_for_tensor_cores} of the {totals.sparse_layers} have a shape and pattern that Sparse Tensor Cores take."
        )
    if totals.empty_channels:
        lines.append(f"{totals.empty_channels} output channels are empty: all their weights are zero.")
    return lines


def _table(audit: Audit) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    together = len(audit.layers) > _ROWS_SHOWN_ONE_BY_ONE
    rows = group(audit.layers, _block_key) if together else [[layer] for layer in audit.layers]
    numbers = {"layers", "density", "empty", "FLOPs", "share", "rung"}
    headers = ["weight", "layers", "kind", "shape", "density", "empty", "FLOPs", "share", "rung", "sparse?"]
    if not together:
        headers.remove("layers")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    longest = min(50, max(len(fold_names([layer.name for layer in layers])) for layers in rows))
    for header in headers:
        table.add_column(
            header,
            justify="right" if header in numbers else "left",
            no_wrap=header in numbers,
            overflow="fold",
            min_width=longest if header == "weight" else None,
            max_width=36 if header == "sparse?" else None,
        )
    for layers in rows:
        totals = sum_up(layers)
        first = layers[0]
        cells = {
            "weight": fold_names([layer.name for layer in layers]),
            "layers": str(len(layers)),
            "kind": first.kind,
            "shape": shapes(layers),
            "density": f"{totals.participating / totals.weights:.3g}" if totals.weights else "-",
            "empty": str(totals.empty_channels) if first.sparse else "",
            "FLOPs": "-" if totals.flops is None else quantity(totals.flops),
            "share": "-" if not audit.totals.flops or totals.flops is None else percent(totals.flops, audit.totals.flops),
            "rung": fold_numbers([layer.rung for layer in layers]),
            "sparse?": first.pattern if first.sparse else "dense: " + short(first.reason),
        }
        table.add_row(*(Text(cells[header]) for header in headers), style="" if first.sparse else "dim")
    return table


def _block_key(layer: LayerReport) -> Hashable:
    reason = _NUMBER.sub("#", layer.reason)
    return _place(layer), layer.kind, layer.sparse, layer.pattern, reason, layer.flops is None


def _place(layer: LayerReport) -> str:
    return _PATH_NUMBER.sub("#", layer.name)


def group(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items with equal keys together, in order of their first appearance."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def fold_names(names: Sequence[str]) -> str:
    """Names of the same place in repeated blocks, as one: ``layer1.0.conv2`` ... -> ``layer[1-4].[0-2].conv2``."""
    return fold(names, _PATH_NUMBER)


def fold(texts: Sequence[str], number: re.Pattern[str] = _NUMBER) -> str:
    """Texts that differ in their numbers only, as one."""
    numbers = [[int(found) for found in number.findall(text)] for text in texts]
    columns = iter(list(zip(*numbers, strict=True)))
    return number.sub(lambda match: fold_numbers(next(columns), brackets="[]", alone=match.group()), texts[0])


def fold_numbers(numbers: Sequence[int], *, brackets: str = "", alone: str = "") -> str:
    """Numbers as one text: the number where all are equal, ``1-4`` where none is missing between, else ``2,5,9``."""
    values = sorted(set(numbers))
    if len(values) == 1:
        return alone or str(values[0])
    if values[-1] - values[0] == len(values) - 1:
        text = f"{values[0]}-{values[-1]}"
    elif len(values) <= 4:
        text = ",".join(map(str, values))
    else:
        text = f"{values[0]}..{values[-1]}"
    return f"{brackets[0]}{text}{brackets[1]}" if brackets else text


def shapes(layers: Sequence[LayerReport]) -> str:
    """The shape of all layers, or the smallest and the largest."""
    distinct = sorted({layer.shape for layer in layers})
    written = ["x".join(map(str, shape)) for shape in (distinct[0], distinct[-1])]
    return written[0] if len(distinct) == 1 else " .. ".join(written)


def examples(layers: Sequence[LayerReport]) -> str:
    """In parentheses the names of some layers, repeated blocks folded."""
    names = [fold_names([row.name for row in rows]) for rows in group(layers, _place)]
    return f"({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


def short(text: str, length: int = 120) -> str:
    """The first part of a reason, for a cell; the whole stands below the table."""
    first = text.split(";")[0]
    return first if len(first) <= length else first[: length - 3].rstrip() + "..."


def quantity(number: float) -> str:
    """``25557032`` -> ``25.6 M``."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {sign}"
    return f"{number:g}"


def percent(part: float, whole: float) -> str:
    """A share, with one digit after the point: ``98.2 %``."""
    if not whole:
        return "-"
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if 99.95 <= share < 100 else f"{share:.1f} %"


def _share_of(rows: Sequence[LayerReport], whole: Totals) -> str:
    part = sum_up(rows)
    count = f"{len(rows)} layer{'s' if len(rows) > 1 else ''}"
    if whole.flops and part.flops is not None:
        return f"{count}, {percent(part.flops, whole.flops)} of the FLOPs"
    return f"{count}, {percent(part.weights, whole.weights)} of the values"


def _weightiest_first(groups: list[list[LayerReport]]) -> list[list[LayerReport]]:
    """By FLOPs, then by values."""

    def weight(rows: list[LayerReport]) -> tuple[int, int]:
        totals = sum_up(rows)
        return -(totals.flops or 0), -totals.weights

    return sorted(groups, key=weight)


def dense_reasons(audit: Audit) -> list[tuple[str, str, str]]:
    """Why layers stay dense: (how many and how much, the reason, which layers), most important first."""
    return _reasons(audit, [row for row in audit.layers if not row.sparse], lambda row: row.reason)


def hardware_reasons(audit: Audit) -> list[tuple[str, str, str]]:
    """Why Sparse Tensor Cores would not take sparse layers, likewise."""
    rows = [row for row in audit.layers if row.sparse and row.tensor_core_reason]
    return _reasons(audit, rows, lambda row: row.tensor_core_reason)


def backend_reasons(audit: Audit) -> list[tuple[str, str, str]]:
    """What trains sparse layers, where a backend was asked for, likewise."""
    return _reasons(audit, [row for row in audit.layers if row.sparse and row.backend], lambda row: row.backend)


def _reasons(audit: Audit, layers: Sequence[LayerReport], reason: Callable[[LayerReport], str]) -> list[tuple[str, str, str]]:
    alike = _weightiest_first(group(layers, lambda layer: _NUMBER.sub("#", reason(layer))))
    return [(_share_of(rows, audit.totals), fold([reason(row) for row in rows]), examples(rows)) for rows in alike]
