"""Masks that are 2:4 along both axes, chosen and packed in both orientations: one Triton kernel, and the same in plain torch.

The kernel is exact: of the 90 masks of a 4 x 4 block it takes the one that the pattern ``2:4-transposable`` takes, ties included.
Its operands are in the order that CUTLASS reads, which torch's kernels for GPUs of compute capability 8.x take as they are. For
cuSPARSELt (Hopper and newer) it writes the masked weight and its transpose, which ``torch._cslt_compress`` packs: that library's
own order is not documented and differs between GPUs.

Triton is optional. Without a GPU the kernel was run in Triton's interpreter and compiled for GPUs of compute capability 8.0 and
9.0; it has not been run on one.
"""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsefx.errors import OptionError, PatternError
from sparsefx.ops.semi_structured import WORDS, compress, cutlass_metadata
from sparsefx.patterns.transposable import Transposable

PATTERN = Transposable(2, 4)
_PACKED_MULTIPLE = 64  # of rows and columns, for CUTLASS's operands of both orientations
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WARPS = 8


class BothWays(NamedTuple):
    """A masked weight ``[rows, columns]`` and its transpose as CUTLASS takes them.

    Attributes:
        mask: bool ``[rows, columns]``.
        values: ``[rows, columns / 2]``.
        metadata: int16 ``[rows, columns / 16]``, see `cutlass_metadata`.
        values_t, metadata_t: of the transposed weight, ``[columns, rows / 2]`` and ``[columns, rows / 16]``.
    """

    mask: Tensor
    values: Tensor
    metadata: Tensor
    values_t: Tensor
    metadata_t: Tensor


@lru_cache(maxsize=1)
def triton_is_installed() -> bool:
    """Whether Triton can be imported; nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


def runs_here(weight: Tensor) -> bool:
    """Whether the Triton kernel takes this weight: a plain matrix on a GPU, small enough for 32-bit places."""
    return (
        weight.is_cuda
        and weight.ndim == 2
        and weight.is_contiguous()
        and weight.dtype in _FLOATS
        and weight.numel() < 1 << 31
        and weight.shape[0] % 4 == 0
        and weight.shape[1] % 4 == 0
        and torch.version.hip is None
        and triton_is_installed()
        and _works_on(weight.device.index)
    )


@lru_cache(maxsize=64)
def _works_on(device: int) -> bool:
    """Whether the kernel compiles for this GPU and gives there what plain torch gives; tried once a process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (64, 128), generator=generator).to(torch.bfloat16)
    expected = pack_both_ways(weight, compiled=False)
    try:
        there = weight.to(torch.device("cuda", device))
        made = empty_both_ways(there, None, weight.dtype)
        launch(there, None, mask=made.mask, packed=made)
        same = all(torch.equal(one.cpu(), other) for one, other in zip(made, expected, strict=True))
        problem = "its results differ from those of plain torch"
    except Exception as error:  # Triton raises errors of many kinds, also of the C compiler that it calls
        same, problem = False, f"{type(error).__name__}: {error}"
    if not same:
        told = problem.splitlines()[0]
        warnings.warn(
            f"the Triton kernel for 2:4 transposable masks is not used on cuda:{device}, plain torch chooses them: {told}",
            UserWarning,
            stacklevel=2,
        )
    return same


def choose_mask(weight: Tensor, *, compiled: bool = True) -> Tensor:
    """The mask of the pattern ``2:4-transposable`` for ``|weight|``: bool, in its shape.

    Args:
        weight: ``[rows, columns]``, both multiples of 4.
        compiled: False leaves it to plain torch, with the same result.
    """
    if not (compiled and runs_here(weight)):
        return PATTERN._mask(weight.abs(), 0.5, 1)
    mask = torch.empty_like(weight, dtype=torch.bool)
    launch(weight, None, mask=mask)
    return mask


