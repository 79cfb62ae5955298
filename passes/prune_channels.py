"""Finds the channels that a model can do without, and cuts them out; nothing is handed out that was not compared in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsefx.errors import CaptureError, VerificationError
from sparsefx.machine import machine_multiple
from sparsefx.passes.channels.build import build_plan
from sparsefx.passes.channels.carriers import choose_carriers
from sparsefx.passes.channels.cut import cut
from sparsefx.passes.channels.graph import ChannelGraph, capture_channels
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.merge import Layer, merge_reads
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.passes.channels.propagation import Propagation
from sparsefx.passes.channels.solve import Solution
from sparsefx.passes.channels.trial import Failure, ShapeTrial, ValueTrial, runs_in
from sparsefx.passes.channels.widths import holds, keep_groups, pattern_of, round_widths
from sparsefx.passes.propagate_channels import propagate_channels

TOLERANCE = 1e-9
"""Largest difference in float64, relative to an output's largest value, that rounding accounts for."""
NOISE = 30
"""How many times the model's own noise under rounded weights is still rounding, where the model is noisier than that."""


@dataclass(frozen=True)
class _Group:
    """Channels whose number the code of some modules may hold: what one class does at one place of its forward.

    Attributes:
        labels: of the channels.
        what: the place, in words.
    """

    labels: tuple[Integers, ...]
    what: str


