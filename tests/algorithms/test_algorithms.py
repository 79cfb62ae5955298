"""Settings, schedules and names of algorithms."""

from __future__ import annotations

import pytest

from sparsefx import algorithms, schedules
from sparsefx.algorithms.magnitude import MAGNITUDE, Magnitude
from sparsefx.algorithms.static import STATIC
from sparsefx.errors import OptionError


def test_the_defaults_are_the_papers() -> None:
    settings = MAGNITUDE.settings(100_000)
    assert (settings.rewire_every, settings.scale, settings.exploit, settings.reset_every) == (1, 1.0, "reset", 1000)
    assert (settings.fix_after, settings.decay) == (0.5, 2e-4)


@pytest.mark.parametrize(("total", "expected"), [(5, 1), (10, 1), (500, 50), (9_999, 999), (10_000, 1000), (10**6, 1000)])
def test_short_runs_reset_at_a_tenth(total: int, expected: int) -> None:
    assert MAGNITUDE.settings(total).reset_every == expected


def test_reset_zeroes_dormant_values_at_multiples_only() -> None:
    settings = Magnitude(exploit="reset", reset_every=4).settings(100)
    assert [settings.dormant_scale(step) for step in range(1, 9)] == [1, 1, 1, 0, 1, 1, 1, 0]
    assert all(settings.rewires(step) for step in range(1, 9))


def test_fix_stops_at_half_of_the_run() -> None:
    settings = Magnitude(exploit="fix").settings(10)
    assert [settings.rewires(step) for step in range(1, 11)] == [True] * 4 + [False] * 6
    assert [settings.dormant_scale(step) for step in range(1, 11)] == [1.0] * 4 + [0.0] * 6


def test_regularize_decays_at_every_step() -> None:
    settings = Magnitude(exploit="regularize", decay=0.25).settings(10)
    assert {settings.dormant_scale(step) for step in range(1, 11)} == {0.75}
    assert settings.rewires(7)


def test_rewiring_every_third_step() -> None:
    settings = Magnitude(rewire_every=3, exploit="none").settings(10)
    assert [step for step in range(1, 11) if settings.rewires(step)] == [3, 6, 9]


@pytest.mark.parametrize(
    "options",
    [
        {"rewire_every": 0},
        {"rewire_every": 1.5},
        {"rewire_every": True},
        {"scale": -0.1},
        {"scale": float("nan")},
        {"exploit": "explore"},
        {"exploit": "fix", "fix_after": 1.5},
        {"exploit": "regularize", "decay": -1},
        {"exploit": "fix", "reset_every": 5},
        {"decay": 0.1},
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="was given"):
        MAGNITUDE.with_options(dict(options))


@pytest.mark.parametrize("total", [0, -1, 2.0, None, True])
def test_total_steps_must_be_a_positive_integer(total: object) -> None:
    with pytest.raises(OptionError, match="total_steps"):
        MAGNITUDE.settings(total)  # type: ignore[arg-type]


def test_static_masks_take_no_option_of_moving_ones() -> None:
    assert not STATIC.moves
    with pytest.raises(OptionError, match="rewire_every"):
        STATIC.with_options({"rewire_every": 2})


def test_an_unknown_algorithm_is_named_with_a_close_one() -> None:
    assert algorithms.find("magnitude") is MAGNITUDE
    with pytest.raises(OptionError, match="did you mean 'magnitude'"):
        algorithms.find("magnitud")


def test_cubic_schedule_falls_from_start_to_end() -> None:
    density = schedules.cubic(1.0, 0.1, first_step=10, last_step=20)
    values = [density(step) for step in range(30)]
    assert values[:11] == [1.0] * 11
    assert values[20:] == [0.1] * 10
    assert values == sorted(values, reverse=True)
    assert density(15) == pytest.approx(0.1 + 0.9 * 0.125, abs=1e-12)
    with pytest.raises(OptionError):
        schedules.cubic(1.0, 0.0, first_step=1, last_step=2)
    with pytest.raises(OptionError):
        schedules.cubic(1.0, 0.5, first_step=2, last_step=2)
