"""One model of a zoo, with inputs that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward."""


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        library: where it comes from: ``"torchvision"``, ``"timm"``, ``"transformers"`` or ``"shipped"``.
        name: within its library.
        family: rows of one family are added up in the table of FLOPs.
        build: makes it with random weights (no downloads), from torch's global generator.
        call: makes the arguments of a forward in eval mode, from torch's global generator.
        training_call: the same for train mode, where that takes others (detection: targets).
        heads: globs of the Linear layers that the paper's rule leaves out for what they are: vocabulary projections and
            classification heads of language models. Written by hand, so that the rule's outcome can be held against it.
    """

    library: str
    name: str
    family: str
    build: Callable[[], nn.Module]
    call: Callable[[], Call]
    training_call: Callable[[], Call] | None = None
    heads: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """``library/name``."""
        return f"{self.library}/{self.name}"
