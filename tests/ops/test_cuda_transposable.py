"""Masks along both axes and their packing: the plain version against torch's conversion, the kernel against the plain version."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsefx.errors import OptionError, PatternError
from sparsefx.ops.cuda_transposable import choose_mask, masked_both_ways, pack_both_ways, runs_here
from sparsefx.patterns import parse

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_orientations_are_what_torch_packs(dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = torch.randn(64, 128, generator=generator).to(dtype)
    packed = pack_both_ways(weight)
    assert torch.equal(packed.mask, parse("2:4-transposable").mask(weight))
    pruned = weight.masked_fill(~packed.mask, 0)
    for made, dense in (
        ((packed.values, packed.metadata), pruned),
        ((packed.values_t, packed.metadata_t), pruned.t().contiguous()),
    ):
        values, metadata = sparse_semi_structured_from_dense_cutlass(dense)
        assert torch.equal(made[0], values)
        assert torch.equal(made[1], metadata)


def test_a_given_mask_is_kept_and_masks_are_chosen_before_rounding(generator: torch.Generator) -> None:
    weight = torch.randn(64, 64, generator=generator)
    other = parse("2:4-transposable").mask(torch.randn(64, 64, generator=generator))
    assert pack_both_ways(weight, other, torch.bfloat16).mask is other
    assert torch.equal(pack_both_ways(weight, dtype=torch.bfloat16).mask, choose_mask(weight))
    masked, turned = masked_both_ways(weight, other, torch.float16)
    assert torch.equal(masked, weight.masked_fill(~other, 0).half())
    assert torch.equal(turned, masked.t())
    assert turned.is_contiguous()
    assert torch.equal(masked_both_ways(weight, None, torch.float16)[0], weight.masked_fill(~choose_mask(weight), 0).half())


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PatternError, match="expected \\[64 n, 64 m\\]"):
        pack_both_ways(torch.zeros(32, 64, dtype=torch.float16))
    with pytest.raises(OptionError, match=r"expected torch\.float16 or"):
        pack_both_ways(torch.zeros(64, 64))
    assert not runs_here(torch.zeros(64, 64))


def _run(script: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_the_kernel_gives_the_same_in_the_interpreter() -> None:
    assert "matrices equal" in _run("interpret_transposable.py", TRITON_INTERPRET="1")


@needs_triton
def test_the_kernel_compiles_for_ampere_and_hopper(tmp_path: Path) -> None:
    lines = _run("compile_transposable.py", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 8
    assert sum(line.startswith("sm_90") for line in lines) == 4


@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernel_gives_the_same_on_the_gpu(dtype: torch.dtype, generator: torch.Generator) -> None:
    for weight in (torch.randn(256, 512, generator=generator), torch.randint(-2, 3, (256, 512), generator=generator).float()):
        low = weight.to(dtype)
        kind = torch.bfloat16 if dtype == torch.float32 else dtype
        assert runs_here(low.cuda())
        for one, other in zip(pack_both_ways(low.cuda(), dtype=kind), pack_both_ways(low, dtype=kind), strict=True):
            assert torch.equal(one.cpu(), other)
        mask = choose_mask(low)
        for one, other in zip(masked_both_ways(low.cuda(), mask.cuda(), kind), masked_both_ways(low, mask, kind), strict=True):
            assert torch.equal(one.cpu(), other)
