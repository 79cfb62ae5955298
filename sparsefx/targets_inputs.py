"""Example inputs made up from a model of a known library: zeros, ones and small integers of the right shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.errors import OptionError

_TOKENS = 16


def torchvision_inputs(name: str, module: str, model: nn.Module, batch: int) -> tuple[Any, ...]:
    """Images, a list of images (detection), a clip (video) or two frames (optical flow)."""
    if ".detection." in module:
        return ([_image(3, 224, 224) for _ in range(batch)],)
    if ".video." in module:
        size = 224 if name.startswith(("mvit", "swin3d")) else 112
        return (torch.rand(batch, 3, 16, size, size, generator=_generator()),)
    if ".optical_flow." in module:
        return tuple(torch.rand(batch, 3, 128, 128, generator=_generator()) for _ in range(2))
    size = getattr(model, "image_size", 299 if name == "inception_v3" else 224)
    return (torch.rand(batch, 3, size, size, generator=_generator()),)


def timm_inputs(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    """Images of the size that the model's own configuration names."""
    settings: Any = getattr(model, "pretrained_cfg", None) or {}
    return (torch.rand(batch, *settings.get("input_size", (3, 224, 224)), generator=_generator()),)


def transformers_inputs(model: nn.Module, batch: int) -> dict[str, Tensor] | None:
    """Keyword arguments from the configuration, for text, images, sound and pairs of these; None for anything else."""
    config: Any = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs["input_ids"] = _tokens(config, batch)
    elif main == "pixel_values":
        inputs["pixel_values"] = _pixels(config, batch)
    elif main == "input_values":
        inputs["input_values"] = torch.rand(batch, 16_000, generator=_generator())
    elif main == "input_features":
        length = 2 * int(getattr(config, "max_source_positions", 50))
        inputs["input_features"] = torch.rand(batch, int(getattr(config, "num_mel_bins", 80)), length, generator=_generator())
    else:
        return None
    if "input_ids" in inputs and hasattr(config, "vision_config") and hasattr(config, "text_config"):
        inputs["pixel_values"] = _pixels(config, batch)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(config, batch)
    return inputs


def _tokens(config: Any, batch: int) -> Tensor:
    text = getattr(config, "text_config", config)
    words = int(getattr(text, "vocab_size", 100))
    # Some models pool at the end-of-text token: no special token is drawn, the small numbers are theirs.
    low = min(8, words - 1)
    drawn = torch.randint(low, max(low + 1, min(words, 1000)), (batch, _TOKENS), generator=_generator())
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < words:
        drawn[:, -1] = end
    return drawn


def _pixels(config: Any, batch: int) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size: Any = getattr(vision, "image_size", None) or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.rand(batch, int(getattr(vision, "num_channels", 3)), int(height), int(width), generator=_generator())


def _image(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tensors_of_shapes(texts: Sequence[str], model: nn.Module) -> tuple[Tensor, ...]:
    """Arguments of the shapes that were asked for, on the model's device, in its dtype.

    Args:
        texts: ``1x3x224x224``, or with a dtype, ``2x16:int64``; integers are small.
        model: tells device and default dtype.

    Raises:
        OptionError: a text that is no shape.
    """
    own = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    made = []
    for text in texts:
        sizes, _, kind = text.partition(":")
        dtype = getattr(torch, kind, None) if kind else own.dtype
        parts = sizes.replace(",", "x").split("x")
        if not isinstance(dtype, torch.dtype) or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise OptionError(f"input shape {text!r} was given; expected positive sizes such as 1x3x224x224, or 2x16:int64")
        shape = [int(part) for part in parts]
        if dtype.is_floating_point:
            tensor = torch.rand(shape, generator=_generator()).to(dtype)
        else:
            tensor = torch.randint(0, 2 if dtype is torch.bool else 8, shape, generator=_generator()).to(dtype)
        made.append(tensor.to(own.device))
    return tuple(made)
