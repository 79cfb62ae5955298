"""Class specialization against sums over all activations; accuracy fractions against arithmetic; plots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparsefx.analysis import (
    accuracy_fraction,
    accuracy_fraction_section,
    class_specialization,
    estimate,
    plot_accuracy_fraction,
    plot_decorrelation,
    plot_specialization,
    specialization_section,
)
from sparsefx.analysis.decorrelation import Decorrelation
from sparsefx.analysis.plots import COLOURS, svg
from sparsefx.errors import EligibilityError, OptionError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def data(per_class: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    labels = torch.cat([torch.full((count,), number) for number, count in enumerate(per_class)])
    return torch.randn(len(labels), 2, 6, 6, generator=torch.Generator().manual_seed(1)), labels


@pytest.mark.parametrize("per_class", [(8, 8, 8), (3, 9, 12), (5, 0, 5)])
@pytest.mark.parametrize("batch", [5, 24])
def test_shares_are_those_of_all_activations(per_class: tuple[int, ...], batch: int) -> None:
    model = net().train()
    images, labels = data(per_class)
    pairs = list(zip(images.split(batch), labels.split(batch), strict=True))
    found = class_specialization(model, pairs, least=0.0)
    assert all(module.training for module in model.modules())
    assert not model[0]._forward_hooks
    model.eval()
    with torch.no_grad():
        first = model[0](images).double().abs().sum((2, 3))
    means = torch.stack([first[labels == number].mean(0) for number in range(3) if per_class[number]])
    torch.testing.assert_close(found.channels["0"], means.amax(0) / means.sum(0))
    assert set(found.channels) == {"0", "3"}
    assert found.left_out == {"0": 0, "3": 0}
    assert found.mean == pytest.approx(float(torch.cat(list(found.channels.values())).mean()))


def test_the_weakest_channels_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 0.5, 0.03, 0.0]).view(4, 1, 1, 1))
    images = torch.cat([torch.ones(2, 1, 2, 2), 3 * torch.ones(2, 1, 2, 2)])
    found = class_specialization(model, [(images, torch.tensor([0, 0, 1, 1]))])
    assert found.channels["0"].isnan().tolist() == [False, False, True, True]
    assert found.left_out["0"] == 2
    assert found.mean == pytest.approx(0.75)
    assert found.layer_means() == {"0": pytest.approx(0.75)}


def test_modules_can_be_named_and_wrong_ones_are_refused() -> None:
    images, labels = data((4, 4, 4))
    found = class_specialization(net(), [(images, labels)], modules=["2", "5"])
    assert set(found.channels) == {"2", "5"}
    with pytest.raises(EligibilityError, match="nothing"):
        class_specialization(net(), [(images, labels)], modules=["nothing"])
    with pytest.raises(EligibilityError, match="no convolution"):
        class_specialization(nn.Linear(2, 2), [])
    with pytest.raises(OptionError, match="no batches"):
        class_specialization(net(), [])
    with pytest.raises(OptionError, match="12 outputs for 3 labels"):
        class_specialization(net(), [(images, labels[:3])])
    with pytest.raises(OptionError, match="negative"):
        class_specialization(net(), [(images, labels - 1)])


def test_f_is_one_where_sparse_is_as_good_as_dense() -> None:
    assert accuracy_fraction([0.9], [0.9], [0.8]).mean == pytest.approx(1.0)
    assert accuracy_fraction([0.9], [0.8], [0.8]).mean == pytest.approx(0.0)
    assert accuracy_fraction([0.9, 0.92], [0.87, 0.88], [0.8, 0.82]).mean == pytest.approx(0.65)
    errors = accuracy_fraction([10.0], [12.5], [20.0])
    assert errors.mean == pytest.approx(0.75)
    assert math.isnan(errors.standard_error)


def test_the_error_of_f_is_that_of_many_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, sparse, small = (level + 0.01 * torch.randn(5, generator=generator, dtype=torch.float64) for level in (0.9, 0.87, 0.7))
    found = accuracy_fraction(dense.tolist(), sparse.tolist(), small.tolist())
    draws = [one.mean() + one.std() / 5**0.5 * torch.randn(100_000, generator=generator) for one in (dense, sparse, small)]
    fractions = (draws[1] - draws[2]) / (draws[0] - draws[2])
    assert found.standard_error == pytest.approx(float(fractions.std()), rel=0.02)


def test_figures_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(OptionError, match="no fraction"):
        accuracy_fraction([0.5], [0.4], [0.5])
    with pytest.raises(OptionError, match="no value"):
        estimate([])


def test_figures_are_drawn_and_repeat_themselves() -> None:
    images, labels = data((4, 4, 4))
    found = {"dense": class_specialization(net(), [(images, labels)])}
    figure = plot_specialization(found)
    assert figure.axes[0].get_legend() is not None
    assert svg(figure) == svg(plot_specialization(found))
    assert "Class specialization" in specialization_section(found)
    fractions = {0.1: estimate([0.5, 0.6]), 0.5: estimate([1.0, 0.98])}
    assert len(plot_accuracy_fraction(fractions).axes) == 1
    assert accuracy_fraction_section(fractions).count("svg+xml") == 1


def test_many_layers_have_a_short_legend() -> None:
    times, magnitudes = torch.rand(30, dtype=torch.float64), torch.rand(30)
    layers = [Decorrelation(f"layer{number}", times, magnitudes, 0.01, 0.5) for number in range(len(COLOURS) + 4)]
    legend = plot_decorrelation(layers).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["layer0", f"layer{len(COLOURS) + 3}"]


def test_half_precision_gives_what_single_does() -> None:
    model = net()
    model[0].weight.data.mul_(300)
    batches = [(torch.randn(30, 2, 6, 6), torch.arange(30) % 3)]
    wanted = class_specialization(model, batches, modules=["0"]).mean
    half = [(batches[0][0].half(), batches[0][1])]
    assert class_specialization(model.half(), half, modules=["0"]).mean == pytest.approx(wanted, rel=1e-2)


def test_modules_without_a_tensor_or_without_a_run_are_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.unused = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.lstm(x)[0]
            return made

    batches = [(torch.randn(6, 5, 4), torch.arange(6) % 3)]
    with pytest.raises(OptionError, match="lstm gives a tuple"):
        class_specialization(Recurrent(), batches, modules=["lstm"])
    with pytest.raises(EligibilityError, match="none of unused ran"):
        class_specialization(Recurrent(), batches, modules=["unused"])
    with pytest.raises(OptionError, match="least"):
        class_specialization(net(), [(torch.randn(6, 2, 6, 6), torch.arange(6) % 3)], least=2.0)
