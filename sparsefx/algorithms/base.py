"""What an algorithm decides, and when it is asked."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, final

from torch import Tensor

from sparsefx.algorithms.layer import Layer, Run, random_scores, scale_gradients
from sparsefx.algorithms.start import Start
from sparsefx.errors import OptionError
from sparsefx.patterns.base import Pattern

Method = TypeVar("Method", bound="Algorithm")
First = Literal["magnitude", "random"]


class Split(NamedTuple):
    """How weights are split after an optimizer step.

    Attributes:
        rewire: whether each mask becomes the best one for ``|weight|``.
        dormant_scale: factor on the weights outside the mask that was used, before that.
        densities: one a layer, in place of its own.
        reached: one a layer: the weights that the step may change; the others first go back to their dormant value. None: all.
    """

    rewire: bool = False
    dormant_scale: float = 1.0
    densities: Sequence[float] | None = None
    reached: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Algorithm(ABC):
    """How masks begin and how they follow a training run. Its fields are its options.

    An algorithm keeps no state of its own: what it has to remember stands beside each layer (`Layer.state`) and in the run
    (`Run.values`), where checkpoints find it. At each optimizer step it is asked in this order:

    1. ``replaces_step``: whether the optimizer is to leave every weight alone, since a change of masks takes the step's place;
    2. ``edit_gradients``, once for each gradient, where ``edits_gradients``; weights hold all values w here;
    3. ``after_step``, when the optimizer has updated all of w: how to split it into participating and dormant values;
    4. ``move``, when weights hold participating values and zeros again: masks may change there too.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What ``sparsify(..., algorithm=)`` takes."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """One line for people."""

    @property
    def moves(self) -> bool:
        """Whether masks ever change after ``sparsify``."""
        return True

    @property
    def keeps_dormant(self) -> bool:
        """Whether weights keep a value while they do not participate."""
        return False

    @property
    def keeps_moments(self) -> bool:
        """Whether the optimizer keeps moments of weights that do not participate."""
        return self.keeps_dormant

    @property
    def edits_gradients(self) -> bool:
        """Whether `edit_gradients` has to be called at all."""
        return True

    @property
    def follows_schedule(self) -> bool:
        """Whether ``attach(..., density_schedule=)`` can change the density: masks are chosen by magnitude at a given density."""
        return False

    @property
    def chooses_together(self) -> bool:
        """Whether masks change by `Split.rewire` alone, if ever: to the best of the pattern, over layers that go together."""
        return not self.moves

    def refusal(self, pattern: Pattern) -> str | None:
        """Why masks of this pattern cannot move in this way, or None where they can."""
        return None

    def shards_refusal(self) -> str | None:
        """Why masks of parameters that processes share (FSDP2, tensor parallel) cannot move in this way, or None where they can.

        There each process asks for its part of a weight, and whatever concerns a whole layer has to be agreed on.
        """
        return "it looks at whole layers, and each process holds a part of them"

    def default_densities(self, pattern: Pattern) -> str:
        """The ``densities`` of `sparsefx.sparsify` that are taken where the user gives none."""
        return "uniform"

    def first_scores(self, start: Start) -> list[Tensor]:
        """One tensor of scores a weight, in its shape: the first masks keep those of the largest magnitude."""
        return list(start.weights)

    @property
    def start_options(self) -> tuple[str, ...]:
        """Options that act when `sparsefx.sparsify` is called, and no later."""
        return ("first",)

    def first_density(self, density: float) -> float:
        """The density that masks begin with, for a layer whose density is to be ``density``."""
        return density

    def check(self, run: Run) -> None:  # noqa: B027 (most have nothing to refuse)
        """Raise OptionError or OptimizerError where the run cannot be trained in this way. Called by ``attach``."""

    def in_force(self, run: Run) -> dict[str, Any]:
        """The options as plain values, defaults resolved: for people and for checkpoints."""
        return {"total_steps": run.total_steps, **{name: plain(value) for name, value in asdict(self).items()}}

    def begin(self, run: Run, layer: Layer) -> None:  # noqa: B027 (most keep nothing)
        """Called once a layer, before its first step: make ready what stands in ``layer.state``."""

    def replaces_step(self, run: Run) -> bool:
        """Whether ``run.step`` changes masks in place of weights."""
        return False

    def edit_gradients(self, run: Run, layers: Sequence[Layer]) -> None:
        """Change the dense ``layer.gradient`` of some layers in place; called once for each gradient."""
        scale_gradients(layers, 0.0)

    def after_step(self, run: Run) -> Split:
        """How to split all of w; weights and masks may be changed before that."""
        return Split()

    def move(self, run: Run) -> None:  # noqa: B027 (many choose masks in after_step)
        """Change masks when weights are sparse again; `Layer.set_mask` keeps weights and optimizer state in step."""

    @final
    def with_options(self: Method, options: dict[str, Any]) -> Method:
        """This algorithm with other options. Raises OptionError for a name that it does not have, or a value out of range."""
        known = [field.name for field in fields(self) if field.name not in self.start_options]
        for name in options:
            if name in self.start_options:
                raise OptionError(
                    f"{name}={options[name]!r} was given to attach, but acts in sparsify; "
                    f"call sparsify(..., algorithm={type(self).__name__}({name}=...))"
                )
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                meant = f"did you mean {close[0]!r}? " if close else ""
                has = f"it has {', '.join(known)}" if known else "it has none"
                never = "" if self.moves else ", whose masks never move"
                raise OptionError(
                    f"{name}={options[name]!r} was given, but algorithm {self.name!r}{never} has no such option; {meant}{has}"
                )
        return replace(self, **options)


def first_scores_of(first: First, start: Start) -> list[Tensor]:
    """The scores of first masks that are chosen by magnitude or at random."""
    if first == "magnitude":
        return list(start.weights)
    return [random_scores(weight, start.generator) for weight in start.weights]


def plain(value: Any) -> Any:
    """An option as a number, a text, or a name: what a checkpoint may hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", repr(value))
