"""Which calls of an optimizer's step hooks stand for a step that was made."""

from __future__ import annotations

import inspect
from pathlib import Path

from torch.optim import Optimizer

_TORCH_OPTIMIZER_FILE = inspect.getfile(Optimizer)
_CHECKPOINT_FILE = str(Path("torch", "distributed", "checkpoint", "state_dict.py"))


def step_was_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler told a fused optimizer to leave the weights alone (others are not even called)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def is_no_training_step(optimizer: Optimizer) -> bool:
    """Whether these hooks belong to a ``super().step()`` inside the optimizer's own step, or to a step that trains nothing.

    torch runs the hooks around the step of every class that has one. Only the outermost pair may act, and after a step that
    raised no counter could tell which that is; the stack can. It also tells when torch.distributed.checkpoint makes a step with a
    learning rate of zero, so that the optimizer creates its state.
    """
    frame, steps = inspect.currentframe(), 0
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _TORCH_OPTIMIZER_FILE and code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer:
            steps += 1
        if code.co_name == "_init_optim_state" and code.co_filename.endswith(_CHECKPOINT_FILE):
            return True
        frame = frame.f_back
    return steps > 1
