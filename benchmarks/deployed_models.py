"""Models of the kinds that are deployed, at their published widths, with random weights and inputs small enough for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def resnet50() -> tuple[nn.Module, Any]:
    """ResNet-50 and one small image."""
    import torchvision

    return torchvision.models.resnet50(), torch.randn(1, 3, 64, 64)


def convnext() -> tuple[nn.Module, Any]:
    """ConvNeXt-T and one small image."""
    import torchvision

    return torchvision.models.convnext_tiny(), torch.randn(1, 3, 64, 64)


def vit_b() -> tuple[nn.Module, Any]:
    """ViT-B/16 and an image of four patches."""
    import torchvision

    return torchvision.models.vit_b_16(image_size=32), torch.randn(1, 3, 32, 32)


def bert() -> tuple[nn.Module, Any]:
    """BERT-base with a small vocabulary, and 16 tokens."""
    import transformers

    model = transformers.BertModel(transformers.BertConfig(vocab_size=1000))
    return model, {"input_ids": torch.randint(0, 1000, (1, 16)), "attention_mask": torch.ones(1, 16, dtype=torch.int64)}


def llama(**sizes: Any) -> tuple[nn.Module, Any]:
    """A Llama-style decoder of hidden size 512 without a cache, and 16 tokens; ``sizes`` go before these of its configuration."""
    import transformers

    settings = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
        **sizes,
    }
    config = transformers.LlamaConfig(**settings, use_cache=False)
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, settings["vocab_size"], (1, 16))}


DEPLOYED: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": resnet50,
    "convnext": convnext,
    "vit_b": vit_b,
    "bert": bert,
}
