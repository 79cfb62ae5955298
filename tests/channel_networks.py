"""Random networks with random empty filters, for tests and benchmarks of channel pruning.

A network is a list of steps over a list of tensors; every choice is made by a function from a number of options to one of
them, so that a property-based test can shrink what it found and a benchmark can go by a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_builder import Builder, Choose, Net
from tests.channel_steps import odd, places, recurrent, reordered

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    torch.sigmoid,
    F.softplus,
    F.hardsigmoid,
    F.gelu,
    torch.tanh,
    F.hardswish,
    torch.cos,
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: x + 0.5,
    lambda x: 1 - 0.25 * x,
    lambda x: torch.clamp(x, -0.5, 2.0),
    lambda x: F.elu(x - 0.25),
    lambda x: F.relu_(x * 1.0),
)


def _conv(b: Builder) -> None:
    source, out, size = b.one(), (2, 4, 6, 8)[b.choose(4)], 0
    kernel, padding, stride = (1, 3)[b.choose(2)], b.choose(2), 1 + (b.choose(4) == 3)
    size = (b.sizes[source] + 2 * padding - kernel) // stride + 1
    if size < 1:
        return
    mode = ("zeros", "zeros", "zeros", "replicate")[b.choose(4)]
    b.call(
        nn.Conv2d(b.channels[source], out, kernel, stride, padding, bias=bool(b.choose(2)), padding_mode=mode), source, out, size
    )


def _grouped(b: Builder) -> None:
    source = b.one()
    groups = 2 if b.channels[source] % 2 == 0 else 1
    out = groups * (1, 2, 4)[b.choose(3)]
    padding = b.choose(2)
    if b.sizes[source] < 3:
        return
    made = nn.Conv2d(b.channels[source], out, 3, padding=padding, groups=groups, bias=bool(b.choose(2)))
    b.call(made, source, out, b.sizes[source] - 2 + 2 * padding)


def _depthwise(b: Builder) -> None:
    source, padding, times = b.one(), b.choose(2), 1 + (b.choose(4) == 3)
    if b.sizes[source] < 3:
        return
    channels = b.channels[source]
    made = nn.Conv2d(channels, channels * times, 3, padding=padding, groups=channels, bias=bool(b.choose(2)))
    b.call(made, source, channels * times, b.sizes[source] - 2 + 2 * padding)


def _transposed(b: Builder) -> None:
    source, out = b.one(), (3, 4)[b.choose(2)]
    if b.sizes[source] > 8:
        return
    depthwise = b.choose(4) == 3
    out = b.channels[source] if depthwise else out
    made = nn.ConvTranspose2d(
        b.channels[source], out, 2, stride=2, bias=bool(b.choose(2)), groups=b.channels[source] if depthwise else 1
    )
    b.call(made, source, out, 2 * b.sizes[source])


def _norm(b: Builder) -> None:
    source, kind = b.one(), b.choose(6)
    channels, size = b.channels[source], b.sizes[source]
    made: nn.Module
    if kind <= 2:
        made = nn.BatchNorm2d(channels, affine=bool(b.choose(5)))
    elif kind == 3:
        made = nn.GroupNorm(2 if channels % 2 == 0 else 1, channels)
    elif kind == 4 and size > 1:
        made = nn.InstanceNorm2d(channels, affine=bool(b.choose(2)))
    else:
        number = b.layer(nn.LayerNorm(channels))
        b.step(lambda net, x: net.layers[number](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), (source,), (channels, size))
        return
    b.call(made, source, channels, size)


def _activation(b: Builder) -> None:
    source = b.one()
    function = _ACTIVATIONS[b.choose(len(_ACTIVATIONS))]
    if b.choose(8) == 7:
        b.call(nn.PReLU(b.channels[source]), source, b.channels[source], b.sizes[source])
        return
    b.step(lambda net, x: function(x), (source,), (b.channels[source], b.sizes[source]))


def _add(b: Builder) -> None:
    source = b.one()
    other = b.alike(source)
    sign = 1 - 2 * b.choose(2)
    b.step(lambda net, x, y: x + sign * y, (source, other), (b.channels[source], b.sizes[source]))


def _multiply(b: Builder) -> None:
    source = b.one()
    other = b.alike(source)
    gated = bool(b.choose(2))
    made = (b.channels[source], b.sizes[source])
    b.step(lambda net, x, y: x * torch.sigmoid(y) if gated else x * y, (source, other), made)


def _squeeze(b: Builder) -> None:
    source = b.one()
    channels = b.channels[source]
    down, up = b.layer(nn.Conv2d(channels, 2, 1)), b.layer(nn.Conv2d(2, channels, 1))

    def gate(net: Any, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(net.layers[up](F.relu(net.layers[down](pooled))))

    b.step(gate, (source,), (channels, b.sizes[source]))


def _scale(b: Builder) -> None:
    source = b.one()
    channels, size = b.channels[source], b.sizes[source]
    shapes = ((channels, 1, 1), (1, channels, 1, 1), (1, channels, size, size), (1, 1, size, size), (1,))
    number = b.scale(*shapes[b.choose(len(shapes))])
    if b.choose(2):
        b.step(lambda net, x: x * net.scales[number], (source,), (channels, size))
    else:
        b.step(lambda net, x: x + net.scales[number], (source,), (channels, size))


def _concatenate(b: Builder) -> None:
    source = b.one()
    fitting = [number for number in range(len(b.channels)) if b.sizes[number] == b.sizes[source]]
    other = fitting[b.choose(len(fitting))]
    if b.channels[source] + b.channels[other] > 16:
        return
    b.step(lambda net, x, y: torch.cat((x, y), 1), (source, other), (b.channels[source] + b.channels[other], b.sizes[source]))


def _split(b: Builder) -> None:
    source = b.one()
    channels, size = b.channels[source], b.sizes[source]
    if channels % 2:
        return
    kind, half = b.choose(3), channels // 2
    if kind == 0:
        b.step(lambda net, x: x.chunk(2, dim=1), (source,), (half, size), (half, size))
    elif kind == 1:
        b.step(lambda net, x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]), (source,), (half, size), (half, size))
    else:
        b.step(lambda net, x: (x[:, :1], x[:, 1:]), (source,), (1, size), (channels - 1, size))


def _shuffle(b: Builder) -> None:
    source = b.one()
    channels, size = b.channels[source], b.sizes[source]
    if channels % 2:
        return

    def shuffled(net: Any, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)

    baked = (2, channels // 2, size, size)
    if b.choose(3) == 0:
        b.step(lambda net, x: x.view(-1, *baked).transpose(1, 2).flatten(1, 2), (source,), (channels, size))
    elif b.choose(2):
        b.step(lambda net, x: F.channel_shuffle(x, 2), (source,), (channels, size))
    else:
        b.step(shuffled, (source,), (channels, size))


def _pixels(b: Builder) -> None:
    source = b.one()
    channels, size = b.channels[source], b.sizes[source]
    if channels % 4 == 0 and size <= 8 and b.choose(2):
        b.step(lambda net, x: F.pixel_shuffle(x, 2), (source,), (channels // 4, 2 * size))
    elif size % 2 == 0 and channels <= 4:
        b.step(lambda net, x: F.pixel_unshuffle(x, 2), (source,), (4 * channels, size // 2))


def _pool(b: Builder) -> None:
    source, kind = b.one(), b.choose(5)
    channels, size = b.channels[source], b.sizes[source]
    if size < 4:
        return
    pools: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda x: F.adaptive_avg_pool2d(x, 4),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="nearest"),
    )
    after = (((size - 1) // 2 + 1), ((size - 1) // 2 + 1), ((size - 1) // 2 + 1), 4, size // 2)[kind]
    chosen = pools[kind]
    b.step(lambda net, x: chosen(x), (source,), (channels, after))


def _pad(b: Builder) -> None:
    source, kind = b.one(), b.choose(3)
    channels, size = b.channels[source], b.sizes[source]
    if size > 8:
        return
    if kind == 0:
        b.step(lambda net, x: F.pad(x, (1, 1, 1, 1)), (source,), (channels, size + 2))
    elif kind == 1 and size > 1:
        b.step(lambda net, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), (source,), (channels, size + 2))
    else:
        b.step(lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 1)), (source,), (channels + 2, size))


def _shared(b: Builder) -> None:
    """A layer that was called already, once more on another tensor."""
    called = [module for module in b.net.layers if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)]
    if not called:
        return
    module = called[b.choose(len(called))]
    fitting = [number for number in range(len(b.channels)) if b.channels[number] == module.in_channels]
    if not fitting or module.stride != (1, 1):
        return
    source = fitting[b.choose(len(fitting))]
    number = next(number for number, layer in enumerate(b.net.layers) if layer is module)
    size = b.sizes[source] + 2 * int(module.padding[0])
    b.step(lambda net, x: net.layers[number](x), (source,), (module.out_channels, size))


def _attention(b: Builder) -> None:
    source = b.one()
    channels, size = b.channels[source], b.sizes[source]
    if size > 8:
        return
    inner = 8
    q, k, v = (b.layer(nn.Linear(channels, inner, bias=bool(b.choose(2)))) for _ in range(3))
    out = b.layer(nn.Linear(inner, channels))
    kind, heads, baked = b.choose(3), 2, b.choose(3) == 0

    def attend(net: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        shape = (x.shape[0], size * size, heads, inner // heads) if baked else (x.shape[0], size * size, -1, inner // heads)
        queries, keys, values = (net.layers[number](tokens).view(shape).transpose(1, 2) for number in (q, k, v))
        if kind == 0:
            mixed = F.scaled_dot_product_attention(queries, keys, values)
        elif kind == 1:
            mixed = torch.softmax(queries @ keys.transpose(-1, -2) / 2, -1) @ values
        else:
            scores = torch.softmax(torch.einsum("bhid,bhjd->bhij", queries, keys) / 2, -1)
            mixed = torch.einsum("bhij,bhjd->bhid", scores, values)
        made: Tensor = net.layers[out](mixed.transpose(1, 2).flatten(2))
        return made.transpose(1, 2).unflatten(2, (size, size))

    b.step(attend, (source,), (channels, size))


def _feed_forward(b: Builder) -> None:
    source = b.one()
    channels, size = b.channels[source], b.sizes[source]
    first, second = b.layer(nn.Linear(channels, 6, bias=bool(b.choose(2)))), b.layer(nn.Linear(3 if b.choose(2) else 6, channels))
    gated = b.net.layers[second].in_features == 3  # type: ignore[union-attr]

    def feed(net: Any, x: Tensor) -> Tensor:
        hidden = net.layers[first](x.permute(0, 2, 3, 1))
        if gated:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * F.silu(gate)
        else:
            hidden = F.gelu(hidden)
        made: Tensor = net.layers[second](hidden)
        return made.permute(0, 3, 1, 2)

    b.step(feed, (source,), (channels, size))


_STEPS: tuple[Callable[[Builder], None], ...] = (
    *(_conv, _conv, _conv, _grouped, _depthwise, _transposed, _norm, _norm, _activation, _activation, _add, _add, _multiply),
    *(_squeeze, _scale, _concatenate, _split, _shuffle, _pixels, _pool, _pad, _shared, _attention, _feed_forward, recurrent),
    *(places, odd, reordered, reordered),
)


def random_network(choose: Choose, *, longest: int = 14) -> tuple[Net, Tensor]:
    """A network in eval mode with random empty filters, biases and statistics, and an input for it.

    Args:
        choose: from a number of options to one of them, counted from 0.
        longest: largest number of steps.
    """
    b = Builder(choose)
    b.call(nn.Conv2d(4, 6, 3, padding=1, bias=bool(choose(2))), 0, 6, 8)
    for _ in range(2 + choose(longest - 1)):
        _STEPS[choose(len(_STEPS))](b)
    last = len(b.channels) - 1
    kind = choose(3)
    features = b.channels[last] * (b.sizes[last] ** 2 if kind else 1)
    if features > 1200:
        kind, features = 0, b.channels[last]
    hidden, head = b.layer(nn.Linear(features, 5)), b.layer(nn.Linear(5, 3))

    def classify(net: Any, x: Tensor) -> Tensor:
        flat = x.flatten(1) if kind else x.mean((2, 3))
        made: Tensor = net.layers[head](torch.tanh(net.layers[hidden](flat)))
        return made

    b.step(classify, (last,), (3, 1))
    b.net.outputs = [len(b.channels) - 1]
    if choose(4) == 3:
        b.net.outputs.append(1 + choose(len(b.channels) - 2))
    _randomize(b.net, choose)
    return b.net.eval(), torch.randn(2, 4, 8, 8)


@torch.no_grad()
def _randomize(net: Net, choose: Choose) -> None:
    """Random statistics and biases; empty filters, unread inputs and vanishing scales in some layers."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features) * choose(2))
            module.running_var.copy_(torch.rand(module.num_features) + 0.5)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)) and module.weight is not None:
            module.weight.copy_(torch.rand(module.weight.shape) + 0.5)
            module.bias.copy_(torch.randn(module.bias.shape) * choose(2))
            if choose(3) == 0:
                module.weight[torch.rand(module.weight.shape) < 0.5] = 0
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            if choose(4):
                module.weight.movedim(axis, 0)[torch.rand(module.weight.shape[axis]) < 0.5] = 0
            if choose(4) == 0:
                module.weight.movedim(1 - axis, 0)[torch.rand(module.weight.shape[1 - axis]) < 0.5] = 0
            if module.bias is not None and choose(3) == 0:
                module.bias.zero_()
        if isinstance(module, nn.RNNBase):
            _silence(module, choose)
    for scale in net.scales:
        if choose(3) == 0:
            scale[torch.rand(scale.shape) < 0.5] = 0


def _silence(module: nn.RNNBase, choose: Choose) -> None:
    """Units that nothing enters, or that nobody reads."""
    units = module.hidden_size
    for name, weight in module.named_parameters():
        # The cell gate of an LSTM and the new gate of a GRU stand third.
        entrance = 2 * units if weight.shape[0] > units else 0
        chosen = torch.arange(units)[: 1 + choose(units)]
        if choose(4):
            weight[entrance + chosen] = 0
        if name.startswith("weight_hh") and choose(3) == 0:
            weight[:, torch.rand(units) < 0.5] = 0
