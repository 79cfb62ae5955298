"""The nets and data of the claims."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsefx.data import digits
from sparsefx.demo import small_net


class Data(NamedTuple):
    """Normalised images ``[N, C, H, W]`` and labels, to train on and to test on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = inputs == width and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        made: Tensor = self.relu2(inner + self.short(x))
        return made


def build(net: str) -> nn.Module:
    """A fresh net; the global random state decides its weights."""
    if net == "conv":
        return small_net()
    if net == "lenet300":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    if net == "resnet8":  # small enough for one core: it halves the image at once, and its layout is the faster one there
        return _residual(((16, 1), (32, 2), (64, 2)), stride=2).to(memory_format=torch.channels_last)
    return _residual(((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)), stride=1)


def _residual(widths: Sequence[tuple[int, int]], stride: int) -> nn.Module:
    """Blocks of these widths and strides behind a first convolution of 16 channels and the stride given."""
    blocks, inputs = [], 16
    for width, step in widths:
        blocks.append(Block(inputs, width, step))
        inputs = width
    start = [nn.Conv2d(3, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*start, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def load(name: str, folder: Path | None) -> Data:
    """The shipped digits, or MNIST or CIFAR-10 from a folder: see `find`."""
    if name == "digits":
        return _digits()
    if folder is None:
        raise FileNotFoundError(f"{name} needs --data FOLDER")
    return _mnist(folder) if name == "mnist" else _cifar10(folder)


def find(name: str, folder: Path | None) -> bool:
    """Whether a folder holds a data set: as files of the original names (``mnist-`` may stand before them), or as torchvision
    keeps it; CIFAR-10 also as ``cifar10_*.npz``."""
    if folder is None:
        return False
    if name == "mnist":
        return _mnist_file(folder, "train-images-idx3-ubyte") is not None
    return (folder / "cifar-10-batches-py").is_dir() or (folder / "cifar10_train_lossless_1.npz").exists()


def _digits() -> Data:
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1797))
    pixels = (torch.from_numpy(images).float() / 8 - 1).unsqueeze(1)[order]
    classes = torch.from_numpy(labels).long()[order]
    return Data(pixels[:1200], classes[:1200], pixels[1200:], classes[1200:])


def _mnist_file(folder: Path, name: str) -> Path | None:
    places = [folder / f"mnist-{name}.gz", folder / f"{name}.gz", folder / name, folder / "MNIST" / "raw" / name]
    return next((place for place in places if place.exists()), None)


def _mnist(folder: Path) -> Data:
    def read(name: str) -> Tensor:
        path = _mnist_file(folder, name)
        if path is None:
            raise FileNotFoundError(f"{folder} holds no {name}")
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = [int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(raw[3])]
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())

    def images(name: str) -> Tensor:
        return ((read(name).float() / 255 - 0.1307) / 0.3081).unsqueeze(1)

    train_x, train_y = images("train-images-idx3-ubyte"), read("train-labels-idx1-ubyte").long()
    # As the article's code does: a tenth is held out, and left alone here.
    return Data(train_x[:54_000], train_y[:54_000], images("t10k-images-idx3-ubyte"), read("t10k-labels-idx1-ubyte").long())


@lru_cache(maxsize=1)  # unpacking takes longer than an epoch of a small net, and a worker makes many runs
def _cifar10(folder: Path) -> Data:
    """The 45 000 first training images, and as the test the 5 000 others, which no net here is trained on."""
    if (folder / "cifar-10-batches-py").is_dir():
        from torchvision.datasets import CIFAR10

        found = CIFAR10(str(folder), train=True)
        pixels, labels = torch.from_numpy(found.data), torch.tensor(found.targets)
    else:
        parts = [_packed_cifar10(folder / f"cifar10_train_lossless_{number}.npz") for number in range(1, 6)]
        pixels, labels = (torch.from_numpy(np.concatenate(list(part))) for part in zip(*parts, strict=True))
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / deviation
    return Data(images[:45_000], labels[:45_000], images[45_000:], labels[45_000:])


def _packed_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[N, 32, 32, 3]`` and labels of a file that holds differences between neighbours and colours, LZMA-packed."""
    with np.load(path) as file:
        raw = np.frombuffer(lzma.decompress(file["z"].tobytes()), np.uint8).reshape(3, -1, 32, 32)
        labels = file["labels"].astype(np.int64)
    green, red, blue = np.cumsum(np.cumsum(raw, axis=3, dtype=np.uint8), axis=2, dtype=np.uint8)
    return np.stack([red + green, green, blue + green], axis=3), labels


def augmented(name: str, images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch as it is trained on: CIFAR-10 shifted by up to four pixels and mirrored, one draw a batch."""
    if name != "cifar10":
        return images
    dx, dy, mirror = torch.randint(0, 9, (3,), generator=generator).tolist()
    shifted = functional.pad(images, (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]
    return shifted.flip(3) if mirror % 2 else shifted
