"""Small parts of self-contained HTML reports: a page, tiles, tables, line charts, mask pictures.

Every function returns markup and escapes whatever text it is given, so parts can be nested freely. A page holds its
style sheet and its one script, refers to nothing outside itself, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import html
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsefx.atomic_file import replace_file
from sparsefx.errors import ExportError, OptionError


class Markup(str):
    """Text that is HTML already; plain `str` is escaped wherever it is put into a page."""

    __slots__ = ()


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown and, for columns of numbers, the number to sort by."""

    text: str
    sort: float | None = None


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend, in which equal names share an entry.
        points: (x, y) pairs by rising x.
        colour: 0 to 3; the same thing has the same colour in every chart of a page.
        faint: drawn thin and pale, as for single runs behind their mean.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False


def escape(text: str) -> Markup:
    """Text made safe for content and attributes; Markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text, quote=True))


def breakable(name: str) -> Markup:
    """A dotted name that lines may break after dots and underscores, and not within words."""
    return Markup(escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def page(title: str, *parts: Markup, subtitle: str = "") -> str:
    """A whole document."""
    folder = files("sparsefx.data")
    style = folder.joinpath("report.css").read_text(encoding="utf-8")
    script = folder.joinpath("report.js").read_text(encoding="utf-8")
    below = f"<p class=subtitle>{escape(subtitle)}</p>" if subtitle else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n<header><h1>{escape(title)}</h1>{below}</header>\n"
        + "\n".join(parts)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file through a temporary one beside it, so that ``path`` never holds half of it.

    Raises:
        ExportError: it cannot be written; a file already there is as before.
    """
    try:
        replace_file(path, lambda file: _write_down(file, text))
    except OptionError as error:
        told = str(error)
        raise ExportError(told if "cannot be written" in told else f"{path} cannot be written: {told}") from error


