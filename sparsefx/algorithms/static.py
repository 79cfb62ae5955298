"""One-shot magnitude masks that stay for the whole run, as for fine-tuning pretrained weights (Mishra et al. 2021)."""

from sparsefx.algorithms.base import Algorithm

STATIC = Algorithm(
    name="static",
    summary="the largest |w| at the time of sparsify participate from then on; the others stay zero",
    moves=False,
    keeps_dormant=False,
)
