"""Products with a 2:4 matrix: the kernels that torch has for Sparse Tensor Cores, and a reference in plain torch.

    kernel      GPUs               dtypes                    a weight [outputs, inputs] is a multiple of
    cusparselt  8.0 and newer      float16, bfloat16, int8   16 x 16, int8 32 x 32
    cutlass     8.x alone          float16, bfloat16, int8   32 x 64, int8 16 x 128
    reference   any, CPU           all                       1 x 8

Shapes are those of ``torch.sparse.SparseSemiStructuredTensor``'s two subclasses. torch refuses its CUTLASS kernels on other GPUs
than 8.x ("Supported only on GPUs with compute capability 8.x"), so Hopper has cuSPARSELt alone. How cuSPARSELt lays out a
compressed matrix is its own affair and differs between GPUs, so nothing here reads or writes it: it is packed by
``torch._cslt_compress`` on the GPU at hand, and unpacked by a product with the identity, which is exact.

Written without a GPU at hand: the two kernels for GPUs have not been run yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from sparsefx.errors import OptionError
from sparsefx.ops.masked import LIBRARY
from sparsefx.ops.semi_structured import WORDS, Compressed, codes_of_cutlass, compress, cutlass_metadata, decompress


class Operands(NamedTuple):
    """A 2:4 matrix as one kernel takes it. Only that kernel, on that kind of GPU, knows what the numbers mean."""

    packed: Tensor
    metadata: Tensor


Room = tuple[tuple[int, ...], torch.dtype]


class ProductKernel(ABC):
    """One implementation of ``input @ weight.T + bias`` for a 2:4 ``weight [outputs, inputs]``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As the op and the reports have it."""

    @property
    @abstractmethod
    def multiples(self) -> dict[torch.dtype, tuple[int, int]]:
        """What outputs and inputs are multiples of, by dtype; a dtype that is not there is not supported."""

    @abstractmethod
    def layout(self, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Room, Room]:
        """Shape and dtype of both operands, for stand-ins without values."""

    @abstractmethod
    def pack(self, weight: Tensor) -> Operands:
        """The operands of a dense contiguous ``weight [outputs, inputs]`` that is 2:4 along its rows."""

    @abstractmethod
    def unpack(self, operands: Operands, inputs: int) -> Tensor:
        """The dense weight, value for value."""

    @abstractmethod
    def product(self, rows: Tensor, operands: Operands, bias: Tensor | None, algorithm: int) -> Tensor:
        """``rows [n, inputs]`` times the weight transposed: ``[n, outputs]``, int32 where they are int8."""

    def fastest_algorithm(self, rows: Tensor, operands: Operands, bias: Tensor | None) -> int:
        """The number of the variant that is fastest for these operands; 0 where the kernel has one only."""
        return 0

    @final
    def refusal(self, outputs: int, inputs: int, dtype: torch.dtype) -> str:
        """Why a weight of this shape and dtype cannot be taken, with the remedy; empty where it can."""
        if dtype not in self.multiples:
            names = ", ".join(_plain(one) for one in self.multiples)
            return f"{self.name} takes {names}, and the weight is {_plain(dtype)}; convert the model with .to(torch.bfloat16)"
        row, column = self.multiples[dtype]
        if outputs % row or inputs % column or not outputs or not inputs:
            return (
                f"{self.name} takes {_plain(dtype)} weights of {row}n outputs and {column}n inputs; this one has {outputs} and "
                f"{inputs}; pad the layer to such a width"
            )
        return ""


@dataclass(frozen=True)
class Reference(ProductKernel):
    """The meaning of the product: the dense weight is restored, and multiplied. For tests, and slower than a dense layer."""

    @property
    def name(self) -> str:
        return "reference"

    @property
    def multiples(self) -> dict[torch.dtype, tuple[int, int]]:
        every = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8)
        return dict.fromkeys(every, (1, 8))

    def layout(self, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Room, Room]:
        return ((outputs, inputs // 2), dtype), ((outputs, inputs // 8), torch.uint8)

    def pack(self, weight: Tensor) -> Operands:
        return Operands(*compress(weight))

    def unpack(self, operands: Operands, inputs: int) -> Tensor:
        return decompress(Compressed(*operands))

    def product(self, rows: Tensor, operands: Operands, bias: Tensor | None, algorithm: int) -> Tensor:
        weight = decompress(Compressed(*operands))
        if rows.dtype == torch.int8:
            # No sum of products of two bytes leaves the integers that float64 holds.
            return (rows.double() @ weight.double().t()).to(torch.int32)
        return functional.linear(rows, weight, bias)


@dataclass(frozen=True)
class Cutlass(ProductKernel):
    """torch's CUTLASS kernels, ``torch._sparse_semi_structured_mm`` and ``_addmm``."""

    @property
    def name(self) -> str:
        return "cutlass"

    @property
    def multiples(self) -> dict[torch.dtype, tuple[int, int]]:
        return {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)}

    def layout(self, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Room, Room]:
        word = WORDS[dtype.itemsize]
        return ((outputs, inputs // 2), dtype), ((outputs, inputs // (8 * word.itemsize)), word)

    def pack(self, weight: Tensor) -> Operands:
        values, codes = compress(weight)
        return Operands(values, cutlass_metadata(codes, WORDS[weight.dtype.itemsize]))

    def unpack(self, operands: Operands, inputs: int) -> Tensor:
        return decompress(Compressed(operands.packed, codes_of_cutlass(operands.metadata)))

    def product(self, rows: Tensor, operands: Operands, bias: Tensor | None, algorithm: int) -> Tensor:
        count = rows.shape[0]
        padded = _padded(rows).t()
        if rows.dtype == torch.int8:
            result = torch._sparse_semi_structured_mm(*operands, padded, out_dtype=torch.int32)
        elif bias is None:
            result = torch._sparse_semi_structured_mm(*operands, padded)
        else:
            result = torch._sparse_semi_structured_addmm(bias, *operands, padded)
        return result.t()[:count].contiguous()


@dataclass(frozen=True)
class CuSparseLt(ProductKernel):
    """cuSPARSELt, ``torch._cslt_sparse_mm``: the result is written transposed, so that nothing is copied."""

    @property
    def name(self) -> str:
        return "cusparselt"

    @property
    def multiples(self) -> dict[torch.dtype, tuple[int, int]]:
        return {torch.float16: (16, 16), torch.bfloat16: (16, 16), torch.int8: (32, 32)}

    def layout(self, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Room, Room]:
        sixteenths = 10 if dtype.itemsize == 1 else 9
        return ((outputs, inputs * sixteenths // 16), dtype), ((0,), torch.uint8)

    def pack(self, weight: Tensor) -> Operands:
        packed = torch._cslt_compress(weight.contiguous()).view(weight.shape[0], -1)
        return Operands(packed, torch.empty(0, dtype=torch.uint8, device=weight.device))

    def unpack(self, operands: Operands, inputs: int) -> Tensor:
        identity = torch.eye(inputs, dtype=operands.packed.dtype, device=operands.packed.device)
        return self.product(identity, operands, None, 0).t().to(operands.packed.dtype).contiguous()

    def product(self, rows: Tensor, operands: Operands, bias: Tensor | None, algorithm: int) -> Tensor:
        count, padded = rows.shape[0], _padded(rows)
        result = torch._cslt_sparse_mm(
            operands.packed,
            padded.t(),
            bias=bias,
            out_dtype=torch.int32 if rows.dtype == torch.int8 else None,
            transpose_result=True,
            alg_id=algorithm,
        )
        return result if padded is rows else result[:count].contiguous()

    def fastest_algorithm(self, rows: Tensor, operands: Operands, bias: Tensor | None) -> int:
        return int(
            torch._cslt_sparse_mm_search(
                operands.packed,
                _padded(rows).t(),
                bias=bias,
                out_dtype=torch.int32 if rows.dtype == torch.int8 else None,
                transpose_result=True,
            )
        )


KERNELS: dict[str, ProductKernel] = {kernel.name: kernel for kernel in (CuSparseLt(), Cutlass(), Reference())}


def kernels_of_device() -> tuple[ProductKernel, ...]:
    """The kernels for Sparse Tensor Cores that the current GPU and this build of torch have, none without a GPU."""
    if not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability()[0] < 8:
        return ()
    found: list[ProductKernel] = [CuSparseLt()] if torch.backends.cusparselt.is_available() else []
    return (*found, Cutlass()) if torch.cuda.get_device_capability()[0] == 8 else tuple(found)


def why_no_kernels() -> str:
    """What is missing where `kernels_of_device` finds none, with the remedy; empty where it finds some."""
    if kernels_of_device():
        return ""
    if torch.version.hip is not None:
        return "this build of torch is for AMD GPUs, and Sparse Tensor Cores are NVIDIA's"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here; run it on a machine with one, with a CUDA build of torch"
    if torch.cuda.get_device_capability()[0] < 8:
        return f"{torch.cuda.get_device_name()} has no Sparse Tensor Cores; use one of compute capability 8.0 or newer"
    return "this build of torch has no cuSPARSELt; install an official CUDA build of torch"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _padded(rows: Tensor) -> Tensor:
    """Rows up to the next multiple that the dense side is read in: 8 of two bytes, 16 of one."""
    rows = rows.contiguous()
    missing = -rows.shape[0] % (16 if rows.dtype.itemsize == 1 else 8)
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows


LIBRARY.define(
    "semi_structured_linear(Tensor input, Tensor packed, Tensor metadata, Tensor? bias, int outputs, str kernel, int algorithm) "
    "-> Tensor"
)


def _semi_structured_linear(
    rows: Tensor, packed: Tensor, metadata: Tensor, bias: Tensor | None, outputs: int, kernel: str, algorithm: int
) -> Tensor:
    if packed.dtype != rows.dtype:
        raise OptionError(
            f"a {_plain(packed.dtype)} 2:4 weight was given {_plain(rows.dtype)} inputs; convert them, or run under autocast"
        )
    if packed.device.type == "cpu" and not isinstance(KERNELS[kernel], Reference):
        raise OptionError(f"the weight is packed for {kernel} on a GPU, and was moved to the CPU; move the model back to the GPU")
    if not rows.shape[0]:
        return rows.new_empty(0, outputs, dtype=torch.int32 if rows.dtype == torch.int8 else rows.dtype)
    return KERNELS[kernel].product(rows, Operands(packed, metadata), bias, algorithm)


def _fake_semi_structured_linear(
    rows: Tensor, packed: Tensor, metadata: Tensor, bias: Tensor | None, outputs: int, kernel: str, algorithm: int
) -> Tensor:
    return rows.new_empty(rows.shape[0], outputs, dtype=torch.int32 if rows.dtype == torch.int8 else rows.dtype)


LIBRARY.impl("semi_structured_linear", _semi_structured_linear, "CPU")
LIBRARY.impl("semi_structured_linear", _semi_structured_linear, "CUDA")
torch.library.register_fake("sparsefx::semi_structured_linear", _fake_semi_structured_linear, lib=LIBRARY)
semi_structured_linear = torch.ops.sparsefx.semi_structured_linear.default
"""``input [n, inputs]`` times a packed 2:4 weight, plus ``bias``: ``[n, outputs]``; see `ProductKernel`. It has no gradient."""
