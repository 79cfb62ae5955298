"""The demo, run as a user runs it (three seeds), and its parts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import sparsefx
from sparsefx.demo import DemoResult, Run, load_digits, predictions, run_demo, small_net, train
from sparsefx.demo_page import demo_page
from sparsefx.errors import ExportError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path, str]:
    out = tmp_path_factory.mktemp("demo") / "report"
    lines: list[str] = []
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    result = run_demo(out, say=lines.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    return result, out, "\n".join(lines)


def test_sparse_nets_are_within_a_point_of_dense_ones(demo: tuple[DemoResult, Path, str]) -> None:
    result, _, _ = demo
    assert [(run.seed, run.kind) for run in result.runs] == [(seed, kind) for seed in range(3) for kind in ("dense", "2:4")]
    assert min(result.accuracies("dense") + result.accuracies("2:4")) > 0.97
    assert result.difference >= -1.0


def test_masks_are_2_to_4_and_the_file_agrees_with_the_model(demo: tuple[DemoResult, Path, str]) -> None:
    result, out, _ = demo
    assert set(result.masks) == {"conv2.weight", "conv3.weight", "conv4.weight", "classifier.weight"}
    for mask in result.masks.values():
        groups = mask.movedim(1, -1).reshape(-1, 4)
        assert torch.equal(groups.sum(1), torch.full((len(groups),), 2))
    assert result.same_predictions == result.test_images == 597
    assert {weight.source: weight.pattern for weight in result.export.initializers if weight.pattern} == dict.fromkeys(
        result.masks, "2:4"
    )
    assert (out / "digits-2to4.onnx").stat().st_size == result.export.bytes


def test_empty_channels_are_removed_and_nothing_changes(demo: tuple[DemoResult, Path, str]) -> None:
    result, out, text = demo
    net = result.pruned
    assert net.accuracy == net.accuracy_after > 0.95
    assert net.same_predictions == result.test_images
    assert net.report.parameters_after < 0.4 * net.report.parameters
    assert net.report.difference is not None
    assert net.report.difference < 1e-10
    assert (out / "digits-pruned.onnx").stat().st_size == net.export.bytes < (out / "digits-channels.onnx").stat().st_size / 2
    assert "A net trained with half of its filters, then cut: parameters" in text
    assert "the same digit on 597 of 597 images" in text


def test_masks_move_early_and_settle(demo: tuple[DemoResult, Path, str]) -> None:
    result, _, _ = demo
    for run in result.runs:
        assert bool(run.flips) == (run.kind == "2:4")
        if run.flips:
            rates = [rate for _, rate in run.flips]
            assert max(rates) > 0.01
            assert rates[-1] < 0.001


def test_everything_is_printed_and_saved(demo: tuple[DemoResult, Path, str]) -> None:
    result, out, printed = demo
    files = ["digits-2to4.onnx", "digits-channels.onnx", "digits-pruned.onnx"]
    assert sorted(file.name for file in out.iterdir()) == ["audit.json", *files, "report.html", "results.json"]
    saved = json.loads((out / "results.json").read_text())
    assert saved["accuracy"]["2:4"] == result.accuracies("2:4")
    assert [row["layer"] for row in saved["channels"]] == ["conv2", "conv3", "conv4", "classifier"]
    assert len(json.loads((out / "audit.json").read_text())["layers"]) == 5
    for part in (f"{result.difference:+6.2f} points", "conv4", "norm of a filter", "597 of 597 test images", "report.html"):
        assert part in printed
    page = (out / "report.html").read_text()
    assert page == demo_page(result)
    assert page.count("<figure>") == 3
    assert page.count("data:image/png") == 4


def test_one_seed_gives_the_same_run_twice() -> None:
    data = load_digits()

    def once() -> tuple[Run, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = sparsefx.sparsify(small_net())
        run = Run(0, "2:4")
        train(model, data, run, epochs=1, after_step=lambda: None)
        return run, model.state_dict()

    (first, weights), (second, again) = once(), once()
    assert (first.losses, first.flips, first.accuracies) == (second.losses, second.flips, second.accuracies)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_split_is_fixed_and_complete() -> None:
    data, again = load_digits(), load_digits()
    assert (len(data.training_images), len(data.test_images)) == (1200, 597)
    assert torch.equal(data.test_images, again.test_images)
    assert (data.test_labels.bincount(minlength=10) > 40).all()
    assert (data.training_images.min(), data.training_images.max()) == (-1, 1)


def test_predictions_put_the_mode_back() -> None:
    model = small_net().train()
    before = copy.deepcopy(model.state_dict())
    predictions(model, load_digits().test_images[:8])
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be made"):
        run_demo(tmp_path / "file" / "out", say=pytest.fail)
