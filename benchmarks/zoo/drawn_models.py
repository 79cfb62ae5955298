"""Models drawn at random from timm and transformers, none of them in the list that the library was mended on.

What is left out is left out before sparsefx sees it: models that are too large for the machine, and architectures of
transformers that do not run with a generic small configuration and generic inputs.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import timm
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from benchmarks.zoo.case import Call, Case
from benchmarks.zoo.timm_models import SMALLEST, timm_case
from benchmarks.zoo.transformers_models import transformers_cases

LARGEST = 120_000_000
"""Parameters."""
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "decoder_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_inner"), 128),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def draw_names(seed: int, timm_models: int = 20, transformers_models: int = 10) -> list[str]:
    """``library/name`` of the first so many that fit, in an order that the seed gives."""
    return [*islice(_timm_in_order(seed), timm_models), *islice(_transformers_in_order(seed), transformers_models)]


def drawn_case(library: str, name: str) -> Case | None:
    """The case of a name that may have been drawn; None where there is none."""
    if library == "timm":
        return timm_case(name, "drawn", own_size=True) if timm.is_model(name) else None
    return _generic(name) if name in MODEL_MAPPING_NAMES else None


def _timm_in_order(seed: int) -> Iterator[str]:
    names = sorted(set(timm.list_models()) - set(SMALLEST.values()))
    random.Random(seed).shuffle(names)
    for name in names:
        with torch.device("meta"):
            try:
                size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
            except RuntimeError:
                continue  # computes with values while it is built
        if size <= LARGEST and not name.startswith("test_"):
            yield f"timm/{name}"


def _transformers_in_order(seed: int) -> Iterator[str]:
    known = {case.build().config.model_type for case in transformers_cases()}  # type: ignore[union-attr]
    names = sorted(set(MODEL_MAPPING_NAMES) - known)
    random.Random(seed).shuffle(names)
    for name in names:
        if _generic(name) is not None:
            yield f"transformers/{name}"


def _generic(name: str) -> Case | None:
    """A small model of this architecture and inputs that it takes; None where there are none of the generic kind."""

    def build() -> nn.Module:
        config = transformers.AutoConfig.for_model(name)
        for key, value in _SMALL.items():
            if isinstance(getattr(config, key, None), int):
                setattr(config, key, value)
        model: nn.Module = transformers.AutoModel.from_config(config)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                if sum(parameter.numel() for parameter in build().parameters()) > LARGEST // 4:
                    return None
            model = build().eval()
        except Exception:  # a configuration that its model does not take, in whatever words
            return None
        for key in ("input_ids", "pixel_values", "input_values", "input_features"):
            case = Case("transformers", name, "drawn", build, lambda key=key: _call(key))  # type: ignore[misc]
            if _takes(model, case):
                return case
    return None


def _takes(model: nn.Module, case: Case) -> bool:
    try:
        args, kwargs = case.call()
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception:  # what a model raises on inputs of another kind is its own business
        return False
    return True


def _call(key: str) -> Call:
    values = {
        "input_ids": lambda: torch.randint(3, 96, (2, 12)),
        "pixel_values": lambda: torch.randn(2, 3, 32, 32),
        "input_values": lambda: torch.randn(2, 1600),
        "input_features": lambda: torch.randn(2, 80, 100),
    }
    return (), {key: values[key]()}
