"""The algorithms by name."""

from __future__ import annotations

import difflib

from sparsefx.algorithms.base import Algorithm, Exploit, Settings
from sparsefx.algorithms.magnitude import MAGNITUDE
from sparsefx.algorithms.static import STATIC
from sparsefx.errors import OptionError

ALGORITHMS: tuple[Algorithm, ...] = (MAGNITUDE, STATIC)


def find(name: str) -> Algorithm:
    """The algorithm of this name. Raises OptionError, which lists the known names, where there is none."""
    by_name = {algorithm.name: algorithm for algorithm in ALGORITHMS}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    close = difflib.get_close_matches(str(name), by_name, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(f"algorithm {name!r} was given; expected one of {', '.join(by_name)}{hint}")


__all__ = ["ALGORITHMS", "Algorithm", "Exploit", "Settings", "find"]
