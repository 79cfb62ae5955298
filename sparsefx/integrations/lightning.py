"""One line for Lightning: ``Trainer(..., callbacks=[SparsityCallback(pattern="2:4")])``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sparsefx.api import attach, sparsify
from sparsefx.errors import OptionError
from sparsefx.integrations.callback import SparseTraining, inner_optimizer
from sparsefx.integrations.watch import REMEDY, MaskWatch
from sparsefx.model_record import has_records
from sparsefx.sharded_records import refuse_distributed


class SparsityCallback(SparseTraining, Callback):  # type: ignore[misc]  # lightning is not type-checked here
    """Trains sparse with the module's own optimizers, saves the runtime in Lightning's checkpoints, and resumes from them.

    The module is sparsified when training begins, unless that was done before, with its ``example_input_array`` as example inputs
    where it has one. ``state_dict`` names stay, so that checkpoints load into the untouched module. Logged with
    ``log_dict``, for every logger and for other callbacks: ``sparsity/density``, ``sparsity/flips`` (since the last
    time) and ``sparsity/empty_channels``.

    Args:
        pattern: as for `sparsefx.sparsify`.
        sparsify_options: the other arguments of `sparsefx.sparsify`.
        attach_options: those of `sparsefx.attach`; ``total_steps`` is Lightning's estimate and ``steps_per_epoch`` its number of
            batches over accumulated ones, unless given.
        finalize_at_end: end sparse training with `sparsefx.finalize` when training ends.
    """

    _saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sparsify and attach, when Lightning has restored weights and optimizers of a checkpoint; then restore the masks."""
        refuse_distributed(pl_module, "SparsityCallback", REMEDY)
        # First masks may be drawn at random: they must not cost a resumed run its weights.
        weights = None if self._saved is None else {name: value.clone() for name, value in pl_module.state_dict().items()}
        if not has_records(pl_module):
            inputs = pl_module.example_input_array
            sparsify(pl_module, **{"pattern": self._pattern, "example_inputs": inputs, **self._sparsify_options})
        if self.runtime is not None:
            self.runtime.detach()
        optimizers = [inner_optimizer(optimizer) for optimizer in trainer.optimizers]
        self.runtime = attach(pl_module, optimizers, **{**_steps(trainer, self._attach_options), **self._attach_options})
        if self._saved is not None and weights is not None:
            self.runtime.load_state_dict(self._saved)
            pl_module.load_state_dict(weights)
            self._saved = None
        self._watch = MaskWatch(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the figures, as often as Lightning logs."""
        if self._watch is not None and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._watch.measure(), batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize where that was asked for. Else the runtime stays until checkpoints of the end of training are written."""
        if self._finalize_at_end:
            self._stop(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop following."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """The runtime's state, which Lightning puts into its checkpoints."""
        return {} if self.runtime is None else {"runtime": self.runtime.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, when there is a runtime to load it."""
        self._saved = state_dict.get("runtime")


def _steps(trainer: Trainer, given: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if isinstance(trainer.num_training_batches, int):
        options["steps_per_epoch"] = max(1, -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
    if "total_steps" not in given:
        total = trainer.estimated_stepping_batches
        if not isinstance(total, int) or total < 1:
            raise OptionError(
                f"Lightning estimates {total} optimizer steps, but the length of a sparse run must be known; "
                "give the Trainer max_steps= or max_epochs=, or the callback attach_options={'total_steps': ...}"
            )
        options["total_steps"] = total
    return options
