"""Which layers a user means: names, globs, module types and predicates."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from sparsefx.errors import EligibilityError, OptionError

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Selection = Selector | Sequence[Selector] | None


def select(
    selection: Selection, layers: Mapping[str, Sequence[str]], modules: Mapping[str, nn.Module], option: str
) -> frozenset[str] | None:
    """Names of the layers that a selection means; None where there is no selection.

    Args:
        selection: one selector or a sequence of them; a layer is selected where any of them matches. A name or glob matches
            the layer, its parameter, or a module around it; a type matches a layer of that type or inside one; a predicate
            ``(name, module)`` is asked about the module that owns the weight.
        layers: the full names of the layer's parameter by layer name: several where it is tied.
        modules: all modules of the model by path.
        option: ``"include"`` or ``"exclude"``, for the errors.

    Raises:
        EligibilityError: a name or glob matches no layer.
        OptionError: something that is no selector.
    """
    if selection is None:
        return None
    selectors = list(selection) if isinstance(selection, (list, tuple, set, frozenset)) else [selection]
    chosen: set[str] = set()
    for selector in selectors:
        if isinstance(selector, str):
            found = {name for name, full in layers.items() if any(_matches(selector, name, one) for one in full)}
            if not found:
                raise EligibilityError(_nothing_matches(selector, layers, modules, option))
        elif isinstance(selector, type) and issubclass(selector, nn.Module):
            found = {name for name, full in layers.items() if any(_inside(selector, one, modules) for one in full)}
        elif not isinstance(selector, type) and callable(selector):
            found = {name for name, full in layers.items() if _asked(selector, name, modules[full[0].rpartition(".")[0]], option)}
        else:
            raise OptionError(
                f"{option} was given {selector!r}; expected a layer name, a glob, a module type, a predicate (name, module) -> "
                "bool, or a sequence of these"
            )
        chosen |= found
    return frozenset(chosen)


def _asked(predicate: Callable[[str, nn.Module], bool], name: str, module: nn.Module, option: str) -> bool:
    try:
        return bool(predicate(name, module))
    except Exception as error:
        raise OptionError(
            f"{option} was given a predicate that raised {type(error).__name__} for {name}: {error}; expected one that takes "
            "(name, module) and returns True or False"
        ) from error


def _matches(text: str, name: str, parameter: str) -> bool:
    if any(sign in text for sign in "*?["):
        layer = parameter.rpartition(".")[0]
        return any(fnmatch.fnmatchcase(one, text) for one in (name, parameter, layer))
    return text in (name, parameter) or parameter.startswith(f"{text}.")


def _inside(kind: type[nn.Module], parameter: str, modules: Mapping[str, nn.Module]) -> bool:
    path = parameter.rpartition(".")[0]
    while True:
        if isinstance(modules[path], kind):
            return True
        if not path:
            return False
        path = path.rpartition(".")[0]


def _nothing_matches(text: str, layers: Mapping[str, Sequence[str]], modules: Mapping[str, nn.Module], option: str) -> str:
    close = difflib.get_close_matches(text, [*layers, *(path for path in modules if path)], n=3, cutoff=0.5)
    hint = f"close to it: {', '.join(close)}" if close else f"the first layers are: {', '.join(list(layers)[:3]) or 'none'}"
    return f"{option} was given {text!r}, which matches no Linear or Conv layer; {hint}"
