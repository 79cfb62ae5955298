"""The numbers of channels that modules of torch.nn hold beside their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsefx.layers import known_base
from sparsefx.passes.channels.plan import Attribute

Shape = tuple[int, ...]
# How libraries name the number of heads where it does not end in "heads", and the channels of all heads.
_HEADS = frozenset(("n_head", "num_head", "nhead"))
_ALL_HEADS = frozenset(("all_head_size", "attn_dim", "attention_dim", "inner_dim", "inner_size", "split_size"))


def changed_attributes(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    after: Mapping[str, Shape],
    groups: Mapping[str, int],
    normalized: Mapping[str, int],
    heads: Sequence[tuple[str, tuple[int, int], int]],
) -> Iterator[Attribute]:
    """What the modules of a model have to hold after a cut.

    Args:
        model: before the cut.
        tensors: its parameters and buffers by first name.
        after: their shapes after the cut.
        groups: number of groups left in each grouped convolution, by the name of its weight.
        normalized: number of channels left in what each module of a normalization takes, by its path.
        heads: path of the module, number of heads before and after, and channels of a head, for each call of attention.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    for path, module in model.named_modules():
        shapes: dict[str, Shape] = {}
        for local_name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and id(tensor) in names:
                shapes[local_name] = after[names[id(tensor)]]
        weight = module._parameters.get("weight")
        left = groups.get(names.get(id(weight), ""))
        if path in normalized and "weight" not in shapes and isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            shapes["weight"] = (normalized[path],)
        for name, value in _numbers(module, shapes, left):
            before = getattr(module, name, None)
            if before is not None and before != value:
                yield Attribute(path, name, before, value)
    yield from _of_heads(model, heads)


def _of_heads(model: nn.Module, heads: Sequence[tuple[str, tuple[int, int], int]]) -> Iterator[Attribute]:
    """What modules of any library hold of their heads, by the names that are usual; the cut model is run and compared anyway."""
    modules = dict(model.named_modules(remove_duplicate=False))
    by_module: dict[str, dict[str, set[tuple[int, int]]]] = {}
    for path, (before, after), size in heads:
        if path not in modules:
            continue
        found = by_module.setdefault(path, {})
        for name, value in vars(modules[path]).items():
            if type(value) is int and value == before and (name.endswith("heads") or name in _HEADS):
                found.setdefault(name, set()).add((before, after))
            elif type(value) is int and value == before * size and name in _ALL_HEADS:
                found.setdefault(name, set()).add((before * size, after * size))
    for path, names in by_module.items():
        for name, counts in names.items():
            if len(counts) == 1 and (count := counts.pop())[0] != count[1]:
                yield Attribute(path, name, *count)


def changed_sizes(model: nn.Module, splits: Sequence[tuple[str, Shape, Shape]]) -> Iterator[Attribute]:
    """What modules of any library may hold of the parts that they take: all sizes as a list, else one of them, or their sum.

    A guess by value, for modules that do not run without it: the cut model is run and compared anyway.

    Args:
        model: before the cut.
        splits: path of the module, sizes of the parts before and after, of each place where parts are taken.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[str, str], set[Any]] = {}
    for path, before, after in splits:
        if path not in modules or before == after:
            continue
        held = {name: value for name, value in vars(modules[path]).items() if not name.startswith("_")}
        lists = [name for name, value in held.items() if type(value) in (list, tuple) and tuple(value) == before]
        for name in lists:
            found.setdefault((path, name), set()).add(after)
        if lists:
            continue
        for size, left in {*zip(before, after, strict=True), (sum(before), sum(after))}:
            for name, value in held.items():
                if type(value) is int and value == size:
                    found.setdefault((path, name), set()).add(left)
    for (path, name), values in found.items():
        before_it = getattr(modules[path], name)
        if len(values) == 1 and (after_it := values.pop()) != before_it:
            yield Attribute(path, name, before_it, list(after_it) if type(before_it) is list else after_it)


def _numbers(module: nn.Module, shapes: Mapping[str, Shape], groups: int | None) -> Iterator[tuple[str, Any]]:
    """Attributes as they follow from shapes, for the types of which they are known."""
    shape = shapes.get("weight")
    if isinstance(module, nn.modules.batchnorm._NormBase):
        lengths = [shapes[name][0] for name in ("weight", "running_mean") if name in shapes]
        if lengths:
            yield "num_features", lengths[0]
    if isinstance(module, nn.RNNBase) and "weight_ih_l0" in shapes:
        yield "input_size", shapes["weight_ih_l0"][1]
        if not module.proj_size:
            yield "hidden_size", shapes["weight_hh_l0"][1]
    if isinstance(module, nn.RNNCellBase) and "weight_ih" in shapes:
        yield from (("input_size", shapes["weight_ih"][1]), ("hidden_size", shapes["weight_hh"][1]))
    if shape is None:
        return
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        left = shape[0] if module.groups == module.in_channels and module.groups > 1 else module.groups
        yield from (("groups", left), ("in_channels", shape[0]), ("out_channels", shape[1] * left))
    elif isinstance(module, nn.modules.conv._ConvNd):
        depthwise = module.groups == module.in_channels == module.out_channels and module.groups > 1
        left = shape[0] if depthwise else groups if groups is not None else module.groups
        yield from (("groups", left), ("in_channels", shape[1] * left), ("out_channels", shape[0]))
    elif isinstance(module, nn.Linear):
        yield from (("out_features", shape[0]), ("in_features", shape[1]))
    elif isinstance(module, nn.GroupNorm):
        yield from (("num_groups", module.num_groups * shape[0] // module.num_channels), ("num_channels", shape[0]))
    elif isinstance(module, nn.Embedding):
        yield "embedding_dim", shape[1]
    elif isinstance(module, nn.PReLU):
        yield "num_parameters", shape[0]
    elif isinstance(module, nn.LayerNorm):
        yield "normalized_shape", shape
    elif known_base(module) is not None and type(module).__name__ == "Conv1D":
        yield from (("nx", shape[0]), ("nf", shape[1]))
