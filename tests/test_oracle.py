"""The oracle of the exactness benchmark finds what can be removed, knowing nothing of ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.oracle import Oracle, Verdict
from benchmarks.oracle.replay import Recording
from benchmarks.oracle.written_down import NotWrittenDown, WrittenDown
from tests.channel_pruning import IMAGE, Around, empty


def _verdict(model: nn.Module, *shape: int) -> Verdict:
    torch.manual_seed(0)
    verdict = Oracle(model.eval(), (((torch.randn(shape),), {}), ((torch.randn(shape),), {})), 60.0).verdict()
    assert verdict.difference <= 1e-9
    return verdict


def _numbers(mask: Tensor) -> list[int]:
    found: list[int] = mask.nonzero().flatten().tolist()
    return found


def test_constants_and_dead_channels_can_go() -> None:
    model = Around(
        lambda m, x: m.last(torch.sigmoid(m.norm(m.first(x)))),
        first=nn.Conv2d(3, 6, 1),
        norm=nn.BatchNorm2d(6),
        last=nn.Conv2d(6, 4, 1),
    )
    empty(model.first.weight, 1, 2)  # type: ignore[arg-type, union-attr]
    empty(model.last.weight, 5, axis=1)  # type: ignore[arg-type, union-attr]
    verdict = _verdict(model, *IMAGE)
    assert _numbers(verdict.rows["first.weight"]) == [1, 2, 5]
    assert _numbers(verdict.columns["last.weight"]) == [1, 2, 5]
    assert verdict.removable == {"first.weight": 9, "last.weight": 12}
    assert not verdict.rows["last.weight"].any()


def test_a_residual_and_a_norm_over_channels_hold_what_they_add_and_measure() -> None:
    model = Around(
        lambda m, x: m.last(F.layer_norm(m.inner(m.first(x)), (5,)) + 0 * m.side(x)[..., :5] + m.skip(x)[..., :5]),
        first=nn.Linear(4, 6),
        inner=nn.Linear(6, 5),
        side=nn.Linear(4, 5),
        skip=nn.Linear(4, 5),
        last=nn.Linear(5, 2),
    )
    empty(model.first.weight, 0, 3)  # type: ignore[arg-type, union-attr]
    empty(model.inner.weight, 1)  # type: ignore[arg-type, union-attr]
    empty(model.skip.weight, 1)  # type: ignore[arg-type, union-attr]
    verdict = _verdict(model, 7, 4)
    assert _numbers(verdict.rows["first.weight"]) == [0, 3]
    assert not verdict.rows["inner.weight"].any()
    assert not verdict.rows["skip.weight"].any()
    assert verdict.rows["side.weight"].all()


def test_padding_and_groups() -> None:
    model = Around(
        lambda m, x: m.last(m.grouped(torch.relu(m.first(x)))),
        first=nn.Conv2d(3, 8, 1, bias=False),
        grouped=nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        last=nn.Conv2d(8, 2, 1),
    )
    empty(model.first.weight, 0, 1, 4)  # type: ignore[arg-type, union-attr]
    verdict = _verdict(model, *IMAGE)
    assert _numbers(verdict.rows["first.weight"]) == [0, 1, 4]
    # Of the two groups the second lost one input only.
    assert verdict.removable == {"first.weight": 6, "grouped.weight": 72, "last.weight": 0}


def test_channels_of_shuffles_and_heads_are_found_by_what_they_reach() -> None:
    def attend(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))  # type: ignore[operator]
        made: Tensor = m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[operator]
        return made

    model = Around(attend, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), out=nn.Linear(8, 3))
    empty(model.out.weight, 4, 5, 6, 7, axis=1)  # type: ignore[arg-type, union-attr]
    verdict = _verdict(model, 2, 5, 6)
    assert all(_numbers(verdict.rows[f"{name}.weight"]) == [4, 5, 6, 7] for name in "qkv")


def test_a_bare_column_has_one_output() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.column, self.last = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 1)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            read = self.first(x)
            made: Tensor = self.last(read * torch.sigmoid(read @ self.column))
            return made

    model = Pooled()
    empty(model.first.weight, 2)
    nn.init.zeros_(model.first.bias)
    verdict = _verdict(model, 5, 4)
    assert _numbers(verdict.rows["first.weight"]) == [2]
    assert verdict.removable == {"first.weight": 4, "column": 1, "last.weight": 2}


def _hides(m: nn.Module, x: Tensor) -> Tensor:
    # Of channel 0 both are below zero on whatever comes in here: each could be anything, but not both.
    q, k = torch.relu(m.q(x) / 10 - m.mark), torch.relu(m.k(x) / 10 - m.mark)  # type: ignore[operator]
    made: Tensor = m.out(q * k)  # type: ignore[operator]
    return made


def _hiding() -> nn.Module:
    model = Around(_hides, q=nn.Linear(6, 4), k=nn.Linear(6, 4), out=nn.Linear(4, 3))
    model.register_buffer("mark", torch.tensor([0.25, 0.0, 0.0, 0.0]))
    return model


def test_what_one_input_hides_and_another_would_not_stays() -> None:
    verdict = _verdict(_hiding(), 2000, 6)
    assert not any(verdict.rows[name].any() for name in ("q.weight", "k.weight"))


def test_of_two_that_hide_each_other_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.oracle.written_down.loosened", lambda made, *_: made)
    verdict = _verdict(_hiding(), 2000, 6)
    assert [_numbers(verdict.rows[name]) for name in ("q.weight", "k.weight")] in ([[0], []], [[], [0]])


class _Shortcut(nn.Module):
    """In-place ops, a slice written into, pooling, a norm over channels, a product of every place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=2)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.first(x))
        y = self.second(x)
        y[:, 2:4] += x[:, :2]
        x = F.adaptive_avg_pool2d(x + y, (2, 1)).flatten(2).transpose(1, 2)
        made: Tensor = self.last(self.norm(x))
        return made