def masked_both_ways(weight: Tensor, mask: Tensor | None, dtype: torch.dtype, *, compiled: bool = True) -> tuple[Tensor, Tensor]:
    """``weight`` where the mask is True and zero elsewhere, in ``dtype``, and its transpose, both contiguous.

    Args:
        weight: ``[rows, columns]``, both multiples of 4.
        mask: bool, in its shape; None stands for the best one for ``|weight|``.
        dtype: of both results.
        compiled: False leaves it to plain torch, with the same result.
    """
    if not (compiled and runs_here(weight) and (mask is None or mask.is_contiguous())):
        chosen = choose_mask(weight, compiled=False) if mask is None else mask
        masked = weight.masked_fill(~chosen, 0).to(dtype)
        return masked.contiguous(), masked.t().contiguous()
    masked, turned = weight.new_empty(weight.shape, dtype=dtype), weight.new_empty(weight.shape[::-1], dtype=dtype)
    launch(weight, mask, dense=(masked, turned))
    return masked, turned


def pack_both_ways(
    weight: Tensor, mask: Tensor | None = None, dtype: torch.dtype | None = None, *, compiled: bool = True
) -> BothWays:
    """Choose the mask, unless one is given, and pack the masked weight and its transpose for CUTLASS.

    Args:
        weight: ``[rows, columns]``, both multiples of 64, of any floating dtype.
        mask: bool, 2:4 along both axes; None stands for the best one for ``|weight|``.
        dtype: of the operands, float16 or bfloat16; None means the weight's own. Masks are chosen before the conversion.
        compiled: False leaves it to plain torch, with the same result.

    Raises:
        PatternError: the shape does not fit.
        OptionError: a dtype of other than two bytes.
    """
    dtype = weight.dtype if dtype is None else dtype
    if weight.ndim != 2 or weight.shape[0] % _PACKED_MULTIPLE or weight.shape[1] % _PACKED_MULTIPLE:
        raise PatternError(
            f"a weight of shape {tuple(weight.shape)} was given; expected [64 n, 64 m] to pack it in both orientations"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise OptionError(f"dtype={dtype} was given; expected torch.float16 or torch.bfloat16")
    if not (compiled and runs_here(weight) and (mask is None or mask.is_contiguous())):
        chosen = choose_mask(weight, compiled=False) if mask is None else mask
        low = weight.to(dtype)
        values, codes = compress(low, chosen)
        values_t, codes_t = compress(low.t().contiguous(), chosen.t())
        word = WORDS[dtype.itemsize]
        return BothWays(chosen, values, cutlass_metadata(codes, word), values_t, cutlass_metadata(codes_t, word))
    packed = empty_both_ways(weight, mask, dtype)
    launch(weight, mask, mask=packed.mask if mask is None else None, packed=packed)
    return packed


def empty_both_ways(weight: Tensor, mask: Tensor | None, dtype: torch.dtype) -> BothWays:
    """Room for what `pack_both_ways` gives; ``mask`` itself where there is one."""
    rows, columns = weight.shape
    return BothWays(
        torch.empty_like(weight, dtype=torch.bool) if mask is None else mask,
        weight.new_empty(rows, columns // 2, dtype=dtype),
        weight.new_empty(rows, columns // 16, dtype=torch.int16),
        weight.new_empty(columns, rows // 2, dtype=dtype),
        weight.new_empty(columns, rows // 16, dtype=torch.int16),
    )


def launch(
    weight: Tensor,
    given: Tensor | None,
    *,
    mask: Tensor | None = None,
    packed: BothWays | None = None,
    dense: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run the kernel on a contiguous ``weight``: with the mask ``given`` or the best one, which goes to ``mask`` where that is
    room for it, and write ``packed`` or ``dense``, one at most."""
    from sparsefx.ops.cuda_transposable_kernel import SIDE, transposable_kernel

    rows, columns = weight.shape
    unused = weight  # a pointer that is not followed
    side: Any = 4 * SIDE.value
    grid = (-(-rows // side), -(-columns // side))
    operands: tuple[Tensor, ...] = (unused,) * 4
    if packed is not None:
        operands = packed[1:]
    elif dense is not None:
        operands = (dense[0], unused, dense[1], unused)
    # Triton launches on the current GPU, which need not be the weight's; in its interpreter there is none.
    with torch.cuda.device_of(weight) if weight.is_cuda else nullcontext():
        transposable_kernel[grid](
            weight,
            unused if given is None else given.view(torch.uint8),
            unused if mask is None else mask.view(torch.uint8),
            *operands,
            rows,
            columns,
            HAS_MASK=given is not None,
            WRITE_MASK=mask is not None,
            PACK=packed is not None,
            WRITE_DENSE=dense is not None,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
