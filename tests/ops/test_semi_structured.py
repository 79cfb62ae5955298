"""The compressed form and CUTLASS's order, against torch's own conversion, which is written in another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsefx.errors import OptionError, PatternError
from sparsefx.ops.semi_structured import WORDS, codes_of_cutlass, compress, cutlass_metadata, decompress
from sparsefx.ops.semi_structured_product import (
    CuSparseLt,
    Cutlass,
    Reference,
    kernels_of_device,
    semi_structured_linear,
    why_no_kernels,
)
from sparsefx.patterns import parse

SHAPES = [(32, 128), (64, 256), (96, 384)]
DTYPES = [torch.float16, torch.bfloat16, torch.int8]


def sparse(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A 2:4 matrix, some of whose groups hold one value or none."""
    weight = torch.randint(-100, 101, shape, generator=generator).float()
    weight[torch.rand(shape, generator=generator) < 0.3] = 0
    return weight.masked_fill(~parse("2:4").mask(weight), 0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_torch_gives_cutlass(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = sparse(shape, dtype, generator)
    values, codes = compress(weight)
    metadata = cutlass_metadata(codes, WORDS[dtype.itemsize])
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values, expected_values)
    assert metadata.dtype == expected_metadata.dtype
    assert torch.equal(metadata, expected_metadata)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), weight)
    assert torch.equal(codes_of_cutlass(metadata), codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *DTYPES])
def test_nothing_is_lost(dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = sparse((5, 24), dtype, generator)
    compressed = compress(weight)
    assert torch.equal(decompress(compressed), weight)
    assert compressed.values.shape == (5, 12)
    assert compressed.codes.shape == (5, 3)


def test_a_mask_decides_where_one_is_given(generator: torch.Generator) -> None:
    weight = torch.randn(8, 32, generator=generator)
    mask = parse("2:4").mask(weight)
    assert torch.equal(decompress(compress(weight, mask)), weight.masked_fill(~mask, 0))


def test_what_is_not_two_of_four_is_refused() -> None:
    weight = torch.zeros(4, 16)
    weight[2, 4:7] = 1
    with pytest.raises(PatternError, match="row 2, columns 4 to 7 hold more than two"):
        compress(weight)
    with pytest.raises(PatternError, match="multiple of 8"):
        compress(torch.zeros(4, 12))


@pytest.mark.parametrize("kernel", [Reference(), Cutlass()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_is_undone_and_told_to_stand_ins(
    kernel: Reference | Cutlass, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = sparse((64, 256), dtype, generator)
    operands = kernel.pack(weight)
    assert torch.equal(kernel.unpack(operands, 256), weight)
    assert [(tuple(one.shape), one.dtype) for one in operands] == list(kernel.layout(64, 256, dtype))


def test_the_reference_product_is_the_dense_one(generator: torch.Generator) -> None:
    weight = sparse((24, 32), torch.float32, generator)
    rows, bias = torch.randn(7, 32, generator=generator), torch.randn(24, generator=generator)
    kernel = Reference()
    packed, metadata = kernel.pack(weight)
    result = semi_structured_linear(rows, packed, metadata, bias, 24, "reference", 0)
    assert torch.equal(result, torch.nn.functional.linear(rows, weight, bias))
    assert semi_structured_linear(rows[:0], packed, metadata, bias, 24, "reference", 0).shape == (0, 24)
    integers = sparse((24, 32), torch.int8, generator)
    bytes_in = torch.randint(-127, 128, (7, 32), generator=generator, dtype=torch.int8)
    sums = semi_structured_linear(bytes_in, *kernel.pack(integers), None, 24, "reference", 0)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), bytes_in.long() @ integers.long().t())


def test_operands_of_another_dtype_or_device_are_refused(generator: torch.Generator) -> None:
    packed, metadata = Reference().pack(sparse((32, 64), torch.bfloat16, generator))
    with pytest.raises(OptionError, match="a bfloat16 2:4 weight was given float32 inputs"):
        semi_structured_linear(torch.randn(2, 64), packed, metadata, None, 32, "reference", 0)
    with pytest.raises(OptionError, match="move the model back to the GPU"):
        semi_structured_linear(torch.randn(2, 64).bfloat16(), packed, metadata, None, 32, "cusparselt", 0)


def test_the_op_is_known_to_compilers(generator: torch.Generator) -> None:
    packed, metadata = Reference().pack(sparse((32, 64), torch.float32, generator))
    rows = torch.randn(3, 64, generator=generator)
    arguments = (rows, packed, metadata, None, 32, "reference", 0)
    torch.library.opcheck(semi_structured_linear, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("kernel", "outputs", "inputs", "dtype", "reason"),
    [
        (CuSparseLt(), 48, 32, torch.float16, ""),
        (CuSparseLt(), 40, 32, torch.float16, "16n outputs and 16n inputs; this one has 40 and 32"),
        (CuSparseLt(), 48, 32, torch.int8, "32n outputs"),
        (CuSparseLt(), 32, 32, torch.float32, "takes float16, bfloat16, int8, and the weight is float32"),
        (Cutlass(), 32, 64, torch.bfloat16, ""),
        (Cutlass(), 32, 32, torch.bfloat16, "32n outputs and 64n inputs"),
        (Cutlass(), 16, 128, torch.int8, ""),
        (Reference(), 3, 8, torch.float64, ""),
    ],
)
def test_shapes_are_refused_with_the_rule(kernel: CuSparseLt, outputs: int, inputs: int, dtype: torch.dtype, reason: str) -> None:
    refusal = kernel.refusal(outputs, inputs, dtype)
    assert reason in refusal
    assert bool(refusal) == bool(reason)


@pytest.mark.parametrize("kernel", [CuSparseLt(), Cutlass()], ids=lambda kernel: kernel.name)
def test_the_rules_are_those_of_torch(kernel: CuSparseLt | Cutlass) -> None:
    classes = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    constraints = classes[kernel.name]._DTYPE_SHAPE_CONSTRAINTS
    for dtype, multiples in kernel.multiples.items():
        assert multiples == (constraints[dtype].sparse_min_rows, constraints[dtype].sparse_min_cols)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_are_no_kernels() -> None:
    assert kernels_of_device() == ()
    assert "torch sees no NVIDIA GPU here" in why_no_kernels()


@pytest.mark.skipif(not kernels_of_device(), reason="no GPU with Sparse Tensor Cores")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_of_the_gpu_do_what_the_reference_does(dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = sparse((128, 256), dtype, generator)
    rows = torch.randint(-9, 10, (37, 256), generator=generator).to(dtype)
    bias = None if dtype == torch.int8 else torch.randn(128, generator=generator).to(dtype)
    # Sums of small integers are exact in every order; only the last rounding is left.
    small = weight.clamp(-9, 9)
    expected = semi_structured_linear(rows, *Reference().pack(small), bias, 128, "reference", 0)
    for kernel in kernels_of_device():
        operands = kernel.pack(small.cuda())
        assert torch.equal(kernel.unpack(operands, 256).cpu(), small)
        given = None if bias is None else bias.cuda()
        result = semi_structured_linear(rows.cuda(), *operands, given, 128, kernel.name, 0).cpu()
        assert [(tuple(one.shape), one.dtype) for one in operands] == list(kernel.layout(128, 256, dtype))
        if dtype == torch.int8:
            assert torch.equal(result, expected)
        else:
            torch.testing.assert_close(result, expected)
