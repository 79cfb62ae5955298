"""Methods that now and then drop a fraction of each layer's weights and grow as many: their schedule, and parts to choose."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from sparsefx import schedules
from sparsefx.algorithms import scores
from sparsefx.algorithms.allocate import allocate
from sparsefx.algorithms.base import Algorithm, First, first_scores_of
from sparsefx.algorithms.drop_grow import Places, Score, Share, Within, drop_smallest, grow_largest
from sparsefx.algorithms.layer import Layer, Run, has_momentum, keeps_state_apart, no_momentum
from sparsefx.algorithms.options import expect_one_of, expect_share, expect_steps
from sparsefx.algorithms.start import Start
from sparsefx.errors import NonFiniteError, OptimizerError, OptionError
from sparsefx.patterns import Block, Channel, GlobalUnstructured, Pattern, Unstructured
from sparsefx.shards import counts_of

DropSchedule = Literal["cosine", "linear", "constant"]
# What decides how many of the weights dropped in all layers each layer grows, given the layer and how many it has kept.
Redistribute = Share | Literal["nonzero"] | None


@dataclass(frozen=True)
class Parts:
    """What a method is composed of.

    Attributes:
        drop: score of weights that participate; the smallest are dropped. It gives a new tensor, which is overwritten.
        grow: score of all weights, likewise; of those that do not participate, the largest are grown.
        redistribute: a layer's share of all weights that are grown; ``"nonzero"`` takes the number of weights that it kept, and
            None lets each layer grow what it dropped.
        drop_within: ``"layer"``: the smallest of each; ``"all"``: the smallest of all layers.
        grow_within: see `drop_grow.grow_largest`.
        by_sign: whether ``drop`` looks at signs, which blocks and filters do not have.
        needs_momentum: whether any of these reads `Layer.momentum`.
        dense_moments: True lets the dense gradient reach the optimizer, so that weights have moments while they do not
            participate, and keep them when they come and go. False zeroes both.
        replaces_step: whether masks change in place of an optimizer step; `Layer.gradient` is dense then.
    """

    drop: Score
    grow: Score
    redistribute: Redistribute = None
    drop_within: Literal["layer", "all"] = "layer"
    grow_within: Within = "layer"
    by_sign: bool = False
    needs_momentum: bool = False
    dense_moments: bool = False
    replaces_step: bool = False


@dataclass(frozen=True, kw_only=True)
class DropAndGrow(Algorithm):
    """The schedule and the machinery; what is dropped and grown is up to `parts`.

    Attributes:
        drop_fraction: share of a layer's participating weights that the first change of masks drops.
        last_drop_fraction: the share when ``fix_after`` is reached.
        drop_schedule: how it goes from one to the other.
        rewire_every: steps from one change to the next; None stands for once an epoch.
        fix_after: share of the run after which masks stay. At the last step of a run they never change.
        depth_ramp: the first layer's drop fraction as a share of the last layer's; layers between lie on a line.
        first: which weights participate at first.
    """

    drop_fraction: float = 0.5
    last_drop_fraction: float = 0.0
    drop_schedule: DropSchedule = "cosine"
    rewire_every: int | None = None
    fix_after: float = 1.0
    depth_ramp: float = 1.0
    first: First = "random"

    def __post_init__(self) -> None:
        for name in ("drop_fraction", "last_drop_fraction", "fix_after", "depth_ramp"):
            expect_share(name, getattr(self, name))
        expect_one_of("drop_schedule", self.drop_schedule, DropSchedule)
        expect_one_of("first", self.first, First)
        if self.rewire_every is not None:
            expect_steps("rewire_every", self.rewire_every)
        _ = self.parts  # refuses options of the parts

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """What is dropped and grown, and how weights move between layers."""

    @property
    @final
    def keeps_moments(self) -> bool:
        return self.parts.dense_moments

    @property
    @final
    def edits_gradients(self) -> bool:
        return not self.parts.dense_moments

    @final
    def refusal(self, pattern: Pattern) -> str | None:
        parts, name = self.parts, pattern.name
        shares = parts.redistribute is not None or parts.grow_within == "all"
        if shares and pattern.fixed_density is not None:
            return (
                f"it moves weights between layers, but with pattern {name!r} each layer's density is always "
                f"{pattern.fixed_density:g}; switch redistribution and global growth off, or use pattern 'unstructured'"
            )
        if shares and isinstance(pattern, Channel):
            return (
                "it moves weights between layers, whose filters differ in size; use pattern 'unstructured', or no redistribution"
            )
        if (shares or parts.drop_within == "all") and isinstance(pattern, GlobalUnstructured):
            return (
                "the pattern shares weights between layers by one ranking, and this method by its own rule; use pattern "
                "'unstructured' (densities='global' gives it the same start)"
            )
        if parts.drop_within == "all" and isinstance(pattern, Channel):
            return "filters of different layers differ in size and cannot be ranked together; drop within each layer"
        if parts.by_sign and isinstance(pattern, (Block, Channel)):
            return f"it drops by sign, and the weights that come and go together in pattern {name!r} have no common sign"
        if parts.grow_within == "neuron" and not isinstance(pattern, Unstructured):
            return (
                f"it divides growth among the neurons of a layer, which pattern {name!r} does not leave free; use 'unstructured'"
            )
        return None

    def shards_refusal(self) -> str | None:
        parts = self.parts
        if parts.by_sign:
            return "it ranks weights of each sign, which it has to see all of; drop by magnitude"
        if parts.grow_within == "neuron":
            return "it divides growth among the neurons of a whole layer; grow by 'momentum' or 'global'"
        return None

    @final
    def first_scores(self, start: Start) -> list[Tensor]:
        return first_scores_of(self.first, start)

    @final
    def check(self, run: Run) -> None:
        self.every(run)
        if self.parts.needs_momentum:
            if keeps_state_apart(run.optimizer):
                raise OptimizerError(
                    f"algorithm {self.name!r} moves masks by momentum, but with {type(run.optimizer).__name__} each process has "
                    "that of its own parameters only; use an optimizer that keeps all of it, fully_shard, or algorithm 'rigl'"
                )
            for layer in run.layers:
                if not has_momentum(layer.group):
                    raise OptimizerError(no_momentum(run.optimizer, layer.name))

    @final
    def in_force(self, run: Run) -> dict[str, Any]:
        return {**Algorithm.in_force(self, run), "rewire_every": self.every(run)}

    @final
    def every(self, run: Run) -> int:
        """Steps from one change of masks to the next. Raises OptionError where neither option tells."""
        every = self.rewire_every if self.rewire_every is not None else run.steps_per_epoch
        if every is None:
            raise OptionError(
                f"algorithm {self.name!r} changes masks once an epoch; give attach steps_per_epoch= (optimizer steps, "
                "len(loader) where each batch makes one), or rewire_every="
            )
        return every

    @final
    def changes(self, run: Run) -> bool:
        """Whether masks change at ``run.step``."""
        return run.step % self.every(run) == 0 and run.step < min(self.fix_after * run.total_steps, run.total_steps)

    @final
    def fraction(self, run: Run) -> float:
        """The share of weights to drop at ``run.step``, without the ramp."""
        last = max(1, round(self.fix_after * run.total_steps))
        if self.drop_schedule == "constant":
            return self.drop_fraction
        schedule = schedules.cosine if self.drop_schedule == "cosine" else schedules.linear
        return schedule(self.drop_fraction, self.last_drop_fraction, first_step=0, last_step=last)(run.step)

    @final
    def replaces_step(self, run: Run) -> bool:
        return self.parts.replaces_step and self.changes(run)

    @final
    def move(self, run: Run) -> None:
        if not self.changes(run):
            return
        parts = self.parts
        fraction, last = self.fraction(run), max(1, len(run.layers) - 1)
        fractions = [fraction * (self.depth_ramp + (1 - self.depth_ramp) * depth / last) for depth in range(len(run.layers))]
        if len(run.layers) == 1:
            fractions = [fraction]
        found = [(layer, share) for layer, share in zip(run.layers, fractions, strict=True) if _can_move(layer, parts)]
        if found:
            drop_and_grow([layer for layer, _ in found], parts, [share for _, share in found])


def _can_move(layer: Layer, parts: Parts) -> bool:
    # A layer that no gradient reached has nothing to grow by.
    if not layer.trains or (parts.replaces_step and not layer.has_gradient):
        return False
    if parts.replaces_step and not bool(torch.isfinite(layer.gradient).all()):
        raise NonFiniteError(
            f"NaN or infinity in the gradient of {layer.name} at step {layer.run.step}, by which its mask was to move: training "
            "diverged. Go back to the last checkpoint; lower the learning rate or clip gradients"
        )
    return True


def drop_and_grow(layers: list[Layer], parts: Parts, fractions: list[float]) -> None:
    """Change the masks of ``layers`` once: drop ``fractions`` of their participating weights, and grow as many in all."""
    places = [Places(layer) for layer in layers]
    one_ranking = all(isinstance(layer.pattern, GlobalUnstructured) for layer in layers)
    if one_ranking or parts.drop_within == "all" or parts.grow_within == "all":
        _among_all_layers(places, parts, fractions, one_ranking=one_ranking)
        return
    # Layer by layer, so that no more than one layer's scores are in memory at a time.
    dropped = [place.dropped(fraction) for place, fraction in zip(places, fractions, strict=True)]
    counts = _counts(places, parts, [place.count - gone for place, gone in zip(places, dropped, strict=True)])
    for place, fraction, count in zip(places, fractions, counts, strict=True):
        kept = drop_smallest([place], [place.drop_scores(parts.drop)], [fraction], together=False)
        grow = [place.scores(parts.grow(place.layer))]
        grow_largest([place], kept, grow, [count], within=parts.grow_within, clear_moments=not parts.dense_moments)


def _among_all_layers(places: list[Places], parts: Parts, fractions: list[float], *, one_ranking: bool) -> None:
    drops = [place.drop_scores(parts.drop) for place in places]
    grows = [place.scores(parts.grow(place.layer)) for place in places]
    kept = drop_smallest(places, drops, fractions, together=one_ranking or parts.drop_within == "all")
    counts = _counts(places, parts, counts_of(kept, [place.shards for place in places]))
    within: Within = "all" if one_ranking else parts.grow_within
    grow_largest(places, kept, grows, counts, within=within, clear_moments=not parts.dense_moments)


def _counts(places: list[Places], parts: Parts, left: list[int]) -> list[int]:
    """How many units each layer grows, given how many it has left."""
    dropped = [place.count - count for place, count in zip(places, left, strict=True)]
    if parts.redistribute is None:
        return dropped
    shares = (
        [float(count) for count in left]
        if parts.redistribute == "nonzero"
        else [parts.redistribute(place.layer) for place in places]
    )
    return allocate(sum(dropped), shares, [place.total - count for place, count in zip(places, left, strict=True)])


def _own(score: Score) -> Score:
    """The score as a new tensor, whatever a function of the user's gives."""
    return lambda layer: score(layer).clone()


