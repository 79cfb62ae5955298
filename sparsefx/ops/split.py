"""Putting dormant values back before an optimizer step, and choosing masks and splitting weights after it.

Two implementations with the same results, bit for bit: a compiled one for dense CPU tensors (`sparsefx.ops.native`), and plain
torch for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx.errors import OptionError
from sparsefx.patterns.global_unstructured import GlobalUnstructured
from sparsefx.sparse_parameter import SparseParameter


@torch.no_grad()
def merge(weights: Sequence[Tensor], records: Sequence[SparseParameter], threads: int | None = None) -> None:
    """Put the dormant values back, in place: ``weight <- where(mask, weight, dormant)``.

    Args:
        weights: detached parameters, holding participating weights and zeros.
        records: one a weight, of its device, dtype and strides (`SparseParameter.follow`). Without dormant values there is
            nothing to put back.
        threads: of the CPU; None means torch's own number.
    """
    for weight, record in zip(weights, records, strict=True):
        if record.dormant is not None:
            weight.copy_(torch.where(record.mask, weight, record.dormant))


@torch.no_grad()
def split(
    weights: Sequence[Tensor],
    records: Sequence[SparseParameter],
    *,
    dormant_scale: float = 1.0,
    rewire: bool = True,
    densities: Sequence[float] | None = None,
    threads: int | None = None,
) -> Tensor:
    """Choose masks and split weights into participating and dormant values, in place.

    First the weights outside the mask that was used are multiplied by ``dormant_scale``. Then, with ``rewire``, each
    record's mask becomes the best one for ``|weight|``. Then the weight keeps the participating values, the record's dormant
    tensor (where it has one) gets the others, and both are +0.0 elsewhere.

    Args:
        weights: detached parameters, holding all values w.
        records: one a weight, of its device, dtype and strides (`SparseParameter.follow`). Those with the pattern
            ``unstructured:global`` share one threshold.
        dormant_scale: 1 keeps dormant values, 0 sets them to +0.0, ``1 - beta`` lets them decay.
        rewire: False keeps the masks.
        densities: one a record, in place of ``record.density``.
        threads: of the CPU; None means torch's own number.

    Returns:
        bool, no dimensions, on the first weight's device: True where any weight was NaN or infinite. The masks of such
        weights have no meaning; `merge` gives the values back all the same, where dormant values are kept.
    """
    if not 0 <= dormant_scale <= 1:
        raise OptionError(f"dormant_scale={dormant_scale!r} was given; expected a number from 0 to 1")
    if not weights:
        return torch.zeros((), dtype=torch.bool)
    chosen = [record.density for record in records] if densities is None else list(densities)
    flags = [_non_finite(weight) for weight in weights]
    if dormant_scale != 1:
        for weight, record in zip(weights, records, strict=True):
            _scale_dormant(weight, record.mask, dormant_scale)
    if rewire:
        _choose(weights, records, chosen)
    for weight, record in zip(weights, records, strict=True):
        _separate(weight, record)
    device = weights[0].device
    return torch.stack([flag.to(device, non_blocking=True) for flag in flags]).any()


def _non_finite(weight: Tensor) -> Tensor:
    return ~torch.isfinite(weight).all()


def _scale_dormant(weight: Tensor, mask: Tensor, scale: float) -> None:
    if scale == 0:
        weight.masked_fill_(~mask, 0)
        return
    # Half precision is multiplied in float32 and rounded once.
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(torch.where(mask, weight, weight.to(wide).mul_(scale).to(weight.dtype)))


def _choose(weights: Sequence[Tensor], records: Sequence[SparseParameter], densities: Sequence[float]) -> None:
    together: dict[tuple[GlobalUnstructured, float], list[int]] = {}
    for position, (weight, record, density) in enumerate(zip(weights, records, densities, strict=True)):
        if isinstance(record.pattern, GlobalUnstructured):
            together.setdefault((record.pattern, density), []).append(position)
        else:
            record.mask.copy_(record.pattern._mask(weight.abs(), density, record.reduction_axis))
    for (pattern, density), positions in together.items():
        masks = pattern.choose([weights[position] for position in positions], density)
        for position, mask in zip(positions, masks, strict=True):
            records[position].mask.copy_(mask)


def _separate(weight: Tensor, record: SparseParameter) -> None:
    if record.dormant is not None:
        record.dormant.copy_(weight).masked_fill_(record.mask, 0)
    weight.masked_fill_(~record.mask, 0)
