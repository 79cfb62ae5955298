"""The data set that ships with the package."""

from __future__ import annotations

import numpy as np

from sparsefx.data import digits


def test_digits_have_the_published_shape_range_and_class_counts() -> None:
    images, labels = digits()
    assert images.shape == (1797, 8, 8)
    assert labels.shape == (1797,)
    assert images.dtype == labels.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert labels[:10].tolist() == list(range(10))


def test_each_call_gives_arrays_of_its_own() -> None:
    first, _ = digits()
    first[:] = 0
    assert digits()[0].max() == 16
