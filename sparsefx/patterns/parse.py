"""From the text a user writes to a Pattern."""

from __future__ import annotations

import re
from difflib import get_close_matches

from sparsefx.errors import PatternError
from sparsefx.patterns.base import Pattern
from sparsefx.patterns.block import Block
from sparsefx.patterns.channel import Channel
from sparsefx.patterns.coupled_channel import CoupledChannel
from sparsefx.patterns.global_unstructured import GlobalUnstructured
from sparsefx.patterns.n_of_m import NOfM
from sparsefx.patterns.padded import Padded
from sparsefx.patterns.transposable import Transposable
from sparsefx.patterns.unstructured import Unstructured

_EXAMPLES = (
    "2:4",
    "4:8",
    "1:4",
    "2:4-transposable",
    "2:4-padded",
    "4:8-transposable",
    "unstructured",
    "unstructured:global",
    "block:1x8",
    "block:4x4",
    "channel",
    "channel:coupled",
)
_N_OF_M = re.compile(r"(\d{1,3}):(\d{1,3})(?:(-transposable|[ -]2d)|(-padded)|[ -]1d)?")
_BLOCK = re.compile(r"block:(\d{1,6})x(\d{1,6})(?::norm=([0-9.e+]+))?")


def parse(text: str) -> Pattern:
    """The pattern that a text names.

    ``N:M`` and ``N:M-transposable`` with 1 <= N <= M <= 16 (also written ``N:M 1D`` and ``N:M 2D``), ``N:M-padded`` for weights
    whose inputs are no multiple of M, ``unstructured`` (per layer), ``unstructured:global`` (one threshold
    over all layers), ``block:RxC`` (R along the output axis, C along the reduction axis; ``block:1x8:norm=2`` ranks blocks by
    a p-norm), ``channel`` (whole filters) and ``channel:coupled`` (filters that can be cut out together).
    ``parse(pattern.name) == pattern`` for every pattern.

    Raises:
        PatternError: the text names no pattern, or one outside its range.
    """
    if not isinstance(text, str):
        raise PatternError(f"pattern {text!r} was given; expected a text such as '2:4' (or a sparsefx.patterns.Pattern)")
    cleaned = text.strip().lower()
    if cleaned == "unstructured":
        return Unstructured()
    if cleaned == "unstructured:global":
        return GlobalUnstructured()
    if cleaned == "channel":
        return Channel()
    if cleaned == "channel:coupled":
        return CoupledChannel()
    found = _N_OF_M.fullmatch(cleaned)
    if found:
        kind = Transposable if found[3] else Padded if found[4] else NOfM
        return kind(int(found[1]), int(found[2]))
    found = _BLOCK.fullmatch(cleaned)
    if found:
        return Block(int(found[1]), int(found[2]), _norm(found[3], text))
    raise _unknown(text)


def _norm(given: str | None, text: str) -> float:
    if given is None:
        return float("inf")
    try:
        return float(given)
    except ValueError:
        raise _unknown(text) from None


def _unknown(text: str) -> PatternError:
    close = get_close_matches(text.strip().lower(), _EXAMPLES, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(repr(name) for name in close)}? " if close else ""
    return PatternError(
        f"unknown pattern {text!r}; {meant}expected "
        "N:M, N:M-transposable, unstructured, unstructured:global, block:RxC, channel or channel:coupled"
    )
