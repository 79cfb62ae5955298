"""The masks that `sparsify` begins with: of an algorithm's scores, or of a one-shot method's look at calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import algorithms, one_shot
from sparsefx.algorithms import Algorithm, Start
from sparsefx.algorithms.at_start import AtStart
from sparsefx.capture.arguments import split_arguments
from sparsefx.capture.state import unchanged
from sparsefx.densities import Candidate, Densities, layer_densities
from sparsefx.errors import OptionError
from sparsefx.one_shot import OneShotMethod
from sparsefx.patterns import CoupledChannel, GlobalUnstructured, Pattern
from sparsefx.patterns.coupled_channel import Coupled
from sparsefx.report import LayerReport


@dataclass(frozen=True)
class Method:
    """What ``algorithm=`` stands for.

    Attributes:
        algorithm: how masks move.
        one_shot: how they and the weights are chosen from calibration batches, or None.
    """

    algorithm: Algorithm
    one_shot: OneShotMethod | None

    @property
    def name(self) -> str:
        """As the audit tells it."""
        return self.algorithm.name if self.one_shot is None else self.one_shot.name


@dataclass(frozen=True, eq=False)
class FirstMasks:
    """Masks for some weights.

    Attributes:
        masks: bool, one a weight, in its shape.
        densities: that each layer is to have in the end.
        undo: puts back weights that choosing has changed.
    """

    masks: Sequence[Tensor]
    densities: Sequence[float]
    undo: Callable[[], None]


def method_of(
    algorithm: str | Algorithm | OneShotMethod, pattern: Pattern, *, calibration: object, densities: Densities | None
) -> Method:
    """The method that a user named. Raises OptionError where there is none, or where it does not go with the other arguments."""
    calibrated = one_shot.find(algorithm)
    if isinstance(pattern, CoupledChannel):
        _expect_joint_choice(algorithm, calibrated)
    if isinstance(algorithm, OneShotMethod) or calibrated is not None:
        if densities is not None:
            raise OptionError(f"densities were given, and algorithm {algorithm!r} gives each layer the same; leave them out")
        return Method(algorithms.find("static"), calibrated)
    method = algorithms.find(algorithm, others=tuple(one_shot.ONE_SHOT_METHODS))
    if calibration is not None and not isinstance(method, AtStart):
        users = [one.name for one in algorithms.ALGORITHMS if isinstance(one, AtStart)] + list(one_shot.ONE_SHOT_METHODS)
        raise OptionError(f"calibration was given, and algorithm {method.name!r} uses none; {', '.join(users)} do. Leave it out")
    reason = method.refusal(pattern)
    if reason is not None:
        raise OptionError(f"algorithm {method.name!r} cannot be used with pattern {pattern.name!r}: {reason}")
    return Method(method, None)


def _expect_joint_choice(algorithm: str | Algorithm | OneShotMethod, calibrated: OneShotMethod | None) -> None:
    """Raise OptionError for a method that looks at one layer after another."""
    method = None if isinstance(algorithm, OneShotMethod) or calibrated is not None else algorithms.find(algorithm)
    if method is None or not method.chooses_together:
        name = algorithm if isinstance(algorithm, str) else getattr(algorithm, "name", type(algorithm).__name__)
        able = [one.name for one in algorithms.ALGORITHMS if one.chooses_together and one.refusal(CoupledChannel()) is None]
        raise OptionError(
            f"algorithm {name!r} cannot be used with pattern 'channel:coupled': it chooses the channels of each layer for "
            f"itself; use {', '.join(able)}, or pattern 'channel'"
        )


def first_masks(
    model: nn.Module,
    rows: Sequence[LayerReport],
    *,
    method: Method,
    pattern: Pattern,
    density: float,
    densities: Densities | None,
    calibration: Iterable[Any] | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    generator: torch.Generator | None,
    example_inputs: Any,
    coupled: Mapping[str, Coupled],
) -> FirstMasks:
    """Choose; see `sparsefx.sparsify` for the arguments, and `sparsefx.passes.analyze_eligibility.Analysis` for ``coupled``.

    Only a one-shot method changes weights, and ``undo`` puts them back.
    """
    names = [row.parameter for row in rows]
    if method.one_shot is not None:
        solution = one_shot.solve(model, names, pattern=pattern, density=density, method=method.one_shot, calibration=calibration)
        return FirstMasks(solution.masks, [density] * len(names), solution.undo)
    algorithm = method.algorithm
    scores = algorithm.first_scores(
        Start(
            model=model,
            names=names,
            weights=[model.get_parameter(name).detach() for name in names],
            density=density,
            generator=_apart(generator),
            calibration=calibration,
            loss_fn=loss_fn,
            inputs=None if example_inputs is None else split_arguments(example_inputs),
            unchanged=partial(unchanged, model, parameters=True),
        )
    )
    wanted = algorithm.default_densities(pattern) if densities is None else densities
    candidates = [
        Candidate((row.name, row.parameter), row.reduction_axis, score) for row, score in zip(rows, scores, strict=True)
    ]
    shares = layer_densities(wanted, density, pattern, candidates)
    first = [algorithm.first_density(share) for share in shares]
    return FirstMasks(_masks(pattern, first, candidates, [coupled.get(name) for name in names]), shares, lambda: None)


def _masks(
    pattern: Pattern, shares: Sequence[float], layers: Sequence[Candidate], coupled: Sequence[Coupled | None]
) -> list[Tensor]:
    members = [member for member in coupled if member is not None]
    if isinstance(pattern, CoupledChannel) and members:
        axes = [layer.reduction_axis for layer in layers]
        return pattern.choose([layer.scores for layer in layers], members, shares[0], axes)
    if isinstance(pattern, GlobalUnstructured):
        return pattern.masks([layer.scores for layer in layers], shares[0])
    return [
        pattern.mask(layer.scores, share, reduction_axis=layer.reduction_axis)
        for layer, share in zip(layers, shares, strict=True)
    ]


def _apart(generator: torch.Generator | None) -> torch.Generator:
    """A generator for the first masks. Growth often gets one of the same seed: it must not draw the very numbers again."""
    given = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=given)))
