"""The compiled merge and split of dense CPU weights (`native.c`), loaded with ctypes; absent where it was not built.

It runs all weights of a model in one call, on threads of its own that end with the call. Magnitudes are compared as bits with
the sign cleared, which is exact for float16, bfloat16, float32 and float64 alike. Results equal those of plain torch bit for bit.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsefx.dormant_values import MASK_CHANGED
from sparsefx.errors import StateError
from sparsefx.patterns.base import Pattern
from sparsefx.patterns.n_of_m import NOfM
from sparsefx.patterns.transposable import Transposable
from sparsefx.sparse_parameter import SparseParameter

_JOB = struct.Struct("4Q12q2d14q")
_GROUP = struct.Struct("3q2d")
_FORMATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_KEEP_MASK, _N_OF_M, _TWO_OF_FOUR_BLOCKS, _THRESHOLD, _MERGE, _PENALIZE = range(6)
_MAX_AXES = 6
_SEARCHES = (_N_OF_M, _TWO_OF_FOUR_BLOCKS, _THRESHOLD)
# Searched for masks; passing over weights takes an eighth. With fewer, starting a thread costs more than it saves.
_WEIGHTS_PER_THREAD = 1 << 16


class Choice(NamedTuple):
    """How a mask is chosen: the fields of a job that depend on the pattern and the memory layout alone."""

    kind: int
    n: int = 0
    m: int = 0
    inner: int = 0
    slow_size: int = 0
    slow_stride: int = 0
    fast_size: int = 0
    transposed: int = 0


KEEP = Choice(_KEEP_MASK)
LARGEST = Choice(_THRESHOLD)
_MERGED = Choice(_MERGE)
_PENALIZED = Choice(_PENALIZE)


class Group(NamedTuple):
    """Weights among which the ``keep`` largest are chosen together."""

    weights: Sequence[Tensor]
    records: Sequence[SparseParameter]
    keep: int


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_native" + suffix)
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            library.sparsefx_layout.restype = ctypes.c_int64
            # A library of another version of these sources would misread its input.
            if library.sparsefx_layout() != _JOB.size * 1000 + _GROUP.size:
                continue
            library.sparsefx_zeros.restype = ctypes.c_int64
            library.sparsefx_zeros.argtypes = [ctypes.c_void_p, ctypes.c_int64]
            library.sparsefx_run.restype = ctypes.c_int
            library.sparsefx_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        except (OSError, AttributeError):
            continue
        return library
    return None


def available() -> bool:
    """Whether the compiled library was built for this platform and loads."""
    return _library() is not None


def describe() -> str:
    """Which implementation of merge and split runs on the CPU, in words."""
    if available():
        return "compiled C kernels for dense CPU weights, plain torch for others"
    return "plain torch (the compiled extension sparsefx.ops._native was not built)"


def supports(weight: Tensor, mask: Tensor, compact: Tensor | None = None) -> bool:
    """Whether the compiled kernels can work on this weight, its mask and its dormant values (`SparseParameter.compact`)."""
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_cpu or weight.dtype not in _FORMATS:
        return False
    if weight.layout is not torch.strided or weight.is_neg():
        return False
    stride, shape = weight.stride(), weight.shape
    if not mask.is_cpu or mask.dtype is not torch.bool or mask.stride() != stride or mask.shape != shape:
        return False
    if compact is not None and (
        not compact.is_cpu or compact.dtype is not weight.dtype or compact.dim() != 1 or not compact.is_contiguous()
    ):
        return False
    return _dense(shape, stride)


@lru_cache(maxsize=1)
def fuses_sums() -> bool:
    """Whether ``a.add_(b, alpha=c)`` of torch rounds once on this machine, as the kernels do: not every CPU can."""
    almost_one = 1 + 2.0**-12
    # The square is 1 + 2^-11 + 2^-24, of which a product in float32 would lose the last.
    found = torch.full((67,), -1.0).add_(torch.full((67,), almost_one), alpha=almost_one)
    return bool((found == 2.0**-11 + 2.0**-24).all())


@lru_cache(maxsize=256)
def choice_of(pattern: Pattern, reduction_axis: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Choice | None:
    """How the kernels choose masks of this pattern on dense memory of this layout; None where they cannot."""
    if isinstance(pattern, NOfM) and pattern.m > 1:
        return Choice(_N_OF_M, n=pattern.n, m=pattern.m, inner=stride[reduction_axis])
    if isinstance(pattern, Transposable) and (pattern.n, pattern.m) == (2, 4):
        slow, fast = (0, 1) if stride[0] > stride[1] else (1, 0)
        return Choice(
            _TWO_OF_FOUR_BLOCKS,
            inner=stride[fast],
            slow_size=shape[slow],
            slow_stride=stride[slow],
            fast_size=shape[fast],
            transposed=slow,
        )
    return None


def can_select(weight: Tensor) -> bool:
    """Whether the kernels can break ties in row-major order in this weight's memory."""
    return weight.is_contiguous() or weight.dim() <= _MAX_AXES


@lru_cache(maxsize=256)
def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements fill their memory once, in whatever order of axes."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step != expected or size == 0:
            return False
        expected *= size
    return True


