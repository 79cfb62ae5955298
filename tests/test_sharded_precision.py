"""FSDP2 on two processes with bfloat16 computation, and compiled: masks follow float32 weights as a plain model's would."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sparsefx
from tests.processes import run_on
from tests.test_sharded import batch, net, shard, whole

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("magnitude", "2:4", {"exploit": "none"}),
    ("magnitude", "unstructured", {"scale": 0.5}),
    ("sparse-momentum", "unstructured", {"rewire_every": 3}),
    ("rigl", "2:4", {"rewire_every": 3}),
)
COMPILED = (METHODS[1], METHODS[3])
STEPS = 8


def test_masks_of_a_sharded_model_in_two_precisions_and_compiled(tmp_path: Path) -> None:
    for told in run_on(2, _runs, tmp_path):
        assert [line for line in told if not line.endswith("held")] == []
        assert len(told) == len(METHODS) + len(COMPILED) + 1


def _runs(rank: int) -> list[str]:
    warnings.simplefilter("ignore")
    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    told = [f"bfloat16 {_follows(rank, one, mp_policy=halves)}" for one in METHODS]
    told += [f"compiled {_follows(rank, one, compiled=True)}" for one in COMPILED]
    counts = [_compiled_graphs(rank, sparse) for sparse in (False, True)]
    told.append(f"graphs and breaks {counts}: {'held' if counts[0] == counts[1] else 'differ'}")
    return told


def _follows(rank: int, method: tuple[str, str, dict[str, Any]], *, compiled: bool = False, **options: Any) -> str:
    """Give a plain model the gradients that the sharded one had: masks and weights have to be the same, bit for bit."""
    algorithm, pattern, settings = method
    models = [sparsefx.sparsify(net().float(), pattern=pattern, algorithm=algorithm) for _ in range(2)]
    shard(models[1], **options)
    runs: Any = torch.compile(models[1], backend="aot_eager") if compiled else models[1]
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        sparsefx.attach(model, optimizer, total_steps=20, **settings)
    first, moved = sparsefx.masks(models[0]), False
    for number in range(STEPS):
        x = batch(number)[rank::2].float()
        optimizers[1].zero_grad()
        (runs(x).float() - x[:, :6]).square().mean().backward()
        for plain, sharded in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert sharded.grad is not None
            plain.grad = whole(sharded.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
        masks = sparsefx.masks(models[0])
        moved = moved or any(not torch.equal(mask, first[name]) for name, mask in masks.items())
        if any(not torch.equal(whole(mask), masks[name]) for name, mask in sparsefx.masks(models[1]).items()):
            return f"{algorithm} {pattern}: masks differ at step {number}"
        for plain, sharded in zip(models[0].parameters(), models[1].parameters(), strict=True):
            if not torch.equal(whole(sharded), plain.detach()):
                return f"{algorithm} {pattern}: weights differ at step {number}"
    return f"{algorithm} {pattern}: {'held' if moved else 'masks never moved'}"


def _compiled_graphs(rank: int, sparse: bool) -> tuple[int, int]:
    """Graphs and graph breaks that torch counts in a compiled run."""
    torch._dynamo.reset()
    counters.clear()
    model: nn.Module = net().float()
    if sparse:
        sparsefx.sparsify(model)
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if sparse:
        sparsefx.attach(model, optimizer, total_steps=20, exploit="none")
    runs = torch.compile(model, backend="aot_eager")
    for number in range(STEPS):
        x = batch(number)[rank::2].float()
        optimizer.zero_grad()
        (runs(x) - x[:, :6]).square().mean().backward()
        optimizer.step()
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
