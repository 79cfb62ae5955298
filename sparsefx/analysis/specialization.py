"""Class specialization of channels (Dettmers and Zettlemoyer, "Sparse Networks from Scratch", 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.algorithms.options import expect_share
from sparsefx.capture.arguments import split_arguments
from sparsefx.errors import EligibilityError, OptionError


@dataclass(frozen=True)
class Specialization:
    """How much of each channel's activation belongs to one class.

    Attributes:
        channels: by module, the largest class's share of the channel's sum of ``|activation|``: 1 / classes for a channel that
            serves all alike, 1 for one that serves a single class. Float64 ``[channels]``, NaN for those left out.
        left_out: by module, how many of the weakest channels were left out.
    """

    channels: dict[str, Tensor]
    left_out: dict[str, int]

    @property
    def mean(self) -> float:
        """Over all channels of all modules that were not left out."""
        values = torch.cat(list(self.channels.values()))
        return float(values[~values.isnan()].mean())

    def layer_means(self) -> dict[str, float]:
        """The mean of each module's channels."""
        return {name: float(values[~values.isnan()].mean()) for name, values in self.channels.items()}


def class_specialization(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    modules: Sequence[str] | None = None,
    least: float = 0.05,
) -> Specialization:
    """Run the model in eval mode on labelled batches and share out each channel's ``|activation|`` among the classes.

    Classes of unequal size are compared by their mean activation. In each module the weakest channels are left out, which
    together hold at most ``least`` of the contribution: what a channel that hardly ever acts is specialised on is chance.

    Args:
        model: left as it was, mode included.
        batches: ``(inputs, labels)``; inputs as for `sparsefx.sparsify`, labels int64 ``[N]`` from 0. N is the first axis of what
            the modules make.
        modules: paths of the modules whose outputs ``[N, channels, ...]`` are looked at; None stands for all convolutions.
            The article looks at what comes out of ReLUs: name these where they are modules.
        least: share of a module's contribution that may be left out.

    Raises:
        OptionError: no batches, labels that do not fit, or a module that gives no tensor.
        EligibilityError: no such module, no convolution, or none that runs.
    """
    expect_share("least", least)
    names = _modules(model, modules)
    sums: dict[str, Tensor] = {}
    labels = torch.empty(0, dtype=torch.int64)
    examples = torch.zeros(0, dtype=torch.float64)

    def note(name: str, output: Tensor) -> None:
        if not isinstance(output, Tensor):
            raise OptionError(
                f"{name} gives a {type(output).__name__}; expected a tensor [N, channels, ...]: name a module behind it"
            )
        activation = output.detach().abs().flatten(2).sum(2, dtype=torch.float64) if output.dim() > 2 else output.detach().abs()
        if len(activation) != len(labels):
            raise OptionError(f"{name} made {len(activation)} outputs for {len(labels)} labels; expected one for each example")
        found = sums.get(name, torch.zeros(0, activation.shape[1], dtype=torch.float64))
        grown = torch.zeros(len(examples), activation.shape[1], dtype=torch.float64)
        grown[: len(found)] = found
        sums[name] = grown.index_add_(0, labels, activation.double().cpu())

    training = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack, torch.no_grad():
        stack.callback(_put_back, training)
        model.eval()
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: note(name, out))
            stack.callback(hook.remove)
        for inputs, given in batches:
            labels = torch.as_tensor(given, dtype=torch.int64).reshape(-1).cpu()
            if not len(labels) or int(labels.min()) < 0:
                raise OptionError("class_specialization was given a batch whose labels are none, or negative; expected 0, 1, ...")
            counts = torch.bincount(labels, minlength=len(examples)).double()
            counts[: len(examples)] += examples
            examples = counts
            args, kwargs = split_arguments(inputs)
            model(*args, **kwargs)
    if not len(examples):
        raise OptionError("class_specialization was given no batches; expected (inputs, labels) pairs")
    channels: dict[str, Tensor] = {}
    left_out: dict[str, int] = {}
    for name in names:
        if name not in sums:
            continue  # a head that the model does not run in eval mode
        channels[name], left_out[name] = _shares(sums[name], examples, least)
    if not channels:
        raise EligibilityError(f"none of {', '.join(names[:3])} ran in eval mode; name modules that do")
    return Specialization(channels, left_out)


def _put_back(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _shares(sums: Tensor, examples: Tensor, least: float) -> tuple[Tensor, int]:
    """Largest class's share by channel, and how many channels were left out; ``sums`` is ``[classes, channels]``."""
    seen = examples[: len(sums)] > 0
    means = sums[seen] / examples[: len(sums)][seen].unsqueeze(1)
    total = means.sum(0)
    order = total.argsort(stable=True)
    weak = order[total[order].cumsum(0) <= least * total.sum()]
    shares = means.amax(0) / total.masked_fill(total == 0, 1)
    shares[weak] = float("nan")
    return shares.masked_fill(total == 0, float("nan")), len(weak)


def _modules(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    named = dict(model.named_modules())
    if wanted is None:
        found = [name for name, module in named.items() if isinstance(module, nn.modules.conv._ConvNd)]
        if not found:
            raise EligibilityError("the model has no convolution; name the modules whose channels are meant with modules=")
        return found
    for name in wanted:
        if name not in named:
            raise EligibilityError(f"modules names {name!r}, which the model does not have; see model.named_modules()")
    return list(wanted)
