"""All cases by library; a library that is not installed has none, and says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from benchmarks.zoo.case import Case


def _torchvision() -> list[Case]:
    from benchmarks.zoo.torchvision_models import torchvision_cases

    return torchvision_cases()


def _timm() -> list[Case]:
    from benchmarks.zoo.timm_models import timm_cases

    return timm_cases()


def _transformers() -> list[Case]:
    from benchmarks.zoo.transformers_models import transformers_cases

    return transformers_cases()


def _shipped() -> list[Case]:
    from benchmarks.zoo.shipped_models import shipped_cases

    return shipped_cases()


LIBRARIES: Mapping[str, Callable[[], list[Case]]] = {
    "shipped": _shipped,
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}


def cases(library: str) -> list[Case]:
    """The cases of one library; an empty list where it is not installed."""
    if library != "shipped" and find_spec(library) is None:
        return []
    return LIBRARIES[library]()


def find(full_name: str) -> Case:
    """The case with this ``library/name``, of the list or of those that can be drawn."""
    library, _, name = full_name.partition("/")
    for case in cases(library):
        if case.name == name:
            return case
    if library in ("timm", "transformers") and find_spec(library) is not None:
        from benchmarks.zoo.drawn_models import drawn_case

        drawn = drawn_case(library, name)
        if drawn is not None:
            return drawn
    raise KeyError(f"{full_name} is no case of the zoo; expected library/name, as coverage.py --list prints them")
