"""What could be removed from a model without a change of its outputs, found by brute force and without looking at its graph.

Output channels of linear layers and convolutions are disturbed by hand, with every other such layer held at what it gave
before (with noise, where the ops of the model can be written down), so that a disturbance shows which inputs of which layers,
and which outputs of the model, it reaches: these channels can only go together. Where it reaches zero weights only, or where a
channel is a constant, it can go. In the end all channels that can go are filled with noise at once, constants put in where they
are read, and the outputs have to be as they were.

Groups of a convolution stay equally large. What it does not know: that code holds numbers of channels (heads of equal size), and
that one constant channel has to stay for a padded convolution. So it is an upper bound. Where three channels of a layer (of a
part of it) reach all that the whole reaches, the others are taken to do so too: that is its sampling.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.oracle.filling import Filling
from benchmarks.oracle.replay import Call, Product, Recording, TooLarge, ranges
from benchmarks.oracle.written_down import NotWrittenDown, WrittenDown

CONFIRMED = 1e-6
"""Largest difference of outputs that is none; parts of some models compute in float32."""
Probe = Generator[Tensor, Tensor, list["_Part"]]
"""Yields rows of a part to disturb (bool [K]), is sent what they reach (bool [targets]), returns smaller parts."""


@dataclass(frozen=True)
class _Part:
    """Channels of a layer, of which it is to be found out what each reaches.

    Attributes:
        name: of the weight.
        rows: of it.
        wanted: targets of which it is not known which of the rows reach them; bool [targets].
        extent: all that the rows may reach; bool [targets].
    """

    name: str
    rows: Tensor
    wanted: Tensor
    extent: Tensor


@dataclass(frozen=True)
class _Link:
    """Rows that reach targets: pair by pair, or all of them all."""

    rows: Tensor
    targets: Tensor
    pairs: bool


@dataclass(frozen=True)
class Verdict:
    """What can go.

    Attributes:
        rows, columns: by weight, which output and input channels can go; bool, shapes [K] and [groups * C].
        groups: of each weight, more than 1 for grouped convolutions.
        removable: values of each weight that go with them.
        difference: of the outputs with these channels filled with noise, relative to each output's largest value.
        confirmed: which of them were.
        runs: how often the model was run.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    groups: dict[str, int]
    removable: dict[str, int]
    difference: float
    confirmed: str
    runs: int


