"""Choosing among tensors that processes share: what one process would choose, ties included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sparsefx.ops.masks_of_shards import choose_of_shards
from sparsefx.ops.select import largest_among
from sparsefx.ops.select_shards import Ranking, largest_of_shards
from sparsefx.patterns import GlobalUnstructured, Pattern, parse
from sparsefx.patterns.selection import largest
from sparsefx.shards import Shards, shards_of, totals, values_of
from sparsefx.sparse_parameter import SparseParameter
from tests.processes import run_on

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
# Rows over three processes: even, uneven, and too few for the last.
SHAPES = ((6, 4), (7, 5), (2, 8), (9, 6, 3, 3))


def test_the_choice_is_that_of_one_process(tmp_path: Path) -> None:
    first, *others = run_on(3, _choices, tmp_path)
    assert all(other == first for other in others)
    assert len(first) > 60
    assert {name for name, held in first.items() if not held} == set()


def scores_of(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = {"normal": values, "ties": values.round(), "zeros": values * 0}[kind]
    return values.to(dtype).abs()


def cut(whole: Tensor, axis: int) -> tuple[Tensor, Shards]:
    mesh = init_device_mesh("cpu", (3,))
    parts = distribute_tensor(whole, mesh, [Shard(axis)])
    shards = shards_of(parts, "w")
    assert shards is not None
    assert torch.equal(shards.part(whole), values_of(parts))
    assert torch.equal(shards.distributed(values_of(parts)).full_tensor(), whole)
    return values_of(parts), shards


def joined(part: Tensor, shards: Shards) -> Tensor:
    made = shards.distributed(part)
    assert isinstance(made, DTensor)
    return made.full_tensor()


def _choices(rank: int) -> dict[str, bool]:
    held: dict[str, bool] = {}
    for shape in SHAPES:
        for axis in (0, 1):
            for kind, dtype in (("normal", torch.float32), ("ties", torch.float64), ("zeros", torch.float16)):
                whole = scores_of(shape, kind, dtype)
                part, shards = cut(whole, axis)
                for count in (1, whole.numel() // 3, whole.numel()):
                    chosen = largest_of_shards([Ranking([part], [shards], count)])[0][0]
                    held[f"{shape} {axis} {kind} {count}"] = torch.equal(joined(chosen, shards), largest(whole, count))
    wholes = [scores_of(shape, "ties", torch.float32) for shape in SHAPES]
    cuts = [cut(whole, position % 2) for position, whole in enumerate(wholes)]
    parts, shards = [part for part, _ in cuts], [one for _, one in cuts]
    for density in (0.1, 0.5):
        records = [
            SparseParameter(GlobalUnstructured(), density, 1, torch.zeros_like(p, dtype=torch.bool), shards=s) for p, s in cuts
        ]
        choose_of_shards([(records, [-part for part in parts], density)])
        expected = GlobalUnstructured().masks(wholes, density)
        for record, one, mask in zip(records, shards, expected, strict=True):
            held[f"global {density} {one.shape}"] = torch.equal(joined(record.mask, one), mask)
    candidates = [whole > 0.5 for whole in wholes]
    for count in (0, 5, sum(int(candidate.sum()) for candidate in candidates)):
        chosen = largest_among(parts, [one.part(c) for one, c in zip(shards, candidates, strict=True)], count, shards=shards)
        expected = largest_among(wholes, candidates, count)
        held[f"among {count}"] = all(torch.equal(joined(c, s), e) for c, s, e in zip(chosen, shards, expected, strict=True))
    for text, shape in (("channel", (7, 5)), ("block:1x4", (6, 8)), ("block:2x2", (12, 4)), ("2:4", (7, 8))):
        pattern: Pattern = parse(text)
        whole = scores_of(shape, "normal", torch.float32)
        part, one = cut(whole, 0)
        density = pattern.resolve_density(None)
        record = SparseParameter(pattern, density, 1, torch.zeros_like(part, dtype=torch.bool), shards=one)
        choose_of_shards([([record], [part], density)])
        held[text] = torch.equal(joined(record.mask, one), pattern.mask(whole, density))
    held["totals"] = totals([float(rank), 2.0], [shards[0], None]) == [3.0, 2.0]
    return held
