"""SparsityCallback in Lightning's Trainer: a small residual network, trained sparse, cut short and resumed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparsefx
from sparsefx.errors import OptionError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    L = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from sparsefx.integrations.lightning import SparsityCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises on workers, loggers and much else


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class ResNet(L.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), Block(16), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
        )
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, index: int) -> Tensor:
        # Lightning itself shows some batches twice when it resumes within an epoch: here the step decides which one it is.
        images = batch[0].roll(self.global_step, dims=3)
        return nn.functional.cross_entropy(self(images), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Look(L.Callback):  # type: ignore[misc,name-defined]
    """Weights are sparse after every batch."""

    batches = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.batches += 1
        for name, mask in sparsefx.masks(pl_module).items():
            assert not pl_module.get_parameter(name)[~mask].any()


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 8, 8, generator=generator).repeat(6, 1, 1, 1)
    return DataLoader(TensorDataset(images, torch.arange(24) % 4), batch_size=4)


def fit(folder: Path, model: Any, callback: Any, *, steps: int = 10, resume: Path | None = None, **options: Any) -> Any:
    look = Look()
    trainer = L.Trainer(
        default_root_dir=str(folder),
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        callbacks=[callback, look],
        **options,
    )
    trainer.fit(model, loader(), ckpt_path=None if resume is None else str(resume))
    assert look.batches > 0
    return trainer


class StopAt(L.Callback):  # type: ignore[misc,name-defined]
    """Saves a checkpoint after the first epoch, and ends the run as if it had been cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("algorithm", "attach_options", "options"),
    [("magnitude", {}, {}), ("set", {"rewire_every": 2}, {"precision": "bf16-mixed"})],
    ids=["magnitude", "set bf16"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, algorithm: str, attach_options: dict[str, Any], options: dict[str, Any]
) -> None:
    def callback() -> SparsityCallback:
        return SparsityCallback("2:4", sparsify_options={"algorithm": algorithm}, attach_options=attach_options)

    whole = ResNet()
    fit(tmp_path, whole, callback(), **options)
    file = tmp_path / "cut.ckpt"
    cut = fit_and_stop(tmp_path, callback(), file, options)
    assert cut.global_step < 10
    resumed = ResNet(seed=9)
    trainer = fit(tmp_path, resumed, callback(), resume=file, **options)
    assert trainer.global_step == 10
    expected, found = whole.state_dict(), resumed.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    one, other = sparsefx.masks(whole), sparsefx.masks(resumed)
    assert len(one) == 5
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {"sparsity/density", "sparsity/flips", "sparsity/empty_channels"} <= trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["sparsity/density"]) == 0.5


def fit_and_stop(folder: Path, callback: Any, file: Path, options: dict[str, Any]) -> Any:
    trainer = L.Trainer(
        default_root_dir=str(folder),
        max_steps=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, StopAt(file)],
        **options,
    )
    trainer.fit(ResNet(), loader())
    return trainer


def test_compiled_in_bfloat16_it_is_the_run_that_is_not_compiled(tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain, compiled = ResNet(), ResNet()
    fit(tmp_path, plain, SparsityCallback("2:4"), steps=4, precision="bf16-mixed")
    runs = torch.compile(compiled, backend="aot_eager")
    callback = SparsityCallback("2:4")
    fit(tmp_path, runs, callback, steps=4, precision="bf16-mixed")
    one, other = sparsefx.masks(plain), sparsefx.masks(compiled)
    assert len(one) == 5
    assert all(float((one[name] == other[name]).float().mean()) > 0.95 for name in one)
    assert all(not compiled.get_parameter(name)[~mask].any() for name, mask in other.items())
    torch._dynamo.reset()


def test_finalize_at_the_end(tmp_path: Path) -> None:
    model = ResNet()
    fit(tmp_path, model, SparsityCallback("2:4", finalize_at_end=True), steps=3)
    assert sparsefx.masks(model) == {}
    assert int((model.net[1].first.weight == 0).sum()) == model.net[1].first.weight.numel() // 2


def test_a_run_without_an_end_is_told(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give the Trainer max_steps"):
        fit(tmp_path, ResNet(), SparsityCallback(), steps=-1, max_epochs=-1)
