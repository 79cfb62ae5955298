"""Makes sure that channels matter to nothing, by noise in all of them at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.oracle.replay import Call, Product, double, run


class Filling:
    """A model in float64, run with noise in channels that are said to matter to nothing.

    Args:
        model: in eval mode; not changed.
        call: its arguments.

    Attributes:
        runs: how often it was run.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self._model, self._call = copy.deepcopy(model).double(), double(call)
        self._first: list[Tensor] = []
        self._expected = run(self._model, self._call, self._plain, exact=True)
        self.runs = 3  # with the two that looked for constants

    def _plain(self, number: int, product: Product, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self._first.append(args[product.inputs].movedim(product.channel, 0).flatten(1)[:, 0].clone())
        made: Tensor = func(*args, **kwargs)
        return made

    def difference(self, rows: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> float:
        """Largest difference of an output, relative to that output's largest value.

        Args:
            rows: by weight, which output channels are filled; bool [K].
            known: by weight, which input channels are replaced by the constants that they were; bool [groups * C].
        """

        def noisy(number: int, product: Product, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            name, axis = product.weight, product.channel
            given = args[product.inputs].clone()
            here = known[name][product.columns.start : product.columns.stop]
            given.movedim(axis, -1)[..., here] = self._first[number][here]
            made: Tensor = func(*args[: product.inputs], given, *args[product.inputs + 1 :], **kwargs)
            chosen = rows[name][product.rows.start : product.rows.stop]
            turned = made.movedim(axis, -1)
            turned[..., chosen] = torch.randn(turned[..., chosen].shape, dtype=turned.dtype) * (1 + made.std(correction=0))
            return made

        found = run(self._model, self._call, noisy, exact=True)
        self.runs += 1
        worst = 0.0
        for one, other in zip(found, self._expected, strict=True):
            if not one.is_floating_point():
                worst = max(worst, 0.0 if torch.equal(one, other) else 1.0)
                continue
            finite = torch.isfinite(other)
            if finite.any():
                worst = max(worst, float((one - other)[finite].abs().max() / other[finite].abs().max().clamp_min(1e-30)))
        return worst


__all__ = ["Filling"]
