"""The demo: a small convolutional net on handwritten digits, trained dense and 2:4 sparse, audited and exported.

Each pair of runs starts from the same weights and sees the same batches; the split into training and test images is
the same for all. Nothing is drawn from the global random state, so the same seeds give the same figures on the same machine.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx.data import digits
from sparsefx.demo_channels import PrunedNet, prune_net
from sparsefx.errors import ExportError
from sparsefx.html import write_text
from sparsefx.passes.onnx_report import ExportReport
from sparsefx.report import Audit

TRAINING_IMAGES = 1200
BATCH = 48
LEARNING_RATE = 0.05
# Steps from one look at loss and masks to the next.
LOOK_EVERY = 5


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` scaled to [-1, 1] and labels ``[N]``, in two parts."""

    training_images: Tensor
    training_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """One training run.

    Attributes:
        seed: of the first weights and the order of batches.
        kind: ``dense``, ``2:4`` or ``channel``.
        accuracy: share of test images that are recognised at the end.
        losses: (step, mean training loss of the last `LOOK_EVERY` steps).
        accuracies: (step, share of test images recognised), after each epoch.
        flips: (step, share of mask entries that changed in the last `LOOK_EVERY` steps).
        seconds: of training, without evaluation.
    """

    seed: int
    kind: str
    accuracy: float = 0.0
    losses: list[tuple[float, float]] = field(default_factory=list)
    accuracies: list[tuple[float, float]] = field(default_factory=list)
    flips: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class ChannelRow:
    """Output channels of one sparse layer: how many, how many are empty, and the norms of their filters."""

    layer: str
    channels: int
    empty: int
    smallest_norm: float
    median_norm: float
    largest_norm: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo found.

    Attributes:
        runs: dense and sparse in turn, by seed.
        audit: of the first sparse model.
        channels: of the first sparse model.
        export: what was checked of its ONNX file.
        same_predictions: test images for which the ONNX file and the model name the same digit.
        test_images: how many there are.
        masks: of the first sparse model, by parameter name.
        pruned: a net with half of its filters left out, before and after these were removed.
        seconds: all in all.
    """

    runs: tuple[Run, ...]
    audit: Audit
    channels: tuple[ChannelRow, ...]
    export: ExportReport
    same_predictions: int
    test_images: int
    masks: dict[str, Tensor]
    pruned: PrunedNet
    seconds: float

    def accuracies(self, kind: str) -> list[float]:
        """Final test accuracies of the runs of one kind, by seed."""
        return [run.accuracy for run in self.runs if run.kind == kind]

    @property
    def difference(self) -> float:
        """Mean test accuracy of the sparse nets minus that of the dense ones, in percentage points."""
        return 100 * (statistics.mean(self.accuracies("2:4")) - statistics.mean(self.accuracies("dense")))


def small_net() -> nn.Sequential:
    """Three convolutions that can be 2:4 sparse behind one that cannot, and a linear classifier: 61 k weights."""
    layers: list[tuple[str, nn.Module]] = []
    channels = 1
    for index, width in enumerate((16, 32, 64, 64), start=1):
        layers.append((f"conv{index}", nn.Conv2d(channels, width, 3, padding=1, bias=False)))
        layers.append((f"norm{index}", nn.BatchNorm2d(width)))
        layers.append((f"relu{index}", nn.ReLU()))
        if index == 2:
            layers.append(("pool", nn.MaxPool2d(2)))
        channels = width
    layers += [("mean", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("classifier", nn.Linear(channels, 10))]
    return nn.Sequential(OrderedDict(layers))


def load_digits() -> Digits:
    """The images that ship with the package, in a fixed order, split 1 200 to 597."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1797))
    pixels = (torch.from_numpy(images).float() / 8 - 1).unsqueeze(1)[order]
    classes = torch.from_numpy(labels).long()[order]
    return Digits(pixels[:TRAINING_IMAGES], classes[:TRAINING_IMAGES], pixels[TRAINING_IMAGES:], classes[TRAINING_IMAGES:])


