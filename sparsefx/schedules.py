"""Values that change over training, as plain functions of the step (1 is the first step)."""

from __future__ import annotations

import math
from collections.abc import Callable

from sparsefx.errors import OptionError

DensitySchedule = Callable[[int], float]


def constant(density: float) -> DensitySchedule:
    """The same density at every step. Raises OptionError for anything outside (0, 1]."""
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
        raise OptionError(f"density {density!r} was given; expected a number in (0, 1]")
    return lambda step: density


def density_at(schedule: DensitySchedule, step: int) -> float:
    """What ``schedule`` says of ``step``. Raises OptionError, with the cause, where it fails or says nothing."""
    try:
        density = schedule(step)
    except Exception as error:
        raise OptionError(
            f"density_schedule was asked for step {step} and raised {type(error).__name__}: {error}; expected a function that "
            "takes the step alone and returns a density in (0, 1], see sparsefx.schedules"
        ) from error
    if density is None:
        raise OptionError(f"density_schedule returned None for step {step}; expected a density in (0, 1]")
    return density


def cubic(start: float, end: float, *, first_step: int, last_step: int) -> DensitySchedule:
    """Density from ``start`` at ``first_step`` to ``end`` at ``last_step`` along a cube: fast at first, slow at the end.

    The schedule of gradual magnitude pruning (Zhu and Gupta 2018, equation 1), written for densities.

    Raises:
        OptionError: a density outside (0, 1], or an empty range of steps.
    """
    if not (0 < start <= 1 and 0 < end <= 1):
        raise OptionError(f"densities {start!r} to {end!r} were given; expected numbers in (0, 1]")
    if last_step <= first_step:
        raise OptionError(f"steps {first_step} to {last_step} were given; expected first_step < last_step")

    def density(step: int) -> float:
        left = 1 - min(max((step - first_step) / (last_step - first_step), 0.0), 1.0)
        return end + (start - end) * left**3

    return density


def cosine(start: float, end: float, *, first_step: int = 0, last_step: int) -> DensitySchedule:
    """From ``start`` at ``first_step`` to ``end`` at ``last_step`` along half a cosine: slow at first, and slow at the end.

    Raises:
        OptionError: a value outside [0, 1], or an empty range of steps.
    """
    progress = _progress(start, end, first_step, last_step)
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * progress(step))) / 2


def linear(start: float, end: float, *, first_step: int = 0, last_step: int) -> DensitySchedule:
    """From ``start`` at ``first_step`` to ``end`` at ``last_step`` along a line. Raises OptionError as `cosine` does."""
    progress = _progress(start, end, first_step, last_step)
    return lambda step: end + (start - end) * (1 - progress(step))


def _progress(start: float, end: float, first_step: int, last_step: int) -> Callable[[int], float]:
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise OptionError(f"values {start!r} to {end!r} were given; expected numbers from 0 to 1")
    if last_step <= first_step:
        raise OptionError(f"steps {first_step} to {last_step} were given; expected first_step < last_step")
    return lambda step: min(max((step - first_step) / (last_step - first_step), 0.0), 1.0)