@dataclass(frozen=True, kw_only=True)
class Composed(DropAndGrow):
    """A method of your own. Scores are functions of a `Layer`; `sparsefx.algorithms.scores` has the usual ones.

    Attributes:
        label: its name.
        drop: score of weights that participate: the smallest are dropped.
        grow: score of all weights: the largest of the others are grown.
        redistribute: a layer's share of all that are grown, as a function of the layer; None: each grows what it dropped.
        instead_of_step: whether a change of masks takes the place of an optimizer step, as in RigL.
        masks_gradients: whether weights that do not participate get no gradient and have no moments in the optimizer. Leave
            it False to grow by momentum, or by gradients without ``instead_of_step``.
    """

    label: str
    drop: Callable[[Layer], Tensor] = scores.magnitude
    grow: Callable[[Layer], Tensor] = scores.random
    redistribute: Callable[[Layer], float] | None = None
    instead_of_step: bool = False
    masks_gradients: bool = False

    @property
    def name(self) -> str:
        return self.label

    @property
    def summary(self) -> str:
        return "a method of your own"

    def shards_refusal(self) -> str | None:
        return "functions of your own would see the part of a layer that one process holds"

    @property
    def parts(self) -> Parts:
        return Parts(
            _own(self.drop),
            _own(self.grow),
            redistribute=self.redistribute,
            dense_moments=not self.masks_gradients,
            replaces_step=self.instead_of_step,
        )
