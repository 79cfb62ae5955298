"""What an algorithm decides: whether masks move, what becomes of dormant values, and its defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

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
        check_every: steps between two looks at the device's NaN flag (a look makes the host wait for the device).
    """

    total_steps: int
    rewire_every: int
    scale: float
    exploit: Exploit
    reset_every: int
    fix_after: float
    decay: float
    check_every: int

    def __post_init__(self) -> None:
        for name in ("total_steps", "rewire_every", "reset_every", "check_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r} was given; expected a whole number of steps, at least 1")
        for name in ("scale", "fix_after", "decay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise OptionError(f"{name}={value!r} was given; expected a number from 0 to 1")
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


@dataclass(frozen=True)
class Algorithm:
    """How masks follow a training run.

    Attributes:
        name: what ``sparsify(..., algorithm=)`` takes.
        summary: one line for people.
        moves: whether masks ever change after ``sparsify``.
        keeps_dormant: whether weights keep a value while they do not participate.
    """

    name: str
    summary: str
    moves: bool
    keeps_dormant: bool

    def settings(
        self,
        total_steps: int,
        *,
        rewire_every: int | None = None,
        scale: float | None = None,
        exploit: Exploit | None = None,
        reset_every: int | None = None,
        fix_after: float | None = None,
        decay: float | None = None,
        check_every: int | None = None,
    ) -> Settings:
        """The settings for a run of ``total_steps``; None stands for the algorithm's own default.

        Raises:
            OptionError: a value out of range, or an option that has no effect with this algorithm or ``exploit``.
        """
        if not self.moves:
            given = {
                "rewire_every": rewire_every,
                "scale": scale,
                "exploit": exploit,
                "reset_every": reset_every,
                "fix_after": fix_after,
                "decay": decay,
            }
            wrong = [name for name, value in given.items() if value is not None]
            if wrong:
                raise OptionError(
                    f"{', '.join(wrong)} was given, but the masks of algorithm {self.name!r} never move; "
                    "leave it out, or sparsify with algorithm='magnitude'"
                )
        chosen: Exploit = exploit if exploit is not None else ("reset" if self.moves else "none")
        needs = {"reset_every": "reset", "fix_after": "fix", "decay": "regularize"}
        for name, value in (("reset_every", reset_every), ("fix_after", fix_after), ("decay", decay)):
            if value is not None and chosen != needs[name]:
                raise OptionError(
                    f"{name}={value!r} was given with exploit={chosen!r}; it only acts with exploit={needs[name]!r}"
                )
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
            raise OptionError(f"total_steps={total_steps!r} was given; expected a whole number of steps, at least 1")
        return Settings(
            total_steps=total_steps,
            rewire_every=1 if rewire_every is None else rewire_every,
            scale=(1.0 if self.moves else 0.0) if scale is None else scale,
            exploit=chosen,
            # The paper's z is about 1000; a run of fewer than 10 000 steps would be reset too seldom to matter.
            reset_every=max(1, min(1000, total_steps // 10)) if reset_every is None else reset_every,
            fix_after=0.5 if fix_after is None else fix_after,
            decay=2e-4 if decay is None else decay,
            check_every=100 if check_every is None else check_every,
        )


SETTING_NAMES = tuple(field.name for field in fields(Settings))
