"""Original weights in a temporary file, so that a model can be put back without a second copy of it in memory."""

from __future__ import annotations

import tempfile
import weakref

import torch
from torch import Tensor

from sparsefx.errors import OptionError


class Originals:
    """Weights by name, on the disk. The file has no name and goes with this object, also where the process is killed.

    It lies in Python's folder for temporary files, which the environment variable TMPDIR moves; where that is in memory itself,
    nothing is gained.
    """

    def __init__(self) -> None:
        try:
            # Without a buffer, what a full disk did not take cannot be in the way of reading the rest.
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as this object
        except OSError as error:
            raise self._full(error, 0) from error
        weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def keep(self, name: str, weight: Tensor) -> None:
        """Write a weight down. Raises OptionError where there is no room."""
        data = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        try:
            place = self._file.seek(0, 2)
            left = data.numpy().data
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._full(error, data.numel()) from error
        self._places[name] = place, weight.dtype, weight.shape

    def restore(self, name: str, weight: Tensor) -> None:
        """Give ``weight`` the values that were kept under this name, in place; nothing where none were."""
        if name not in self._places or not weight.numel():
            return
        place, dtype, shape = self._places[name]
        self._file.seek(place)
        content = bytearray(shape.numel() * dtype.itemsize)
        left = memoryview(content)
        while read := self._file.readinto(left):
            left = left[read:]
        weight.detach().copy_(torch.frombuffer(content, dtype=dtype).reshape(shape))

    @staticmethod
    def _full(error: OSError, size: int) -> OptionError:
        return OptionError(
            f"the original weights, {size} bytes of the next layer, cannot be kept in {tempfile.gettempdir()}: "
            f"{error.strerror or error}; free some space there, or set TMPDIR to another folder"
        )
