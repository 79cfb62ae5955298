"""Putting dormant values back before an optimizer step, and choosing masks and splitting weights after it.

Two implementations with the same results, bit for bit: a compiled one for dense CPU tensors (`sparsefx.ops.native`), and plain
torch for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx.coupled_records import by_coupling, coupled_masks
from sparsefx.dormant_values import expect_own_mask
from sparsefx.errors import OptionError
from sparsefx.ops import cuda_transposable, native
from sparsefx.ops.masks_of_shards import choose_of_shards
from sparsefx.patterns.global_unstructured import GlobalUnstructured
from sparsefx.patterns.selection import participating
from sparsefx.patterns.units import is_free
from sparsefx.patterns.unstructured import Unstructured
from sparsefx.sparse_parameter import SparseParameter


@torch.no_grad()
def merge(
    weights: Sequence[Tensor], records: Sequence[SparseParameter], threads: int | None = None, *, compiled: bool = True
) -> None:
    """Put the dormant values back, in place: ``weight <- where(mask, weight, dormant)``.

    Args:
        weights: detached parameters, holding participating weights and zeros.
        records: one a weight, of its device, dtype and strides (`SparseParameter.follow`). Without dormant values there is
            nothing to put back.
        threads: of the CPU, for compiled kernels; None means torch's own number.
        compiled: False leaves everything to plain torch.

    Raises:
        StateError: a mask was changed without the dormant values beside it; no weight was changed.
    """
    batch = native.Batch()
    rest: list[tuple[Tensor, SparseParameter]] = []
    compiled = compiled and native.available()
    for weight, record in zip(weights, records, strict=True):
        if record.compact is None:
            continue
        if compiled and native.supports(weight, record.mask, record.compact):
            batch.merge(weight, record)
            continue
        expect_own_mask(record.compact, record.mask)
        rest.append((weight, record))
    batch.run(threads)
    for weight, record in rest:
        dormant = record.dormant
        assert dormant is not None
        weight.copy_(torch.where(record.mask, weight, dormant))


@torch.no_grad()
def split(
    weights: Sequence[Tensor],
    records: Sequence[SparseParameter],
    *,
    dormant_scale: float = 1.0,
    rewire: bool = True,
    densities: Sequence[float] | None = None,
    reached: Sequence[Tensor] | None = None,
    threads: int | None = None,
    compiled: bool = True,
) -> Tensor:
    """Choose masks and split weights into participating and dormant values, in place.

    With ``reached``, weights that neither participate nor are in it first go back to their dormant value. Then weights outside
    the mask that was used are multiplied by ``dormant_scale``. Then, with ``rewire``, each record's mask becomes the best one for
    ``|weight|``. Then the weight keeps the participating values and is +0.0 elsewhere, and the record (where it keeps dormant
    values) gets the others.

    Args:
        weights: detached parameters, holding all values w.
        records: one a weight, of its device, dtype and strides (`SparseParameter.follow`). Those with the pattern
            ``unstructured:global`` share one threshold.
        dormant_scale: 1 keeps dormant values, 0 sets them to +0.0, ``1 - beta`` lets them decay.
        rewire: False keeps the masks.
        densities: one a record, in place of ``record.density``.
        reached: one a weight, bool, of its shape: the weights that the step may change; dormant values are kept. None for all.
        threads: of the CPU, for compiled kernels; None means torch's own number.
        compiled: False leaves everything to plain torch.

    Returns:
        bool, no dimensions, on the first weight's device: True where any weight was NaN or infinite. The masks of such
        weights have no meaning; `merge` gives the values back all the same, where dormant values are kept.

    Raises:
        OptionError: dormant_scale is outside [0, 1].
    """
    if not 0 <= dormant_scale <= 1:
        raise OptionError(f"dormant_scale={dormant_scale!r} was given; expected a number from 0 to 1")
    if not weights:
        return torch.zeros((), dtype=torch.bool)
    wanted = [record.density for record in records] if densities is None else list(densities)
    if reached is not None and (rewire or dormant_scale != 1 or not compiled):
        _restore(weights, records, reached)
        reached = None
    batch = native.Batch()
    left = _gather(batch, weights, records, wanted, dormant_scale, rewire, reached) if compiled else list(range(len(weights)))
    if reached is not None:
        _restore([weights[i] for i in left], [records[i] for i in left], [reached[i] for i in left])
    flags = [torch.tensor(batch.run(threads))] if len(left) < len(weights) else []
    rest = [weights[i] for i in left], [records[i] for i in left], [wanted[i] for i in left]
    flags += [_non_finite(weight) for weight in rest[0]]
    if dormant_scale != 1:
        for weight, record in zip(*rest[:2], strict=True):
            _scale_dormant(weight, record.mask, dormant_scale)
    if rewire:
        _choose(*rest)
    for weight, record in zip(*rest[:2], strict=True):
        _separate(weight, record)
    device = weights[0].device
    return flags[0].to(device) if len(flags) == 1 else torch.stack([flag.to(device) for flag in flags]).any()


@torch.no_grad()
def rewire_masks(
    weights: Sequence[Tensor],
    records: Sequence[SparseParameter],
    *,
    densities: Sequence[float] | None = None,
    threads: int | None = None,
    compiled: bool = True,
) -> None:
    """Choose each record's mask anew for ``|weight|``, in place, and leave weights and dormant values as they are.

    Arguments as for `split`. The weights are not searched for NaN.
    """
    wanted = [record.density for record in records] if densities is None else list(densities)
    batch = native.Batch()
    left = _gather(batch, weights, records, wanted, 1.0, True, None, write=False) if compiled else list(range(len(weights)))
    _choose([weights[i] for i in left], [records[i] for i in left], [wanted[i] for i in left])
    batch.run(threads)


@torch.no_grad()
def penalize(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    records: Sequence[SparseParameter],
    reached: Sequence[Tensor],
    *,
    scale: Sequence[float],
    more: Sequence[float],
    compiled: bool = True,
) -> None:
    """Add an L2 penalty to gradients, a larger one on weights that do not participate, and keep those that are reached.

    ``gradient <- where(reached, (gradient + scale * weight) + more * dormant, 0)``, in place.

    Args:
        gradients: dense.
        weights: detached parameters, holding all values w, inside a step.
        records: one a weight, with dormant values, which `merge` has put back.
        reached: one a weight, bool, of its shape.
        scale: one a weight: on all of it.
        more: one a weight: what is added to that on dormant ones.
        compiled: False leaves everything to plain torch.
    """
    batch = native.Batch()
    compiled = compiled and native.available() and native.fuses_sums()
    for gradient, weight, record, chosen, all_, extra in zip(gradients, weights, records, reached, scale, more, strict=True):
        alike = gradient.dtype == weight.dtype == torch.float32 and native.supports(gradient, chosen)
        if compiled and alike and native.supports(weight, record.mask) and gradient.stride() == weight.stride():
            batch.penalize(gradient, weight, record.mask, chosen, all_, extra)
            continue
        assert record.dormant is not None
        gradient.add_(weight, alpha=all_).add_(record.dormant, alpha=extra).masked_fill_(~chosen, 0)
    batch.run()


@torch.no_grad()
def keep_masked(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Make +0.0 of everything in ``tensors`` (gradients, say) that the mask of the same place leaves out."""
    batch = native.Batch()
    compiled = native.available()
    for tensor, mask in zip(tensors, masks, strict=True):
        if compiled and native.supports(tensor, mask):
            batch.keep(tensor, mask)
        else:
            tensor.masked_fill_(~mask, 0)
    batch.run()


