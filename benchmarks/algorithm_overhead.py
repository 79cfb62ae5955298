"""Claim: an optimizer step of any method costs at most 1.05 of the dense step, and 1.03 where masks change every 100 steps.

Every method, unstructured at density 0.1 (N:M where that is what it is for), against the dense step of the same model in one
run, interleaved step by step. Masks change every fourth step here, so that both kinds of step are seen; the cost told is that
of the method's own rhythm, one change in 100 steps where it is now and then: (99 * median of plain steps + median of steps
with a change) / 100.

The peers, timed the same way where they are there and run: rigl-torch and sparsimony's RigL (``pip install --no-deps
rigl-torch sparsimony``), and the code of the sparse momentum article's author, module ``sparselearning`` of
https://github.com/TimDettmers/sparse_learning: put a checkout of it on PYTHONPATH. That code moves its masks to a GPU whatever
the model is on; on the CPU that one call is made to do nothing here, and everything else runs as it is.

    python benchmarks/algorithm_overhead.py [--model transformer|resnet50|mlp] [--steps 16] [--only rigl,set]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx.algorithms import ALGORITHMS, Algorithm
from sparsefx.algorithms.at_start import AtStart
from sparsefx.ops import native

EVERY = 4
# What each is held to: the recipe, and methods that change masks now and then; others are told without a bar.
BARS = {"magnitude": 1.05, **dict.fromkeys(("sparse-momentum", "set", "rigl", "dsr", "gradual", "top-kast"), 1.03)}
Loss = Callable[[nn.Module, Tensor], Tensor]


def transformer(device: str) -> tuple[nn.Module, Tensor, Loss]:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return model, torch.randn(8, 128, 512, device=device), lambda model, batch: model(batch).square().mean()


def resnet50(device: str) -> tuple[nn.Module, Tensor, Loss]:
    import torchvision

    labels = torch.arange(8, device=device)
    model = torchvision.models.resnet50(weights=None)
    return model, torch.randn(8, 3, 224, 224, device=device), lambda model, batch: functional.cross_entropy(model(batch), labels)


def mlp(device: str) -> tuple[nn.Module, Tensor, Loss]:
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16))
    return model, torch.randn(128, 784, device=device), lambda model, batch: model(batch).square().mean()


MODELS = {"transformer": transformer, "resnet50": resnet50, "mlp": mlp}


class Contestant:
    """One way to train: a model and its optimizer, and how a step is made with it."""

    def __init__(self, name: str, model: nn.Module, bar: float | None = None) -> None:
        self.name, self.model, self.bar = name, model.train(), bar
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
        self.make_step: Callable[[], object] = self.optimizer.step
        self.every: int | None = None
        self.made = 0
        self.seconds: list[float] = []

    def step(self, batch: Tensor, loss_of: Loss) -> None:
        synchronise = torch.cuda.synchronize if batch.is_cuda else (lambda: None)
        synchronise()
        started = time.perf_counter()
        loss_of(self.model, batch).backward()
        self.make_step()
        self.optimizer.zero_grad()
        synchronise()
        self.seconds.append(time.perf_counter() - started)

    def rounds(self) -> tuple[list[int], list[int]]:
        """Positions of plain steps and of steps with a change of masks, without the warm-up; ``made`` steps went before."""
        positions = range(EVERY, len(self.seconds))
        changing = [position for position in positions if self.every is not None and (self.made + position + 1) % self.every == 0]
        return [position for position in positions if position not in changing], changing


def sparse(dense: nn.Module, algorithm: Algorithm, batch: Tensor, loss_of: Loss, steps: int) -> Contestant:
    fixed = {"accelerated": "4:8-transposable"}.get(algorithm.name)
    model = sparsefx.sparsify(
        copy.deepcopy(dense),
        pattern=fixed or "unstructured",
        density=None if fixed else 0.1,
        algorithm=algorithm,
        calibration=[batch] if isinstance(algorithm, AtStart) else None,
        loss_fn=loss_of,
        example_inputs=batch if algorithm.name == "synflow" else None,
    )
    contestant = Contestant(f"{algorithm.name} {fixed or ''}".strip(), model, BARS.get(algorithm.name))
    now_and_then = "rewire_every" in {field.name for field in fields(algorithm)} and algorithm.name not in ("magnitude", "sr-ste")
    options = {"rewire_every": EVERY} if now_and_then else {}
    contestant.every = EVERY if now_and_then else None
    # Long enough that no schedule ends in here.
    sparsefx.attach(model, contestant.optimizer, total_steps=100 * steps, steps_per_epoch=EVERY, **options)
    return contestant


def rigl_torch(dense: nn.Module, steps: int) -> Contestant:
    from rigl_torch.RigL import RigLScheduler

    contestant = Contestant("peer: rigl-torch", copy.deepcopy(dense))
    pruner = RigLScheduler(
        contestant.model, contestant.optimizer, dense_allocation=0.1, T_end=75 * steps, delta=EVERY, ignore_linear_layers=False
    )
    step = contestant.optimizer.step
    contestant.every = EVERY
    contestant.make_step = lambda: step() if pruner() else None
    return contestant


def sparsimony_rigl(dense: nn.Module, steps: int) -> Contestant:
    from sparsimony.distributions.base import UniformDistribution
    from sparsimony.dst.rigl import RigL
    from sparsimony.schedulers.base import CosineDecayScheduler

    contestant = Contestant("peer: sparsimony rigl", copy.deepcopy(dense))
    modules = [name for name, module in contestant.model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    scheduler = CosineDecayScheduler(0.3, 75 * steps, EVERY)
    sparsifier = RigL(scheduler, UniformDistribution(), contestant.optimizer, sparsity=0.9, init_method=None)
    sparsifier.prepare(contestant.model, [{"tensor_fqn": f"{name}.weight"} for name in modules])
    contestant.every = EVERY

    def step() -> None:
        if not sparsifier.step():
            contestant.optimizer.step()

    contestant.make_step = step
    return contestant


def sparse_learning(dense: nn.Module, steps: int) -> Contestant:
    from sparselearning.core import CosineDecay, Masking

    contestant = Contestant("peer: sparse_learning", copy.deepcopy(dense))
    masking = Masking(contestant.optimizer, CosineDecay(0.5, 100 * steps), prune_rate=0.5, prune_every_k_steps=EVERY)
    on_gpu = next(dense.parameters()).is_cuda
    stays = contextlib.nullcontext() if on_gpu else mock.patch.object(Tensor, "cuda", lambda self: self)
    with stays, contextlib.redirect_stdout(io.StringIO()):  # it tells each parameter that it masks
        masking.add_module(contestant.model, density=0.1, remove_param_names=["norm"])
    contestant.every = EVERY
    contestant.make_step = masking.step
    return contestant


def compare(name: str, steps: int, device: str, only: set[str]) -> None:
    torch.manual_seed(0)
    dense, batch, loss_of = MODELS[name](device)
    dense = dense.to(device)
    found = [Contestant("dense", dense)]
    found += [sparse(dense, one, batch, loss_of, steps) for one in ALGORITHMS if not only or one.name in only]
    for peer in (rigl_torch, sparsimony_rigl, sparse_learning):
        try:
            contestant = peer(dense, steps)
            contestant.step(batch, loss_of)
            contestant.seconds.clear()
            contestant.made = 1
            found.append(contestant)
        except Exception as error:  # that a peer is not there or does not run is a result too
            told = (str(error).splitlines() or [""])[0]
            print(f"{peer.__name__} does not run: {type(error).__name__}: {told}")
    for number in range(steps + EVERY):
        for offset in range(len(found)):
            found[(number + offset) % len(found)].step(batch, loss_of)
    baseline = found[0].seconds
    middle = statistics.median(baseline[EVERY:])
    print(
        f"{name}: {sum(p.numel() for p in dense.parameters()):,} parameters; dense step {1e3 * middle:.1f} ms; {steps} steps each"
    )
    for contestant in found[1:]:
        plain, changing = contestant.rounds()
        # Paired with the dense step of the same round, which had the same neighbours on the machine.
        ordinary = statistics.median(contestant.seconds[i] / baseline[i] for i in plain)
        cost, note = ordinary, ""
        if changing:
            change = statistics.median(contestant.seconds[i] / baseline[i] for i in changing)
            cost = (99 * ordinary + change) / 100
            note = f"   plain {ordinary:.3f}, with a change {change:.3f}"
        bar = "" if contestant.bar is None else f"   bar {contestant.bar}: {'met' if cost <= contestant.bar else 'not met'}"
        print(f"  {contestant.name:32} {cost:.3f}{note}{bar}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="transformer")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", default="", help="names of algorithms, with commas between")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device_name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    print(f"device {arguments.device} ({device_name}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"sparsefx {sparsefx.__version__}, seed 0, SGD with momentum, mask kernels: {native.describe()}")  # fmt: skip
    compare(arguments.model, arguments.steps, arguments.device, set(filter(None, arguments.only.split(","))))


if __name__ == "__main__":
    main()
