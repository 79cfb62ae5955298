"""Masks for pretrained weights from a few calibration batches, without training: Wanda and SparseGPT."""

from __future__ import annotations

from sparsefx.errors import OptionError
from sparsefx.one_shot.base import OneShotMethod
from sparsefx.one_shot.blocks import Solution, solve
from sparsefx.one_shot.sparsegpt import SparseGPT
from sparsefx.one_shot.wanda import Wanda

ONE_SHOT_METHODS: dict[str, OneShotMethod] = {method.name: method for method in (Wanda(), SparseGPT())}


def find(algorithm: object) -> OneShotMethod | None:
    """The one-shot method of this name, or the method itself; None for anything else."""
    if isinstance(algorithm, OneShotMethod):
        return algorithm
    return ONE_SHOT_METHODS.get(algorithm) if isinstance(algorithm, str) else None


def expect_no_calibration(calibration: object, algorithm: object) -> None:
    """Raise OptionError where calibration batches were given to an algorithm that uses none."""
    if calibration is not None:
        names = " and ".join(ONE_SHOT_METHODS)
        raise OptionError(f"calibration was given, and algorithm {algorithm!r} uses none; {names} do")


__all__ = ["ONE_SHOT_METHODS", "OneShotMethod", "Solution", "SparseGPT", "Wanda", "expect_no_calibration", "find", "solve"]
