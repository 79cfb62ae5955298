"""Claim: pruning takes no longer than Torch-Pruning's, on ResNet-50, and grows linearly with the graph up to 10 000 nodes.

Half of the filters of a ResNet-50 are empty. `prune_channels` finds and removes them; Torch-Pruning builds its dependency graph,
ranks filters by norm and removes half, on the same network, in turn. Medians of the processor time of one thread (other work on
the machine does not count in it), and of the time on the clock. Ours is told by parts: torch.export, analysis, trial runs without
memory, surgery, and the comparison in float64, at the example's sizes and at other ones, which Torch-Pruning has none of.

Then networks of residual blocks of rising length, with half of the filters of each block empty: time by parts, for each node.

    pip install torch-pruning
    python benchmarks/prune_scaling.py [--repeats 5] [--nodes 10000]
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torchvision
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsefx
from benchmarks.emptied import empty_half, randomize

SEED = 0
PARTS = {
    "torch.export": ("sparsefx.passes.channels.graph.exported_program",),
    "trial runs": ("sparsefx.passes.prune_channels.ShapeTrial.failure",),
    "float64": ("sparsefx.passes.prune_channels.ValueTrial.__init__", "sparsefx.passes.prune_channels.ValueTrial.difference"),
    "other sizes": ("sparsefx.passes.prune_channels.ValueTrial.difference_elsewhere",),
    "surgery": ("sparsefx.pruning._applied",),
}
"""What belongs to which part; the rest is analysis."""


@contextmanager
def parts() -> Iterator[Counter[str]]:
    """Processor seconds of each part, while this is open."""
    spent: Counter[str] = Counter()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - start

        return run

    with ExitStack() as stack:
        for part, targets in PARTS.items():
            for target in targets:
                path, _, name = target.rpartition(".")
                owner = _resolve(path)
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield spent


def _resolve(path: str) -> Any:
    """A module, or a class in one."""
    module, _, name = path.rpartition(".")
    return sys.modules[path] if path in sys.modules else getattr(sys.modules[module], name)


def ours(model: nn.Module, image: Tensor) -> tuple[nn.Module, Counter[str]]:
    """Prune, with the time of each part and ``all``."""
    with parts() as spent:
        start, clock = time.process_time(), time.perf_counter()
        pruned = sparsefx.prune_channels(model, image)
        total = time.process_time() - start
        spent["analysis"] = total - sum(spent.values())  # type: ignore[assignment]
        spent["all"], spent["clock"] = total, time.perf_counter() - clock  # type: ignore[assignment]
    return pruned, spent


def torch_pruning(model: nn.Module, image: Tensor) -> Counter[str]:
    """Time in which Torch-Pruning halves all widths of a network."""
    import torch_pruning as peer

    start, clock = time.process_time(), time.perf_counter()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = peer.pruner.MagnitudePruner(
        model, image, importance=peer.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=head
    )
    pruner.step()
    return Counter({"all": time.process_time() - start, "clock": time.perf_counter() - clock})  # type: ignore[dict-item]


class Block(nn.Module):
    """Two convolutions and a residual: seven nodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


def long_network(nodes: int) -> nn.Module:
    """About as many nodes, half of the inner filters empty."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *[Block(8) for _ in range(nodes // 7)], nn.Flatten(), nn.LazyLinear(10)).eval()
    model(torch.zeros(1, 3, 10, 10))
    randomize(model, torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Block):
                module.first[0].weight[::2] = 0  # type: ignore[index,operator]
                # Values that neither vanish nor grow over a thousand residuals.
                module.second[1].weight.mul_(0.01)  # type: ignore[operator,union-attr]
    return model


def told(spent: dict[str, float], scale: float = 1.0, unit: str = "s") -> str:
    return ", ".join(f"{name} {spent[name] * scale:.2f}" for name in (*PARTS, "analysis", "all")) + f" {unit}"


def main(
    repeats: Annotated[int, typer.Option(help="Runs that medians are of.")] = 5,
    nodes: Annotated[int, typer.Option(help="Nodes of the longest network.")] = 10_000,
) -> None:
    """Measure."""
    import torch_pruning as peer

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"CPU {platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, torch-pruning {getattr(peer, '__version__', '?')}, sparsefx {sparsefx.__version__}, "
          f"seed {SEED}")  # fmt: skip
    generator = torch.Generator().manual_seed(SEED)
    image = torch.randn(1, 3, 224, 224, generator=generator)

    def resnet() -> nn.Module:
        torch.manual_seed(SEED)
        model = torchvision.models.resnet50().eval()
        randomize(model, torch.Generator().manual_seed(SEED))
        return model

    emptied = resnet()
    empty_half(emptied, image, generator, biases=True)
    runs: list[Counter[str]] = []
    theirs: list[Counter[str]] = []
    for _ in range(repeats + 1):
        runs.append(ours(emptied, image)[1])
        theirs.append(torch_pruning(resnet(), image))
    # The first run of each loads code.
    mine = {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}
    other = {name: statistics.median(run[name] for run in theirs[1:]) for name in theirs[0]}
    print(f"ResNet-50, ours: {told(mine)}; on the clock {mine['clock']:.2f} s")
    print(f"ResNet-50, Torch-Pruning: all {other['all']:.2f} s; on the clock {other['clock']:.2f} s")
    ratio = mine["all"] / other["all"]
    print(f"ours / theirs {ratio:.2f}, on the clock {mine['clock'] / other['clock']:.2f}; bar 1.00: "
          f"{'holds' if ratio <= 1 else 'does not hold'}")  # fmt: skip

    sizes = [size for size in (nodes // 16, nodes // 8, nodes // 4, nodes // 2, nodes) if size >= 14]
    for size in sizes:
        pruned, spent = ours(long_network(size), torch.zeros(1, 3, 10, 10))
        report = sparsefx.channel_plan_of(pruned).report
        print(
            f"{size} nodes: {told(spent, 1000 / size, 'ms a node')}, {report.parameters:,} -> {report.parameters_after:,} "
            f"parameters, difference {report.difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
