"""One sparse weight as an algorithm sees it, and the run that it is trained in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsefx.errors import OptimizerError
from sparsefx.ops.split import keep_masked
from sparsefx.patterns.base import Pattern
from sparsefx.shards import is_distributed, values_of
from sparsefx.sparse_parameter import SparseParameter


@dataclass(eq=False)
class Layer:
    """A sparse parameter during an optimizer step. Scores that one makes of it have the weight's shape.

    Attributes:
        name: full name of the parameter.
        parameter: the Parameter itself.
        record: its mask and what else sparsefx keeps beside it.
        run: the run that it is trained in.
    """

    name: str
    parameter: nn.Parameter
    record: SparseParameter
    run: Run

    @property
    def weight(self) -> Tensor:
        """The parameter's values (of a sharded one, this process's), detached: changing them changes the parameter."""
        return values_of(self.parameter)

    @property
    def mask(self) -> Tensor:
        """bool, True where a weight participates."""
        return self.record.mask

    @property
    def pattern(self) -> Pattern:
        return self.record.pattern

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors that an algorithm keeps beside the weight; saved in checkpoints."""
        return self.record.state

    @property
    def trains(self) -> bool:
        """False for a layer that was frozen: nothing grows there, so that nothing may be dropped."""
        return self.parameter.requires_grad

    @property
    def has_gradient(self) -> bool:
        return self.parameter.grad is not None

    @property
    def gradient(self) -> Tensor:
        """The dense gradient at the sparse weights, of the step being made. Raises OptimizerError where there is none."""
        if self.parameter.grad is None:
            raise OptimizerError(f"{self.name} has no gradient at step {self.run.step}; it was asked for to move its mask")
        return self._beside(self.parameter.grad, "its gradient")

    def _beside(self, tensor: Tensor, what: str) -> Tensor:
        """The part of a tensor that stands beside this process's part of the parameter."""
        if not is_distributed(tensor):
            return tensor
        placed = getattr(tensor, "placements", None)
        if self.record.shards is not None and placed is not None and tuple(placed) != self.record.shards.placements:
            raise OptimizerError(
                f"{self.name} is sharded as {self.record.shards.placements}, but {what} as {tuple(placed)}; masks need both alike"
            )
        return values_of(tensor)

    @property
    def group(self) -> dict[str, Any]:
        """The optimizer's parameter group that holds the weight: ``layer.group["lr"]``."""
        for group in self.run.optimizer.param_groups:
            if any(parameter is self.parameter for parameter in group["params"]):
                found: dict[str, Any] = group
                return found
        raise OptimizerError(f"{self.name} is no longer held by its {type(self.run.optimizer).__name__}")

    @property
    def downhill(self) -> int:
        """The sign of what makes a weight smaller when it is added to the gradient: -1 where the optimizer maximizes."""
        return -1 if self.group.get("maximize") else 1

    @property
    def learning_rate(self) -> float:
        return float(self.group["lr"])

    @property
    def momentum(self) -> Tensor:
        """The optimizer's running mean of gradients, in units of its steps; zeros before the first step.

        SGD and others that keep a ``momentum_buffer``: that. The Adam family: ``exp_avg / (sqrt(exp_avg_sq) + 1e-8)``. Others
        that keep an ``exp_avg`` (Lion): that. Raises OptimizerError for optimizers that keep none.
        """
        state = self._optimizer_state
        buffer = state.get("momentum_buffer")
        if buffer is None and "exp_avg" in state:
            buffer = state["exp_avg"]
            if "exp_avg_sq" in state:
                square = state["exp_avg_sq"]
                # 1e-8 is nothing in float16.
                root = square.to(torch.promote_types(square.dtype, torch.float32)).sqrt().add_(1e-8)
                buffer = torch.div(buffer, root, out=root) if buffer.dtype == root.dtype else buffer / root
        if buffer is not None:
            return self._beside(torch.as_tensor(buffer), "its momentum")
        if state and not has_momentum(self.group):
            raise OptimizerError(no_momentum(self.run.optimizer, self.name))
        return torch.zeros_like(self.weight)

    @property
    def _optimizer_state(self) -> dict[str, Any]:
        # A ZeroRedundancyOptimizer has another one inside, which keeps the state of this process's parameters.
        keeper = self.run.optimizer.optim if keeps_state_apart(self.run.optimizer) else self.run.optimizer  # type: ignore[attr-defined]
        found: dict[str, Any] = keeper.state.get(self.parameter, {})
        return found

    def random(self) -> Tensor:
        """Random scores in [0, 1), float64, drawn on the CPU from the run's generator: the same on every device."""
        shards = self.record.shards
        if shards is None:
            return random_scores(self.weight, self.run.generator)
        # All processes draw for the whole weight, so that they draw what one process would.
        return shards.part(random_scores(self.weight, self.run.generator, shards.shape))

    def mask_moments(self) -> None:
        """Zero what the optimizer keeps of weights that do not participate."""
        moments = list(self._moments().values())
        keep_masked(moments, [self.record.mask] * len(moments))

    def _moments(self) -> dict[str, Tensor]:
        """What the optimizer keeps of each weight, by its name in the optimizer's state."""
        kept = self._optimizer_state.items()
        values = {name: self._beside(value, "its optimizer state") for name, value in kept if isinstance(value, Tensor)}
        return {name: value for name, value in values.items() if value.shape == self.mask.shape and value.is_floating_point()}

    def _first_moment(self, name: str) -> float:
        """What the optimizer begins with: zero, but for Rprop's step sizes and the sums that Adagrad may begin with."""
        return float(self.group.get({"step_size": "lr", "sum": "initial_accumulator_value"}.get(name, ""), 0.0))

    def set_mask(self, mask: Tensor, *, density: float | None = None, clear_moments: bool = True) -> None:
        """Let the mask become ``mask``, in place. Weights that come or go are zero from now on.

        Args:
            mask: bool, of the weight's shape.
            density: the layer's share of participating weights from now on; None keeps it.
            clear_moments: what the optimizer keeps of weights that come or go becomes what it would be for a new parameter, zero
                in most; what it keeps once for all weights (Adam's count of steps) stays.
        """
        if clear_moments:
            changed = mask != self.record.mask
            for name, value in self._moments().items():
                value.masked_fill_(changed, self._first_moment(name))
        dormant = self.record.dormant
        self.weight.masked_fill_(~(mask & self.record.mask), 0)
        self.record.mask.copy_(mask)
        if dormant is not None:
            self.record.keep(dormant)
        if density is not None:
            self.record.density = density


