"""MaskRuntime: keeps masked parameters sparse at rest and moves their masks, through the optimizer's own step hooks.

Between steps a masked Parameter holds participating values p and zeros. The step pre-hook puts the dormant values n
back, so that the optimizer updates all of w; the post-hook lets exploitation act on n, chooses the mask, and splits w
into p and n again ("Advances in Sparse Neural Model Training", algorithm 1).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsefx.algorithms import Settings
from sparsefx.errors import NonFiniteError, OptimizerError, StateError
from sparsefx.ops.split import merge, split
from sparsefx.schedules import DensitySchedule
from sparsefx.sparse_parameter import SparseParameter, records_of, sparse_parameters

_STATE_VERSION = 1


@dataclass(eq=False)
class _Followed:
    """One masked parameter that an optimizer updates; the Parameter is looked up anew at every step."""

    name: str
    module: nn.Module
    local_name: str
    record: SparseParameter

    def parameter(self) -> nn.Parameter:
        if records_of(self.module).get(self.local_name) is not self.record:
            raise StateError(
                f"{self.name}: the model was finalized or sparsified again while a MaskRuntime is attached; "
                "call runtime.detach() before that, and attach again afterwards"
            )
        parameter = self.module._parameters[self.local_name]
        assert parameter is not None
        return parameter


class _OptimizerHooks:
    """The step hooks on one optimizer, and the steps it has made."""

    def __init__(self, optimizer: Optimizer, followed: list[_Followed], runtime: MaskRuntime) -> None:
        self.optimizer = optimizer
        self.followed = followed
        self.step = 0
        self._runtime = runtime
        self._merged = False
        self._non_finite: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _tensors(self) -> tuple[list[Tensor], list[SparseParameter]]:
        weights: list[Tensor] = []
        records: list[SparseParameter] = []
        for entry in self.followed:
            weight = entry.parameter().detach()
            entry.record.follow(weight)
            weights.append(weight)
            records.append(entry.record)
        return weights, records

    def _merge(self) -> None:
        # A step that raised between the hooks has left the dense weights in place: merging twice would lose them.
        if not self._merged:
            merge(*self._tensors())
            self._merged = True

    def _split(self, *, dormant_scale: float = 1.0, rewire: bool = False, densities: Sequence[float] | None = None) -> Any:
        flag = split(*self._tensors(), dormant_scale=dormant_scale, rewire=rewire, densities=densities)
        self._merged = False
        return flag

    def _scale_gradients(self) -> None:
        scale = self._runtime.settings.scale
        if scale == 1.0:
            return
        for entry in self.followed:
            gradient = entry.parameter().grad
            if gradient is not None:
                entry.record.follow(entry.parameter().detach())
                mask = entry.record.mask
                gradient.mul_(mask if scale == 0.0 else torch.where(mask, 1.0, scale).to(gradient.dtype))

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
        self._merge()
        if not callable(closure):
            self._scale_gradients()
            return None

        def sparse_closure() -> Any:
            """The user's closure evaluates the model, so it must see the sparse weights, whatever the optimizer did."""
            with torch.no_grad():
                self._split()
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                self._merge()
                self._scale_gradients()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": sparse_closure}
        return (args[0], sparse_closure, *args[2:]), kwargs

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._merged:
            # Hooks were attached while a step was under way; the next one is whole.
            return
        if _step_was_skipped(optimizer):
            self._split()
            return
        self.step += 1
        settings, schedule = self._runtime.settings, self._runtime.density_schedule
        densities = None
        if schedule is not None:
            densities = [entry.record.pattern.resolve_density(schedule(self.step)) for entry in self.followed]
        flag = self._split(
            dormant_scale=settings.dormant_scale(self.step),
            rewire=self._runtime.moves and settings.rewires(self.step),
            densities=densities,
        )
        self._look_for_non_finite(flag)

    def _look_for_non_finite(self, flag: Tensor | bool) -> None:
        if isinstance(flag, Tensor) and flag.device.type != "cpu":
            self._non_finite = flag if self._non_finite is None else self._non_finite | flag
            if self.step % self._runtime.settings.check_every:
                return
            flag, self._non_finite = self._non_finite, None
        if not bool(flag):
            return
        bad = [
            entry.name
            for entry in self.followed
            if not bool(torch.isfinite(entry.parameter()).all())
            or (entry.record.dormant is not None and not bool(torch.isfinite(entry.record.dormant).all()))
        ]
        raise NonFiniteError(
            f"NaN or infinity in the weights of {', '.join(bad[:5]) or 'a masked layer'} after optimizer step {self.step}: "
            "training diverged. Go back to the last checkpoint; lower the learning rate or clip gradients"
        )


