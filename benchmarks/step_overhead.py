"""Claim: a training step with masks that move at every step costs at most 1.05 of the dense step.

ResNet-50 (batch 8, 224 x 224) and a 6-layer transformer encoder (d 512, batch 8 x 128 tokens), AdamW, 2:4 masks chosen anew at
every step; each against its own dense step in the same run, interleaved step by step, the ratio of medians. The peer is
``torch.ao.pruning.WeightNormSparsifier`` (2:4 blocks, the mask updated at every step) on the same layers.

    python benchmarks/step_overhead.py [--model resnet50|transformer|all] [--pattern 2:4] [--steps 15]
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx.ops import native

BAR = 1.05


def resnet50(device: str) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    import torchvision

    labels = torch.arange(8, device=device)
    model = torchvision.models.resnet50(weights=None)
    return model, torch.randn(8, 3, 224, 224, device=device), lambda output: functional.cross_entropy(output, labels)


def transformer(device: str) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return model, torch.randn(8, 128, 512, device=device), lambda output: output.square().mean()


class Contestant:
    """One way to train: a model, its optimizer, and what has to be called after each step."""

    def __init__(self, name: str, model: nn.Module, after: Callable[[], None] | None = None) -> None:
        self.name, self.model, self.after = name, model.train(), after
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        self.seconds: list[float] = []

    def step(self, batch: Tensor, loss_of: Callable[[Tensor], Tensor]) -> None:
        synchronise = torch.cuda.synchronize if batch.is_cuda else (lambda: None)
        synchronise()
        started = time.perf_counter()
        loss_of(self.model(batch)).backward()
        self.optimizer.step()
        if self.after is not None:
            self.after()
        self.optimizer.zero_grad()
        synchronise()
        self.seconds.append(time.perf_counter() - started)


def peer(dense: nn.Module, masked: list[str]) -> Contestant:
    """torch.ao's sparsifier on the same layers, where it can take them (it masks ``module.weight`` only)."""
    from torch.ao.pruning import WeightNormSparsifier

    model = copy.deepcopy(dense)
    modules = dict(model.named_modules())
    names = [name.removesuffix(".weight") for name in masked if name.endswith(".weight")]
    config = [{"tensor_fqn": f"{name}.weight"} for name in names if isinstance(modules[name], (nn.Linear, nn.Conv2d))]
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier.prepare(model, config)
        sparsifier.step()
    return Contestant(f"torch.ao WeightNormSparsifier ({len(config)} of {len(masked)} weights)", model, sparsifier.step)


def compare(name: str, pattern: str, steps: int, device: str) -> None:
    torch.manual_seed(0)
    dense, batch, loss_of = {"resnet50": resnet50, "transformer": transformer}[name](device)
    dense = dense.to(device)
    sparse_model = sparsefx.sparsify(copy.deepcopy(dense), pattern=pattern)
    masked = list(sparsefx.masks(sparse_model))
    sparse = Contestant(f"sparsefx {pattern}", sparse_model)
    runtime = sparsefx.attach(sparse_model, sparse.optimizer, total_steps=10 * steps)
    contestants = [Contestant("dense", dense), sparse]
    try:
        contestants.append(peer(dense, masked))
    except Exception as error:  # the peer is deprecated: that it does not run is a result too
        print(f"{name}: the peer does not run: {type(error).__name__}: {str(error).splitlines()[0]}")
    for round_number in range(steps + 3):
        for offset in range(len(contestants)):
            contestants[(round_number + offset) % len(contestants)].step(batch, loss_of)
    assert runtime.step == steps + 3
    share = sum(mask.numel() for mask in sparsefx.masks(sparse_model).values()) / sum(p.numel() for p in dense.parameters())
    baseline = statistics.median(contestants[0].seconds[3:])
    print(f"{name}: {len(masked)} masked weights, {share:.0%} of all parameters; {steps} steps each after 3 of warm-up")
    for contestant in contestants:
        times = contestant.seconds[3:]
        ratio = statistics.median(times) / baseline
        paired = statistics.median(a / b for a, b in zip(times, contestants[0].seconds[3:], strict=True))
        line = (
            f"  {contestant.name:55} {1e3 * statistics.median(times):9.1f} ms ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
        )
        line += f"   ratio of medians {ratio:.3f}, median of paired ratios {paired:.3f}"
        if contestant is sparse:
            line += f"   bar {BAR}: {'met' if ratio <= BAR else 'not met'}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet50", "transformer", "all"), default="all")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device_name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    print(f"device {arguments.device} ({device_name}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"sparsefx {sparsefx.__version__}, seed 0, mask kernels: {native.describe()}")  # fmt: skip
    for name in ("resnet50", "transformer") if arguments.model == "all" else (arguments.model,):
        compare(name, arguments.pattern, arguments.steps, arguments.device)


if __name__ == "__main__":
    main()
