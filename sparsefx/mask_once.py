"""Masking weights for good, one layer at a time, for models that leave no room for a second copy of anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from sparsefx.api import audit
from sparsefx.errors import EligibilityError, NonFiniteError, OptionError, StateError
from sparsefx.model_record import has_records
from sparsefx.one_shot import OneShotMethod, find, solve
from sparsefx.ops.split import split
from sparsefx.passes.analyze_eligibility import Eligibility, Selection
from sparsefx.patterns import CoupledChannel, GlobalUnstructured, Pattern, parse
from sparsefx.sharded_records import refuse_distributed
from sparsefx.sparse_parameter import SparseParameter

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)


class Choice(TypedDict, total=False):
    """Which layers are to be masked, and how; see `sparsefx.sparsify`."""

    pattern: str | Pattern
    density: float | None
    example_inputs: Any
    include: Selection
    exclude: Selection
    eligibility: Eligibility | None


def mask_once(
    model: Model,
    *,
    algorithm: str | OneShotMethod = "magnitude",
    calibration: Iterable[Any] | None = None,
    **choice: Unpack[Choice],
) -> Model:
    """Set weights of the eligible layers to zero, in place and for good: `sparsefx.sparsify` and `sparsefx.finalize` in one,
    without a mask or a removed weight being kept.

    Memory: a mask of one layer (1 byte a weight) and what choosing it takes, at any time. The price is that nothing can be put
    back: everything that can be refused is refused first, but where the process is stopped midway, the layers done by then stay
    masked. Calling it again goes on from there, since a masked layer keeps its mask.

    With algorithm ``"wanda"`` or ``"sparsegpt"`` and calibration batches, that is the statistics of one block's inputs and what
    solving one layer takes. Their original weights wait in a temporary file, and are put back where a layer fails.

    Arguments as for `sparsefx.sparsify`, with its defaults; ``"magnitude"`` removes the smallest weights. Returns the same
    object.

    Raises:
        StateError: the model is sparsified already, sharded, or on the meta device.
        OptionError: another algorithm, no calibration batches for one that looks at them, a pattern that it cannot choose, or
            pattern ``"unstructured:global"``, whose threshold needs all layers at once.
        EligibilityError: no layer is eligible, or ``include``/``exclude`` match nothing.
        PatternError, CaptureError: as for `sparsefx.sparsify`.
        NonFiniteError: a weight holds NaN or infinity.
    """
    odd = sorted(choice.keys() - Choice.__annotations__.keys())
    if odd:
        raise TypeError(f"mask_once() got an unexpected keyword argument {odd[0]!r}")
    method = find(algorithm)
    if method is None and algorithm not in ("magnitude", "static"):
        raise OptionError(f"algorithm={algorithm!r} was given; expected 'magnitude', 'wanda' or 'sparsegpt'")
    if method is None and calibration is not None:
        raise OptionError("calibration was given, and masks by magnitude use none; leave it out, or pass algorithm='wanda'")
    if isinstance(model, nn.Module):
        refuse_distributed(model, "mask_once")
    found = audit(model, **choice)
    if has_records(model):
        raise StateError("mask_once was given a model that is sparsified already; call sparsefx.finalize(model) instead")
    pattern = choice.get("pattern", "2:4")
    chosen = parse(pattern) if isinstance(pattern, str) else pattern
    density = chosen.resolve_density(choice.get("density"))
    if isinstance(chosen, GlobalUnstructured):
        raise OptionError(
            "mask_once was given pattern 'unstructured:global', whose one threshold needs all layers at once; use "
            "'unstructured', or sparsefx.sparsify and sparsefx.finalize"
        )
    if isinstance(chosen, CoupledChannel):
        raise OptionError(
            "mask_once was given pattern 'channel:coupled', whose masks need all layers at once; use 'channel', or "
            "sparsefx.sparsify and sparsefx.finalize"
        )
    rows = [row for row in found.layers if row.sparse]
    if not rows:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in found.layers[:3])
        raise EligibilityError(f"no layer of this model can be sparse: {reasons or 'it has no Linear or Conv layer'}")
    for row in rows:
        weight = model.get_parameter(row.parameter).detach()
        if weight.is_meta:
            raise StateError(f"{row.name} is on the meta device; give the model memory and weights first")
        # Smallest and largest pass NaN on, and take no memory of the weight's size.
        if not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):
            raise NonFiniteError(f"{row.name}: the weight holds NaN or infinity; load a good checkpoint, or exclude the layer")
    with torch.inference_mode(False), torch.no_grad():
        if method is not None:
            names = [row.parameter for row in rows]
            solve(model, names, pattern=chosen, density=density, method=method, calibration=calibration, keep_masks=False)
            return model
        for row in rows:
            _mask(model.get_parameter(row.parameter).detach(), chosen, density, row.reduction_axis)
    return model


def _mask(weight: Tensor, pattern: Pattern, density: float, reduction_axis: int) -> None:
    # A function of its own, so that one layer's mask is gone before the next one is made.
    mask = torch.empty_like(weight, dtype=torch.bool)
    split([weight], [SparseParameter(pattern, density, reduction_axis, mask)])
