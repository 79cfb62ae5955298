"""What 3 x 3 convolutions on Sparse Tensor Cores could gain, estimated from published figures; nothing is run.

A roofline: a layer takes the longer of its arithmetic at the peak rate and its bytes at the peak bandwidth. Both rates are scaled
by the share of the peak that dense kernels reach in practice. With 2:4 weights the arithmetic runs at twice the rate and the
weights take 9/16 of their bytes; inputs and outputs stay. Peaks are those of NVIDIA's data sheets (dense bfloat16; SXM parts).

    python benchmarks/cuda/sparse_convolution_estimate.py [--batch 64] [--efficiency 0.75]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

BYTES = 2


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU: dense bfloat16 operations and bytes a second."""

    name: str
    operations: float
    bandwidth: float


DEVICES = (Device("A100 80GB", 312e12, 2.039e12), Device("H100", 989e12, 3.35e12), Device("H200", 989e12, 4.8e12))


@dataclass(frozen=True)
class Layer:
    """``count`` equal convolutions: channels in and out, width of the square output, stride, filter."""

    channels: int
    outputs: int
    side: int
    stride: int
    filter: int
    count: int

    def operations(self, batch: int) -> float:
        return 2.0 * batch * self.side**2 * self.outputs * self.channels * self.filter**2

    def seconds(
        self, device: Device, batch: int, efficiency: float, *, sparse: bool, speed: float = 2.0, unfolded: bool = False
    ) -> float:
        """The longer of arithmetic and memory, of one of them; ``unfolded``: every patch is written out first and read again."""
        places = batch * self.side**2
        weights = self.outputs * self.channels * self.filter**2 * (9 / 16 if sparse else 1)
        # A 1 x 1 filter with a stride reads the places that it uses.
        read = places * self.channels * (self.stride**2 if self.filter > 1 else 1)
        data = read + places * self.outputs + (2 * places * self.channels * self.filter**2 if unfolded else 0)
        arithmetic = self.operations(batch) / device.operations / (speed if sparse else 1.0)
        return max(arithmetic, BYTES * (weights + data) / device.bandwidth) / efficiency


def resnet50() -> list[Layer]:
    """All convolutions of torchvision's ResNet-50 at 224 x 224 but the first, equal ones together."""
    layers = []
    for width, side, blocks in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        first, stride = (64, 1) if width == 64 else (2 * width, 2)
        layers += [
            Layer(first, width, side * stride, 1, 1, 1),
            Layer(4 * width, width, side, 1, 1, blocks - 1),
            Layer(width, width, side, stride, 3, 1),
            Layer(width, width, side, 1, 3, blocks - 1),
            Layer(width, 4 * width, side, 1, 1, blocks),
            Layer(first, 4 * width, side, stride, 1, 1),
        ]
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--efficiency", type=float, default=0.75, help="share of the peaks that kernels reach")
    options = parser.parse_args()
    batch, efficiency = options.batch, options.efficiency
    print(f"ESTIMATE from data sheets, not measured: batch {batch}, bfloat16, {efficiency:.0%} of the peaks, 224 x 224")
    for device in DEVICES:
        estimate(device, resnet50(), batch, efficiency)


def estimate(device: Device, layers: list[Layer], batch: int, efficiency: float) -> None:
    """Print each 3 x 3 layer, and what that makes of the network."""
    balance = device.operations / device.bandwidth
    print(f"\n{device.name}: {device.operations / 1e12:.0f} TFLOP/s dense, {device.bandwidth / 1e12:.2f} TB/s,", end=" ")
    print(f"balanced at {balance:.0f} operations a byte")
    total = {"twice": 0.0, "1.5 times": 0.0, "twice (after im2col)": 0.0}
    whole = conv = 0.0
    for layer in layers:
        dense = layer.seconds(device, batch, efficiency, sparse=False)
        whole += dense * layer.count
        if layer.filter != 3:
            continue
        sparse = layer.seconds(device, batch, efficiency, sparse=True)
        arithmetic = layer.operations(batch) / device.operations / 2 / efficiency
        conv += dense * layer.count
        total["twice"] += sparse * layer.count
        total["1.5 times"] += layer.seconds(device, batch, efficiency, sparse=True, speed=1.5) * layer.count
        copied = layer.seconds(device, batch, efficiency, sparse=True, unfolded=True)
        total["twice (after im2col)"] += copied * layer.count
        shape = f"{layer.count} x 3x3 {layer.channels:3d} -> {layer.outputs:3d} at {layer.side:2d}, stride {layer.stride}"
        bound = "memory" if sparse > 1.001 * arithmetic else "arithmetic"
        print(f"  {shape}: dense {1e6 * dense:6.1f} us, sparse {1e6 * sparse:6.1f} us, {dense / sparse:.2f}x (bound by {bound})")
    for speed, seconds in total.items():
        network = whole / (whole - conv + seconds)
        print(f"  at {speed} the dense rate: 3x3 layers {conv / seconds:.2f}x, all convolutions {network:.2f}x", end=" ")
        print(f"(3x3 are {conv / whole:.0%} of their time)")


if __name__ == "__main__":
    main()