class Batch:
    """Weights gathered for one call of the library."""

    def __init__(self) -> None:
        self._jobs: list[bytes] = []
        self._groups: list[tuple[Group, int]] = []
        self._changed: list[Tensor] = []
        self._to_separate: list[tuple[Tensor, SparseParameter]] = []
        self._work = 0

    def merge(self, weight: Tensor, record: SparseParameter) -> None:
        """Put the dormant values back."""
        self._add(weight, record.mask, record.compact, _MERGED, write=True, scale=1.0)

    def keep(self, tensor: Tensor, mask: Tensor) -> None:
        """Make zero of what the mask leaves out."""
        self._add(tensor, mask, None, KEEP, write=True, scale=1.0)

    def split(
        self,
        weight: Tensor,
        record: SparseParameter,
        choice: Choice,
        *,
        write: bool = True,
        scale: float = 1.0,
        reached: Tensor | None = None,
    ) -> None:
        """Choose the mask by `choice_of`, or leave it with ``KEEP``, and, with ``write``, split the weight.

        With ``reached``, which wants dormant values, ``KEEP`` and scale 1, what is neither in the mask nor reached first goes
        back to its dormant value.
        """
        # With ``reached`` the values that are there are read first, and their number has to be the mask's.
        if record.compact is not None and write and reached is None:
            record.make_room(_left_out(weight, record.mask, choice))
        self._add(weight, record.mask, record.compact, choice, write=write, scale=scale, reached=reached)

    def penalize(self, gradient: Tensor, weight: Tensor, mask: Tensor, reached: Tensor, scale: float, more: float) -> None:
        """``(gradient + scale * weight) + more * dormant`` where reached, else zero; float32, where `fuses_sums`."""
        self._add(gradient, mask, weight, _PENALIZED, write=True, scale=scale, reached=reached, more=more)

    def split_group(self, group: Group, *, write: bool = True, scale: float = 1.0) -> None:
        """Choose the largest weights of a group, all of one dtype, and, with ``write``, split them."""
        self._groups.append((group, len(self._jobs)))
        for weight, record in zip(group.weights, group.records, strict=True):
            # How many dormant values each weight has, and where they begin, is known when the group's threshold is.
            later = write and record.compact is not None
            if later:
                self._to_separate.append((weight, record))
            group_number = len(self._groups) - 1
            self._add(weight, record.mask, None, LARGEST, write=write and not later, scale=scale, group=group_number)

    def _add(
        self,
        weight: Tensor,
        mask: Tensor,
        compact: Tensor | None,
        choice: Choice,
        *,
        write: bool,
        scale: float,
        group: int = -1,
        reached: Tensor | None = None,
        more: float = 0.0,
    ) -> None:
        axes, lengths = 0, (0,) * (2 * _MAX_AXES)
        if choice.kind == _THRESHOLD and not weight.is_contiguous():
            axes, filler = weight.dim(), (0,) * (_MAX_AXES - weight.dim())
            lengths = (*weight.shape, *filler, *weight.stride(), *filler)
        count = weight.numel()
        self._jobs.append(
            _JOB.pack(
                weight.data_ptr(),
                mask.data_ptr(),
                0 if compact is None else compact.data_ptr(),
                0 if reached is None else reached.data_ptr(),
                -1 if compact is None else compact.numel(),
                count,
                _FORMATS[weight.dtype],
                *choice,
                write,
                scale,
                more,
                group,
                axes,
                *lengths,
            )
        )
        self._work += count if choice.kind in _SEARCHES else count // 8
        if write:
            self._changed.append(weight)
        if choice.kind not in (_MERGE, _KEEP_MASK, _PENALIZE):
            self._changed.append(mask)
        if choice.kind not in (_MERGE, _PENALIZE) and compact is not None and write:
            self._changed.append(compact)

    def run(self, threads: int | None = None) -> bool:
        """Do it all. Returns whether NaN or infinity was seen.

        Raises:
            MemoryError: there was none for the kernels' tables; nothing was changed.
            StateError: a mask was changed without the dormant values beside it; nothing was changed.
        """
        if not self._jobs:
            return False
        library = _library()
        assert library is not None
        jobs = ctypes.create_string_buffer(b"".join(self._jobs), len(self._jobs) * _JOB.size)
        groups = ctypes.create_string_buffer(b"".join(map(_pack_group, self._groups)), max(1, len(self._groups) * _GROUP.size))
        wanted = torch.get_num_threads() if threads is None else threads
        used = max(1, min(wanted, self._work // _WEIGHTS_PER_THREAD)) if threads is None else wanted
        result = library.sparsefx_run(jobs, len(self._jobs), groups, len(self._groups), used)
        if result == -2:
            raise StateError(MASK_CHANGED)
        if result < 0:
            raise MemoryError("no memory for the tables of the mask kernels")
        # Autograd has to notice writes that it did not see.
        torch.autograd.graph.increment_version([tensor for tensor in self._changed if not tensor.is_inference()])
        for position, (group, _) in enumerate(self._groups):
            threshold = _GROUP.unpack_from(groups, position * _GROUP.size)[-1]
            for record in group.records:
                record.threshold = None if math.isnan(threshold) else threshold
        if self._to_separate:
            rest = Batch()
            for weight, record in self._to_separate:
                rest.split(weight, record, KEEP)
            result |= rest.run(threads)
        return bool(result)


def _left_out(weight: Tensor, mask: Tensor, choice: Choice) -> int:
    """How many weights the mask will leave out when it is chosen so."""
    count = weight.numel()
    if choice.kind == _N_OF_M:
        return count // choice.m * (choice.m - choice.n)
    if choice.kind == _TWO_OF_FOUR_BLOCKS:
        return count // 2
    library = _library()
    assert library is not None
    found: int = library.sparsefx_zeros(mask.data_ptr(), count)
    return found


def _pack_group(entry: tuple[Group, int]) -> bytes:
    group, first = entry
    hint = group.records[0].threshold
    return _GROUP.pack(first, len(group.weights), group.keep, math.nan if hint is None else hint, math.nan)
