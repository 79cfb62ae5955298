"""What methods share that choose their masks once, before training, by scoring every weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from torch import Tensor, nn

from sparsefx.algorithms.base import Algorithm
from sparsefx.algorithms.start import Start
from sparsefx.errors import NonFiniteError, OptionError
from sparsefx.patterns import Block, Pattern, Unstructured


@dataclass(frozen=True)
class AtStart(Algorithm):
    """Masks that a score of all weights decides, and that stay for the whole run.

    The scores of all layers are ranked together, as published, wherever the pattern leaves densities free;
    ``densities="uniform"`` ranks within each layer.
    """

    @property
    @final
    def moves(self) -> bool:
        return False

    @property
    @final
    def start_options(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self))

    @final
    def shards_refusal(self) -> str | None:
        return None  # masks stay once they are chosen

    @final
    def default_densities(self, pattern: Pattern) -> str:
        return "global" if isinstance(pattern, (Unstructured, Block)) else "uniform"

    @final
    def first_scores(self, start: Start) -> list[Tensor]:
        scores = self.scores(start)
        for name, score in zip(start.names, scores, strict=True):
            if not bool(torch.isfinite(score).all()):
                raise NonFiniteError(
                    f"{self.name}: the scores of {name} hold NaN or infinity; look at the loss on the calibration batches, "
                    "or exclude the layer"
                )
        return scores

    @abstractmethod
    def scores(self, start: Start) -> list[Tensor]:
        """One tensor of non-negative scores a weight; ``start.model`` is as before when this returns."""


def losses(start: Start, algorithm: str) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """The loss of each calibration batch, with the parameters that become sparse; run inside ``start.unchanged()``.

    Raises:
        OptionError: no batches or no ``loss_fn`` were given, or a loss is no differentiable number.
    """
    if start.calibration is None or start.loss_fn is None:
        missing = " and ".join(
            name for name, value in (("calibration", start.calibration), ("loss_fn", start.loss_fn)) if value is None
        )
        raise OptionError(
            f"algorithm {algorithm!r} scores weights by data, but sparsify was given no {missing}; pass "
            "calibration=[batch, ...] and loss_fn=lambda model, batch: ..."
        )
    if not callable(start.loss_fn):
        raise OptionError(f"loss_fn={start.loss_fn!r} was given; expected a function: loss_fn(model, batch) is the loss")
    if isinstance(start.calibration, (Tensor, dict, str)) or not isinstance(start.calibration, Iterable):
        raise OptionError(
            f"algorithm {algorithm!r} was given calibration={type(start.calibration).__name__}; expected batches, such as a "
            "DataLoader or a list of inputs"
        )
    parameters = start.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    seen = False
    for batch in start.calibration:
        seen = True
        try:
            loss = start.loss_fn(start.model, batch)
        except Exception as error:
            raise OptionError(
                f"loss_fn(model, batch) raised {type(error).__name__}: {error}; expected the loss of one calibration batch"
            ) from error
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            raise OptionError(
                f"loss_fn(model, batch) returned {_told(loss)}; expected the loss: a tensor without dimensions that depends "
                "on the weights"
            )
        yield loss, parameters
    if not seen:
        raise OptionError(f"algorithm {algorithm!r} was given calibration without any batch; expected at least one")


def gradients(loss: Tensor, parameters: list[nn.Parameter], *, keep_graph: bool = False) -> list[Tensor]:
    """Gradients of the loss, zeros where it does not depend on a parameter; nothing is written to ``.grad``."""
    found = torch.autograd.grad(loss, parameters, create_graph=keep_graph, allow_unused=True)
    return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found, strict=True)]


def _told(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)}" if value.dim() else "a tensor that needs no gradient"