def _gather(
    batch: native.Batch,
    weights: Sequence[Tensor],
    records: Sequence[SparseParameter],
    densities: Sequence[float],
    scale: float,
    rewire: bool,
    reached: Sequence[Tensor] | None,
    *,
    write: bool = True,
) -> list[int]:
    """Fill ``batch`` with what the compiled kernels can do; the positions of the rest."""
    if not native.available():
        return list(range(len(weights)))
    left: list[int] = []
    together: dict[float, list[int]] = {}
    for position, (weight, record) in enumerate(zip(weights, records, strict=True)):
        pattern = record.pattern
        if record.shards is not None and (weight.numel() == 0 or (rewire and is_free(pattern))):
            left.append(position)
            continue
        if rewire and isinstance(pattern, GlobalUnstructured):
            together.setdefault(densities[position], []).append(position)
            continue
        choice = native.choice_of(pattern, record.reduction_axis, tuple(weight.shape), weight.stride()) if rewire else native.KEEP
        mine = None if reached is None else reached[position]
        if not native.supports(weight, record.mask, record.compact) or not (mine is None or native.supports(weight, mine)):
            left.append(position)
        elif choice is not None:
            batch.split(weight, record, choice, write=write, scale=_scale_first(weight, record, scale), reached=mine)
        elif isinstance(pattern, Unstructured) and native.can_select(weight):
            group = native.Group((weight,), (record,), participating(densities[position], weight.numel()))
            batch.split_group(group, write=write, scale=_scale_first(weight, record, scale))
        else:
            left.append(position)
    for density, positions in together.items():
        group_weights, group_records = [weights[i] for i in positions], [records[i] for i in positions]
        if len({weight.dtype for weight in group_weights}) > 1 or not all(
            native.supports(weight, record.mask, record.compact) and native.can_select(weight)
            for weight, record in zip(group_weights, group_records, strict=True)
        ):
            left += positions
            continue
        for weight, record in zip(group_weights, group_records, strict=True):
            rest_of_scale = _scale_first(weight, record, scale)
        keep = participating(density, sum(weight.numel() for weight in group_weights))
        batch.split_group(native.Group(group_weights, group_records, keep), write=write, scale=rest_of_scale)
    return sorted(left)


