"""The one trainer of all claims: makes a task's run from its seed alone, and returns what was measured as plain values."""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from benchmarks.claims.networks import Data, augmented, build, load
from benchmarks.claims.task import BATCH, Task
from sparsefx.algorithms import find as find_algorithm
from sparsefx.algorithms.at_start import AtStart
from sparsefx.analysis import Recorder, class_specialization

# Chosen on dense nets; every method of a data set trains with the same.
LEARNING_RATE = {"digits": 0.05, "mnist": 0.1, "cifar10": 0.1}
# Steps from one change of masks to the next as published, None for an epoch. In a run too short for CHANGES of these, masks
# change so many times, but not oftener than every LEAST steps: a change of RigL takes the place of a step.
INTERVALS = {"rigl": 100, "dsr": 100, "top-kast": 100, "gradual": 100, "set": None, "sparse-momentum": None}
CHANGES = 40
LEAST = 10


def interval(method: str, total: int, per_epoch: int) -> int:
    """Steps from one change of masks to the next in a run of ``total`` steps, for a method of `INTERVALS`."""
    return min(INTERVALS[method] or per_epoch, max(LEAST, total // CHANGES))


class _Run:
    """Optimizer, learning rate and batches of one task; the lottery ticket stops and goes on."""

    def __init__(self, task: Task, data: Data) -> None:
        self.task, self.data = task, data
        self.size = BATCH[task.data]
        self.per_epoch = len(data.images) // self.size
        self.total = self.per_epoch * task.epochs

    def train(self, model: nn.Module, first: int, last: int, state: Any, follow: bool = False) -> Any:
        """Steps ``first + 1`` to ``last``; the order of batches depends on seed and epoch alone."""
        rate = LEARNING_RATE[self.task.data]
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=self.total, pct_start=0.15, cycle_momentum=False
        )
        if state is not None:
            optimizer.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
        if follow:
            self._attach(model, optimizer)
        recorder = Recorder(model, optimizer) if self.task.measure == "decorrelation" else None
        model.train()
        for step in range(first, last):
            epoch, number = divmod(step, self.per_epoch)
            if number == 0 or step == first:
                generator = torch.Generator().manual_seed(1000 * self.task.seed + epoch)
                order = torch.randperm(len(self.data.images), generator=generator).to(self.data.images.device)
            batch = order[number * self.size : (number + 1) * self.size]
            images = augmented(self.task.data, self.data.images[batch], generator)
            optimizer.zero_grad()
            functional.cross_entropy(model(images), self.data.labels[batch]).backward()
            optimizer.step()
            schedule.step()
        self.recorder = recorder
        return optimizer.state_dict(), schedule.state_dict()

    def _attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        options: dict[str, Any] = dict(self.task.options)
        if self.task.method in INTERVALS and "rewire_every" not in options:
            options["rewire_every"] = interval(self.task.method, self.total, self.per_epoch)
        generator = torch.Generator().manual_seed(self.task.seed)
        sparsefx.attach(model, optimizer, total_steps=self.total, steps_per_epoch=self.per_epoch, generator=generator, **options)


def train(task: Task, folder: Path | None, device: str) -> dict[str, Any]:
    """Train and test.

    Returns:
        ``error`` (test error in percent), ``weights`` (that take part, of all parameters), ``seconds``, and what the task's
        ``measure`` adds.
    """
    started = time.perf_counter()
    data = Data(*(part.to(device) for part in load(task.data, folder)))
    torch.manual_seed(task.seed)
    model = build(task.net).to(device)
    run = _Run(task, data)
    if task.method == "dense":
        run.train(model, 0, run.total, None)
    elif task.method == "small":
        sparse = sparsefx.sparsify(copy.deepcopy(model), pattern="unstructured", density=task.density, **_which(task))
        model = sparsefx.small_baseline(sparse, None, data.images[:2], seed=task.seed)
        run.train(model, 0, run.total, None)
    elif task.method == "lottery":
        sparsefx.lottery_ticket(
            model, run.train, total_steps=run.total, pattern=task.pattern, density=task.density, **_which(task)
        )
    else:
        _sparsify(model, task, data)
        run.train(model, 0, run.total, None, follow=True)
    result = {"error": error(model, data), "weights": _weights(model)}
    result |= _measured(task, model, data, run.recorder)
    return {**result, "seconds": time.perf_counter() - started}


def _which(task: Task) -> dict[str, Any]:
    """Of a fully connected net all layers are sparse, as published; of others those that the paper's rule allows."""
    return {"eligibility": sparsefx.Eligibility(multiple=1)} if task.net == "lenet300" else {}


def _sparsify(model: nn.Module, task: Task, data: Data) -> None:
    fixed = sparsefx.patterns.parse(task.pattern).fixed_density is not None
    looks = isinstance(find_algorithm(task.method), AtStart)
    count = 10 * BATCH[task.data]
    sparsefx.sparsify(
        model,
        pattern=task.pattern,
        density=None if fixed else task.density,
        algorithm=task.method,
        calibration=[(data.images[:count], data.labels[:count])] if looks else None,
        loss_fn=(lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1])) if looks else None,
        generator=torch.Generator().manual_seed(task.seed),
        **_which(task),
    )


