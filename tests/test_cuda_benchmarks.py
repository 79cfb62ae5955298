"""The GPU benchmarks run from end to end at tiny sizes on the CPU, and refuse to measure without a GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cuda.every import BENCHMARKS, TESTS
from benchmarks.cuda.sparse_convolution_estimate import DEVICES, Layer, resnet50

NEEDS = {"inference_models": ("transformers",)}


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    for library in NEEDS.get(name, ()):
        pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    importlib.import_module(f"benchmarks.cuda.{name}").main()


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("inference_gemm", (), "reference int8"),
        ("training_linear", (), "64 x 128"),
        ("mask_and_pack", (), "mask and pack, CUTLASS"),
        ("inference_models", ("--model", "bert_large", "--int8"), "13 of 13 layers sparse"),
        ("inference_models", ("--model", "vit_l"), "9 of 10 layers sparse"),
        ("training_step", (), "9 of 10 layers on sparse kernels"),
    ],
)
def test_a_dry_run_goes_through(
    name: str, arguments: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, monkeypatch, "--dry", "--dtype", "bfloat16", *arguments)
    printed = capsys.readouterr().out
    assert "DRY RUN: no ratio below means anything" in printed
    assert "seed 0" in printed
    assert expected in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="nothing was measured: torch sees no NVIDIA GPU here"):
        run("inference_gemm", monkeypatch)


def test_every_benchmark_is_run_by_every() -> None:
    folder = Path(__file__).parent.parent / "benchmarks" / "cuda"
    programs = {path.stem for path in folder.glob("*.py") if "start(__doc__" in path.read_text()}
    assert set(BENCHMARKS) == programs
    assert all((folder.parent.parent / path).exists() for path in TESTS)


def test_the_estimate_is_a_roofline() -> None:
    layers = resnet50()
    assert sum(layer.count for layer in layers) == 52  # the 53 convolutions without the first
    assert sum(layer.count for layer in layers if layer.filter == 3) == 16
    flops = sum(layer.operations(1) * layer.count for layer in layers)
    assert flops == pytest.approx(2 * 3.97e9, rel=0.01)  # 4.09 G multiply-adds, 0.12 of them in the first convolution
    bound = Layer(512, 512, 14, 1, 3, 1)
    dense, sparse = (bound.seconds(DEVICES[0], 64, 1.0, sparse=one) for one in (False, True))
    assert dense == pytest.approx(2 * sparse)
