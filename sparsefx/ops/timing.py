"""Which of several GPU operations is fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

Operation = Callable[[], object]
Timer = Callable[[Sequence[Operation]], Sequence[float]]
"""Seconds that each operation takes, measured beside the others."""

_LAUNCHES = 10
_ROUNDS = 15
_WARM_UP = 3


@torch.no_grad()
def cuda_seconds(operations: Sequence[Operation]) -> list[float]:
    """The median time of each operation on the current GPU, in turns.

    Each is captured several times over in a CUDA graph, so that what is timed is the GPU's work and not Python's; what cannot be
    captured is launched as often. All operations read the same data at every launch, so what fits into the cache is read from
    there.

    Not run on a GPU yet.
    """
    replays = [_replay(operation) for operation in operations]
    seconds: list[list[float]] = [[] for _ in operations]
    for round_number in range(_ROUNDS + _WARM_UP):
        for replay, times in zip(replays, seconds, strict=True):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            replay()
            last.record()
            last.synchronize()
            if round_number >= _WARM_UP:
                times.append(first.elapsed_time(last) / 1e3 / _LAUNCHES)
    return [statistics.median(times) for times in seconds]


def _replay(operation: Operation) -> Callable[[], None]:
    """Something that does ``operation`` several times."""

    def launch() -> None:
        for _ in range(_LAUNCHES):
            operation()

    # Handles, plans and workspaces come into being at the first calls, which may not be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError:
        torch.cuda.synchronize()
        return launch
    return graph.replay
