"""Claim: channel pruning never changes an output and never makes a network larger, on random networks with random empty filters.

    python benchmarks/fuzz.py                  10 000 networks
    python benchmarks/fuzz.py --networks 500 --seed 7

Networks have plain, grouped, depthwise and transposed convolutions, batch, group, layer and instance norms, activations with
f(0) != 0, sums, products, gates, concatenations, splits, shuffles, pixel shuffles, pools, paddings, attention, gated feed-forward
layers, recurrent layers, shared modules, ops without a rule and code that holds numbers of channels. Outputs are compared in
float64.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import sparsefx

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.channel_networks import random_network

TOLERANCE = 1e-9


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value, infinite for other shapes or other places without a number."""
    if one.shape != other.shape or not torch.equal(torch.isfinite(one), torch.isfinite(other)):
        return float("inf")
    known = torch.isfinite(other)
    if not known.any():
        return 0.0
    return float((one - other)[known].abs().max() / other[known].abs().max().clamp_min(1e-300))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, sparsefx {sparsefx.__version__}, CPU, one thread, first seed {options.seed}")
    started, wrong = time.perf_counter(), 0
    before = after = smaller = kept_whole = 0
    worst = 0.0
    seeds = range(options.seed, options.seed + options.networks)
    console = Console(stderr=True)
    for seed in track(seeds, "networks", console=console, disable=not console.is_terminal):
        torch.manual_seed(seed)
        model, x = random_network(random.Random(seed).randrange)
        try:
            plan = sparsefx.channel_plan(model, x, multiple=1 if seed % 3 else 4)
            pruned = sparsefx.apply_channel_plan(copy.deepcopy(model).double(), plan)
            with torch.no_grad():
                pairs = zip(pruned(x.double()), model.double()(x.double()), strict=True)
                found = max(difference(one, other) for one, other in pairs)
        except Exception as error:  # whatever it is, it counts as wrong and the run goes on
            print(f"seed {seed}: {type(error).__name__}: {error}")
            wrong += 1
            continue
        parameters = sum(parameter.numel() for parameter in pruned.parameters())
        grown = parameters > plan.report.parameters
        if found > TOLERANCE or grown:
            print(f"seed {seed}: outputs differ by {found:.1e}, parameters {plan.report.parameters} -> {parameters}")
            wrong += 1
        worst = max(worst, found)
        before, after = before + plan.report.parameters, after + parameters
        smaller += not plan.empty
        kept_whole += bool(plan.report.refused)
        if (seed + 1 - options.seed) % 500 == 0:
            print(f"{seed + 1 - options.seed} networks: {wrong} wrong, largest difference {worst:.1e}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{options.networks} networks in {seconds:.0f} s: {wrong} wrong, largest difference {worst:.1e}")
    print(
        f"{smaller} became smaller; parameters {after / max(1, before):.3f} of what they were; in {kept_whole} code held a number"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
