"""One line for Hugging Face's Trainer: ``Trainer(..., callbacks=[SparsityCallback(pattern="2:4")])``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsefx.api import attach, sparsify
from sparsefx.errors import CaptureError, OptionError, StateError
from sparsefx.integrations.callback import SparseTraining, inner_optimizer
from sparsefx.integrations.watch import REMEDY, MaskWatch
from sparsefx.model_record import has_records
from sparsefx.patterns import Pattern
from sparsefx.sharded_records import refuse_distributed
from sparsefx.sparse_file import load, save

FILE = "sparsefx.safetensors"


class SparsityCallback(SparseTraining, TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked here
    """Trains sparse with the Trainer's own optimizer, saves the masks in its checkpoints, and resumes from them.

    The model is sparsified when training begins, unless that was done before, with the model's ``dummy_inputs`` as example
    inputs where it runs on them. Each checkpoint folder gets a file ``sparsefx.safetensors`` beside the Trainer's own; the
    weights in those are the sparse ones, under the names that ``from_pretrained`` expects.

    ``sparsity/density``, ``sparsity/flips`` (since the last time) and ``sparsity/empty_channels`` join the Trainer's own figures
    in ``state.log_history`` and in what is printed. Loggers such as TensorBoard stand before callbacks of the user in the
    Trainer's list, and do not see what those add; ``SparsityCallback(...).add_to(trainer)`` puts this one first, where they do.

    Args:
        pattern: as for `sparsefx.sparsify`.
        sparsify_options: the other arguments of `sparsefx.sparsify`.
        attach_options: those of `sparsefx.attach`; ``total_steps`` and ``steps_per_epoch`` are the Trainer's unless given.
        finalize_at_end: end sparse training with `sparsefx.finalize` when training ends.
        resume_from: the checkpoint folder, for runs resumed from one that is not ``checkpoint-STEP`` in ``output_dir``.
    """

    def __init__(
        self, pattern: str | Pattern = "2:4", *, resume_from: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        super().__init__(pattern, **options)
        self._resume_from = resume_from

    def add_to(self, trainer: Trainer) -> SparsityCallback:
        """Put this callback before all others of ``trainer``, so that every logger sees its figures; gives itself back."""
        if not isinstance(trainer, Trainer):
            raise OptionError(f"add_to was given a {type(trainer).__name__}; expected a transformers.Trainer")
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Sparsify, attach, and resume where the Trainer does."""
        model: nn.Module = given["model"]
        refuse_distributed(model, "SparsityCallback", REMEDY)
        file = None if state.global_step == 0 else self._saved(args, state)
        if not has_records(model):
            self._sparsify(model)
        if self.runtime is not None:
            self.runtime.detach()
        options = {"total_steps": state.max_steps, "steps_per_epoch": _steps_per_epoch(args, given), **self._attach_options}
        self.runtime = attach(model, inner_optimizer(given["optimizer"]), **options)
        if file is not None:
            load(model, file, runtime=self.runtime)
        self._watch = MaskWatch(model)

    def _sparsify(self, model: nn.Module) -> None:
        # Accelerate's autocast around forward would hide how outputs come about, and with that the head of a language model.
        wrapper = model.__dict__.pop("forward") if {"forward", "_original_forward"} <= model.__dict__.keys() else None
        try:
            self._sparsify_plain(model)
        finally:
            if wrapper is not None:
                model.__dict__["forward"] = wrapper

    def _sparsify_plain(self, model: nn.Module) -> None:
        options = {"pattern": self._pattern, **self._sparsify_options}
        if "example_inputs" not in options:
            try:
                sparsify(model, example_inputs=_dummy_inputs(model), **options)
            except CaptureError:  # not every model runs on its dummy inputs
                sparsify(model, **options)
        else:
            sparsify(model, **options)

    def _saved(self, args: TrainingArguments, state: TrainerState) -> Path:
        told = (self._resume_from, args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None)
        folders = [Path(folder) for folder in told if folder] or [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        for folder in folders:
            if (folder / FILE).is_file():
                return folder / FILE
        raise StateError(
            f"training resumes at step {state.global_step}, but there is no {FILE} in {folders[0]}; give "
            "SparsityCallback(resume_from=FOLDER) where the checkpoint is elsewhere, or resume from an earlier one if it was "
            "saved without this callback or cut short"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Put the masks into the checkpoint that was just written."""
        if self.runtime is None or not state.is_world_process_zero:
            return
        save(given["model"], Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE, runtime=self.runtime)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **given: Any,
    ) -> None:
        """Add the figures to those of the Trainer."""
        if self._watch is None or self.runtime is None or logs is None or "loss" not in logs:
            return
        figures = self._watch.measure()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Stop following, and finalize where that was asked for."""
        self._stop(given["model"])


def _steps_per_epoch(args: TrainingArguments, given: Mapping[str, Any]) -> int | None:
    """Optimizer steps of an epoch, the last of which may be of fewer batches; None where data has no length."""
    try:
        batches = len(given["train_dataloader"])
    except (KeyError, TypeError):
        return None
    return max(1, -(-batches // int(args.gradient_accumulation_steps)))


def _dummy_inputs(model: nn.Module) -> dict[str, Any] | None:
    inputs = getattr(model, "dummy_inputs", None)
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()} if isinstance(inputs, dict) else None
