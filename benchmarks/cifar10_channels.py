"""Claim: the empty channels of sparsely trained nets become a smaller, faster net that names every image as before.

A pretrained CIFAR-10 ResNet is fine-tuned with whole filters left out (pattern ``channel``, each layer for itself, widths aimed
at steps of 16; and ``channel:coupled``, filters that are added up together), and with 5 % of its weights (sparse momentum). Shown
for each: channels that are empty, widths, parameters and operations before and after, accuracy on the 1 000 test images before
and after, to the last digit, on how many images the two agree, and times in torch and onnxruntime beside the bounds that are
estimated elsewhere (density; share of channels that are empty).

    python benchmarks/cifar10_channels.py --data FOLDER [--depth 20] [--steps 300] [--out runs/cifar10_channels]

Nets that were trained are kept in ``--out`` and not trained again; ``--only channel`` trains that one and stops.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsefx
from benchmarks.cifar10_finetune import accuracy, augmented, normalise, predictions, save
from sparsefx.algorithms.sparse_momentum import SparseMomentum
from sparsefx.pruning_speed import measure_speed, speed_lines

BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, SEED = 64, 0.03, 0.9, 5e-4, 0
VARIANTS: dict[str, dict[str, Any]] = {
    "channel": {"pattern": "channel", "density": 0.5, "densities": "steps"},
    "coupled": {"pattern": "channel:coupled", "density": 0.5},
    "weights": {"pattern": "unstructured", "density": 0.05, "algorithm": SparseMomentum(first="magnitude")},
}


def train(model: nn.Module, variant: str, steps: int, images: Tensor, labels: Tensor) -> nn.Module:
    """Fine-tune in place; the result is a plain model again."""
    sparsefx.sparsify(model, example_inputs=(images[:2],), **VARIANTS[variant])
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    options = {"rewire_every": max(1, steps // 20)} if variant == "weights" else {}
    sparsefx.attach(model, optimizer, total_steps=steps, **options)
    generator = torch.Generator().manual_seed(SEED)
    model.train()
    started, order = time.perf_counter(), torch.randperm(len(images), generator=generator)
    for step in range(steps):
        at = step * BATCH % (len(images) - BATCH)
        chosen = order[at : at + BATCH]
        loss = functional.cross_entropy(model(augmented(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            print(
                f"{variant}: step {step + 1}/{steps}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    return sparsefx.finalize(model).eval()


def compare(variant: str, net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Prune, and show what changed and what did not."""
    net = net.to(memory_format=torch.contiguous_format)
    example = images[:64].contiguous()
    for multiple in ("auto", 1):
        pruned = sparsefx.prune_channels(net, example, multiple=multiple)
        report = sparsefx.channel_plan_of(pruned).report
        before, after = predictions(net, images), predictions(pruned, images)
        correct, correct_after = int((before == labels).sum()), int((after == labels).sum())
        channels = sum(row.outputs for row in report.layers)
        print(f"{variant}, multiple={multiple}: {sum(row.empty for row in report.layers)} of {channels} channels empty; "
              f"{sum(row.outputs_after for row in report.layers)} left, {sum(row.folded for row in report.layers)} constants "
              f"folded; {report.summary()}")  # fmt: skip
        print(f"  widths {' '.join(f'{row.outputs_after}/{row.outputs}' for row in report.layers)}")
        print(f"  accuracy {100 * correct / len(labels):.1f} -> {100 * correct_after / len(labels):.1f}, the same class on "
              f"{int((before == after).sum())} of {len(labels)} images: "
              f"{'identical' if torch.equal(before, after) else 'NOT identical'}")  # fmt: skip
        for line in speed_lines(report, measure_speed(net, pruned, example)):
            print(f"  {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the CIFAR-10 files, load.py and models.py")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 32, 56))
    parser.add_argument("--steps", type=int, default=300, help=f"of fine-tuning, {BATCH} images each")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_channels"))
    parser.add_argument("--only", choices=tuple(VARIANTS), help="train this one and stop")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    sys.path.insert(0, str(arguments.data))
    load, models = __import__("load"), __import__("models")
    arguments.out.mkdir(parents=True, exist_ok=True)
    test_images, test_labels = load.cifar_lossless("cifar10_test1000_lossless")
    test_x, test_y = normalise(test_images), torch.from_numpy(numpy.asarray(test_labels)).long()

    def pretrained() -> nn.Module:
        net: nn.Module = models.CifarResNet(arguments.depth)
        net.load_state_dict(torch.load(arguments.data / f"cifar10_resnet{arguments.depth}.pt", weights_only=True))
        return net.to(memory_format=torch.channels_last).eval()

    def trained(variant: str) -> nn.Module:
        net, path = pretrained(), arguments.out / f"resnet{arguments.depth}-{variant}-{arguments.steps}.pt"
        if not path.exists():
            parts_needed = min(5, -(-arguments.steps * BATCH // 10_000))
            parts = [load.cifar_lossless(f"cifar10_train_lossless_{part + 1}") for part in range(parts_needed)]
            images = torch.cat([normalise(images) for images, _ in parts])
            labels = torch.cat([torch.from_numpy(numpy.asarray(labels)).long() for _, labels in parts])
            save(path, train(net, variant, arguments.steps, images, labels).state_dict())
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()

    print(f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"onnxruntime {onnxruntime.__version__}, sparsefx {sparsefx.__version__}, seed {SEED}; {arguments.steps} steps of "
          f"{BATCH} images, lr {LEARNING_RATE}")  # fmt: skip
    print(f"pretrained, dense: accuracy {accuracy(pretrained(), test_x, test_y):.1f}")
    for variant in [arguments.only] if arguments.only else VARIANTS:
        net = trained(variant)
        if not arguments.only:
            compare(variant, net, test_x, test_y)


if __name__ == "__main__":
    main()