def train(model: nn.Module, data: Digits, run: Run, *, epochs: int, after_step: Callable[[], None]) -> None:
    """Train ``model`` in place and note what happens in ``run``; a sparsified model gets a mask runtime."""
    batches = len(data.training_images) // BATCH
    steps = epochs * batches
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    runtime = sparsefx.attach(model, optimizer, total_steps=steps) if run.kind != "dense" else None
    order = torch.Generator().manual_seed(run.seed)
    before = sparsefx.masks(model) if runtime is not None else {}
    recent: list[float] = []
    step = 0
    for _ in range(epochs):
        model.train()
        start = time.perf_counter()
        for batch in torch.randperm(len(data.training_images), generator=order)[: batches * BATCH].split(BATCH):
            loss = functional.cross_entropy(model(data.training_images[batch]), data.training_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            step += 1
            recent.append(loss.item())
            if step % LOOK_EVERY == 0:
                run.losses.append((step, statistics.mean(recent)))
                recent.clear()
                if runtime is not None:
                    now = sparsefx.masks(model)
                    run.flips.append((step, _share_changed(before, now)))
                    before = now
            after_step()
        run.seconds += time.perf_counter() - start
        run.accuracies.append((step, accuracy(model, data)))
    run.accuracy = run.accuracies[-1][1]


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The digit that the model names for each image; its mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        named: Tensor = model(images).argmax(1)
    model.train(training)
    return named


def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of test images that are recognised."""
    return (predictions(model, data.test_images) == data.test_labels).float().mean().item()


def channel_rows(model: nn.Module, audit: Audit) -> tuple[ChannelRow, ...]:
    """Norms of the filters of each sparse layer."""
    rows = []
    for layer in audit.layers:
        if layer.sparse:
            weight = model.get_parameter(layer.parameter).detach()
            norms = weight.movedim(1 - layer.reduction_axis, 0).flatten(1).norm(dim=1)
            values = (norms.min().item(), norms.median().item(), norms.max().item())
            rows.append(ChannelRow(layer.name, len(norms), layer.empty_channels, *values))
    return tuple(rows)


def run_demo(
    out: Path, *, seeds: int = 3, epochs: int = 16, say: Callable[[str], None] = print, console: Console | None = None
) -> DemoResult:
    """Train ``seeds`` pairs of nets, print what came out, and write the ONNX file, the HTML report and the figures to ``out``.

    Args:
        out: a folder, made where it does not exist.
        seeds: pairs of runs.
        epochs: of each run.
        say: receives what is printed, line by line.
        console: for a progress bar where it is a terminal.

    Raises:
        ExportError: the folder or a file in it cannot be written.
    """
    from sparsefx.demo_page import demo_page, demo_text

    start = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{out} cannot be made: {error.strerror or error}; name a folder that can be written") from error
    data = load_digits()
    runs: list[Run] = []
    models: list[nn.Module] = []
    steps = (2 * seeds + 1) * epochs * (len(data.training_images) // BATCH)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console is None or not console.is_terminal,
    )
    with _one_thread(), bar:
        task = bar.add_task("", total=steps)
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                dense = small_net()
            sparse = sparsefx.sparsify(copy.deepcopy(dense), pattern="2:4", example_inputs=data.test_images[:2])
            for kind, model in (("dense", dense), ("2:4", sparse)):
                bar.update(task, description=f"training {kind}, seed {seed}")
                run = Run(seed, kind)
                train(model, data, run, epochs=epochs, after_step=lambda: bar.advance(task))
                runs.append(run)
                models.append(model)
                say(f"seed {seed}  {kind:5}  test accuracy {100 * run.accuracy:.2f} %  ({run.seconds:.1f} s)")
        bar.update(task, description="training with half of the filters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            narrow = sparsefx.sparsify(
                small_net(), pattern="channel", density=0.5, exclude="classifier", example_inputs=data.test_images[:2]
            )
        run = Run(0, "channel")
        train(narrow, data, run, epochs=epochs, after_step=lambda: bar.advance(task))
        say(f"seed 0  {run.kind:5}  test accuracy {100 * run.accuracy:.2f} %  ({run.seconds:.1f} s)")
        pruned = prune_net(narrow, data.test_images, data.test_labels, out)
        result = _examine(models[1], data, tuple(runs), pruned, out, start)
    say(demo_text(result))
    write_text(out / "report.html", demo_page(result))
    write_text(out / "audit.json", result.audit.to_json())
    write_text(out / "results.json", _as_json(result))
    say(f"wrote {result.export.path}, {out / 'report.html'}, {out / 'audit.json'} and {out / 'results.json'}")
    return result


def _examine(model: nn.Module, data: Digits, runs: tuple[Run, ...], pruned: PrunedNet, out: Path, start: float) -> DemoResult:
    """Audit and export a trained sparse model, and compare the file's predictions with its own."""
    import onnxruntime

    model.eval()
    audit = sparsefx.audit(model)
    channels = channel_rows(model, audit)
    masks = sparsefx.masks(model)
    path = out / "digits-2to4.onnx"
    batch = torch.export.Dim("batch")
    export = sparsefx.export_onnx(model, (data.test_images[:4],), path, dynamic_shapes=({0: batch},))
    sparsefx.finalize(model)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    answers = session.run(None, {session.get_inputs()[0].name: data.test_images.numpy()})[0]
    same = int((np.argmax(answers, axis=1) == predictions(model, data.test_images).numpy()).sum())
    seconds = time.perf_counter() - start
    return DemoResult(runs, audit, channels, export, same, len(data.test_images), masks, pruned, seconds)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of a few milliseconds: threads that wait for each other on busy cores would cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _share_changed(before: dict[str, Tensor], now: dict[str, Tensor]) -> float:
    changed = sum(int((before[name] != mask).sum()) for name, mask in now.items())
    return changed / sum(mask.numel() for mask in now.values())


def _as_json(result: DemoResult) -> str:
    content = {
        "accuracy": {kind: result.accuracies(kind) for kind in ("dense", "2:4")},
        "difference_in_points": result.difference,
        "same_predictions": result.same_predictions,
        "test_images": result.test_images,
        "channels": [asdict(row) for row in result.channels],
        "pruned": asdict(result.pruned),
        "export": asdict(result.export),
        "runs": [asdict(run) for run in result.runs],
        "seconds": result.seconds,
    }
    return json.dumps(content, indent=2, default=str)
