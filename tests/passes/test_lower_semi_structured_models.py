"""Lowering of model families whose code reads weights in its own ways: small ones, all that fits lowered, outputs compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.acceleration import accelerate_with
from sparsefx.ops.semi_structured_product import Reference

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "intermediate_size": 64}


def _text(name: str, config: str = "", **sizes: Any) -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{config or name}Config")(**sizes))
    return model, {"input_ids": torch.arange(8)[None]}


def _image(name: str, side: int, **options: Any) -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, **options), torch.randn(1, 3, side, side)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int]] = {
    "llama": (lambda: _text("Llama", use_cache=False, num_key_value_heads=1, **SIZES), 14),
    "gpt2": (lambda: _text("GPT2", use_cache=False, n_embd=32, n_layer=2, n_head=2, vocab_size=64), 8),
    "t5": (lambda: _text("T5Encoder", "T5", d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64), 10),
    "vit": (lambda: _image("vit_tiny_patch16_224", 32, img_size=32, depth=2), 9),
    "regnet": (lambda: _image("regnetx_002", 32), 16),
}


def sparse_wins(operations: Sequence[Callable[[], object]]) -> list[float]:
    return [2.0, *(1.0 for _ in operations[1:])]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay(name: str) -> None:
    build, expected = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build()
    sparsefx.sparsify(model.eval(), example_inputs=inputs)
    report = accelerate_with(model, inputs, kernels=(Reference(),), timer=sparse_wins)
    assert len(report.accelerated) == expected
    assert report.largest_difference < 1e-5  # and not NaN, which would say that no output was compared
