"""MaskRuntime: keeps masked parameters sparse at rest and moves their masks, through the optimizer's own step hooks.

Between steps a masked Parameter holds participating values p and zeros. The step pre-hook puts the dormant values n
back, so that the optimizer updates all of w; the post-hook lets exploitation act on n, chooses the mask, and splits w
into p and n again ("Advances in Sparse Neural Model Training", algorithm 1).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.checkpoint import adopt, cut_to_one_threshold
from sparsefx.coupled_records import couple_loaded
from sparsefx.errors import NonFiniteError
from sparsefx.follow import (
    Followed,
    broadcast_generator,
    broadcast_masks,
    owners_of,
    plan_of,
    refuse_double_following,
    refuse_shards,
    refuse_split_channels,
    refuse_split_threshold,
    runtime_of,
)
from sparsefx.model_record import model_records, watch
from sparsefx.ops.split import merge, split
from sparsefx.runtime_state import STATE_VERSION, check_state, of_this_process
from sparsefx.runtime_steps import is_no_training_step, step_was_skipped
from sparsefx.schedules import DensitySchedule, density_at
from sparsefx.sharded_records import reshard, share_out
from sparsefx.shards import anywhere, by_group, is_distributed
from sparsefx.sparse_parameter import SparseParameter, sparse_parameters

_AS_IT_IS = Split()
# On a gradient that was edited: its version after that.
_EDITED = "_sparsefx_edited"


class _OptimizerHooks:
    """The step hooks on one optimizer, and the steps it has made."""

    def __init__(self, run: Run, followed: list[Followed], runtime: MaskRuntime) -> None:
        self.run = run
        self.optimizer = optimizer = run.optimizer
        self.followed = followed
        self.step = 0
        self._runtime = runtime
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._replaces = False
        self._densities: list[float] | None = None
        self._held = _count(optimizer)
        self._non_finite: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for entry in self.followed:
            if entry.alive():
                entry.record.settle(entry.weight())

    def _merge(self) -> None:
        """Put dormant values back into the weights of the layers that were looked at last."""
        # Those that a step which raised has left merged stay so: merging twice would lose them.
        layers = [layer for layer in self.run.layers if not layer.record.merged]
        weights, records = [layer.weight for layer in layers], [layer.record for layer in layers]
        for weight, record in zip(weights, records, strict=True):
            record.follow(weight)
        merge(weights, records)
        for record in records:
            record.merged = True

    def _split(self, choice: Split = _AS_IT_IS, densities: Sequence[float] | None = None) -> Tensor:
        weights: list[Tensor] = []
        records: list[SparseParameter] = []
        for entry in self.followed:
            weight = entry.weight()  # anew: an optimizer may have put other memory in its place
            if entry.record.merged:
                entry.record.follow(weight)
                weights.append(weight)
                records.append(entry.record)
        flag = split(
            weights,
            records,
            dormant_scale=choice.dormant_scale,
            rewire=choice.rewire,
            densities=densities,
            reached=choice.reached,
        )
        for record in records:
            record.merged = False
        return flag

    def _prepare_gradients(self) -> None:
        """What the algorithm makes of the gradients, or none at all where a change of masks takes the step's place."""
        algorithm = self._runtime.algorithm
        if self._replaces:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._hidden.append((parameter, parameter.grad))
                        parameter.grad = None
            return
        if not algorithm.edits_gradients:
            return
        # A step that is tried again must not edit a gradient twice. The mark stands on the gradient itself: another one may come
        # to lie where it was.
        new: list[tuple[Layer, Tensor]] = []
        for layer in self.run.layers:
            held = layer.parameter.grad
            if held is not None and held.__dict__.get(_EDITED) != layer.gradient._version:
                new.append((layer, held))
        if new:
            algorithm.edit_gradients(self.run, [layer for layer, _ in new])
        for layer, held in new:
            held.__dict__[_EDITED] = layer.gradient._version

    def _give_back_gradients(self) -> None:
        for parameter, gradient in self._hidden:
            if parameter.grad is None:
                parameter.grad = gradient
        self._hidden.clear()

    def look_at_layers(self) -> None:
        """Bring the run's layers to what the model holds now."""
        if any(entry.record.shards is not None and not is_distributed(entry.parameter()) for entry in self.followed):
            self._runtime.reshard()
        self.run.layers = [Layer(entry.name, entry.parameter(), entry.record, self.run) for entry in self.followed]

    @torch.no_grad()
    def begin(self, entries: Iterable[Followed]) -> None:
        """Let the algorithm make ready what it keeps beside weights that are not those of the last step."""
        for entry in entries:
            entry.record.state.clear()
            self._runtime.algorithm.begin(self.run, Layer(entry.name, entry.parameter(), entry.record, self.run))
            entry.record.mask_before = None

    def begin_loaded(self) -> None:
        """The same for weights that a checkpoint with another mask was loaded into, of which what is kept says nothing.

        Averages that were loaded to look at, and exchanged for the weights of before again, are none.
        """
        for entry in self.followed:
            record, before = entry.record, entry.record.mask_before
            if before is None:
                continue
            record.mask_before = None
            if anywhere(not torch.equal(before.to(record.mask.device), record.mask), record.shards):
                self.begin([entry])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if is_no_training_step(optimizer):
            return None
        if _count(optimizer) != self._held:
            self._runtime.follow_new(self)
            self._held = _count(optimizer)
        # Whatever can be refused is refused before the weights change.
        schedule = self._runtime.density_schedule
        if schedule is not None:
            self._densities = [
                entry.record.pattern.resolve_density(density_at(schedule, self.step + 1)) for entry in self.followed
            ]
        closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
        self._give_back_gradients()
        self.look_at_layers()
        self.begin_loaded()
        self.run.step = self.step + 1
        self._replaces = self._runtime.algorithm.replaces_step(self.run)
        self._merge()
        if not callable(closure):
            self._prepare_gradients()
            return None

        def sparse_closure() -> Any:
            """The user's closure evaluates the model, so it must see the sparse weights, whatever the optimizer did."""
            with torch.no_grad():
                self._split()
            self._give_back_gradients()
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                self.look_at_layers()
                self._merge()
                self._prepare_gradients()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": sparse_closure}
        return (args[0], sparse_closure, *args[2:]), kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_no_training_step(optimizer):
            return
        self._give_back_gradients()
        if step_was_skipped(optimizer):
            self._split()
            return
        self.step += 1
        for layer in self.run.layers:
            # The next step's is another, though it may be written into the same tensor unseen (``grad.data.copy_``).
            if layer.parameter.grad is not None:
                layer.parameter.grad.__dict__.pop(_EDITED, None)
        algorithm = self._runtime.algorithm
        choice = _AS_IT_IS if self._replaces else algorithm.after_step(self.run)
        scheduled = self._densities is not None and choice.rewire
        densities = self._densities if scheduled else choice.densities
        flag = self._split(choice, densities)
        if scheduled and self._densities is not None:
            for entry, density in zip(self.followed, self._densities, strict=True):
                entry.record.density = density
        self._look_for_non_finite(flag)
        algorithm.move(self.run)

    def _look_for_non_finite(self, flag: Tensor | bool) -> None:
        if isinstance(flag, Tensor) and flag.device.type != "cpu":
            self._non_finite = flag if self._non_finite is None else self._non_finite | flag
            if self.step % self._runtime.check_every:
                return
            flag, self._non_finite = self._non_finite, None
        # Where weights are sharded, all processes stop, whichever of them found it.
        shared = by_group([entry.record.shards for entry in self.followed])
        first = [self.followed[positions[0]].record.shards for positions in shared.values()]
        if not any([bool(flag), *(anywhere(bool(flag), shards) for shards in first)]):
            return
        bad = [
            entry.name
            for entry in self.followed
            if not bool(torch.isfinite(entry.weight()).all())
            or (entry.record.compact is not None and not bool(torch.isfinite(entry.record.compact).all()))
        ]
        raise NonFiniteError(
            f"NaN or infinity in the weights of {', '.join(bad[:5]) or 'another process'} after optimizer step {self.step}: "
            "training diverged. Go back to the last checkpoint; lower the learning rate or clip gradients"
        )


