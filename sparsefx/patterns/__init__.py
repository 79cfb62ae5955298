"""Which masks a weight may have, and the best of them for given scores."""

from sparsefx.patterns.base import Pattern
from sparsefx.patterns.block import Block
from sparsefx.patterns.channel import Channel
from sparsefx.patterns.coupled_channel import CoupledChannel
from sparsefx.patterns.global_unstructured import GlobalUnstructured
from sparsefx.patterns.n_of_m import NOfM
from sparsefx.patterns.padded import Padded
from sparsefx.patterns.parse import parse
from sparsefx.patterns.transposable import Transposable
from sparsefx.patterns.unstructured import Unstructured

__all__ = [
    "Block",
    "Channel",
    "CoupledChannel",
    "GlobalUnstructured",
    "NOfM",
    "Padded",
    "Pattern",
    "Transposable",
    "Unstructured",
    "parse",
]
