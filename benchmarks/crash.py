"""Claim: a run that is killed (SIGKILL) at random moments, again and again, and resumed from its last checkpoint ends bit for
bit as an uninterrupted one does: weights, masks, dormant values, optimizer and losses. No torn checkpoint is ever seen.

    python benchmarks/crash.py --runs 100

Each run draws its moments from the seed; a third of the kills is aimed at the time when a checkpoint is written. Checkpoints are
written by `sparsefx.save` and, in every second run, by ``torch.save`` to a temporary name that is then renamed, with the
runtime's state_dict in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsefx

METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("magnitude", "2:4", {"reset_every": 7}),
    ("set", "unstructured", {"rewire_every": 3}),
    ("sparse-momentum", "unstructured", {"rewire_every": 3}),
    ("rigl", "2:4", {"rewire_every": 3}),
)


@dataclass(frozen=True)
class Job:
    """One training run: where its checkpoint is, how it is written, and what is trained."""

    folder: Path
    writer: str
    method: int
    steps: int
    save_every: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


def train(job: Job) -> None:
    """Train from the last checkpoint, or from the start, to the end; leave ``final`` in the folder."""
    algorithm, pattern, options = METHODS[job.method]
    resumes = job.checkpoint.exists()
    # A resumed process starts from other weights and another random state: all of it has to come from the checkpoint.
    model = net(seed=1 if resumes else 0)
    sparsefx.sparsify(model, pattern=pattern, algorithm=algorithm)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    runtime = sparsefx.attach(model, optimizer, total_steps=job.steps, **options)
    losses: list[float] = []
    if resumes:
        losses = _resume(job, model, optimizer, runtime)
    else:
        torch.manual_seed(7)
    for step in range(len(losses), job.steps):
        x = torch.randn(16, 32)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :16]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % job.save_every == 0:
            _save(job, job.checkpoint, model, optimizer, runtime, losses)
    _save(job, job.folder / "final", model, optimizer, runtime, losses)


def _save(job: Job, path: Path, model: nn.Module, optimizer: Any, runtime: sparsefx.MaskRuntime, losses: list[float]) -> None:
    extra = {"optimizer": optimizer.state_dict(), "losses": losses, "random": torch.get_rng_state()}
    if job.writer == "sparsefx.save":
        sparsefx.save(model, path, runtime=runtime, extra=extra)
        return
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "runtime": runtime.state_dict(), **extra}, part)
    os.replace(part, path)


def _resume(job: Job, model: nn.Module, optimizer: Any, runtime: sparsefx.MaskRuntime) -> list[float]:
    extra: dict[str, Any]
    if job.writer == "sparsefx.save":
        extra = sparsefx.load(model, job.checkpoint, runtime=runtime).extra
    else:
        extra = torch.load(job.checkpoint, weights_only=True)
        model.load_state_dict(extra["model"])
        runtime.load_state_dict(extra["runtime"])
    optimizer.load_state_dict(extra["optimizer"])
    torch.set_rng_state(extra["random"])
    losses: list[float] = extra["losses"]
    assert runtime.step == len(losses)
    return losses


def final(job: Job) -> dict[str, Any]:
    """Everything that the end of a run is compared by."""
    if job.writer == "torch.save":
        found: dict[str, Any] = torch.load(job.folder / "final", weights_only=True)
        return found
    model = net(seed=2)
    loaded = sparsefx.load(model, job.folder / "final")
    return {"model": model.state_dict(), "runtime": loaded.runtime, **loaded.extra}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through dicts, lists and tuples."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def start(job: Job) -> int:
    """A child process that trains; this one has run no model, so that a fork is as good as a new process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train(job)
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_and_kill(job: Job, generator: random.Random, seconds: float) -> int:
    """Start, kill at a random moment, and start again, until it gets to the end; how often it was killed.

    Raises RuntimeError where a process ended by itself with an error: a checkpoint that cannot be read would show here.
    """
    kills = 0
    while True:
        child = start(job)
        deadline = time.monotonic() + generator.uniform(0.0, seconds)
        at_writing = generator.random() < 1 / 3
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                if status:
                    raise RuntimeError(f"{job}: a resumed process failed with status {status}")
                return kills
            writing = (job.folder / ".checkpoint.part").exists() or (job.folder / "checkpoint.part").exists()
            if time.monotonic() > deadline and (writing or not at_writing or time.monotonic() > deadline + seconds):
                break
            time.sleep(0.0002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        # Every time a little longer, so that the run gets to its end.
        seconds *= 1.1


def crash_runs(runs: int, seed: int, folder: Path, *, steps: int = 40, save_every: int = 4) -> list[tuple[Job, int, bool]]:
    """All runs; for each the job, how often it was killed, and whether it ended as the uninterrupted one."""
    torch.set_num_threads(1)
    generator = random.Random(seed)
    references: dict[tuple[str, int], tuple[Job, float]] = {}
    found = []
    for number in range(runs):
        writer, method = ("sparsefx.save", "torch.save")[number % 2], number // 2 % len(METHODS)
        if (writer, method) not in references:
            whole = Job(folder / f"whole-{writer}-{method}", writer, method, steps, save_every)
            whole.folder.mkdir()
            began = time.monotonic()
            _, status = os.waitpid(start(whole), 0)
            if status:
                raise RuntimeError(f"{whole} failed")
            references[writer, method] = whole, time.monotonic() - began
        whole, seconds = references[writer, method]
        job = Job(folder / f"run-{number}", writer, method, steps, save_every)
        job.folder.mkdir()
        kills = run_and_kill(job, generator, seconds)
        found.append((job, kills, same(final(whole), final(job))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, CPU, seed {given.seed}")
    with tempfile.TemporaryDirectory() as folder:
        found = crash_runs(given.runs, given.seed, Path(folder))
    for writer in ("sparsefx.save", "torch.save"):
        own = [(kills, equal) for job, kills, equal in found if job.writer == writer]
        equal = sum(equal for _, equal in own)
        print(
            f"{writer}: {len(own)} runs, killed {sum(kills for kills, _ in own)} times, {equal} of {len(own)} as if uninterrupted"
        )
    sys.exit(0 if all(equal for _, _, equal in found) else 1)


if __name__ == "__main__":
    main()
