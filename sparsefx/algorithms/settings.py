"""The values in force for methods that keep dense weights: when masks move, and what becomes of dormant values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sparsefx.algorithms.options import expect_share, expect_steps
from sparsefx.errors import OptionError

Exploit = Literal["reset", "fix", "regularize", "none"]


@dataclass(frozen=True)
class Settings:
    """The values in force during one training run. Steps count from 1.

    Attributes:
        total_steps: optimizer steps of the whole run.
        rewire_every: r, steps from one choice of masks to the next.
        scale: s, factor on the gradient of weights that do not participate.
        exploit: what keeps dormant values from adding noise: ``reset``, ``fix``, ``regularize`` or ``none``.
        reset_every: z, with ``reset``: dormant values become 0 at steps divisible by it.
        fix_after: v, with ``fix``: share of the run after which masks stay and dormant values are 0.
        decay: beta, with ``regularize``: dormant values lose this share at every step.
    """

    total_steps: int
    rewire_every: int
    scale: float
    exploit: Exploit
    reset_every: int
    fix_after: float
    decay: float

    def __post_init__(self) -> None:
        for name in ("total_steps", "rewire_every", "reset_every"):
            expect_steps(name, getattr(self, name))
        for name in ("scale", "fix_after", "decay"):
            expect_share(name, getattr(self, name))
        if self.exploit not in get_args(Exploit):
            raise OptionError(f"exploit={self.exploit!r} was given; expected one of {', '.join(get_args(Exploit))}")

    def fixed(self, step: int) -> bool:
        """Whether masks have stopped for good at this step."""
        return self.exploit == "fix" and step >= self.fix_after * self.total_steps

    def rewires(self, step: int) -> bool:
        """Whether the masks are chosen anew after this step."""
        return step % self.rewire_every == 0 and not self.fixed(step)

    def dormant_scale(self, step: int) -> float:
        """The factor on dormant values after this step (of the mask that was used in it)."""
        if self.exploit == "reset":
            return 0.0 if step % self.reset_every == 0 else 1.0
        if self.exploit == "regularize":
            return 1.0 - self.decay
        return 0.0 if self.fixed(step) else 1.0
