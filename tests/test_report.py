"""Audit: totals, text, JSON and the HTML page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsefx import html
from sparsefx.errors import ExportError
from sparsefx.report import Audit, LayerReport
from sparsefx.report_table import as_text, fold, fold_names, percent, quantity


def layer(name: str, *, sparse: bool = True, flops: int | None = 1000, reason: str = "", **other: object) -> LayerReport:
    values: dict[str, object] = {
        "name": name,
        "parameter": f"{name}.weight",
        "kind": "Linear",
        "shape": (16, 32),
        "sparse": sparse,
        "reason": reason if not sparse else "",
        "pattern": "2:4" if sparse else "",
        "density": 0.5 if sparse else 1.0,
        "empty_channels": 0,
        "flops": flops,
        "rung": 1,
        "call_sites": (name,),
        "reduction_axis": 1,
        "tensor_core_reason": "",
    }
    return LayerReport(**{**values, **other})  # type: ignore[arg-type]


@pytest.fixture
def audit() -> Audit:
    layers = (
        layer("stem", sparse=False, flops=500, reason="3 input channels is not a multiple of 16; it stays dense", shape=(16, 3)),
        layer("body", tensor_core_reason="10 output channels is not a multiple of 8", empty_channels=2),
        layer("head", sparse=False, flops=2500, reason="a vocabulary projection; it stays dense"),
    )
    return Audit(layers, ("table",), {"pattern": "2:4", "density": 0.5}, "Net")


def test_totals_weigh_values_and_flops(audit: Audit) -> None:
    totals = audit.totals
    assert (totals.layers, totals.sparse_layers) == (3, 1)
    assert (totals.weights, totals.sparse_weights, totals.participating) == (48 + 512 + 512, 512, 48 + 256 + 512)
    assert (totals.flops, totals.sparse_flops, totals.effective_flops) == (4000, 1000, 3500)
    assert (totals.empty_channels, totals.fit_for_tensor_cores) == (2, 0)


def test_a_weight_under_two_names_counts_once() -> None:
    twice = Audit((layer("first", parameter="w"), layer("second", parameter="w")))
    assert twice.totals.layers == 1
    assert twice.totals.weights == 512


def test_flops_are_unknown_rather_than_zero_without_shapes() -> None:
    audit = Audit((layer("a", flops=None),))
    assert audit.totals.flops is None
    assert audit.totals.effective_flops is None
    assert "FLOPs are not known: pass example_inputs" in str(audit)


def test_text_names_each_layer_and_orders_reasons_by_flops(audit: Audit) -> None:
    text = str(audit)
    assert text.startswith("Net: pattern 2:4, density 0.5\n1 of 3 Linear/Conv weights are sparse")
    assert "2 output channels are empty" in text
    assert text.index("a vocabulary projection; it stays dense (head)") < text.rindex("3 input channels")
    assert "1 layer, 62.5 % of the FLOPs" in text
    assert "10 output channels is not a multiple of 8 (body)" in text
    assert "table: pass example_inputs" in text
    assert "\x1b" not in text


def test_text_of_a_model_not_yet_sparsified_says_would(audit: Audit) -> None:
    assert "would be sparse" in str(Audit(audit.layers, settings={"sparsified": False}))


def test_a_thousand_layers_take_one_row_for_each_kind_of_block() -> None:
    layers = [layer(f"blocks.{block}.{part}.{index}") for block in range(100) for part in ("mlp", "attn") for index in range(5)]
    text = str(Audit(tuple(layers)))
    assert "blocks.[0-99].mlp.[0-4]" in text
    assert "blocks.[0-99].attn.[0-4]" in text
    assert len(text.splitlines()) < 20


def test_sparse_and_dense_layers_of_one_block_pattern_are_apart() -> None:
    layers = [layer(f"blocks.{index}", sparse=index != 7, reason="excluded") for index in range(50)]
    rows = [line for line in str(Audit(tuple(layers))).splitlines() if line.startswith("blocks")]
    assert len(rows) == 2
    assert rows[1].startswith("blocks.7 ")


def test_an_empty_audit_has_a_text_and_a_page(tmp_path: Path) -> None:
    audit = Audit(())
    assert "no Linear or Conv weight" in str(audit)
    audit.to_html(tmp_path / "empty.html")
    assert "no Linear or Conv weight" in (tmp_path / "empty.html").read_text()


def test_brackets_in_names_are_text_and_not_console_markup() -> None:
    assert "[red]x[/red]" in as_text(Audit((layer("[red]x[/red]"),)))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layer1.0.conv2", "layer2.1.conv2", "layer3.2.conv2"], "layer[1-3].[0-2].conv2"),
        (["a.1", "a.1"], "a.1"),
        (["a.07"], "a.07"),
        (["a.1", "a.5"], "a.[1,5]"),
        (["a.1", "a.3", "a.5", "a.7", "a.9"], "a.[1..9]"),
        (["plain"], "plain"),
    ],
)
def test_fold_names(names: list[str], expected: str) -> None:
    assert fold_names(names) == expected


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_fold_holds_the_smallest_and_the_largest_number(numbers: list[int]) -> None:
    text = fold([f"block{number}.weight" for number in numbers])
    found = [int(number) for number in re.findall(r"\d+", text)]
    assert (min(found), max(found)) == (min(numbers), max(numbers))


def test_layers_of_one_block_are_not_folded_together() -> None:
    names = [f"layer{stage}.{block}.conv{index}" for stage in range(1, 5) for block in range(4) for index in (1, 2, 3)]
    text = str(Audit(tuple(layer(name) for name in names)))
    assert all(f"layer[1-4].[0-3].conv{index} " in text for index in (1, 2, 3))


def test_quantities() -> None:
    assert [quantity(number) for number in (0, 999, 25_557_032, 999_999, 4.1e9)] == ["0", "999", "25.6 M", "1 M", "4.1 G"]
    assert [percent(part, 10_000) for part in (0, 1, 5000, 9999, 10_000)] == ["0.0 %", "< 0.1 %", "50.0 %", "> 99.9 %", "100.0 %"]
    assert percent(1, 0) == "-"


def test_json_holds_every_field(audit: Audit) -> None:
    content = json.loads(audit.to_json())
    assert content["settings"] == {"pattern": "2:4", "density": 0.5}
    assert content["unseen"] == ["table"]
    assert [row["name"] for row in content["layers"]] == ["stem", "body", "head"]
    assert content["layers"][1]["effective_flops"] == 500
    assert content["layers"][1]["shape"] == [16, 32]
    assert content["totals"]["flops"] == 4000


class _Page(HTMLParser):
    """Collects what a page refers to, its tags and its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "data")]


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    path = tmp_path / "audit.html"
    Audit((layer("<script>alert(1)</script>"),), ("<b>",), {"pattern": '"2:4"'}, "A & B").to_html(path)
    text = path.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "A &amp; B" in text
    assert "prefers-color-scheme: dark" in text
    seen = _Page()
    seen.feed(text)
    assert seen.references == []
    assert "http" not in text
    assert seen.tags.count("script") == 1
    assert {"table", "input", "main"} <= set(seen.tags)


