"""Recorder: watches weights and masks while a model trains, in memory that does not grow with the run."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsefx.algorithms.options import expect_share, expect_steps
from sparsefx.analysis.decorrelation import Decorrelation, decorrelation_lags
from sparsefx.analysis.mask_changes import LayerMaskHistory, MaskChanges, MaskPoint
from sparsefx.analysis.weight_trace import WeightTrace
from sparsefx.errors import StateError
from sparsefx.layers import known_weights
from sparsefx.runtime_steps import is_no_training_step, step_was_skipped
from sparsefx.sparse_parameter import SparseParameter, sparse_parameters


class Recorder:
    """Looks at a model after optimizer steps; the training loop stays as it is.

        recorder = Recorder(model, optimizer)   # after sparsefx.attach
        ...the user's own training loop...
        recorder.decorrelation()                # and recorder.mask_history()

    Of a sparsified model the masked weights are followed, with their dormant values where the algorithm keeps those: the
    weights w that the optimizer updates. Of a dense model, all Linear and Conv weights.

    Memory a layer: ``4 * sample * capacity`` bytes for traces (2 MB), and two bytes a masked weight. All that is kept of weights
    is a trace of a random ``sample`` of them, at ``capacity / 2`` to ``capacity`` evenly spaced steps; see `WeightTrace`.

    Args:
        model: sparsified or dense.
        optimizer: whose steps count; of several that step in turn, the last.
        every: steps from one look to the next.
        sample: weights to follow in each layer.
        capacity: looks at weights that are kept, and points of each mask's history; an even number.
        seed: of the sample.

    Raises:
        StateError: the model has no weight to follow.
        OptionError: a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 1,
        sample: int = 1024,
        capacity: int = 512,
        seed: int = 0,
    ) -> None:
        expect_steps("every", every)
        expect_steps("sample", sample)
        self._model = model
        self._every = every
        self._shapes = {name: weight.shape for name, weight, _ in _followed(model)}
        if not self._shapes:
            raise StateError("Recorder was given a model without Linear or Conv weights; there is nothing to follow")
        generator = torch.Generator().manual_seed(seed)
        self._traces = {
            name: WeightTrace(weight, sample=sample, capacity=capacity, generator=generator)
            for name, weight, _ in _followed(model)
        }
        self._masks = {
            name: LayerMaskHistory(record.mask, capacity=capacity) for name, _, record in _followed(model) if record is not None
        }
        self._changes = MaskChanges(model)
        self.step = 0
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Look no more; what was recorded stays."""
        self._handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_no_training_step(optimizer) or step_was_skipped(optimizer):
            return
        self.step += 1
        if self.step % self._every == 0:
            self.look()

    @torch.no_grad()
    def look(self) -> None:
        """Note weights and masks as they are now; the optimizer's hook calls this.

        Raises:
            StateError: weights are dense inside a step, or have another shape than at first.
        """
        found = list(_followed(self._model))
        for name, weight, record in found:
            if record is not None and record.merged:
                raise StateError(
                    f"{name} was looked at inside an optimizer step, while it is dense: the Recorder stands before the mask "
                    "runtime; make it after sparsefx.attach"
                )
            if self._shapes.get(name) != weight.shape:
                raise StateError(
                    f"{name} of shape {list(weight.shape)} is not what the Recorder began with; after a change of the model "
                    "(sparsify, prune_channels_) make a new one"
                )
        flips = self._changes.flips()
        for name, weight, record in found:
            self._traces[name].look(_all_values(weight, record))
            if record is not None:
                self._masks[name].look(self.step, record.mask, flips[name], weight, record.reduction_axis)

    def decorrelation(self, density: float | None = None) -> tuple[Decorrelation, ...]:
        """Decorrelation times of the weights that were followed, one entry a layer.

        Args:
            density: where pruning by magnitude is to divide small from large weights; None takes each mask's own density, and
                of a dense model no threshold.

        Raises:
            StateError: fewer than three looks were made, or the model was finalized since.
        """
        if density is not None:
            expect_share("density", density)
        found = list(_followed(self._model))
        if [name for name, _, _ in found] != list(self._traces) or any(
            (record is None) == (name in self._masks) for name, _, record in found
        ):
            raise StateError("the model holds other masks than those that the Recorder followed; ask it before finalize")
        return tuple(self._decorrelation(name, weight, record, density) for name, weight, record in found)

    def _decorrelation(self, name: str, weight: Tensor, record: SparseParameter | None, density: float | None) -> Decorrelation:
        trace = self._traces[name]
        series = trace.values
        if len(series) < 3:
            raise StateError(f"{len(series)} looks were made at {name}, but a correlation over time needs three or more")
        lags = decorrelation_lags(series)
        never = lags == len(series)
        times = (lags * trace.stride / trace.looks).clamp(max=1.0).masked_fill(never, 1.0)
        values = _all_values(weight, record)
        share = density if density is not None else (float(record.mask.float().mean()) if record is not None else None)
        return Decorrelation(
            name=name,
            times=times,
            magnitudes=trace.chosen(values).abs().cpu(),
            resolution=trace.stride / trace.looks,
            threshold=None if share is None else _threshold(values, share),
        )

    def mask_history(self) -> dict[str, tuple[MaskPoint, ...]]:
        """By parameter: flip rate, density, share ever used and empty channels over time. Empty for a dense model."""
        return {name: history.points for name, history in self._masks.items()}


def _followed(model: nn.Module) -> list[tuple[str, Tensor, SparseParameter | None]]:
    """Masked weights of a model, or all Linear and Conv weights of one that has none; each once."""
    masked: list[tuple[str, Tensor, SparseParameter | None]] = [
        (name, parameter.detach(), record) for name, parameter, record in sparse_parameters(model)
    ]
    if masked:
        return masked
    found: dict[int, tuple[str, Tensor, SparseParameter | None]] = {}
    for path, module in model.named_modules():
        for known in known_weights(module):
            parameter = module._parameters.get(known.local_name)
            if parameter is not None:
                name = f"{path}.{known.local_name}" if path else known.local_name
                found.setdefault(id(parameter), (name, parameter.detach(), None))
    return list(found.values())


def _all_values(weight: Tensor, record: SparseParameter | None) -> Tensor:
    """Participating and dormant values together."""
    dormant = None if record is None else record.dormant
    return weight if dormant is None else weight + dormant


def _threshold(values: Tensor, density: float) -> float:
    """The smallest magnitude that stays; above all of them where nothing does."""
    kept = round(density * values.numel())
    if kept == 0:
        return float("inf")
    ordered = values.abs().reshape(-1).to(torch.float32).sort(descending=True).values
    return float(ordered[kept - 1])
