"""How long a weight stays correlated with its own past ("Advances in Sparse Neural Model Training", section 2, figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Coefficients below this are zero: what the transforms below leave of one that is exactly zero.
_ZERO = 1e-9
_CHUNK = 256


@dataclass(frozen=True)
class MagnitudeBin:
    """Weights of like magnitude at the end of a run.

    Attributes:
        magnitude: their median ``|w|`` at the end.
        time: the median of their decorrelation times, as a share of the run.
        count: how many there are.
    """

    magnitude: float
    time: float
    count: int


@dataclass(frozen=True)
class Decorrelation:
    """Decorrelation times of the followed weights of one layer.

    Attributes:
        name: of the parameter.
        times: share of the run after which each weight is uncorrelated with its past, float64 ``[weights]``; 1 where that never
            happens, NaN for weights that never changed.
        magnitudes: ``|w|`` at the end, ``[weights]``.
        resolution: share of the run between two looks that were kept; shorter times read as this.
        threshold: the smallest ``|w|`` that stays when the layer is pruned by magnitude; None where no density was given.
    """

    name: str
    times: Tensor
    magnitudes: Tensor
    resolution: float
    threshold: float | None = None

    def bins(self, count: int = 20) -> list[MagnitudeBin]:
        """The figure's points: weights ranked by final magnitude, in ``count`` groups of like size, with their medians."""
        return magnitude_bins(self.times, self.magnitudes, count)

    def medians(self) -> tuple[float, float]:
        """Median times of the weights that pruning removes, and of those that it keeps. NaN for a group without members."""
        if self.threshold is None:
            return float("nan"), median(self.times)
        kept = self.magnitudes >= self.threshold
        return median(self.times[~kept]), median(self.times[kept])


def correlations(series: Tensor) -> Tensor:
    """Pearson coefficients of time series with themselves, shifted.

    At lag ``k`` those of the windows ``w[0 .. n-k-1]`` and ``w[k .. n-1]``, each with its own mean and deviation, as the paper
    defines it (and not by one mean for all lags, as autocorrelation often is). A window that does not vary has coefficient 0.

    Args:
        series: ``[n, weights]``.

    Returns:
        float64 ``[n - 1, weights]``; row ``k`` is lag ``k``, from 0 to ``n - 2`` (shorter windows have no correlation).
    """
    if len(series) < 3:
        return torch.zeros(max(0, len(series) - 1), series.shape[1], dtype=torch.float64)
    return torch.cat([_correlations(part.double()) for part in series.split(_CHUNK, dim=1)], dim=1)


def _correlations(series: Tensor) -> Tensor:
    length = len(series)
    # Exactly, since sums tell a window that stands still from one that hardly moves by no more than rounding.
    leading = (series == series[:1]).to(torch.int64).cumprod(0).sum(0)
    trailing = (series == series[-1:]).flip(0).to(torch.int64).cumprod(0).sum(0)
    series = series - series.mean(0)  # takes nothing from the coefficients, and keeps the sums below small
    scale = series.abs().amax(0)
    series = series / scale.masked_fill(scale == 0, 1)
    # Products of all lags at once: the transform of the series, padded so that it does not meet its own other end.
    spectrum = torch.fft.rfft(series, n=2 * length, dim=0)
    products = torch.fft.irfft(spectrum.abs().square(), n=2 * length, dim=0)[: length - 1]
    counts = torch.arange(length, 1, -1, dtype=torch.float64).unsqueeze(1)
    sums, squares = series.cumsum(0), series.square().cumsum(0)
    first, first_squares = sums.flip(0)[:-1], squares.flip(0)[:-1]
    zero = torch.zeros_like(sums[:1])
    last = sums[-1] - torch.cat([zero, sums[:-2]])
    last_squares = squares[-1] - torch.cat([zero, squares[:-2]])
    covariance = products - first * last / counts
    spread = (first_squares - first.square() / counts).clamp_min(0) * (last_squares - last.square() / counts).clamp_min(0)
    # Variances that are nothing but rounding are those of windows that stand still.
    still = (spread <= (_ZERO * squares[-1]).square()) | (counts <= leading) | (counts <= trailing)
    return torch.where(still, 0.0, covariance / spread.masked_fill(still, 1).sqrt())


def decorrelation_lags(series: Tensor) -> Tensor:
    """The smallest lag at which a series is no longer positively correlated with itself.

    Args:
        series: ``[n, weights]``.

    Returns:
        float64 ``[weights]``, in rows of ``series``; ``n`` where that never happens, NaN where the series never changed.
    """
    reached = correlations(series) <= _ZERO
    lags = torch.where(reached.any(0), reached.to(torch.uint8).argmax(0), len(series)).double()
    still = (series == series[:1]).all(0)
    return lags.masked_fill(still, float("nan"))


def magnitude_bins(times: Tensor, magnitudes: Tensor, count: int) -> list[MagnitudeBin]:
    """Medians of ``times`` over groups of like size by rising magnitude. Weights without a time (NaN) are left out."""
    known = ~times.isnan()
    times, magnitudes = times[known], magnitudes[known]
    order = magnitudes.argsort(stable=True)
    found = [part for part in order.tensor_split(min(count, max(1, len(order)))) if len(part)]
    return [MagnitudeBin(median(magnitudes[part]), median(times[part]), len(part)) for part in found]


def median(values: Tensor | Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle; NaN are left out, and of nothing it is NaN."""
    found = torch.as_tensor(values, dtype=torch.float64)
    found = found[~found.isnan()]
    return float(found.quantile(0.5)) if len(found) else float("nan")
