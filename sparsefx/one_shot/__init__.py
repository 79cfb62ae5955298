"""Masks for pretrained weights from a few calibration batches, without training: Wanda and SparseGPT."""

from __future__ import annotations

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


__all__ = ["ONE_SHOT_METHODS", "OneShotMethod", "Solution", "SparseGPT", "Wanda", "find", "solve"]
