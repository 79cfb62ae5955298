"""``sparsefx prune``: a model by name, its weights, and the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparsefx
from sparsefx.cli import app
from tests.test_pruning import Small

TARGET = "tests.test_cli_prune:build"
RUNNER = CliRunner()


def build() -> tuple[torch.nn.Module, torch.Tensor]:
    """What the command line is pointed at."""
    torch.manual_seed(0)
    return Small().eval(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_rebuild_the_smaller_model(tmp_path: Path, suffix: str) -> None:
    weights, plan = tmp_path / f"small{suffix}", tmp_path / "plan.safetensors"
    result = RUNNER.invoke(app, ["prune", TARGET, "--out", str(weights), "--plan", str(plan), "--multiple", "1"])
    assert result.exit_code == 0, result.output
    assert "32 -> 22" in result.output
    model, x = build()
    fresh = sparsefx.apply_channel_plan(Small().eval(), sparsefx.ChannelPlan.load(plan))
    if suffix == ".pt":
        fresh.load_state_dict(torch.load(weights, weights_only=True))
    else:
        from safetensors.torch import load_file

        fresh.load_state_dict(load_file(weights))
    torch.testing.assert_close(fresh(x), model(x))


def test_json_has_widths_before_and_after() -> None:
    result = RUNNER.invoke(app, ["prune", TARGET, "--json", "--multiple", "8"])
    assert result.exit_code == 0, result.output
    stem = json.loads(result.stdout)["layers"][0]
    assert (stem["outputs"], stem["outputs_after"], stem["outputs_needed"]) == (32, 24, 22)


def test_measured_times_stand_beside_the_bounds(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = RUNNER.invoke(app, ["prune", TARGET, "--measure", "--html", str(page), "--multiple", "1"])
    assert result.exit_code == 0, result.output
    for text in (result.stdout, page.read_text()):
        assert "Bounds on the speed-up" in text
        assert "in torch" in text
        assert "in onnxruntime" in text
    assert "32 -&gt; 22" in page.read_text() or ">22<" in page.read_text()
    result = RUNNER.invoke(app, ["prune", TARGET, "--json", "--measure", "--multiple", "1"])
    measured = json.loads(result.stdout)["measured"]
    assert len(measured["torch_seconds"]) == len(measured["onnx_seconds"]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prune", TARGET, "--multiple", "none"], "expected 'auto' or a positive number"),
        (["prune", "model.onnx"], "is an ONNX file"),
        (["prune", TARGET, "--out", "no/such/folder/small.pt"], "does not exist; create it first"),
    ],
)
def test_errors_are_one_line(arguments: list[str], told: str) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 1
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
