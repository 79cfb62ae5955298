"""Claim: a training step of ViT-L with transposable 2:4 masks on sparse kernels is at least 1.15 times as fast as the dense step.

ViT-L/16, AdamW (fused), 224 x 224, masks chosen anew every ``--rewire-every`` steps, as a user runs it: forward, backward,
optimizer step with the mask runtime attached; wall time with the GPU waited for, in turns. Beside it the same masks without the
backend (zeros are multiplied). Published: 1.06 on an A100 (PyTorch's blog, 2024).

    python -m benchmarks.cuda.training_step [--batch 64] [--steps 20] [--rewire-every 40] [--dry]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from benchmarks.cuda.common import Setting, interleaved_steps, start, verdict
from benchmarks.cuda.vision_transformer import vit_large
from sparsefx.training_backend import install_backend

BAR = 1.15


def step_of(
    model: nn.Module, data: Tensor, labels: Tensor, dtype: torch.dtype, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """One training step under autocast, float32 weights."""

    def step() -> None:
        with torch.autocast(data.device.type, dtype):
            loss = functional.cross_entropy(model(data), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(dtype: torch.dtype, setting: Setting) -> None:
    """Dense, masked, and masked on sparse kernels."""
    torch.manual_seed(setting.seed)
    side, batch = (32, 2) if setting.dry else (224, setting.options.batch)
    dense = vit_large(dry=setting.dry).to(setting.device).train()
    data = torch.randn(batch, 3, side, side, device=setting.device)
    labels = torch.arange(batch, device=setting.device)
    models: dict[str, nn.Module] = {"dense": dense}
    for name in ("masked", "sparse kernels"):
        models[name] = sparsefx.sparsify(copy.deepcopy(dense), pattern="2:4-transposable")
    with torch.autocast(setting.device, dtype):
        layers = sparsefx.audit(models["sparse kernels"]).layers
        rows = install_backend(models["sparse kernels"], layers, data, kernels=setting.kernels, timer=setting.chooser)
    steps: list[Callable[[], None]] = []
    runtimes = []
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=not setting.dry)
        if name != "dense":
            options = {"total_steps": 10_000, "rewire_every": setting.options.rewire_every}
            runtimes.append(sparsefx.attach(model, optimizer, **options))
        steps.append(step_of(model, data, labels, dtype, optimizer))
    seconds = interleaved_steps(steps, 2 if setting.dry else setting.options.steps, setting.device)
    sparse = [row for row in rows if row.backend and not row.backend.startswith("dense")]
    for reason in sorted({row.backend for row in rows if row.backend.startswith("dense")}):
        print(f"  {reason}")
    for name, time in zip(models, seconds, strict=True):
        bar = BAR if name == "sparse kernels" else None
        told = f"   {len(sparse)} of {len(rows)} layers on sparse kernels" if bar else ""
        ratio = verdict(seconds[0] / time, bar, setting)
        print(
            f"{str(dtype).removeprefix('torch.'):9s}ViT-L step, batch {batch:4d} {name:15s}{1e3 * time:9.2f} ms {ratio}{told}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rewire-every", type=int, default=40)
    setting = start(__doc__, parser)
    # Gradients in float16 underflow without a scaler; the step is timed in bfloat16 unless float16 is asked for.
    dtypes = setting.dtypes if setting.options.dtype != "both" else (torch.bfloat16,)
    for dtype in dtypes:
        compare(dtype, setting)


if __name__ == "__main__":
    main()
