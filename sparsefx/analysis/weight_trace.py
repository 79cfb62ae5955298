"""The values of a few weights over a run whose length is not known, in memory of a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.errors import OptionError


class WeightTrace:
    """A random sample of one tensor's elements, looked at again and again.

    Each look is kept until ``capacity`` are; then every other one is forgotten, and from then on only every second look is
    kept, and so on. So there are always between half the capacity and all of it, evenly spaced over the whole run, whatever its
    length; a history of all weights would take as many bytes as the run has steps for every byte of the model.

    Args:
        weight: the tensor, for its shape and device.
        sample: elements to follow; all of them where there are fewer.
        capacity: looks to keep, an even number.
        generator: of the sample, on the CPU.
    """

    def __init__(self, weight: Tensor, *, sample: int, capacity: int, generator: torch.Generator) -> None:
        if capacity < 4 or capacity % 2:
            raise OptionError(f"capacity={capacity!r} was given; expected an even number of looks, at least 4")
        if sample < 1:
            raise OptionError(f"sample={sample!r} was given; expected a number of weights, at least 1")
        count = min(sample, weight.numel())
        chosen = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
        self.positions = chosen.to(weight.device)
        self.looks = 0
        self.stride = 1
        self._kept = 0
        self._values = torch.zeros(capacity, count, dtype=torch.float32, device=weight.device)

    @torch.no_grad()
    def look(self, weight: Tensor) -> None:
        """Note the values as they are now; ``weight`` has the shape that it had at first."""
        if self.looks % self.stride == 0:
            if self._kept == len(self._values):
                self._kept //= 2
                self._values[: self._kept] = self._values[::2].clone()
                self.stride *= 2
            if self.looks % self.stride == 0:
                self._values[self._kept] = self.chosen(weight)
                self._kept += 1
        self.looks += 1

    def chosen(self, weight: Tensor) -> Tensor:
        """The followed elements of a tensor of the weight's shape."""
        return weight.detach().reshape(-1)[self.positions.to(weight.device)].to(self._values.device, torch.float32)

    @property
    def values(self) -> Tensor:
        """float32 ``[looks kept, elements]``, on the CPU; row ``i`` is look ``i * stride``, counted from 0."""
        return self._values[: self._kept].cpu()