def _warn_if_masks_stay(algorithm: Algorithm, run: Run) -> None:
    every = algorithm.in_force(run).get("rewire_every")
    if algorithm.moves and isinstance(every, int) and every >= run.total_steps > 1:
        warnings.warn(
            f"algorithm {algorithm.name!r} changes masks every {every} steps, but the run has {run.total_steps}, so that they "
            "never move; give attach(..., rewire_every=) a smaller number",
            stacklevel=4,
        )


class MaskRuntime:
    """What `attach` returns: follows optimizers and moves masks. Has a state_dict; see also `report`."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        algorithm: Algorithm,
        *,
        total_steps: int,
        steps_per_epoch: int | None = None,
        generator: torch.Generator | None = None,
        density_schedule: DensitySchedule | None = None,
        check_every: int = 100,
        replace: bool = False,
    ) -> None:
        self.algorithm = algorithm
        self.density_schedule = density_schedule
        self.check_every = check_every
        self._model = model
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        share_out(model)
        owners = owners_of(model)
        self._names = tuple(owners)
        plan = plan_of(optimizers, owners)
        refuse_split_threshold(owners, plan)
        refuse_split_channels(algorithm, owners, plan)
        refuse_shards(algorithm, owners)
        self._hooks: list[_OptimizerHooks] = []
        runs = [Run(optimizer, total_steps, steps_per_epoch, self._generator) for optimizer in optimizers]
        for run, names in zip(runs, plan, strict=True):
            run.layers = [Layer(name, owners[name].parameter(), owners[name].record, run) for name in names]
            algorithm.check(run)
        _warn_if_masks_stay(algorithm, runs[0])
        refuse_double_following(owners, plan, replace)
        broadcast_masks(model, self._generator)
        broadcast_generator(owners, self._generator)
        for entry in owners.values():
            adopt(entry.record, entry.parameter())
            entry.record.left_out = None
        cut_to_one_threshold([(entry.weight(), entry.record) for entry in owners.values()])
        couple_loaded([entry.weight() for entry in owners.values()], [entry.record for entry in owners.values()])
        for run, names in zip(runs, plan, strict=True):
            self._hooks.append(_OptimizerHooks(run, [owners[name] for name in names], self))
            self._claim(self._hooks[-1], self._hooks[-1].followed)

    def reshard(self) -> None:
        """Put FSDP2's sharded parameters in place, where an evaluation has left whole ones in the model."""
        reshard(self._model)

    def _claim(self, hooks: _OptimizerHooks, entries: Iterable[Followed]) -> None:
        for _, model_record in model_records(self._model):
            model_record.attached = True
        for entry in entries:
            entry.record.runtime = weakref.ref(self)
            if entry.record.warning is not None:
                entry.record.warning.remove()
                entry.record.warning = None
        hooks.begin(entries)

    def follow_new(self, hooks: _OptimizerHooks) -> None:
        """Follow masked parameters that ``optimizer.add_param_group`` brought since (called by the hooks)."""
        free = {name: entry for name, entry in owners_of(self._model).items() if runtime_of(entry) is None}
        new = [free[name] for name in plan_of([hooks.optimizer], free, required=False)[0]]
        order = {name: number for number, name in enumerate(owners_of(self._model))}
        hooks.followed = sorted([*hooks.followed, *new], key=lambda entry: order[entry.name])
        self._claim(hooks, new)

    @property
    def unfollowed(self) -> tuple[str, ...]:
        """Masked parameters that none of the optimizers holds: their masks stay."""
        held = {entry.name for hooks in self._hooks for entry in hooks.followed}
        return tuple(name for name in self._names if name not in held)

    def follows(self, model: nn.Module) -> bool:
        """Whether the masks that this runtime moves are those of ``model``."""
        records = {id(record) for _, _, record in sparse_parameters(model)}
        return all(id(entry.record) in records for hooks in self._hooks for entry in hooks.followed)

    @property
    def step(self) -> int:
        """Optimizer steps made since the start of the run; with several optimizers, of the one with most."""
        return max(hooks.step for hooks in self._hooks)

    def detach(self) -> None:
        """Stop following: masks stay where they are, and the optimizers step as if sparsefx had never been there."""
        for hooks in self._hooks:
            hooks.remove()
            for entry in hooks.followed:
                entry.record.runtime = None
        if all(entry.alive() for hooks in self._hooks for entry in hooks.followed):
            for _, model_record in model_records(self._model):
                model_record.attached = False
            watch(self._model)

    def report(self) -> dict[str, Any]:
        """The values in force, the steps made, and which masked parameters no optimizer updates."""
        return {
            "algorithm": self.algorithm.name,
            **self.algorithm.in_force(self._hooks[0].run),
            "check_every": self.check_every,
            "density_schedule": self.density_schedule is not None,
            "step": self.step,
            "optimizers": [type(hooks.optimizer).__name__ for hooks in self._hooks],
            "parameters": sum(len(hooks.followed) for hooks in self._hooks),
            "unfollowed": list(self.unfollowed),
        }

    def state_dict(self) -> dict[str, Any]:
        """Masks, dormant values, step counts and the random generator, as copies. Tensors and plain values only
        (``weights_only`` loads it); of sharded parameters DTensors, as ``torch.distributed.checkpoint`` takes them."""
        reshard(self._model)
        parameters: dict[str, dict[str, Any]] = {}
        for hooks in self._hooks:
            hooks.begin_loaded()
            for entry in hooks.followed:
                record, dormant = entry.record, entry.record.dormant
                parameters[entry.name] = {
                    "pattern": record.pattern.name,
                    "density": record.density,
                    "target": record.target,
                    "mask": record.distributed(record.mask.clone()),
                    "dormant": None if dormant is None else record.distributed(dormant),
                    "state": {key: record.distributed(value.clone()) for key, value in record.state.items()},
                }
        return {
            "version": STATE_VERSION,
            "algorithm": self.algorithm.name,
            "settings": self.algorithm.in_force(self._hooks[0].run),
            "steps": [hooks.step for hooks in self._hooks],
            "values": [dict(hooks.run.values) for hooks in self._hooks],
            "generator": self._generator.get_state(),
            "parameters": parameters,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise the StateError that `load_state_dict` would; nothing is changed."""
        records = {entry.name: entry.record for hooks in self._hooks for entry in hooks.followed}
        check_state(of_this_process(state, records), records, self.algorithm.name, len(self._hooks))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`, all or nothing. Load the model's own state_dict too, before or after.

        Raises:
            StateError: the state is of another version, algorithm, set of parameters, pattern or shape.
        """
        reshard(self._model)
        entries = {entry.name: entry for hooks in self._hooks for entry in hooks.followed}
        state = of_this_process(state, {name: entry.record for name, entry in entries.items()})
        self.check_state_dict(state)
        for name, saved in state["parameters"].items():
            entry = entries[name]
            parameter = entry.weight()
            entry.record.follow(parameter)
            dormant = None if entry.record.merged else entry.record.dormant
            if dormant is not None:
                # What loading the model's state_dict could not let participate, the saved mask may.
                parameter.copy_(torch.where(entry.record.mask, parameter, dormant))
            entry.record.merged, entry.record.mask_before = False, None
            entry.record.density = saved["density"]
            entry.record.target = saved.get("target", entry.record.target)
            entry.record.mask.copy_(saved["mask"])
            entry.record.threshold = None
            if saved["dormant"] is not None:
                entry.record.keep(saved["dormant"])
            for key, value in saved["state"].items():
                entry.record.state[key].copy_(value)
            parameter.masked_fill_(~entry.record.mask, 0)
        for hooks, step, values in zip(self._hooks, state["steps"], state["values"], strict=True):
            hooks.step = step
            hooks.run.values = dict(values)
        self._generator.set_state(state["generator"])


def _count(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
