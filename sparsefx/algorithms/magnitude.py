"""Magnitude rewiring with dense updates ("Advances in Sparse Neural Model Training", algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.layer import Layer, Run, scale_gradients
from sparsefx.algorithms.options import expect_steps
from sparsefx.algorithms.settings import Exploit, Settings
from sparsefx.errors import OptionError


@dataclass(frozen=True)
class Magnitude(Algorithm):
    """The largest |w| participate; all weights are updated, with the gradient at the participating ones.

    Attributes:
        rewire_every: r, steps from one choice of masks to the next.
        scale: s, factor on the gradient of weights that do not participate.
        exploit: what becomes of those weights, see `Settings`.
        reset_every: z; None stands for 1000, and in short runs a tenth of the run.
        fix_after: v; None stands for 0.5.
        decay: beta; None stands for 2e-4.
    """

    rewire_every: int = 1
    scale: float = 1.0
    exploit: Exploit = "reset"
    reset_every: int | None = None
    fix_after: float | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        needs = {"reset_every": "reset", "fix_after": "fix", "decay": "regularize"}
        for name, exploit in needs.items():
            if getattr(self, name) is not None and self.exploit != exploit:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} was given with exploit={self.exploit!r}; it only acts with "
                    f"exploit={exploit!r}: leave it out, or choose that"
                )
        self.settings(1)  # checks the ranges

    @property
    def name(self) -> str:
        return "magnitude"

    @property
    def summary(self) -> str:
        return "the largest |w| participate; all weights are updated, and masks are chosen anew as they change"

    @property
    def keeps_dormant(self) -> bool:
        return True

    @property
    def edits_gradients(self) -> bool:
        return self.scale != 1.0

    @property
    def follows_schedule(self) -> bool:
        return True

    @property
    def chooses_together(self) -> bool:
        return True

    def shards_refusal(self) -> str | None:
        return None

    def settings(self, total_steps: int) -> Settings:
        """The values in force in a run of ``total_steps``. Raises OptionError for one out of range."""
        expect_steps("total_steps", total_steps)
        return Settings(
            total_steps=total_steps,
            rewire_every=self.rewire_every,
            scale=self.scale,
            exploit=self.exploit,
            # The paper's z is about 1000; a run of fewer than 10 000 steps would be reset too seldom to matter.
            reset_every=max(1, min(1000, total_steps // 10)) if self.reset_every is None else self.reset_every,
            fix_after=0.5 if self.fix_after is None else self.fix_after,
            decay=2e-4 if self.decay is None else self.decay,
        )

    def in_force(self, run: Run) -> dict[str, Any]:
        return asdict(self.settings(run.total_steps))

    def edit_gradients(self, run: Run, layers: Sequence[Layer]) -> None:
        scale_gradients(layers, self.scale)

    def after_step(self, run: Run) -> Split:
        settings = self.settings(run.total_steps)
        return Split(rewire=settings.rewires(run.step), dormant_scale=settings.dormant_scale(run.step))


MAGNITUDE = Magnitude()
