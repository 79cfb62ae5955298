"""A run on the example inputs, for what has to tell inputs that a model does not take from a model that cannot be followed."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsefx.capture.arguments import copies, describe_arguments
from sparsefx.errors import CaptureError


def run_examples(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outputs of ``model`` on copies of its example inputs, in the mode it is in.

    Raises:
        CaptureError: the model does not run on them.
    """
    own_args, own_kwargs = copies(args, kwargs)
    try:
        return model(*own_args, **own_kwargs)
    except Exception as error:
        raise CaptureError(
            f"the model does not run on the example inputs {describe_arguments(args, kwargs)}: {type(error).__name__}: "
            f"{first_text(error)}; give inputs that model(*args, **kwargs) accepts"
        ) from error


def first_text(error: Exception) -> str:
    """The first line of an error's text, at most 300 characters, or its type where it has none."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
