"""Claim: a pruned network is as fast as one that was built with its widths, and fewer operations become less time.

Half of the filters of ResNet-18, ResNet-50 and MobileNetV2 are empty, the same ones where residuals tie layers together.
Compared, in torch and onnxruntime on the CPU: the dense network, what `prune_channels` makes of it at multiples of 16, a network
of the same widths built from new modules with weights of their own, and what Torch-Pruning makes of the dense one at half of the
channels and round_to=16. Bars: at least 0.98 times as fast as the one built by hand; ResNet-50 at 3.66 times fewer multiply-adds
3.4 times, and MobileNetV2 at 3 times fewer 1.08 times as fast as dense.

    pip install torch-pruning
    python benchmarks/pruned_speed.py [--repeats 51] [--image 224] [--only resnet50]

One thread. Networks take turns; medians of the thread's processor time (``--clock wall`` for the time on the clock), into which
other work on the machine enters only through caches and shared cores.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import torchvision
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsefx
from benchmarks.emptied import empty_half, randomize
from sparsefx.pruning_speed import in_turn, onnx_run

SEED = 0
SAME_SPEED = 0.98
FASTER = {"resnet50": (3.66, 3.4), "mobilenet_v2": (3.0, 1.08)}
"""Fewer multiply-adds, and the speed-up that they have to give."""
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


def dense(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    model: nn.Module = torchvision.models.get_model(name).eval()
    randomize(model, torch.Generator().manual_seed(SEED))
    return model


def pruned(name: str, image: Tensor) -> tuple[nn.Module, float]:
    """A network without the empty half of its filters, and how many times fewer multiply-adds it has."""
    model = dense(name)
    empty_half(model, image, torch.Generator().manual_seed(SEED), biases=False)
    small = sparsefx.prune_channels(model, image, multiple=16)
    return small.eval(), sparsefx.channel_plan_of(small).report.operations_bound


def built_by_hand(small: nn.Module, name: str) -> nn.Module:
    """The same architecture from new modules of these widths, with weights of their own: nothing in it was made by pruning."""
    model = dense(name)
    torch.manual_seed(SEED + 1)
    for path, module in small.named_modules():
        fresh: nn.Module | None = None
        if isinstance(module, nn.Conv2d):
            fresh = nn.Conv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                module.groups,
                bias=module.bias is not None,
            )
        elif isinstance(module, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(module.num_features, module.eps)
        elif isinstance(module, nn.Linear):
            fresh = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        if fresh is not None:
            parent, _, local_name = path.rpartition(".")
            setattr(model.get_submodule(parent), local_name, fresh)
    return model.eval()


def torch_pruning(name: str, image: Tensor) -> tuple[nn.Module, float]:
    """Torch-Pruning at half of the channels and round_to=16, and how many times fewer multiply-adds it has."""
    import torch_pruning as peer

    model = dense(name)
    before = peer.utils.count_ops_and_params(model, image)[0]
    head = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = peer.pruner.MagnitudePruner(
        model, image, importance=peer.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=head, round_to=16
    )
    pruner.step()
    return model.eval(), before / peer.utils.count_ops_and_params(model, image)[0]


def times(models: list[nn.Module], image: Tensor, repeats: int, clock: str, folder: Path) -> dict[str, list[float]]:
    """Median seconds in torch and onnxruntime."""
    runs = []
    for number, model in enumerate(models):
        path = folder / f"{number}.onnx"
        # The small exporter: sparsefx's own checks take long and do not change the graph's speed.
        torch.onnx.export(model, (image,), str(path), dynamo=False)
        runs.append(onnx_run(path, [image]))
    with torch.no_grad():
        in_torch = in_turn([lambda model=model: model(image) for model in models], repeats, CLOCKS[clock])  # type: ignore[misc]
    return {"torch": in_torch, "onnxruntime": in_turn(runs, repeats, CLOCKS[clock])}


def told(label: str, value: float, bar: float) -> str:
    return f"{label} {value:.3f}, bar {bar}: {'holds' if value >= bar else 'DOES NOT HOLD'}"


def main(
    repeats: Annotated[int, typer.Option(help="Runs that medians are of.")] = 51,
    image: Annotated[int, typer.Option(help="Side of the image.")] = 224,
    clock: Annotated[str, typer.Option(help="processor or wall.")] = "processor",
    only: Annotated[list[str] | None, typer.Option(help="Networks.")] = None,
) -> None:
    """Measure."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"CPU {platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), 1 thread, load "
          f"{os.getloadavg()[0]:.1f}, {clock} time, torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"onnxruntime {onnxruntime.__version__}, sparsefx {sparsefx.__version__}, seed {SEED}, image {image}")  # fmt: skip
    data = torch.randn(1, 3, image, image, generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in only or ("resnet18", "resnet50", "mobilenet_v2"):
            small, fewer = pruned(name, data)
            peer, peer_fewer = torch_pruning(name, data)
            found = times([dense(name), small, built_by_hand(small, name), peer], data, repeats, clock, folder)
            for where, (whole, mine, by_hand, theirs) in found.items():
                print(f"{name} in {where}: dense {1000 * whole:.1f} ms; pruned, {fewer:.2f} times fewer multiply-adds, "
                      f"{1000 * mine:.1f} ms; built by hand {1000 * by_hand:.1f} ms; Torch-Pruning, {peer_fewer:.2f} times "
                      f"fewer, {1000 * theirs:.1f} ms, {whole / theirs:.2f} times as fast")  # fmt: skip
                print("  " + told("speed against built by hand", by_hand / mine, SAME_SPEED))
                wanted, bar = FASTER.get(name, (1.0, 1.0))
                print("  " + told(f"as fast as dense, at {fewer:.2f} (wanted {wanted}) times fewer multiply-adds,",
                      whole / mine, bar), flush=True)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
