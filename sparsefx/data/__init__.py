"""The small data set that ships with the package; see README.md in this folder for its source and licence."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from numpy.typing import NDArray


def digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Handwritten digits: 1 797 images by 13 writers, the test set of UCI's optical digits.

    Returns:
        Images, uint8 ``[1797, 8, 8]`` with values 0 to 16 (ink in each cell), and labels, uint8 ``[1797]`` with values
        0 to 9. The order is that of the source; both arrays are new on each call.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
    https://doi.org/10.24432/C50P49 (CC BY 4.0).
    """
    with files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]