class MaskRuntime:
    """What `attach` returns: follows optimizers and moves masks. Has a state_dict; see also `report`."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        settings: Settings,
        *,
        algorithm: str,
        moves: bool,
        density_schedule: DensitySchedule | None = None,
        replace: bool = False,
    ) -> None:
        self.settings = settings
        self.algorithm = algorithm
        self.moves = moves
        self.density_schedule = density_schedule
        owners = _owners(model)
        plan = _plan(model, optimizers, owners)
        _refuse_double_following(owners, plan, replace)
        held = {name for names in plan for name in names}
        self.unfollowed = tuple(name for name in owners if name not in held)
        self._hooks = [
            _OptimizerHooks(optimizer, [owners[name] for name in names], self)
            for optimizer, names in zip(optimizers, plan, strict=True)
        ]
        for hooks in self._hooks:
            for entry in hooks.followed:
                entry.record.runtime = weakref.ref(self)

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

    def report(self) -> dict[str, Any]:
        """The values in force, the steps made, and which masked parameters no optimizer updates."""
        return {
            "algorithm": self.algorithm,
            **asdict(self.settings),
            "density_schedule": self.density_schedule is not None,
            "step": self.step,
            "optimizers": [type(hooks.optimizer).__name__ for hooks in self._hooks],
            "parameters": sum(len(hooks.followed) for hooks in self._hooks),
            "unfollowed": list(self.unfollowed),
        }

    def state_dict(self) -> dict[str, Any]:
        """Masks, dormant values and step counts, as copies. Tensors and plain values only (``weights_only`` loads it)."""
        parameters: dict[str, dict[str, Any]] = {}
        for hooks in self._hooks:
            for entry in hooks.followed:
                record = entry.record
                parameters[entry.name] = {
                    "pattern": record.pattern.name,
                    "density": record.density,
                    "mask": record.mask.clone(),
                    "dormant": None if record.dormant is None else record.dormant.clone(),
                }
        return {
            "version": _STATE_VERSION,
            "algorithm": self.algorithm,
            "settings": asdict(self.settings),
            "steps": [hooks.step for hooks in self._hooks],
            "parameters": parameters,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`, all or nothing. Load the model's own state_dict too, before or after.

        Raises:
            StateError: the state is of another version, algorithm, set of parameters, pattern or shape.
        """
        entries = {entry.name: entry for hooks in self._hooks for entry in hooks.followed}
        _check_state(state, entries, self.algorithm, len(self._hooks))
        for name, saved in state["parameters"].items():
            entry = entries[name]
            parameter = entry.parameter().detach()
            entry.record.follow(parameter)
            entry.record.density = saved["density"]
            entry.record.mask.copy_(saved["mask"])
            entry.record.threshold = None
            if entry.record.dormant is not None:
                entry.record.dormant.copy_(saved["dormant"])
            parameter.masked_fill_(~entry.record.mask, 0)
        for hooks, step in zip(self._hooks, state["steps"], strict=True):
            hooks.step = step


def _step_was_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler told a fused optimizer to leave the weights alone (others are not even called)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _owners(model: nn.Module) -> dict[str, _Followed]:
    modules = dict(model.named_modules())
    owners: dict[str, _Followed] = {}
    for name, _, record in sparse_parameters(model):
        module_name, _, local_name = name.rpartition(".")
        owners[name] = _Followed(name, modules[module_name], local_name, record)
    if not owners:
        raise StateError("attach was given a model without masked parameters; call sparsefx.sparsify(model) first")
    return owners


