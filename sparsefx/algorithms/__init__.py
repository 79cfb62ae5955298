"""How masks move while a model trains. One method a file, composed of drop, growth, redistribution and a schedule."""

from __future__ import annotations

import difflib

from sparsefx.algorithms import scores
from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.composed import Composed
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.magnitude import MAGNITUDE, Magnitude
from sparsefx.algorithms.rigl import RIGL, RigL
from sparsefx.algorithms.settings import Exploit, Settings
from sparsefx.algorithms.sparse_evolution import SET, SparseEvolution
from sparsefx.algorithms.sparse_momentum import SPARSE_MOMENTUM, SparseMomentum
from sparsefx.algorithms.start import Start
from sparsefx.algorithms.static import STATIC, STATIC_RANDOM, Static
from sparsefx.errors import OptionError

ALGORITHMS: tuple[Algorithm, ...] = (MAGNITUDE, STATIC, STATIC_RANDOM, SPARSE_MOMENTUM, SET, RIGL)


def find(name: str | Algorithm) -> Algorithm:
    """The algorithm of this name; an Algorithm is given back as it is. Raises OptionError, with the known names, where there is
    none."""
    if isinstance(name, Algorithm):
        return name
    by_name = {algorithm.name: algorithm for algorithm in ALGORITHMS}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    close = difflib.get_close_matches(str(name), by_name, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(
        f"algorithm {name!r} was given; expected one of {', '.join(by_name)}, or a sparsefx.algorithms.Algorithm{hint}"
    )


__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Composed",
    "Exploit",
    "Layer",
    "Magnitude",
    "RigL",
    "Run",
    "Settings",
    "SparseEvolution",
    "SparseMomentum",
    "Split",
    "Start",
    "Static",
    "find",
    "scores",
]
