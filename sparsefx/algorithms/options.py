"""Checks of options, with one wording for all algorithms."""

from __future__ import annotations

from typing import Any, get_args

import torch

from sparsefx.errors import OptionError


def expect_steps(name: str, value: object) -> None:
    """Raise OptionError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}={value!r} was given; expected a whole number of steps, at least 1")


def expect_share(name: str, value: object) -> None:
    """Raise OptionError unless ``value`` is a number from 0 to 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise OptionError(f"{name}={value!r} was given; expected a number from 0 to 1")


def expect_not_negative(name: str, value: object) -> None:
    """Raise OptionError unless ``value`` is a finite number of at least 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise OptionError(f"{name}={value!r} was given; expected a number of at least 0")


def expect_one_of(name: str, value: object, literal: Any) -> None:
    """Raise OptionError unless ``value`` is one of the texts of a ``typing.Literal``."""
    if value not in get_args(literal):
        raise OptionError(f"{name}={value!r} was given; expected one of {', '.join(map(repr, get_args(literal)))}")


def expect_generator(value: object) -> None:
    """Raise OptionError unless ``value`` is None or a generator on the CPU."""
    if value is None or (isinstance(value, torch.Generator) and value.device.type == "cpu"):
        return
    given = f"a generator on {value.device}" if isinstance(value, torch.Generator) else repr(value)
    raise OptionError(f"generator={given} was given; expected a torch.Generator() on the CPU, or None for one with seed 0")