@pytest.mark.parametrize("seed", range(3))
def test_ops_written_down_find_what_running_the_model_finds(seed: int) -> None:
    torch.manual_seed(seed)
    model = _Shortcut().eval()
    call = ((torch.randn(IMAGE),), {})
    written, recording = WrittenDown(model, call), Recording(model, call)
    assert [product.weight for product in written.products] == [product.weight for product in recording.products]
    generator = torch.Generator().manual_seed(seed)
    for name in ("first.weight", "second.weight", "last.weight"):
        rows = {name: torch.rand(model.get_parameter(name).shape[0], generator=generator) < 0.4}
        (one, reached), (other, expected) = written.disturb(rows), recording.disturb(rows)
        assert reached == expected
        nothing = [torch.zeros(len(product.columns), dtype=torch.bool) for product in written.products]
        filled = [[n if f is None else f for f, n in zip(found, nothing, strict=True)] for found in (one, other)]
        assert all(map(torch.equal, *filled))
        # What is not asked for is not looked at.
        assert written.disturb(rows, (nothing, False)) == ([None] * len(nothing), False)


def test_code_that_looks_at_values_is_not_written_down() -> None:
    model = Around(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
    with pytest.raises(NotWrittenDown):
        WrittenDown(model.eval(), ((torch.ones(3, 4),), {}))
    verdict = Oracle(model, (((torch.ones(3, 4),), {}), ((torch.ones(3, 4),), {})), 60.0).verdict()
    assert set(verdict.rows) == {"a.weight"}


def test_what_code_keeps_is_no_tensor_of_the_ops_that_were_written_down() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(4, 4), None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(4.0, device=x.device).clone()
                self.table[1] = 7
            made: Tensor = self.layer(x) + self.table
            return made

    model = Caching().eval()
    call = ((torch.randn(3, 4),), {})
    assert len(WrittenDown(model, call).products) == 1
    torch.testing.assert_close(model(*call[0]), model.layer(*call[0]) + torch.tensor([0.0, 7.0, 2.0, 3.0]))
