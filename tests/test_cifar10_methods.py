"""The table of methods on CIFAR-10: its runs, its cells, and a small part of it made on the shipped digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import cifar10_methods
from benchmarks.cifar10_methods import DENSITIES, METHODS, SIZES, counts, table, tasks
from benchmarks.claims.results import Results
from benchmarks.claims.trainer import interval


def _put(results: Results, cell: list, errors: list[float], weights: int = 100) -> None:
    for task, error in zip(cell, errors, strict=False):
        path = results.path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"result": {"error": error, "weights": weights}}))


@pytest.mark.parametrize("scale", sorted(SIZES))
def test_every_method_stands_at_every_density_with_all_seeds(scale: str) -> None:
    size = SIZES[scale]
    cells = tasks(size)
    assert len(cells) == 1 + len(METHODS) * len(DENSITIES) + 2
    runs = [task for group in cells.values() for task in group]
    assert len({task.key for task in runs}) == len(runs) == len(cells) * size.seeds
    assert [row[0] for row in dict.fromkeys(row for row, _ in cells)] == ["dense", *METHODS, "magnitude", "magnitude"]


def test_short_runs_change_masks_forty_times_and_long_ones_as_published() -> None:
    short, long = (SIZES[scale].epochs * 351 for scale in ("cpu", "gpu"))
    assert interval("rigl", short, 351) == interval("sparse-momentum", short, 351) == short // 40
    assert interval("rigl", long, 351) == 100
    assert interval("sparse-momentum", long, 351) == 351
    assert interval("rigl", 50, 25) == 10


def test_only_keeps_the_dense_net_beside_what_is_asked_for() -> None:
    assert {row[0] for row, _ in tasks(SIZES["smoke"], ["set"])} == {"dense", "set"}


def test_cells_tell_means_standard_errors_and_what_is_missing(tmp_path: Path) -> None:
    results = Results(tmp_path)
    cells = tasks(SIZES["smoke"])
    _put(results, cells[("dense", "unstructured"), 1.0], [10.0, 12.0], weights=1000)
    _put(results, cells[("set", "unstructured"), 0.5], [20.0])
    _put(results, cells[("magnitude", "2:4"), 0.5], [30.0, 30.0])
    lines = {line.split(" | ")[0].lstrip("| "): line for line in table(cells, results).splitlines()}
    assert "11.00 ± 1.00" in lines["dense"]
    assert "20.00 (1 of 2 seeds)" in lines["set"]
    assert lines["set"].count(" - ") == 3
    assert "30.00 ± 0.00" in lines["magnitude rewiring, 2:4"]
    assert "dense 1: 1,000" in counts(cells, results)
    assert len({line.count("|") for line in table(cells, results).splitlines()}) == 1


def test_the_command_runs_and_finds_its_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cifar10_methods.SIZES, "smoke", cifar10_methods.Size("digits", "conv", 1, 1))
    monkeypatch.setattr(
        sys, "argv", ["cifar10_methods", "--only", "rigl", "--workers", "1", "--out", str(tmp_path), "--device", "cpu"]
    )
    cifar10_methods.main()
    first = capsys.readouterr().out
    assert "5 runs, 5 of them to make" in first
    assert (tmp_path / "table-smoke.md").exists()
    cifar10_methods.main()
    second = capsys.readouterr().out
    assert "5 runs, 0 of them to make" in second
    assert table(tasks(cifar10_methods.SIZES["smoke"], ["rigl"]), Results(tmp_path / "smoke")) in second
