"""Steps of random networks beyond layers: recurrent ones, sums over places, other orders of channels, and ops over channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_builder import Builder


def recurrent(b: Builder) -> None:
    """A recurrent layer over the places of an image, read by what it returns at each place or by its last states."""
    source = b.one()
    channels, size = b.channels[source], b.sizes[source]
    if size > 4:
        return
    kind, deep, both, units = (nn.LSTM, nn.GRU, nn.RNN)[b.choose(3)], 1 + b.choose(2), bool(b.choose(2)), 5
    number = b.layer(kind(channels, units, deep, bias=bool(b.choose(3)), batch_first=True, bidirectional=both))
    out = units * (2 if both else 1)
    reads = b.choose(3)

    def run(net: Any, x: Tensor) -> Tensor:
        made, states = net.layers[number](x.flatten(2).transpose(1, 2))
        if reads == 0:
            last = states[0] if isinstance(states, tuple) else states
            added = last.unflatten(0, (deep, -1))[-1].transpose(0, 1).flatten(1)
            made = made * torch.sigmoid(added).unsqueeze(1)
        image: Tensor = made.transpose(1, 2).unflatten(2, (size, size))
        return image

    b.step(run, (source,), (out, size))


def places(b: Builder) -> None:
    """Places of an image as the channels of another layer, summed over beside channels that stand elsewhere."""
    source = b.one()
    if b.sizes[source] != 8:
        return
    number, kind = b.layer(nn.Linear(64, 64, bias=bool(b.choose(2)))), b.choose(2)

    def mix(net: Any, image: Tensor, x: Tensor) -> Tensor:
        other = torch.tanh(net.layers[number](image.flatten(2)))
        mixed = x.flatten(2) @ other.transpose(1, 2) if kind else torch.einsum("bcp,bdp->bcd", x.flatten(2), other)
        made: Tensor = x * torch.sigmoid(mixed.sum(2))[:, :, None, None]
        return made

    b.step(mix, (0, source), (b.channels[source], 8))


def odd(b: Builder) -> None:
    """Ops over channels, and one that has no rule."""
    source, kind = b.one(), b.choose(4)
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: torch.softmax(x, 1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: torch.cumsum(x, 1),
        torch.special.i0e,
    )
    chosen = functions[kind]
    b.step(lambda net, x: chosen(x), (source,), (b.channels[source], b.sizes[source]))


def _written(x: Tensor) -> Tensor:
    made = x.clone()
    made[:, 0] = 0.5
    made[:, -1:] *= 2
    return made


_REORDERED: tuple[tuple[Callable[[Tensor], Tensor], int], ...] = (
    (lambda x: x.flip(1), 1),
    (lambda x: x.roll(1, 1), 1),
    (lambda x: x.repeat_interleave(2, 1), 2),
    (lambda x: x.repeat(1, 2, 1, 1), 2),
    (lambda x: torch.stack((x, torch.sigmoid(x)), 2).flatten(1, 2), 2),
    (lambda x: torch.stack(x.unbind(1)[::-1], 1), 1),
    (lambda x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)), 1),
    (lambda x: torch.where(x > 0, x, torch.tanh(x) - 0.25), 1),
    (lambda x: x.masked_fill(x < -0.5, 0.25), 1),
    (lambda x: F.normalize(x, dim=1), 1),
    (lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-3), 1),
    (lambda x: x - x.amax((2, 3), keepdim=True), 1),
    (lambda x: x / (1 + x.abs().sum(1, keepdim=True)), 1),
    (lambda x: x.transpose(2, 3).contiguous(), 1),
    (lambda x: torch.addcmul(x, x, torch.sigmoid(x), value=0.5), 1),
    (lambda x: torch.lerp(x, torch.cos(x), 0.25), 1),
    (lambda x: torch.maximum(x, x.flip(2)), 1),
    (_written, 1),
)


def reordered(b: Builder) -> None:
    """Channels in another order, several times, written to, or measured by each other."""
    source = b.one()
    function, times = _REORDERED[b.choose(len(_REORDERED))]
    if times * b.channels[source] <= 24:
        b.step(lambda net, x: function(x), (source,), (times * b.channels[source], b.sizes[source]))