@torch.no_grad()
def error(model: nn.Module, data: Data) -> float:
    """Test error in percent."""
    model.eval()
    pairs = zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)
    wrong = sum(int((model(images).argmax(1) != labels).sum()) for images, labels in pairs)
    return 100 * wrong / len(data.test_labels)


def _weights(model: nn.Module) -> int:
    masks = sparsefx.masks(model)
    masked = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    return sum(parameter.numel() for parameter in model.parameters()) - masked


def _measured(task: Task, model: nn.Module, data: Data, recorder: Recorder | None) -> dict[str, Any]:
    if recorder is not None:
        layers = recorder.decorrelation(density=0.5)
        medians = [layer.medians() for layer in layers]
        points = [[(one.magnitude, one.time) for one in layer.bins(15)] for layer in layers]
        return {
            "small": statistics.fmean(small for small, _ in medians),
            "large": statistics.fmean(large for _, large in medians),
            "bins": dict(zip([layer.name for layer in layers], points, strict=True)),
        }
    if task.measure == "specialization":
        pairs = list(zip(data.test_images.split(500), data.test_labels.split(500), strict=True))
        # As the article does: what comes out of ReLUs.
        modules = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
        return {"specialization": class_specialization(model, pairs, modules=modules).mean}
    if task.measure == "channels":
        return _channels(model, data)
    return {}


def _channels(model: nn.Module, data: Data) -> dict[str, Any]:
    """Empty channels, and what is gained when they go: outputs compared, steps timed in turn, on the device of the run."""
    images = data.test_images[:256]
    plan = sparsefx.channel_plan(model.eval(), images[:2])
    slim = sparsefx.apply_channel_plan(model, plan).eval()
    rows = [row for row in plan.report.layers if row.outputs]
    with torch.no_grad():
        before, after = model(images), slim(images)
        seconds: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(25):
            for which, net in enumerate((model, slim)):
                if images.is_cuda:
                    torch.cuda.synchronize()
                started = time.perf_counter()
                net(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                seconds[which].append(time.perf_counter() - started)
    ratios = [wide / narrow for wide, narrow in zip(seconds[0][5:], seconds[1][5:], strict=True)]
    return {
        "empty": sum(row.empty for row in rows) / sum(row.outputs for row in rows),
        "operations": plan.report.operations_after / plan.report.operations,
        "speedup": statistics.median(ratios),
        "difference": _largest(before - after) / _largest(before),
        "same": int((before.argmax(1) == after.argmax(1)).sum()) / len(images),
    }


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
