"""Magnitude rewiring with dense updates ("Advances in Sparse Neural Model Training", algorithm 1)."""

from sparsefx.algorithms.base import Algorithm

MAGNITUDE = Algorithm(
    name="magnitude",
    summary="the largest |w| participate; all weights are updated, and masks are chosen anew as they change",
    moves=True,
    keeps_dormant=True,
)