class ChannelPlanner:
    """Plans the cut of one model for some example inputs.

    Args:
        model: in any mode.
        args, kwargs: example inputs.
        multiple: widths are rounded up to multiples of it where enough channels are there; ``"auto"`` for the machine's.
        trains: whether the next training step has to give the same loss too, so that only constants of both modes count.
        seed: of the random inputs that the result is compared on.
        progress: called with what is done next.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        multiple: int | str,
        trains: bool,
        seed: int,
        progress: Callable[[str], None],
    ) -> None:
        self._model = model
        self._arguments = (args, kwargs)
        self._seed = seed
        self._progress = progress
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._multiple = machine_multiple(device) if multiple == "auto" else int(multiple)
        progress("following channels")
        self._told: dict[str, str] = {}
        self._unread: tuple[str, ...] = ()
        self._trains = trains
        self._graphs = self._captured(trains)
        self._modes = tuple(graph.training for graph in self._graphs)
        if self._told and runs_in(model, self._arguments, training=True):
            self._modes = (False, True)
        self._types = {path: type(module).__qualname__ for path, module in model.named_modules()}
        self._shapes = ShapeTrial(model, self._arguments, self._modes)
        self._follow(only_zeros=False)

    def _follow(self, *, only_zeros: bool) -> None:
        self._propagation: Propagation = propagate_channels(self._model, self._graphs, only_zeros=only_zeros)
        self._roots = self._propagation.labels.roots()
        self._layers: list[Layer] = merge_reads(self._model, self._propagation, self._roots, trains=self._trains)
        self._patterns = [(layer, pattern) for layer in self._layers if (pattern := pattern_of(self._model, layer)) is not None]
        self._whole: list[_Group] = []
        self._sized: set[str] = set()
        self._tried: set[str] = set()

    def _captured(self, trains: bool) -> list[ChannelGraph]:
        graphs = [capture_channels(self._model, *self._arguments)]
        read = graphs[0].read()
        # Auxiliary heads run in train mode only; without them the result could not be trained.
        unread = [name for name, _ in self._model.named_parameters() if name not in read]
        if trains or unread:
            try:
                graphs.append(capture_channels(self._model, *self._arguments, training=True))
            except CaptureError as error:
                if trains:
                    raise
                self._told["train mode"] = _unread_told(unread, error)
            else:
                self._unread = _owners(name for name in unread if name not in graphs[1].read())
        return graphs

    def shaped_plan(self) -> ChannelPlan:
        """The largest cut with which the model runs; values are not compared."""
        self._progress("running the smaller model")
        return self._settled(self._shapes.failure)

    def plan(self) -> ChannelPlan:
        """The largest cut that leaves every output as it is.

        Raises:
            VerificationError: outputs differ although every group of which the model's code may hold the number was kept whole.
        """
        plan = self.shaped_plan()
        if plan.empty:
            return plan
        self._progress("comparing in float64")
        shapes, values = self._shapes, ValueTrial(self._model, self._arguments, self._seed)
        differences: list[float] = []

        def differs(candidate: ChannelPlan) -> Failure | None:
            differences.append(values.difference(candidate))
            if differences[-1] <= TOLERANCE or differences[-1] <= NOISE * values.noise():
                return None
            return shapes.failure(candidate) or Failure("", f"outputs differ by {differences[-1]:.1e} of their largest value")

        failure = differs(plan)
        if failure is not None:
            plan = self._settled(lambda candidate: shapes.failure(candidate) or differs(candidate), failure)
        if plan.empty or (elsewhere := self._differs_elsewhere(plan, values)) is None:
            return replace(plan, report=replace(plan.report, difference=differences[-1] if not plan.empty else 0.0))
        # What looks constant in a graph may be another number in other sizes; zeros mostly are zeros there too.
        self._told["constants"] = f"constants other than zero: {elsewhere.told}"
        self._follow(only_zeros=True)
        plan = self._settled(
            lambda candidate: shapes.failure(candidate) or differs(candidate) or self._differs_elsewhere(candidate, values)
        )
        return replace(plan, report=replace(plan.report, difference=differences[-1] if not plan.empty else 0.0))

    def _differs_elsewhere(self, plan: ChannelPlan, values: ValueTrial) -> Failure | None:
        found = values.difference_elsewhere(plan)
        if found <= TOLERANCE or found <= NOISE * values.noise():
            return None
        return Failure("", f"with inputs of other sizes or numbers outputs differ by {found:.1e} of their largest value")

    def _settled(self, failure: Callable[[ChannelPlan], Failure | None], first: Failure | None = None) -> ChannelPlan:
        """A plan that the test has nothing against: groups that code holds the number of are found and kept whole."""
        while True:
            plan = self._solved()
            if plan.empty:
                return plan
            found = first or failure(plan)
            first = None
            if found is None:
                return plan
            if self._goes_with_sizes(found, failure):
                continue
            suspects = self._suspects(found) or self._everything()
            if not suspects:
                raise VerificationError(
                    f"the model without its empty channels does not give the same outputs ({found.told} "
                    f"in {found.where or 'the model'}), and nothing that was kept whole helped. This is a bug in prune_channels; "
                    "the model is as before. Please report it"
                )
            self._whole += suspects
            self._admit(suspects, failure, found)

    def _goes_with_sizes(self, found: Failure, failure: Callable[[ChannelPlan], Failure | None]) -> bool:
        """Whether modules of a class in which the run broke get through once the sizes of parts that they hold are changed."""
        for kind in dict.fromkeys(self._types.get(split.where, "") for split in self._propagation.facts.splits):
            if kind in self._tried or not self._is_inside(found, kind):
                continue
            self._tried.add(kind)
            before = self._solved().attributes
            self._sized.add(kind)
            plan = self._solved()
            if plan.attributes != before and not ((again := failure(plan)) and self._is_inside(again, kind)):
                return True
            self._sized.discard(kind)
        return False

    def _is_inside(self, failure: Failure, kind: str) -> bool:
        """Whether a run broke in a module of this class, or in one that it calls."""
        where = failure.where.split(".")
        return any(self._types.get(".".join(where[:depth])) == kind for depth in range(len(where) + 1))

    def _admit(self, suspects: Sequence[_Group], failure: Callable[[ChannelPlan], Failure | None], found: Failure) -> None:
        """Of groups that are kept whole, let those go again that are innocent."""
        if len(suspects) == 1:
            self._told[suspects[0].what] = f"{suspects[0].what}: {found.told}"
            return
        half = len(suspects) // 2
        for part in (suspects[:half], suspects[half:]):
            kept = [group for group in self._whole if not any(group is suspect for suspect in part)]
            before, self._whole = self._whole, kept
            again = failure(self._solved())
            if again is not None:
                self._whole = before
                self._admit(part, failure, again)

    def _suspects(self, failure: Failure) -> list[_Group]:
        """Groups that lose channels and change their shape in the module where the run broke, or in modules of its class."""
        stays = self._solution.stays
        types = self._types
        whole = {group.what for group in self._whole}
        by_place: dict[str, list[Integers]] = {}
        counted: dict[str, int] = {}
        for path, labels in self._propagation.facts.views:
            counted[path] = counted.get(path, -1) + 1
            if stays[self._roots[labels]].all():
                continue
            what = f"change of shape {counted[path]} in {types.get(path, path)}"
            if what not in whole:
                by_place.setdefault(what, []).append(labels)
        near = types.get(failure.where)
        groups = [_Group(tuple(labels), what) for what, labels in by_place.items()]
        mine = [group for group in groups if near is not None and group.what.endswith(f" in {near}")]
        return (mine if failure.where else []) or groups

    def _everything(self) -> list[_Group]:
        """The outputs of every layer that loses some, and what else parameters lose: code may hold their number in ways that no
        op shows."""
        whole = {group.what for group in self._whole}
        stays = self._solution.stays.copy()
        groups = []
        for layer in self._layers:
            if not stays[layer.out].all() and (what := f"outputs of {layer.read.weight.name}") not in whole:
                groups.append(_Group((layer.read.out,), what))
        for group in groups:
            stays[self._roots[group.labels[0]]] = True
        for (name, axis), labels in self._propagation.facts.axes.items():
            if not stays[self._roots[labels]].all() and (what := f"axis {axis} of {name}") not in whole:
                groups.append(_Group((labels,), what))
                stays[self._roots[labels]] = True
        return groups

    def _solved(self) -> ChannelPlan:
        unrounded = self._solution_for(1)
        self._solution = self._solution_for(self._multiple) if self._multiple > 1 else unrounded
        return build_plan(
            self._model,
            self._propagation.facts,
            self._layers,
            self._solution,
            unrounded=unrounded,
            multiple=self._multiple,
            refused=tuple(self._told.values()),
            unread=self._unread,
            sized=lambda path: self._types.get(path) in self._sized,
        )

    def _solution_for(self, multiple: int) -> Solution:
        solution = Solution(self._propagation.facts, self._layers, self._roots)
        for group in self._whole:
            for labels in group.labels:
                solution.need(self._roots[labels])
        solution.settle()
        choose_carriers(solution, self._layers)
        while self._repaired(solution):
            solution.settle()
            choose_carriers(solution, self._layers)
        round_widths(solution, self._layers, multiple)
        choose_carriers(solution, self._layers)
        while self._repaired(solution):
            solution.settle()
            choose_carriers(solution, self._layers)
        return solution

    def _repaired(self, solution: Solution) -> bool:
        """Keep whole groups of four (or M) where a weight would lose its N:M pattern; True where some were kept."""
        changed = False
        for layer, (n, m, both) in self._patterns:
            rows, columns = solution.stays[layer.out], solution.stays[layer.into]
            if rows.all() and columns.all():
                continue
            read = layer.read
            if read.groups > 1:
                changed |= solution.keep(np.concatenate([layer.out, layer.into]))
                continue
            axes = {read.out_axis: torch.from_numpy(rows.nonzero()[0]), read.in_axis: torch.from_numpy(columns.nonzero()[0])}
            left = cut(read.weight.tensor, axes)
            if not holds(left, read.in_axis, n, m):
                changed |= keep_groups(solution, layer.into, m)
            if both and not holds(left, read.out_axis, n, m):
                changed |= keep_groups(solution, layer.out, m)
        return changed


def _owners(names: Iterable[str]) -> tuple[str, ...]:
    """Modules that hold these parameters; those of the model itself by their own names."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def _unread_told(unread: Sequence[str], error: CaptureError) -> str:
    """Which layers eval mode does not run, and that train mode could not be followed to cut them along."""
    owners = _owners(unread)
    shown = ", ".join(owners[:3]) + (f" and {len(owners) - 3} more" if len(owners) > 3 else "")
    return (
        f"{shown}: eval mode does not run it, and the model cannot be captured in train mode to cut it along "
        f"({str(error.__cause__ or error).strip().splitlines()[0][:160]})"
    )