class Oracle:
    """Looks at one model.

    Args:
        model: in eval mode, with its empty filters; not changed.
        calls: two different arguments of it. The first is the one that it is disturbed on.
        seconds: of the processor's time, after which it gives up.

    Raises:
        TooLarge: by time or by memory.
    """

    def __init__(self, model: nn.Module, calls: tuple[Call, Call], seconds: float) -> None:
        self._deadline = time.process_time() + seconds
        self._model = model
        self._calls = calls
        products, self._ranges_in, self._ranges_out = ranges(model, calls)
        still = [self._ranges_out.constant(number) for number in range(len(products))]
        self._recording = _recorded(self._model, calls[0], still)
        self._products = self._recording.products
        parameters = dict(self._model.named_parameters())
        self._weights = {product.weight: parameters[product.weight].detach() for product in self._products}
        self._of = {product.weight: product for product in self._products}
        self._used = {name: _nonzero(self._weights[name], product) for name, product in self._of.items()}
        self._targets: dict[str, slice] = {}
        self._rows: dict[str, slice] = {}
        count = 1  # target 0 is the model's outputs
        for name, product in self._of.items():
            size = self._weights[name].shape[product.in_axis] * product.groups
            self._targets[name] = slice(count, count + size)
            count += size
        self._count = count
        for name, product in self._of.items():
            self._rows[name] = slice(count, count + self._weights[name].shape[product.out_axis])
            count += self._rows[name].stop - self._rows[name].start
        self._parent = torch.arange(count)
        self._reached = torch.zeros(self._count, dtype=torch.bool)
        self._links: list[_Link] = []
        self._runs = 1

    def verdict(self) -> Verdict:
        """Look, and make sure of it."""
        self._couple()
        observed = self._observe()
        constant = self._constants(observed)
        still = {name: constant[part.start : part.stop] for name, part in self._rows.items()}
        filling = Filling(self._model, self._calls[0])
        needed = self._needed(constant)
        rows, columns = self._free(needed)
        difference = filling.difference(rows, self._known(columns, constant))
        confirmed = "all"
        if difference > CONFIRMED:
            # Two constants that are multiplied, say zero by zero in attention, go well but give noise by noise.
            rows = {name: rows[name] & ~still[name] for name in rows}
            difference = filling.difference(rows, self._known(columns, constant))
            confirmed = "what is no constant"
        if difference > CONFIRMED:
            # So do two that are none, where each hides the other on this input: of such, one stays.
            needed = self._needed(constant, self._matters(rows, self._known(columns, constant), filling))
            rows, columns = self._free(needed)
            rows = {name: rows[name] & ~still[name] for name in rows}
            difference = filling.difference(rows, self._known(columns, constant))
            confirmed = "what is no constant, one kept of what hides each other"
        stays = self._filled(needed)
        removable = {name: self._removable(name, stays) for name in rows}
        runs = self._runs + filling.runs
        return Verdict(rows, columns, {n: p.groups for n, p in self._of.items()}, removable, difference, confirmed, runs)

    def _free(self, needed: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Which rows and columns can go when these classes stay."""
        return (
            {name: ~needed[self._parent[part.start : part.stop]] for name, part in self._rows.items()},
            {name: ~needed[self._parent[part.start : part.stop]] for name, part in self._targets.items()},
        )

    def _known(self, columns: Mapping[str, Tensor], constant: Tensor) -> dict[str, Tensor]:
        return {name: columns[name] & constant[part.start : part.stop] for name, part in self._targets.items()}

    def _matters(self, rows: Mapping[str, Tensor], known: Mapping[str, Tensor], filling: Filling) -> Tensor:
        """Classes that go alone but not with all others that go, found by halves; roots."""
        roots = torch.cat([self._parent[self._rows[name]][free] for name, free in rows.items()])
        pending = [roots.unique()]
        going = torch.zeros(len(self._parent), dtype=torch.bool)
        left = []
        while pending:
            if time.process_time() > self._deadline:
                raise TooLarge(f"not done after {self._runs + filling.runs} runs")
            tried = pending.pop()
            with_it = going.clone()
            with_it[tried] = True
            chosen = {name: free & with_it[self._parent[self._rows[name]]] for name, free in rows.items()}
            if filling.difference(chosen, known) <= CONFIRMED:
                going = with_it
            elif len(tried) == 1:
                left.append(tried)
            else:
                pending += tried.chunk(2)
        return torch.cat(left)

    # What reaches what.

    def _reach(self, rows: Mapping[str, Tensor], wanted: Tensor | None = None) -> Tensor:
        """Which targets (of those asked about) a disturbance reaches: outputs first, then inputs of weights; bool [targets]."""
        if time.process_time() > self._deadline:
            raise TooLarge(f"not done after {self._runs} runs")
        self._runs += 1
        if isinstance(self._recording, Recording):
            changed, outputs = self._recording.disturb(rows)
        else:
            asked = None if wanted is None else ([wanted[self._inputs(one)] for one in self._products], bool(wanted[0]))
            changed, outputs = self._recording.disturb(rows, asked)
        found = torch.zeros(self._count, dtype=torch.bool)
        found[0] = outputs
        for product, channels in zip(self._products, changed, strict=True):
            if channels is not None:
                found[self._inputs(product)] |= channels
        return found if wanted is None else found & wanted

    def _inputs(self, product: Product) -> slice:
        first = self._targets[product.weight].start + product.columns.start
        return slice(first, first + len(product.columns))

    def _couple(self) -> None:
        sizes = {name: part.stop - part.start for name, part in self._rows.items()}
        whole = {name: self._reach({name: torch.ones(size, dtype=torch.bool)}) for name, size in sizes.items()}
        for reached in whole.values():
            self._reached |= reached
        unique, index = self._by_bits({name: torch.arange(size) for name, size in sizes.items()})
        parts: list[_Part] = []
        for name, reached in whole.items():
            plain = reached & unique & (index < sizes[name])
            self._pair(self._rows[name].start + index[plain], plain.nonzero().flatten())
            left = reached & ~plain
            if left.any():
                parts.append(_Part(name, torch.arange(sizes[name]), left, reached))
        self._examine(parts)
        for name, product in self._of.items():
            if self._is_depthwise(product):
                size = sizes[name]
                column = torch.arange(size) // (size // product.groups)
                self._join(self._rows[name].start + torch.arange(size), self._targets[name].start + column)
        self._root(torch.arange(len(self._parent)))

    def _by_bits(self, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of each target, the one number of the channels that reach it, where all of them have the same number."""
        bits = max(1, max(int(number.max()) for number in numbers.values()).bit_length())
        unique, index = torch.ones(self._count, dtype=torch.bool), torch.zeros(self._count, dtype=torch.int64)
        for bit in range(bits):
            ones, zeros = (
                self._reach({name: (number >> bit & 1) == value for name, number in numbers.items()}) for value in (1, 0)
            )
            unique &= ones ^ zeros
            index += ones.long() << bit
        return unique, index

    def _split(self, part: _Part) -> Probe:
        """Each channel reaches the same, so that they go together, or there are two halves to be looked at."""
        name, rows, wanted = part.name, part.rows, part.wanted
        size = self._rows[name].stop - self._rows[name].start
        found = []
        for place in dict.fromkeys((0, len(rows) - 1, len(rows) // 3)):
            reached = (yield _mask(size, rows[place])) & wanted
            self._connect(name, rows[place], reached)
            found.append(reached)
            if not torch.equal(reached, wanted):
                break
        else:
            self._connect(name, rows, wanted)
            return []
        if len(rows) == 1:
            return []
        if int(found[-1].sum()) * len(rows) <= int(wanted.sum()):
            # Others stood in the way of numbers, other layers or the rest of this one; these alone may have them.
            unique, index = wanted.clone(), torch.zeros(self._count, dtype=torch.int64)
            for bit in range((len(rows) - 1).bit_length()):
                ones = yield _mask(size, rows[torch.arange(len(rows)) >> bit & 1 == 1])
                zeros = yield _mask(size, rows[torch.arange(len(rows)) >> bit & 1 == 0])
                unique &= ones ^ zeros
                index += ones.long() << bit
            self._pair(self._rows[name].start + rows[index[unique]], unique.nonzero().flatten())
            wanted = wanted & ~unique
            if not wanted.any():
                return []
        middle = _middle(int(rows[0]), int(rows[-1]))
        halves = []
        for half in (rows[rows < middle], rows[rows >= middle]):
            reached = yield _mask(size, half)
            if (reached & wanted).any():
                halves.append(_Part(name, half, reached & wanted, reached))
        return halves

    def _examine(self, parts: list[_Part]) -> None:
        """Split parts until each is known, those that reach different targets in the same run of the model."""
        active = [(part, probe, next(probe)) for part in parts for probe in (self._split(part),)]
        while active:
            chosen, later, taken = [], [], torch.zeros(self._count, dtype=torch.bool)
            for one in active:
                free = not (taken & one[0].extent).any()
                (chosen if free else later).append(one)
                if free:
                    taken |= one[0].extent
            rows: dict[str, Tensor] = {}
            for part, _, asked in chosen:
                rows[part.name] = rows[part.name] | asked if part.name in rows else asked
            reached = self._reach(rows, taken)
            active = []
            for part, probe, _ in chosen:
                try:
                    active.append((part, probe, probe.send(reached & part.extent)))
                except StopIteration as ended:
                    active += [(half, split, next(split)) for half in ended.value for split in (self._split(half),)]
            active += later

    def _connect(self, name: str, rows: Tensor, reached: Tensor) -> None:
        """Each of these rows reaches all of these targets."""
        targets = reached.nonzero().flatten()
        rows = self._rows[name].start + rows.reshape(-1)
        if len(targets):
            self._join(rows[0].expand(len(targets)), targets)
            self._join(rows[0].expand(len(rows)), rows)
            self._links.append(_Link(rows, targets, pairs=False))

    def _pair(self, rows: Tensor, targets: Tensor) -> None:
        """The first row reaches the first target, the second the second, and so on."""
        self._join(rows, targets)
        self._links.append(_Link(rows, targets, pairs=True))

    def _join(self, first: Tensor, second: Tensor) -> None:
        """Make one class of each pair."""
        while True:
            one, other = self._root(first), self._root(second)
            different = one != other
            if not different.any():
                return
            # Of several pairs with one larger root only one is written: the others are different in the next round.
            self._parent[torch.maximum(one, other)[different]] = torch.minimum(one, other)[different]

    def _root(self, members: Tensor) -> Tensor:
        """The smallest of each one's class, which is written down as its parent."""
        root = self._parent[members]
        while not torch.equal(root, above := self._parent[root]):
            root = above
        self._parent[members] = root
        return root

    # What is constant, and what is needed.

    def _observe(self) -> Tensor:
        """Which targets and rows had one value only, in float64, on both calls."""
        constant = torch.ones(len(self._parent), dtype=torch.bool)
        for number, product in enumerate(self._products):
            constant[self._inputs(product)] &= self._ranges_in.constant(number)
            first = self._rows[product.weight].start + product.rows.start
            constant[first : first + len(product.rows)] &= self._ranges_out.constant(number)
        return constant

    def _constants(self, observed: Tensor) -> Tensor:
        """Rows and targets that are constant whatever comes in, and not for what came in: computed from nothing else."""
        constant = torch.zeros(len(self._parent), dtype=torch.bool)
        while True:
            before = constant.clone()
            for name in self._rows:
                free = ~constant[self._targets[name].start : self._targets[name].stop]
                rows = self._rows[name]
                constant[rows.start : rows.stop] = ~self._reads(name, free) & observed[rows.start : rows.stop]
            moving = torch.zeros(len(self._parent), dtype=torch.bool)
            for link in self._links:
                free = ~constant[link.rows]
                if free.any():
                    moving[link.targets[free] if link.pairs else link.targets] = True
            targets = slice(1, self._count)
            constant[targets] = (observed & ~moving)[targets] & self._reached[targets]
            if torch.equal(before, constant):
                return constant

    def _reads(self, name: str, columns: Tensor) -> Tensor:
        """Which rows have a weight other than zero in one of these columns; bool [K]."""
        return (self._used[name] & self._expanded(name, columns)).any(1)

    def _expanded(self, name: str, columns: Tensor) -> Tensor:
        """The columns of each row's group; shape [K, C] or [1, C]."""
        groups = self._of[name].groups
        if groups == 1:
            return columns[None]
        rows = self._rows[name].stop - self._rows[name].start
        return columns.view(groups, -1).repeat_interleave(rows // groups, 0)

    def _is_depthwise(self, product: Product) -> bool:
        return product.groups > 1 and self._weights[product.weight].shape[1] == 1

    def _needed(self, constant: Tensor, also: Tensor | None = None) -> Tensor:
        """Which classes have to stay, by root."""
        needed = torch.zeros(len(self._parent), dtype=torch.bool)
        if also is not None:
            needed[also] = True
        needed[self._parent[0]] = True
        # What no layer reaches comes from the model's inputs or from elsewhere, and cannot be cut there.
        unreached = ~self._reached[1:]
        needed[self._parent[1 : self._count][unreached]] = True
        while True:
            before = needed.clone()
            for name, part in self._targets.items():
                rows = self._rows[name]
                wanted = needed[self._parent[rows.start : rows.stop]]
                used = self._used[name] & wanted[:, None]
                groups = self._of[name].groups
                read = used.view(groups, -1, used.shape[1]).any(1).flatten()
                read &= ~constant[part.start : part.stop]
                needed[self._parent[part.start : part.stop][read]] = True
            if torch.equal(before, needed):
                return needed

    def _filled(self, needed: Tensor) -> Tensor:
        """Which classes stay so that groups of convolutions are equally large: some that could go fill up the smaller ones."""
        stays = needed.clone()
        while True:
            before = stays.clone()
            for name, product in self._of.items():
                if product.groups == 1 or self._is_depthwise(product):
                    continue
                sides = [
                    self._parent[part.start : part.stop].view(product.groups, -1)
                    for part in (self._rows[name], self._targets[name])
                ]
                alive = (stays[sides[0]].any(1) | stays[sides[1]].any(1)).nonzero().flatten()
                for side in sides:
                    wanted = max(1, int(stays[side].sum(1).max()))
                    for group in alive:
                        for root in side[group]:
                            if int(stays[side[group]].sum()) >= wanted:
                                break
                            stays[root] = True
            if torch.equal(before, stays):
                return stays

    def _removable(self, name: str, stays: Tensor) -> int:
        """Values of a weight that go with its rows and columns; something of each stays."""
        weight, product = self._weights[name], self._of[name]
        rows, columns = (
            stays[self._parent[part.start : part.stop]].view(product.groups, -1)
            for part in (self._rows[name], self._targets[name])
        )
        if self._is_depthwise(product):
            left = max(1, int(rows.sum()))
        else:
            groups = max(1, int((rows.any(1) | columns.any(1)).sum()))
            left = groups * max(1, int(rows.sum(1).max())) * max(1, int(columns.sum(1).max()))
        return weight.numel() - left * (weight.numel() // (rows.numel() * weight.shape[product.in_axis]))


def _recorded(model: nn.Module, call: Call, still: Sequence[Tensor]) -> Recording | WrittenDown:
    try:
        return WrittenDown(model, call, still)
    except NotWrittenDown:
        return Recording(model, call)


def _nonzero(weight: Tensor, product: Product) -> Tensor:
    """Which inputs (of its group) each output has a weight other than zero for; bool [K, C]."""
    moved = weight.movedim((product.out_axis, product.in_axis), (0, 1))
    return (moved.reshape(*moved.shape[:2], -1) != 0).any(2)


def _middle(first: int, last: int) -> int:
    """The roundest number of the middle half: heads and groups begin at such."""
    low, high = first + max(1, (last - first) // 4), last - (last - first) // 4
    step = 1 << (high - low + 1).bit_length()
    while (found := -(-low // step) * step) > high:
        step //= 2
    return found


def _mask(size: int, rows: Tensor) -> Tensor:
    made = torch.zeros(size, dtype=torch.bool)
    made[rows] = True
    return made


__all__ = ["CONFIRMED", "Oracle", "TooLarge", "Verdict"]