def test_an_unwritable_page_leaves_what_was_there(tmp_path: Path, audit: Audit) -> None:
    with pytest.raises(ExportError, match=r"missing/audit\.html cannot be written"):
        audit.to_html(tmp_path / "missing" / "audit.html")
    with pytest.raises(ExportError, match="cannot be written"):
        audit.to_html(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_midway_leaves_the_old_page_and_no_other_file(
    tmp_path: Path, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.html"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ExportError, match="No space left on device"):
        audit.to_html(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["audit.html"]


def test_line_chart_draws_each_line_to_scale_and_cuts_it_off_at_the_frame() -> None:
    lines = [html.Line("dense", [(0, 0.0), (10, 1.0)]), html.Line("2:4", [(0, 0.5), (5, 1.0)], colour=1, faint=True)]
    chart = html.line_chart("Accuracy", lines, x_label="step", y_label="share", y_percent=True, y_range=(0.5, 1.0))
    faint, dense = (
        [tuple(map(float, point.split(","))) for point in path.split()] for path in re.findall(r'points="([^"]+)"', chart)
    )
    assert "100%" in chart
    assert faint == [(52, 240), (280, 10)]
    assert dense == [(52, 470), (508, 10)]
    assert '<svg x="52" y="8" width="456" height="234" viewBox="52 8 456 234">' in chart
    with pytest.raises(ValueError, match="no points"):
        html.line_chart("Empty", [], x_label="", y_label="")


def test_a_constant_line_has_an_axis() -> None:
    assert "polyline" in html.line_chart("Loss", [html.Line("a", [(1, 0.0)])], x_label="x", y_label="y")


def test_mask_picture_is_a_png_with_one_bit_for_each_weight() -> None:
    pillow = pytest.importorskip("PIL.Image")
    import io

    mask = np.eye(5, 11, dtype=bool)
    with pillow.open(io.BytesIO(html._png(mask))) as picture:
        assert picture.size == (11, 5)
        assert (np.asarray(picture.convert("RGBA"))[..., 3] == 255).tolist() == mask.tolist()