@dataclass(eq=False)
class Run:
    """One training run of the layers that one optimizer holds.

    Attributes:
        optimizer: the optimizer.
        total_steps: its steps in the whole run.
        steps_per_epoch: or None where the user gave none.
        generator: on the CPU; its state is saved in checkpoints.
        layers: in the model's order, input to output as far as that is known.
        step: number of the step being made, from 1.
        values: numbers that an algorithm keeps, saved in checkpoints.
    """

    optimizer: Optimizer
    total_steps: int
    steps_per_epoch: int | None
    generator: torch.Generator
    layers: list[Layer] = field(default_factory=list)
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)

    @property
    def loss_scale(self) -> Tensor | None:
        """What a GradScaler has multiplied the gradients with, where it leaves undoing that to a fused optimizer."""
        scale = getattr(self.optimizer, "grad_scale", None)
        return scale if isinstance(scale, Tensor) else None


def scale_gradients(layers: Sequence[Layer], scale: float) -> None:
    """Multiply gradients outside the masks, in place; 0 makes them zero there, whatever they were."""
    if scale == 0.0:
        keep_masked([layer.gradient for layer in layers], [layer.mask for layer in layers])
    elif scale != 1.0:
        for layer in layers:
            gradient = layer.gradient
            gradient.copy_(torch.where(layer.mask, gradient, gradient * scale))


def random_scores(like: Tensor, generator: torch.Generator, shape: torch.Size | None = None) -> Tensor:
    """Uniform in [0, 1), float64 (of that many distinct values ties are rare), on ``like``'s device, in its or another shape."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    if like.is_meta:  # nothing to draw for
        return torch.empty_like(like, dtype=dtype)
    return torch.rand(like.shape if shape is None else shape, generator=generator, dtype=torch.float64).to(like.device, dtype)


def has_momentum(group: dict[str, Any]) -> bool:
    """Whether an optimizer keeps a running mean of gradients, going by the options of a parameter group."""
    return "betas" in group or bool(group.get("momentum", 0))


def keeps_state_apart(optimizer: Optimizer) -> bool:
    """Whether each process keeps the optimizer state of some parameters only (ZeRO stage 1)."""
    return hasattr(optimizer, "consolidate_state_dict")


def no_momentum(optimizer: Optimizer, name: str) -> str:
    """What to say where `has_momentum` is False."""
    return (
        f"{type(optimizer).__name__} keeps no momentum for {name}, by which masks are to move; expected an optimizer with "
        "momentum (SGD with momentum=0.9, Adam, AdamW), or growth and redistribution by something else"
    )
