"""Layers whose weight is 2:4 and compressed, for inference on Sparse Tensor Cores: Linear, and convolutions with 1 x 1 filters.

In memory the weight is in the order of one kernel on one kind of GPU; in a state_dict it is in the portable compressed form
(`sparsefx.ops.semi_structured`), as ``values`` and ``codes`` beside ``bias``. So a saved model loads on another kind of GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.errors import StateError
from sparsefx.ops.semi_structured import Compressed, compress, decompress
from sparsefx.ops.semi_structured_product import Operands, ProductKernel, semi_structured_linear

COMPRESSED = ("values", "codes")
SCALE = "scale"
_BYTE_MAX = 127.0


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and the factor of each row, symmetric: ``matrix ~ values * factors``. Zeros stay zeros.

    Args:
        matrix: ``[rows, columns]``, floating point and finite.

    Returns:
        int8 ``[rows, columns]``, and float32 ``[rows, 1]``, 1 for a row of zeros.
    """
    wide = matrix.to(torch.float32)
    largest = wide.abs().amax(dim=1, keepdim=True)
    factors = torch.where(largest > 0, largest / _BYTE_MAX, 1.0)
    return (wide / factors).round().clamp(-_BYTE_MAX, _BYTE_MAX).to(torch.int8), factors


class SemiStructuredLayer(nn.Module, ABC):
    """What both layers share: the packed weight, its product, saving and loading.

    The packed weight stands in the module as bytes, so that ``.half()`` and ``.to(dtype)`` do not change what is no number.
    """

    packed: Tensor
    metadata: Tensor
    scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, compressed: Compressed, scale: Tensor | None, bias: Tensor | None, kernel: ProductKernel, algorithm: int = 0
    ) -> None:
        """
        Args:
            compressed: the weight ``[outputs, inputs]``; int8 values where ``scale`` is given.
            scale: float32 ``[outputs]``, the factor of each row of an int8 weight: inputs are then quantized row by row as they
                come, and results are given in the inputs' dtype.
            bias: ``[outputs]`` in the dtype of the results.
            kernel: that does the product, on the device that the weight is on.
            algorithm: which variant of the kernel, see `ProductKernel.fastest_algorithm`.
        """
        super().__init__()
        self.out_features, self.in_features = compressed.values.shape[0], 2 * compressed.values.shape[1]
        self.weight_dtype, self.kernel, self.algorithm = compressed.values.dtype, kernel, algorithm
        operands = kernel.pack(decompress(compressed))
        self.metadata_dtype = operands.metadata.dtype
        self.register_buffer("packed", operands.packed.contiguous().view(torch.uint8), persistent=False)
        self.register_buffer("metadata", operands.metadata.contiguous().view(torch.uint8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @abstractmethod
    def forward(self, data: Tensor) -> Tensor:
        """What the dense layer computes."""

    def operands(self) -> Operands:
        """The packed weight in its dtypes; views of the buffers."""
        return Operands(self.packed.view(self.weight_dtype), self.metadata.view(self.metadata_dtype))

    def compressed(self) -> Compressed:
        """The weight in the portable form."""
        return compress(self.kernel.unpack(self.operands(), self.in_features))

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[outputs, inputs]``, computed anew at every access: to look at, not to run with."""
        dense = decompress(self.compressed())
        return dense if self.scale is None else dense * self.scale[:, None]

    def product(self, rows: Tensor) -> Tensor:
        """``rows [n, inputs]`` times the weight, plus the bias: ``[n, outputs]``."""
        packed, metadata = self.operands()
        if self.scale is None:
            if rows.dtype != self.weight_dtype and torch.is_autocast_enabled(rows.device.type):
                rows = rows.to(self.weight_dtype)
            return self._sums(rows, packed, metadata, self.bias)
        values, factors = quantize_rows(rows)
        result = self._sums(values, packed, metadata, None) * (factors * self.scale)
        return (result if self.bias is None else result + self.bias).to(rows.dtype)

    def _sums(self, rows: Tensor, packed: Tensor, metadata: Tensor, bias: Tensor | None) -> Tensor:
        sums: Tensor = semi_structured_linear(rows, packed, metadata, bias, self.out_features, self.kernel.name, self.algorithm)
        return sums

    def extra_repr(self) -> str:
        told = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{told}, {str(self.weight_dtype).removeprefix('torch.')} 2:4, kernel={self.kernel.name}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in zip(COMPRESSED, self.compressed(), strict=True):
            destination[prefix + name] = value
        if self.scale is not None:
            destination[prefix + SCALE] = self.scale

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + name for name in (*COMPRESSED, *(() if self.scale is None else (SCALE,)))}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        absent = [key for key in sorted(own) if key not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return
        compressed = Compressed(*(state_dict[prefix + name].to(self.packed.device) for name in COMPRESSED))
        expected = (self.out_features, self.in_features // 2)
        if tuple(compressed.values.shape) != expected or compressed.values.dtype != self.weight_dtype:
            error_msgs.append(
                f"{prefix}values has shape {tuple(compressed.values.shape)} and {compressed.values.dtype}, expected {expected}, "
                f"{self.weight_dtype}; load it into the model it was saved from"
            )
            return
        # Into the same memory, which a captured CUDA graph reads.
        operands = self.kernel.pack(decompress(compressed))
        self.packed.copy_(operands.packed.contiguous().view(torch.uint8))
        self.metadata.copy_(operands.metadata.contiguous().view(torch.uint8))
        if self.scale is not None:
            self.scale.copy_(state_dict[prefix + SCALE])


class SemiStructuredLinear(SemiStructuredLayer):
    """``nn.Linear`` with a compressed 2:4 weight. In: ``[..., inputs]``; out: ``[..., outputs]``."""

    def forward(self, data: Tensor) -> Tensor:
        return self.product(data.reshape(-1, self.in_features)).view(*data.shape[:-1], self.out_features)


class SemiStructuredPointwise(SemiStructuredLayer):
    """``nn.Conv2d`` with 1 x 1 filters, no padding and one group, as a matrix product over the channels.

    In: ``[N, inputs, H, W]``; out: ``[N, outputs, H', W']`` in channels_last, the layout in which this copies nothing (with a
    stride, the places that are read are copied).
    """

    stride: tuple[int, int] = (1, 1)

    def forward(self, data: Tensor) -> Tensor:
        if data.ndim != 4:
            raise StateError(f"a 1 x 1 convolution was given {tuple(data.shape)}; expected [N, {self.in_features}, H, W]")
        places = data[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        result = self.product(places.reshape(-1, self.in_features))
        return result.view(*places.shape[:-1], self.out_features).permute(0, 3, 1, 2)
