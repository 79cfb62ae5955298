"""Parameters that two processes share: FSDP2 and tensor parallel beside one process, resumed, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparsefx
from sparsefx.algorithms import scores
from sparsefx.algorithms.composed import Composed
from sparsefx.errors import NonFiniteError
from tests.processes import run_on

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")


def net(seed: int = 0, rows: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, rows)).double()


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def split_by_tensor_parallel(model: nn.Module) -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def batch(step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    output = model(x)
    (output - x[:, : output.shape[1]]).square().mean().backward()
    optimizer.step()


def whole(value: Tensor) -> Tensor:
    return value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()  # type: ignore[operator]


def same_run(
    sharded: Callable[[nn.Module], nn.Module], part: slice, algorithm: str, pattern: str, rows: int = 6, **options: Any
) -> str:
    """Train a sharded model beside a whole one; empty where masks were equal at every step and weights are to 1e-9."""
    models = [sparsefx.sparsify(net(rows=rows), pattern=pattern, algorithm=algorithm) for _ in range(2)]
    models[1] = sharded(models[1])
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in models]
    for model, one, seed in zip(models, optimizers, (0, torch.distributed.get_rank()), strict=True):
        sparsefx.attach(model, one, total_steps=20, generator=torch.Generator().manual_seed(seed), **options)
    first, moved = sparsefx.masks(models[0]), False
    for number in range(8):
        with torch.no_grad():
            models[1](batch(99))  # leaves whole parameters in the root of FSDP2
        step(models[0], optimizers[0], batch(number))
        step(models[1], optimizers[1], batch(number)[part])
        masks = sparsefx.masks(models[0])
        moved = moved or any(not torch.equal(mask, first[name]) for name, mask in masks.items())
        for name, mask in sparsefx.masks(models[1]).items():
            if not torch.equal(whole(mask), masks[name]):
                return f"{algorithm} {pattern}: masks of {name} differ at step {number}"
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if float((whole(other) - one.detach()).abs().max()) > 1e-9:
            return f"{algorithm} {pattern}: weights differ"
    return "" if moved else f"{algorithm} {pattern}: masks never moved"


def test_a_sharded_run_is_that_of_one_process(tmp_path: Path) -> None:
    assert run_on(2, _runs, tmp_path) == [[""] * 17, [""] * 17]


def _runs(rank: int) -> list[str]:
    part = slice(rank, None, 2)
    # The last layer has 6 rows: 3 on each process, which 2:4 along the other axis does not mind.
    found = [
        same_run(shard, part, "magnitude", "2:4", exploit="none"),
        same_run(shard, part, "magnitude", "unstructured", scale=0.5, exploit="regularize", decay=0.1),
        same_run(shard, part, "magnitude", "channel", exploit="none"),
        same_run(shard, part, "magnitude", "block:1x4", exploit="none"),
        same_run(shard, part, "sr-ste", "2:4"),
        same_run(shard, part, "gradual", "unstructured", rewire_every=2),
        same_run(shard, part, "top-kast", "unstructured", rewire_every=2),
        same_run(shard, part, "rigl", "unstructured", rewire_every=3),
        same_run(shard, part, "sparse-momentum", "unstructured", rewire_every=3, growth="global", drop="global"),
        same_run(shard, part, "set", "block:1x4", rewire_every=3),
    ]
    # One row: the second process holds nothing of the last layer.
    found.append(same_run(shard, part, "magnitude", "2:4", rows=1, exploit="none"))
    found.append(same_run(shard, part, "rigl", "unstructured", rows=1, rewire_every=3))
    # HSDP: two processes that repeat each other, each holding its only shard.
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    found.append(same_run(lambda model: shard(model, mesh=mesh), part, "set", "unstructured", rewire_every=3))
    # Every process gets all of the batch; the first weight is cut by rows, the second by columns, the third not at all.
    everything = slice(None)
    for algorithm, pattern in (("magnitude", "2:4"), ("magnitude", "unstructured"), ("rigl", "2:4"), ("rigl", "unstructured")):
        options: dict[str, Any] = {"rewire_every": 3} if algorithm == "rigl" else {"exploit": "none"}
        found.append(same_run(split_by_tensor_parallel, everything, algorithm, pattern, **options))
    return found


def test_what_cannot_be_decided_shard_by_shard_is_refused_with_the_reason(tmp_path: Path) -> None:
    for told in run_on(2, _refusals, tmp_path):
        assert [text for _, text, expected in told if expected not in text] == []
        assert len(told) == 22


def _refusals(rank: int) -> list[tuple[str, str, str]]:
    told: list[tuple[str, str, str]] = []

    def refused(expected: str, attempt: Callable[[], object]) -> None:
        try:
            attempt()
        except sparsefx.SparsefxError as error:
            told.append((type(error).__name__, str(error), expected))
        else:
            told.append(("", f"not refused: {expected}", expected))

    def attached(model: nn.Module, **options: Any) -> Any:
        return sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), total_steps=10, **options)

    def made(pattern: str = "2:4", algorithm: Any = "magnitude", seed: int = 0, rows: int = 6, **options: Any) -> nn.Module:
        return shard(sparsefx.sparsify(net(seed, rows), pattern=pattern, algorithm=algorithm), **options)

    refused("call sparsify before fully_shard", lambda: sparsefx.sparsify(shard(net())))
    refused(
        "each process holds 6 of 12 there, so that groups would lie across the borders",
        lambda: attached(made("2:4-transposable", rows=12)),
    )
    refused("each process holds 6 of 12", lambda: sparsefx.finalize(made("2:4-transposable", rows=12)))
    placed = {"shard_placement_fn": lambda parameter: Shard(1) if parameter.dim() == 2 else Shard(0)}
    refused("groups of 16 along axis 1, but each process holds 8 of 16", lambda: attached(made("8:16", **placed)))
    transposed = sparsefx.sparsify(nn.Sequential(nn.ConvTranspose2d(16, 16, 3)), pattern="8:16")
    refused("groups of 16 along axis 0, but each process holds 8 of 16", lambda: attached(fully_shard(transposed)))
    refused("it looks at whole layers", lambda: attached(made("unstructured", "deep-r")))
    refused(
        "among the neurons of a whole layer",
        lambda: attached(made("unstructured", "sparse-momentum"), rewire_every=2, growth="neuron"),
    )
    refused("which it has to see all of", lambda: attached(made("unstructured", "set"), rewire_every=2, drop="set"))
    own = Composed(label="own", drop=scores.magnitude, grow=scores.random, rewire_every=2)
    refused("functions of your own", lambda: attached(made("unstructured", own)))
    refused("ranks whole filters", lambda: attached(made("channel", **placed)))
    refused("processes have chosen different masks for 0.weight", lambda: attached(made(seed=rank)))
    refused("save with torch.distributed.checkpoint", lambda: sparsefx.save(made(), "nowhere"))
    refused("load before fully_shard", lambda: sparsefx.load(made(), "nowhere"))
    refused("do that on one process", lambda: sparsefx.audit(made()))
    example = torch.zeros(2, 16, dtype=torch.float64)
    plan = sparsefx.channel_plan(net(), example, multiple=1)
    for attempt in (
        lambda: sparsefx.channel_plan(made(), example),
        lambda: sparsefx.prune_channels(made(), example),
        lambda: sparsefx.prune_channels_(made(), example),
        lambda: sparsefx.apply_channel_plan(made(), plan),
        lambda: sparsefx.channel_order(shard(net()), example),
        lambda: sparsefx.small_baseline(made(), 0.5, example),
        lambda: sparsefx.export_parts(made(), example, "nowhere"),
    ):
        refused("do that on one process", attempt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = FullyShardedDataParallel(sparsefx.sparsify(net()), use_orig_params=True, device_id=torch.device("cpu"))
    refused("use torch.distributed.fsdp.fully_shard", lambda: attached(flat))
    return told


def test_checkpoints_overflows_divergence_and_the_meta_device(tmp_path: Path) -> None:
    for found in run_on(2, _life, tmp_path):
        assert {name for name, held in found.items() if not held} == set()
        assert len(found) == 10


def _life(rank: int) -> dict[str, bool]:
    held: dict[str, bool] = {}
    model = shard(sparsefx.sparsify(net(), pattern="unstructured", algorithm="sparse-momentum"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    runtime = sparsefx.attach(model, optimizer, total_steps=20, rewire_every=2)
    # torch makes a step of its own here, so that the optimizer has a state to save.
    get_optimizer_state_dict(model, optimizer)
    held["a step that torch makes for a checkpoint is not counted"] = runtime.step == 0
    for number in range(5):
        step(model, optimizer, batch(number))
    # Densities have moved between layers by now: a model with those it began with takes all that is loaded.
    fresh = shard(sparsefx.sparsify(net(), pattern="unstructured", algorithm="sparse-momentum"))
    again = sparsefx.attach(fresh, torch.optim.SGD(fresh.parameters(), 0.1, momentum=0.9), total_steps=20, rewire_every=2)
    fresh.load_state_dict(model.state_dict())
    pairs = list(zip(model.parameters(), fresh.parameters(), strict=True))
    held["loading keeps a sparse model whole"] = all(torch.equal(whole(a), whole(b)) for a, b in pairs)
    again.load_state_dict(runtime.state_dict())
    masks = sparsefx.masks(fresh)
    held["masks are those saved"] = all(torch.equal(whole(m), whole(masks[n])) for n, m in sparsefx.masks(model).items())
    held["the step is that saved"] = again.step == 5
    held["a fused optimizer skips steps too"] = _fused_skips(rank)
    # A GradScaler that finds infinity on one process skips the step on both.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(model(batch(7)).square().mean()).backward()
    if rank == 1:
        model[0].weight.grad.to_local()[0, 0] = float("inf")
    before = copy.deepcopy([whole(p) for p in model.parameters()])
    scaler.step(optimizer)
    scaler.update()
    held["a skipped step is none"] = runtime.step == 5 and all(
        torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True)
    )
    # NaN on one process is told on both, so that none waits for the other.
    optimizer.zero_grad()
    model(batch(8)).square().mean().backward()
    if rank == 1:
        model[0].weight.grad.to_local()[0, 0] = float("nan")
    try:
        optimizer.step()
        held["divergence is told everywhere"] = False
    except NonFiniteError as error:
        held["divergence is told everywhere"] = ("0.weight" if rank == 1 else "another process") in str(error)
    # Sparsified before it has memory, sharded, and filled then.
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 6)).double()
    sparsefx.sparsify(empty, pattern="unstructured", density=0.25)
    shard(empty).to_empty(device="cpu")
    source = shard(net(seed=4))
    empty.load_state_dict(source.state_dict())
    expected = sparsefx.masks(sparsefx.sparsify(net(seed=4), pattern="unstructured", density=0.25))
    held["a model from the meta device has its masks"] = (
        all(torch.equal(whole(mask), expected[name]) for name, mask in sparsefx.masks(empty).items()) and len(expected) == 3
    )
    one = sparsefx.attach(empty, torch.optim.SGD(empty.parameters(), 0.1), total_steps=4)
    held["its state is sharded as it is"] = type(one.state_dict()["parameters"]["0.weight"]["dormant"]).__name__ == "DTensor"
    sparsefx.finalize(empty)
    held["finalize leaves sparse shards"] = int((whole(empty[0].weight) != 0).sum()) == 16 * 32 // 4 and not sparsefx.masks(empty)
    return held


def _fused_skips(rank: int) -> bool:
    model = shard(sparsefx.sparsify(net()))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    runtime = sparsefx.attach(model, optimizer, total_steps=10, exploit="none")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for number in range(3):
        optimizer.zero_grad()
        scaler.scale(model(batch(number)[rank::2]).square().mean()).backward()
        if number == 1 and rank == 1:
            model[0].weight.grad.to_local()[0, 0] = float("inf")
        before = [whole(sparsefx.masks(model)["0.weight"]), whole(model[0].weight).clone()]
        scaler.step(optimizer)
        scaler.update()
        counts.append(runtime.step)
        if number == 1 and not (
            torch.equal(before[0], whole(sparsefx.masks(model)["0.weight"])) and torch.equal(before[1], whole(model[0].weight))
        ):
            return False
    return counts == [1, 1, 2]


def test_a_distributed_checkpoint_of_replicas_resumes_in_one_process(tmp_path: Path) -> None:
    model = sparsefx.sparsify(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=9, exploit="none")
    for number in range(3):
        step(model, optimizer, batch(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no processes are there
        dcp.save({"model": model.state_dict(), "sparsity": runtime.state_dict()}, checkpoint_id=tmp_path / "saved")
        other = sparsefx.sparsify(net(seed=3))
        resumed = sparsefx.attach(other, torch.optim.SGD(other.parameters(), 0.1), total_steps=9, exploit="none")
        state = {"model": other.state_dict(), "sparsity": resumed.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / "saved")
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["sparsity"])
    assert resumed.step == 3
    for name, mask in sparsefx.masks(model).items():
        assert torch.equal(mask, sparsefx.masks(other)[name])
    one, two = runtime.state_dict()["parameters"], resumed.state_dict()["parameters"]
    assert all(torch.equal(one[name]["dormant"], two[name]["dormant"]) for name in one)