def _plan(model: nn.Module, optimizers: Sequence[Optimizer], owners: dict[str, _Followed]) -> list[list[str]]:
    """For each optimizer, the names of the masked parameters that it updates."""
    by_identity = {id(entry.parameter()): name for name, entry in owners.items()}
    for name, entry in owners.items():
        if getattr(entry.parameter(), "_in_backward_optimizers", None):
            raise OptimizerError(
                f"{name} is updated by an optimizer fused into backward, whose steps cannot be followed; "
                "use an ordinary optimizer and call optimizer.step() after backward"
            )
    plan: list[list[str]] = []
    taken: dict[str, int] = {}
    for position, optimizer in enumerate(optimizers):
        if not callable(getattr(optimizer, "register_step_pre_hook", None)) or not callable(
            getattr(optimizer, "register_step_post_hook", None)
        ):
            raise OptimizerError(
                f"{type(optimizer).__name__} was given as an optimizer, but its steps cannot be hooked; expected a "
                "torch.optim.Optimizer (or a class with register_step_pre_hook and register_step_post_hook)"
            )
        names = [by_identity[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in by_identity]
        for name in names:
            if taken.setdefault(name, position) != position:
                raise OptimizerError(f"{name} is held by two of the optimizers given; one parameter has one optimizer")
        plan.append(names)
        if not names:
            raise OptimizerError(
                f"{type(optimizer).__name__} holds none of the model's {len(owners)} masked parameters; create the optimizer "
                "from model.parameters() of the very model that was sparsified, after any move that replaces parameters"
            )
    return plan


def _refuse_double_following(owners: dict[str, _Followed], plan: Iterable[Iterable[str]], replace: bool) -> None:
    followed = [owners[name] for names in plan for name in names]
    if any(_runtime_of(entry) is not None for entry in followed):
        gc.collect()  # a forgotten optimizer and its hooks are a reference cycle
    for entry in followed:
        runtime = _runtime_of(entry)
        if runtime is None:
            continue
        if not replace:
            raise StateError(
                f"{entry.name} is already followed by another MaskRuntime; call its detach(), or attach(..., replace=True)"
            )
        runtime.detach()


def _runtime_of(entry: _Followed) -> MaskRuntime | None:
    return None if entry.record.runtime is None else entry.record.runtime()


def _check_state(state: dict[str, Any], entries: dict[str, _Followed], algorithm: str, optimizers: int) -> None:
    def refuse(given: object, expected: object, remedy: str) -> StateError:
        return StateError(f"the runtime state cannot be loaded: it has {given}, expected {expected}; {remedy}")

    if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
        version = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise refuse(f"version {version!r}", _STATE_VERSION, "give what MaskRuntime.state_dict() returned")
    if state["algorithm"] != algorithm:
        raise refuse(f"algorithm {state['algorithm']!r}", repr(algorithm), "sparsify with the algorithm it was saved with")
    if len(state["steps"]) != optimizers:
        raise refuse(f"{len(state['steps'])} optimizers", optimizers, "attach with the same optimizers")
    odd = sorted(set(state["parameters"]) ^ set(entries))
    if odd:
        raise refuse(
            f"{len(state['parameters'])} masked parameters",
            len(entries),
            f"only one side has {', '.join(odd[:3])}; sparsify with the same include and exclude",
        )
    for name, saved in state["parameters"].items():
        record = entries[name].record
        if saved["pattern"] != record.pattern.name:
            raise refuse(f"pattern {saved['pattern']!r} for {name}", repr(record.pattern.name), "sparsify with that pattern")
        if tuple(saved["mask"].shape) != tuple(record.mask.shape):
            raise refuse(f"shape {tuple(saved['mask'].shape)} for {name}", tuple(record.mask.shape), "use the same model")
        if (saved["dormant"] is None) != (record.dormant is None):
            raise refuse(
                f"dormant values {saved['dormant'] is not None} for {name}", record.dormant is not None, "same algorithm"
            )
