"""Claim: ResNet-20 on CIFAR-10, 2:4, loses at most 0.5 points from float to INT8 in onnxruntime, and keeps every zero.

The pretrained net is made 2:4 and fine-tuned as in cifar10_finetune.py, exported, and quantised with 512 training images as
calibration data. Compared on the 1 000 exact test images that the claim is about, and on all 10 000 as JPEGs of quality 75 (on
which both lose accuracy), where the difference is surer. Beside it stand the dense float model and its own INT8 file.

    python benchmarks/int8_resnet20.py --data FOLDER [--out runs/int8_resnet20]

Fine-tuning is checkpointed each epoch; a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from cifar10_finetune import normalise, train
from torch import Tensor, nn

import sparsefx
from sparsefx.onnx_audit import audit_onnx

BAR, SEED, CALIBRATION = 0.5, 0, 512


def correct(path: Path, images: Tensor, labels: Tensor) -> Tensor:
    """Which images a file classifies rightly."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [session.run(None, {name: part.contiguous().numpy()})[0] for part in images.split(250)]
    return torch.from_numpy(np.concatenate(outputs)).argmax(1) == labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the CIFAR-10 files, load.py and models.py")
    parser.add_argument("--out", type=Path, default=Path("runs/int8_resnet20"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.data))
    load, models = __import__("load"), __import__("models")
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"device cpu ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}, onnxruntime "
          f"{onnxruntime.__version__}, sparsefx {sparsefx.__version__}, seed {SEED}")  # fmt: skip
    parts = [load.cifar_lossless(f"cifar10_train_lossless_{part}") for part in range(1, 6)]
    train_x = torch.cat([normalise(images) for images, _ in parts])
    train_y = torch.cat([torch.from_numpy(np.asarray(labels)).long() for _, labels in parts])
    tests = {}
    for title, (images, labels) in {
        "1 000 exact": load.cifar_lossless("cifar10_test1000_lossless"),
        "10 000 JPEG": load.jpegs("cifar10_test10000_q75_jpegs"),
    }.items():
        tests[title] = normalise(np.asarray(images)), torch.from_numpy(np.asarray(labels)).long()

    def pretrained() -> nn.Module:
        net: nn.Module = models.CifarResNet(20)
        net.load_state_dict(torch.load(arguments.data / "cifar10_resnet20.pt", weights_only=True))
        return net.to(memory_format=torch.channels_last)

    example = train_x[:1]
    sparse = sparsefx.sparsify(pretrained(), pattern="2:4", example_inputs=example)
    sparse = train(sparse, "2:4", SEED, train_x, train_y, arguments.out, "cpu")
    chosen = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(SEED))[:CALIBRATION]
    drops = {}
    for kind, model in (("dense", pretrained()), ("2:4", sparse)):
        plain, small = (arguments.out / f"{kind.replace(':', '-')}-{name}.onnx" for name in ("float", "int8"))
        sparsefx.export_onnx(model, example, plain, dynamic_batch=True)
        report = sparsefx.quantize_onnx(plain, train_x[chosen].contiguous().split(64), small)
        pairs = {w.source: w for w in audit_onnx(plain) if w.pattern.startswith("2:4")}
        kept = sum(w.pattern.startswith("2:4") for w in audit_onnx(small) if w.source in pairs)
        print(f"{kind}: {plain.stat().st_size / 1e6:.2f} MB -> {report.bytes / 1e6:.2f} MB, 2:4 weights {len(pairs)} -> {kept}")
        for title, (images, labels) in tests.items():
            before, after = (correct(path, images, labels) for path in (plain, small))
            drops[kind, title] = 100 * float(before.float().mean() - after.float().mean())
            gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
            print(f"  {title}: float {100 * float(before.float().mean()):.2f}, INT8 {100 * float(after.float().mean()):.2f} "
                  f"({drops[kind, title]:+.2f} lost; {lost} images lost, {gained} gained)", flush=True)  # fmt: skip
        if kept != len(pairs):
            raise AssertionError("a weight is not 2:4 any more")
    holds = drops["2:4", "1 000 exact"] <= BAR
    print(f"2:4 loses {drops['2:4', '1 000 exact']:.2f} points, bar {BAR}: the claim {'holds' if holds else 'does not hold'}")
    sys.exit(not holds)


if __name__ == "__main__":
    main()
