"""How the weights that are to participate are divided among the layers, at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from sparsefx.algorithms.allocate import allocate, none_empty
from sparsefx.errors import OptionError
from sparsefx.machine import machine_multiple
from sparsefx.patterns import Channel, CoupledChannel, GlobalUnstructured, Pattern
from sparsefx.patterns.selection import largest, participating
from sparsefx.patterns.units import unit_scores, weights_per_unit
from sparsefx.step_densities import step_densities

Densities = str | Mapping[str, float]
_NAMES = ("uniform", "erk", "global", "steps")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A weight that becomes sparse: its names (of the layer and of the parameter), reduction axis, and first scores (magnitudes
    count)."""

    names: tuple[str, ...]
    reduction_axis: int
    scores: Tensor


def layer_densities(wanted: Densities, density: float, pattern: Pattern, layers: Sequence[Candidate]) -> list[float]:
    """The density of each layer.

    Args:
        wanted: ``"uniform"``: ``density`` for each. ``"erk"`` (Erdos-Renyi-Kernel, Evci et al. 2020): in proportion to the sum
            of a weight's sides over their product; layers that would be above 1 become dense, and the rest is solved again.
            ``"global"``: as one ranking of all scores would have it. ``"steps"``, for whole filters: so that the number of
            filters that is left is a multiple of what the machine computes in, see `step_densities`. A mapping from names or
            globs to densities: an exact name first, else the first glob that matches, else ``density``.
        density: share of all weights that participate. With ``erk`` and ``global`` the total is exact, wherever all units
            have one size.

    Raises:
        OptionError: an unknown name, one that matches no layer, or densities that the pattern does not leave free.
    """
    if wanted != "uniform" and pattern.fixed_density is not None:
        raise OptionError(
            f"densities={wanted!r} was given for pattern {pattern.name!r}, whose density is always {pattern.fixed_density:g}; "
            "leave it out, or choose a pattern with a free density such as 'unstructured'"
        )
    if isinstance(pattern, GlobalUnstructured):
        if wanted not in ("uniform", "global"):
            raise OptionError(
                f"densities={wanted!r} was given for pattern 'unstructured:global', where one threshold divides the weights "
                "among "
                "layers; leave it out, or use pattern 'unstructured'"
            )
        return [density] * len(layers)
    if isinstance(pattern, CoupledChannel) and wanted != "uniform":
        raise OptionError(
            f"densities={wanted!r} was given for pattern 'channel:coupled', where layers lose channels together; leave it out, "
            "or use pattern 'channel'"
        )
    if isinstance(wanted, Mapping):
        return _named(wanted, density, pattern, layers)
    if wanted == "uniform":
        return [density] * len(layers)
    if wanted == "erk":
        return _erdos_renyi(density, pattern, layers)
    if wanted == "global":
        return _global(density, pattern, layers)
    if wanted == "steps":
        return _steps(density, pattern, layers)
    close = get_close_matches(str(wanted), _NAMES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(
        f"densities={wanted!r} was given; expected {', '.join(map(repr, _NAMES))}, or a dict of layer names or globs to "
        f"densities{hint}"
    )


def _erdos_renyi(density: float, pattern: Pattern, layers: Sequence[Candidate]) -> list[float]:
    shapes = [tuple(layer.scores.shape) for layer in layers]
    sizes = [weights_per_unit(pattern, layer.scores.shape, layer.reduction_axis) for layer in layers]
    unit = sizes[0] if len(set(sizes)) == 1 else 1
    units = [layer.scores.numel() // unit for layer in layers]
    # At least one unit a layer, and the rest of the total in proportion.
    counts = allocate(participating(density, sum(units)), [float(sum(shape)) for shape in shapes], units)
    return [count / total for count, total in zip(none_empty(counts), units, strict=True)]


def _global(density: float, pattern: Pattern, layers: Sequence[Candidate]) -> list[float]:
    if isinstance(pattern, Channel):
        raise OptionError(
            "densities='global' was given for pattern 'channel', but filters of different layers differ in size and cannot be "
            "ranked together; use 'uniform', 'erk' or a dict"
        )
    scores = [unit_scores(pattern, layer.scores.abs(), layer.reduction_axis).reshape(-1).cpu().double() for layer in layers]
    chosen = largest(torch.cat(scores), participating(density, sum(score.numel() for score in scores)))
    counts = [int(part.sum()) for part in chosen.split([score.numel() for score in scores])]
    return [count / score.numel() for count, score in zip(none_empty(counts), scores, strict=True)]


def _steps(density: float, pattern: Pattern, layers: Sequence[Candidate]) -> list[float]:
    if not isinstance(pattern, Channel):
        raise OptionError(
            f"densities='steps' was given for pattern {pattern.name!r}, which does not empty filters; use pattern 'channel', or "
            "other densities"
        )
    sizes = [weights_per_unit(pattern, layer.scores.shape, layer.reduction_axis) for layer in layers]
    filters = [layer.scores.numel() // size for layer, size in zip(layers, sizes, strict=True)]
    return step_densities(density, filters, sizes, machine_multiple(layers[0].scores.device))


def _named(wanted: Mapping[str, float], density: float, pattern: Pattern, layers: Sequence[Candidate]) -> list[float]:
    for name in wanted:
        if not any(fnmatchcase(own, name) for layer in layers for own in layer.names):
            known = sorted({own for layer in layers for own in layer.names})
            close = get_close_matches(str(name), known, n=2)
            meant = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise OptionError(
                f"densities names {name!r}, which is no layer that becomes sparse; {meant}there are {', '.join(known[:4])}, ...; "
                "name one of these"
            )
    found: list[float] = []
    for layer in layers:
        exact = [value for name, value in wanted.items() if name in layer.names]
        globs = [value for name, value in wanted.items() if any(fnmatchcase(own, name) for own in layer.names)]
        found.append(pattern.resolve_density((exact or globs or [density])[0]))
    return found
