"""Claim: a pretrained CIFAR-10 ResNet, fine-tuned 2:4 for at most three epochs, is as good as the same net fine-tuned dense.

Rule, stated before the run: over the seeds, the mean of (dense accuracy - sparse accuracy) on the same 1 000 test images, each
pair fine-tuned on the same batches, is at most 0.5 points + 1 standard error for 2:4 along the reduction axis, and at most
0.8 + 1 for 2:4 transposable. The hyperparameters are the constants below, the same for all; nothing was tuned on the test images.

    python benchmarks/cifar10_finetune.py --data FOLDER [--depth 20] [--out runs/cifar10_finetune]

Every (variant, seed) is checkpointed each epoch; a second call goes on where the first was stopped, and repeats nothing. Runs
can be trained side by side by calls with ``--only dense/0 2:4/0 ...``; the call without it then collects them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx

EPOCHS, BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 3, 128, 0.01, 0.9, 1e-4
BARS = {"2:4": 0.5, "2:4-transposable": 0.8}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def normalise(images: numpy.ndarray[Any, Any]) -> Tensor:
    pixels = (torch.from_numpy(images).float() / 255 - MEAN) / STD
    return pixels.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the images padded by 4, and random mirror images."""
    count = len(images)
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count), generator=generator)
    mirror = torch.rand(count, generator=generator) < 0.5
    columns = left[:, None] + torch.where(mirror[:, None], torch.arange(31, -1, -1), torch.arange(32))
    rows = top[:, None] + torch.arange(32)
    cropped = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(batch).argmax(1) for batch in images.split(250)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((predictions(model, images) == labels).float().mean())


def save(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def train(model: nn.Module, variant: str, seed: int, images: Tensor, labels: Tensor, folder: Path, device: str) -> nn.Module:
    """Fine-tune ``model`` in place, resuming from the checkpoint in ``folder`` where there is one."""
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps_per_epoch = len(images) // BATCH
    total_steps = EPOCHS * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total_steps)))
    runtime = None if variant == "dense" else sparsefx.attach(model, optimizer, total_steps=total_steps)
    generator = torch.Generator().manual_seed(seed)
    path, first = folder / f"{variant.replace(':', '-')}-{seed}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        if runtime is not None:
            runtime.load_state_dict(state["runtime"])
        first = state["epoch"]
    for epoch in range(first, EPOCHS):
        model.train()
        started, total = time.perf_counter(), 0.0
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps_per_epoch):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            batch = augmented(images[chosen], generator).to(device)
            loss = functional.cross_entropy(model(batch), labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - started
        print(
            f"{variant:18} seed {seed} epoch {epoch + 1}/{EPOCHS}: loss {total / steps_per_epoch:.4f}, {seconds:.0f} s",
            flush=True,
        )
        save(
            path,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
                "runtime": {} if runtime is None else runtime.state_dict(),
                "epoch": epoch + 1,
            },
        )
    return model.cpu().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the CIFAR-10 files, load.py and models.py")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 32, 56))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_finetune"))
    parser.add_argument("--threads", type=int, default=0, help="0 means torch's default")
    parser.add_argument("--only", nargs="+", metavar="VARIANT/SEED", help="train these and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sys.path.insert(0, str(arguments.data))
    load, models = __import__("load"), __import__("models")
    folder = arguments.out / f"resnet{arguments.depth}"
    folder.mkdir(parents=True, exist_ok=True)
    device_name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    print(f"device {arguments.device} ({device_name}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"sparsefx {sparsefx.__version__}, seeds 0..{arguments.seeds - 1}")  # fmt: skip
    print(f"{EPOCHS} epochs, batch {BATCH}, SGD nesterov, lr {LEARNING_RATE} cosine, momentum {MOMENTUM}, decay {WEIGHT_DECAY}")

    test_images, test_labels = load.cifar_lossless("cifar10_test1000_lossless")
    test_x, test_y = normalise(test_images), torch.from_numpy(numpy.asarray(test_labels)).long()
    parts = [load.cifar_lossless(f"cifar10_train_lossless_{part}") for part in range(1, 6)]
    train_x = torch.cat([normalise(images) for images, _ in parts])
    train_y = torch.cat([torch.from_numpy(numpy.asarray(labels)).long() for _, labels in parts])

    def pretrained() -> nn.Module:
        net: nn.Module = models.CifarResNet(arguments.depth)
        net.load_state_dict(torch.load(arguments.data / f"cifar10_resnet{arguments.depth}.pt", weights_only=True))
        return net.to(memory_format=torch.channels_last)

    def sparse(pattern: str) -> nn.Module:
        return sparsefx.sparsify(pretrained(), pattern=pattern, example_inputs=(test_x[:2],))

    for run in arguments.only or ():
        variant, _, seed_text = run.rpartition("/")
        model = pretrained() if variant == "dense" else sparse(variant)
        train(model, variant, int(seed_text), train_x, train_y, folder, arguments.device)
    if arguments.only:
        return

    print(f"pretrained, dense: {accuracy(pretrained(), test_x, test_y):.1f}")
    for pattern in BARS:
        print(f"pretrained, one-shot {pattern}: {accuracy(sparse(pattern), test_x, test_y):.1f}", flush=True)

    results_path = folder / "results.json"
    results: dict[str, float] = json.loads(results_path.read_text()) if results_path.exists() else {}
    last: dict[str, nn.Module] = {}
    for seed in range(arguments.seeds):
        for variant in ("dense", *BARS):
            model = pretrained() if variant == "dense" else sparse(variant)
            last[variant] = train(model, variant, seed, train_x, train_y, folder, arguments.device)
            results[f"{variant}/{seed}"] = accuracy(last[variant], test_x, test_y)
            temporary = results_path.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1))
            os.replace(temporary, results_path)
            print(f"{variant:18} seed {seed}: {results[f'{variant}/{seed}']:.1f}", flush=True)

    dense = [results[f"dense/{seed}"] for seed in range(arguments.seeds)]
    print(f"dense fine-tuned: {statistics.mean(dense):.2f} ({', '.join(f'{value:.1f}' for value in dense)})")
    for pattern, bar in BARS.items():
        values = [results[f"{pattern}/{seed}"] for seed in range(arguments.seeds)]
        differences = [a - b for a, b in zip(dense, values, strict=True)]
        mean = statistics.mean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        verdict = "holds" if mean <= bar + error else "does not hold"
        told = ", ".join(f"{value:.1f}" for value in values)
        print(f"{pattern} fine-tuned: {statistics.mean(values):.2f} ({told})")
        print(f"  dense - sparse {mean:+.2f} +- {error:.2f}, bar {bar} + 1 standard error: {verdict}")
        model = last[pattern]
        path = folder / f"{pattern.replace(':', '-')}.onnx"
        batch = torch.export.Dim("batch", min=1, max=4096)
        report = sparsefx.export_onnx(model, (test_x[:2],), path, dynamic_shapes=({0: batch},))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = session.run(None, {session.get_inputs()[0].name: test_x.contiguous().numpy()})[0]
        equal = int((torch.from_numpy(outputs).argmax(1) == predictions(model, test_x)).sum())
        print(f"{path.name}: {report.bytes} bytes; its predictions equal the model's on {equal} of {len(test_x)} images")


if __name__ == "__main__":
    main()
