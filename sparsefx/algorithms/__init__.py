"""How masks move while a model trains. One method a file, composed of drop, growth, redistribution and a schedule."""

from __future__ import annotations

import difflib

from sparsefx.algorithms import scores
from sparsefx.algorithms.accelerated import ACCELERATED, Accelerated
from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.composed import Composed
from sparsefx.algorithms.deep_r import DEEP_R, DeepR
from sparsefx.algorithms.drop_back import DROP_BACK, DropBack
from sparsefx.algorithms.dynamic_reparameterization import DSR, DynamicReparameterization
from sparsefx.algorithms.gradual import GRADUAL, Gradual
from sparsefx.algorithms.grasp import GRASP, GraSP
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.magnitude import MAGNITUDE, Magnitude
from sparsefx.algorithms.rigl import RIGL, RigL
from sparsefx.algorithms.settings import Exploit, Settings
from sparsefx.algorithms.snip import SNIP, SNIP_SCORES
from sparsefx.algorithms.sparse_evolution import SET, SparseEvolution
from sparsefx.algorithms.sparse_momentum import SPARSE_MOMENTUM, SparseMomentum
from sparsefx.algorithms.sr_ste import SR_STE, SRSTE
from sparsefx.algorithms.start import Start
from sparsefx.algorithms.static import STATIC, STATIC_RANDOM, Static
from sparsefx.algorithms.synflow import SYNFLOW, SynFlow
from sparsefx.algorithms.top_kast import TOP_KAST, TopKAST
from sparsefx.errors import OptionError

ALGORITHMS: tuple[Algorithm, ...] = (
    MAGNITUDE,
    STATIC,
    STATIC_RANDOM,
    SPARSE_MOMENTUM,
    SET,
    RIGL,
    DSR,
    DEEP_R,
    TOP_KAST,
    SR_STE,
    ACCELERATED,
    SNIP_SCORES,
    GRASP,
    SYNFLOW,
    GRADUAL,
    DROP_BACK,
)


def find(name: str | Algorithm, *, others: tuple[str, ...] = ()) -> Algorithm:
    """The algorithm of this name; an Algorithm is given back as it is.

    Raises OptionError where there is none, with the names that are known, ``others`` among them.
    """
    if isinstance(name, Algorithm):
        return name
    by_name = {algorithm.name: algorithm for algorithm in ALGORITHMS}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    known = (*by_name, *others)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(
        f"algorithm {name!r} was given; expected one of {', '.join(known)}, or a sparsefx.algorithms.Algorithm{hint}"
    )


__all__ = [
    "ALGORITHMS",
    "SNIP",
    "SRSTE",
    "Accelerated",
    "Algorithm",
    "Composed",
    "DeepR",
    "DropBack",
    "DynamicReparameterization",
    "Exploit",
    "GraSP",
    "Gradual",
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
    "SynFlow",
    "TopKAST",
    "find",
    "scores",
]