def _write_down(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def section(heading: str, *parts: str) -> Markup:
    """A headed section; plain strings become paragraphs."""
    body = "\n".join(part if isinstance(part, Markup) else f"<p>{escape(part)}</p>" for part in parts)
    return Markup(f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>")


def tiles(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """Headline figures: (label, value, note) each."""
    body = "".join(
        f"<div class=tile><span class=label>{escape(label)}</span><span class=value>{escape(value)}</span>"
        f"<span class=note>{escape(note)}</span></div>"
        for label, value, note in entries
    )
    return Markup(f"<div class=tiles>{body}</div>")


def bullets(entries: Sequence[str]) -> Markup:
    """An unordered list."""
    return Markup("<ul>" + "".join(f"<li>{escape(entry)}</li>" for entry in entries) + "</ul>")


def columns(*parts: Markup) -> Markup:
    """Parts side by side where there is room."""
    return Markup("<div class=columns>" + "".join(f"<div>{part}</div>" for part in parts) + "</div>")


def table(headers: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, filterable: bool = False) -> Markup:
    """A table whose columns sort on a click; with ``filterable``, a text field above keeps matching rows."""
    numeric = [bool(rows) and all(isinstance(row[index], Cell) for row in rows) for index in range(len(headers))]
    mark = ["n" if is_number else "t" for is_number in numeric]
    head = "".join(
        f'<th scope="col" class={kind}><button type="button">{escape(header)}</button></th>'
        for header, kind in zip(headers, mark, strict=True)
    )
    body = "\n".join("<tr>" + "".join(_cell(cell, kind) for cell, kind in zip(row, mark, strict=True)) + "</tr>" for row in rows)
    field = ""
    if filterable:
        field = (
            f'<p class=filter><label>Filter <input type="search" placeholder="name, kind or reason"></label>'
            f'<output aria-live="polite">{len(rows)} of {len(rows)}</output></p>'
        )
    return Markup(
        f"<div class=tablebox>{field}<div class=scroll><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n"
        "</tbody></table></div></div>"
    )


def _cell(cell: str | Cell, kind: str) -> str:
    if isinstance(cell, Cell):
        key = "" if cell.sort is None else f' data-sort="{cell.sort:.12g}"'
        return f"<td class={kind}{key}>{escape(cell.text)}</td>"
    return f"<td class={kind}>{escape(cell)}</td>"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    y_percent: bool = False,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """A line chart as inline SVG with axes, grid lines and a legend.

    ``y_range`` bounds the y axis, and lines are cut off there; without it the axis covers the values. Raises ValueError
    where no line has points.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        raise ValueError(f"chart {title!r} has no points")
    width, height, left, right, top, bottom = 520.0, 280.0, 52.0, 12.0, 10.0, 40.0
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    low, high = y_range or (min(y for _, y in points), max(y for _, y in points))
    y_ticks = _ticks(low, high)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def across(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1) * (width - left - right)

    def down(y: float) -> float:
        return top + (y_high - y) / ((y_high - y_low) or 1) * (height - top - bottom)

    def tick_text(value: float) -> str:
        return f"{value * 100:g}%" if y_percent else f"{value:g}"

    drawn = [
        f'<line class=grid x1="{left}" x2="{width - right}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
        f'<text class=tick text-anchor="end" x="{left - 6}" y="{down(y) + 4:.1f}">{tick_text(y)}</text>'
        for y in y_ticks
    ]
    drawn += [
        f'<text class=tick text-anchor="middle" x="{across(x):.1f}" y="{height - bottom + 16:.1f}">{x:g}</text>'
        for x in x_ticks
        if x_low <= x <= x_high
    ]
    colours = {line.name: line.colour for line in lines}
    # A nested svg cuts off what lies outside of it; two units more leave lines along the edge their full width.
    frame = (left, top - 2, width - left - right, height - top - bottom + 4)
    drawn.append('<svg x="{0:g}" y="{1:g}" width="{2:g}" height="{3:g}" viewBox="{0:g} {1:g} {2:g} {3:g}">'.format(*frame))
    for line in sorted(lines, key=lambda one: not one.faint):
        style = f"line series{line.colour}" + (" faint" if line.faint else "")
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)
        drawn.append(f'<polyline class="{style}" points="{path}"/>')
    drawn.append("</svg>")
    drawn.append(
        f'<text class=label text-anchor="middle" x="{(left + width - right) / 2}" y="{height - 6}">{escape(x_label)}</text>'
    )
    legend = "".join(f"<span class=series{colour}>{escape(name)}</span>" for name, colour in colours.items())
    return Markup(
        f"<figure><figcaption>{escape(title)}<span class=unit>{escape(y_label)}</span></figcaption>"
        f'<div class=legend>{legend}</div><svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width:g} {height:g}">'
        + "".join(drawn)
        + "</svg></figure>"
    )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover low to high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999))
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    return [round(index * step, 12) for index in range(first, last + 1)]


def mask_picture(caption: str, mask: NDArray[np.bool_], *, zoom: int = 4) -> Markup:
    """A mask ``[rows, columns]`` as a picture: participating weights filled, the others empty. Inline PNG."""
    rows, across = mask.shape
    data = base64.b64encode(_png(mask)).decode("ascii")
    return Markup(
        f'<figure class=mask><img alt="{escape(caption)}" width="{across * zoom}" height="{rows * zoom}" '
        f'src="data:image/png;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def svg_picture(caption: str, svg: str) -> Markup:
    """A figure that was drawn elsewhere, as an image of its own: its styles stay inside, and it stands on white."""
    data = base64.b64encode(svg.encode("utf-8")).decode("ascii")
    image = f'<img alt="{escape(caption)}" style="width:100%;background:#fff" src="data:image/svg+xml;base64,{data}">'
    return Markup(f"<figure class=drawn>{image}</figure>")


def _png(mask: NDArray[np.bool_]) -> bytes:
    """A PNG of one bit a pixel, its palette an accent colour for True and full transparency for False."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows, across = mask.shape
    lines = np.packbits(mask, axis=1)
    # Each line starts with its filter's number, 0: no filter.
    pixels = np.concatenate([np.zeros((rows, 1), np.uint8), lines], axis=1).tobytes()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", across, rows, 1, 3, 0, 0, 0))
        + chunk(b"PLTE", bytes((0, 0, 0, 0x4A, 0x86, 0xD8)))
        + chunk(b"tRNS", bytes((0, 255)))
        + chunk(b"IDAT", zlib.compress(pixels, 9))
        + chunk(b"IEND", b"")
    )