def _scale_first(weight: Tensor, record: SparseParameter, scale: float) -> float:
    """Do in torch the multiplications of half precision numbers, which the kernels leave out; the scale still to be applied."""
    if weight.element_size() > 2 or scale in (0, 1):
        return scale
    _scale_dormant(weight, record.mask, scale)
    return 1.0


def _restore(weights: Sequence[Tensor], records: Sequence[SparseParameter], reached: Sequence[Tensor]) -> None:
    """Give weights that neither participate nor were reached their dormant value back."""
    for weight, record, chosen in zip(weights, records, reached, strict=True):
        dormant = record.dormant
        assert dormant is not None
        weight.copy_(torch.where(record.mask | chosen, weight, dormant))


def _non_finite(weight: Tensor) -> Tensor:
    return ~torch.isfinite(weight).all()


def _scale_dormant(weight: Tensor, mask: Tensor, scale: float) -> None:
    if scale == 0:
        weight.masked_fill_(~mask, 0)
        return
    # Half precision is multiplied in float32 and rounded once.
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(torch.where(mask, weight, (weight.to(wide) * scale).to(weight.dtype)))


def _choose(weights: Sequence[Tensor], records: Sequence[SparseParameter], densities: Sequence[float]) -> None:
    together: dict[tuple[GlobalUnstructured, float], list[int]] = {}
    shared: list[int] = []
    coupled = by_coupling(records)
    apart = {position for positions in coupled for position in positions}
    for position, (weight, record, density) in enumerate(zip(weights, records, densities, strict=True)):
        if isinstance(record.pattern, GlobalUnstructured):
            together.setdefault((record.pattern, density), []).append(position)
        elif position in apart:
            continue
        elif record.shards is not None:
            shared.append(position)
        elif record.pattern == cuda_transposable.PATTERN and cuda_transposable.runs_here(weight):
            record.mask.copy_(cuda_transposable.choose_mask(weight))
        else:
            record.mask.copy_(record.pattern._mask(weight.abs(), density, record.reduction_axis))
    for positions in coupled:
        members, values = [records[i] for i in positions], [weights[i] for i in positions]
        for record, mask in zip(members, coupled_masks(values, members, densities[positions[0]]), strict=True):
            record.mask.copy_(mask)
    rankings = [([records[i]], [weights[i]], densities[i]) for i in shared]
    for (pattern, density), positions in together.items():
        members, values = [records[i] for i in positions], [weights[i] for i in positions]
        if members[0].shards is not None:
            rankings.append((members, values, density))
            continue
        for record, mask in zip(members, pattern.choose(values, density), strict=True):
            record.mask.copy_(mask)
    choose_of_shards(rankings)


def _separate(weight: Tensor, record: SparseParameter) -> None:
    record.keep(weight)
    weight.masked_fill_(~record.mask, 0)
