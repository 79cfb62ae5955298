"""What an object holds, through containers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def below(
    value: Any, *, passed_over: Collection[int] = (), contents: Callable[[Any], Iterable[Any] | None] = lambda item: None
) -> Iterator[Any]:
    """Everything at and below a value that is no container, each object once, in no particular order.

    Args:
        value: anything. Containers are dicts (keys and values), lists, tuples, sets, deques and dataclasses.
        passed_over: identities of objects that are not looked at.
        contents: what another object holds; None for one that is no container.
    """
    pending, seen = [value], set(passed_over)
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        held = contents(item)
        if held is not None:
            pending += held
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            pending += item
        elif is_dataclass(item) and not isinstance(item, type):
            pending += [getattr(item, one.name, None) for one in fields(item)]
        else:
            yield item
