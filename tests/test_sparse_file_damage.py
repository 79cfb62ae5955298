"""Files that are torn, foreign or forged, disks that are full, and models that refuse: all are told, and nothing is changed."""

from __future__ import annotations

import json
import os
import pickle
import stat
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import sparsefx
from sparsefx import atomic_file
from sparsefx.errors import OptionError, SparsefxError
from tests.test_sparse_file import assert_equal, everything, trained
from tests.training import small_net


def tiny(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "model"
    model = sparsefx.sparsify(tiny())
    runtime = sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=9)
    sparsefx.save(model, path, runtime=runtime, extra={"epoch": 1})
    return path.read_bytes()


def refused(content: bytes, folder: Path, suffix: str) -> str:
    """The message with which this content is refused, into a dense and into a sparse model, both of which stay."""
    path = folder / f"damaged{suffix}"
    path.write_bytes(content)
    told = ""
    for model in (tiny(seed=5), sparsefx.sparsify(tiny(seed=5))):
        before = everything(model)
        with pytest.raises(SparsefxError) as caught:
            sparsefx.load(model, path)
        assert_equal(before, everything(model))
        told = str(caught.value)
    return told


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.7, 0.999])
def test_a_truncated_file(whole: bytes, tmp_path: Path, share: float, suffix: str) -> None:
    assert "damaged" in refused(whole[: int(len(whole) * share)], tmp_path, suffix)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(whole: bytes, tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    flipped = bytearray(whole)
    flipped[place % len(whole)] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(flipped)
    model, saved = tiny(seed=5), tiny()
    before = everything(model)
    try:
        sparsefx.load(model, path)
    except SparsefxError:
        assert_equal(before, everything(model))
    else:  # the bit was in what nobody reads: the padding, or the key that other readers know the format by
        assert torch.equal(model[2].weight, sparsefx.sparsify(saved)[2].weight)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", pickle.dumps({"a": 1}), b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00echotR.", b"\x00" * 64],
    ids=range(5),
)
def test_a_foreign_file(content: bytes, tmp_path: Path) -> None:
    assert refused(content, tmp_path, ".bin")


def test_a_file_that_holds_code_runs_none(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(OptionError, match="cannot be read"):
        sparsefx.load(tiny(), tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_forged_description_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    size = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]
    description = json.loads(metadata["sparsefx"])
    for change in (
        {"version": 99},
        {"parameters": {"0.weight": {}}},
        {"parameters": 3},
        {"extra": {"call": "os.system"}},
        {"sums": {}},
    ):
        text = json.dumps({**description, **change})
        save_file(load_file(path), tmp_path / "forged", {"sparsefx": text, "sparsefx_sum": str(zlib.crc32(text.encode()))})
        assert refused((tmp_path / "forged").read_bytes(), tmp_path, "")


def test_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no file"):
        sparsefx.load(tiny(), tmp_path / "nothing")
    with pytest.raises(OptionError, match="damaged or no file"):
        sparsefx.load(tiny(), tmp_path)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_model_that_refuses_its_values_is_as_before(tmp_path: Path, sparse: bool) -> None:
    sparsefx.save(sparsefx.sparsify(small_net()), tmp_path / "model")
    model = sparsefx.sparsify(small_net(seed=5)) if sparse else small_net(seed=5)

    def refuse(module: nn.Module, keys: Any) -> None:
        raise RuntimeError("not today")

    handle = model.register_load_state_dict_post_hook(refuse)
    before = everything(model)
    with pytest.raises(OptionError, match="not today; it is as before"):
        sparsefx.load(model, tmp_path / "model")
    assert_equal(before, everything(model))
    handle.remove()
    sparsefx.load(model, tmp_path / "model")


def _no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_file_of_before_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    sparsefx.save(tiny(), path)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", _no_space)
        with pytest.raises(OptionError, match="No space left on device; free some space"):
            sparsefx.save(tiny(seed=3), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".model.part"
    left.mkdir()
    (left / "model").write_bytes(b"half")
    sparsefx.save(tiny(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_permissions_are_those_of_any_new_file_or_of_the_one_before(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    sparsefx.save(tiny(), tmp_path / "model")
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    (tmp_path / "model").chmod(0o640)
    sparsefx.save(tiny(), tmp_path / "model")
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("path", "text"), [("", "directory"), ("no/such/folder", "does not exist; create it first"), ("nul\0", "expected the path")]
)
def test_places_where_no_file_can_be(tmp_path: Path, path: str, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        atomic_file.replace_file(f"{tmp_path}/{path}", lambda made: made.touch())


@pytest.mark.parametrize(
    "extra",
    [{"optimizer": object()}, {"model": nn.Linear(1, 1)}, {"f": print}, {1.5: 1}, ["a"], {"meta": torch.ones(2, device="meta")}],
    ids=range(6),
)
def test_what_cannot_be_written_is_named(tmp_path: Path, extra: Any) -> None:
    with pytest.raises(OptionError, match=r"expected|materialise"):
        sparsefx.save(tiny(), tmp_path / "model", extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_saving_after_a_step_that_raised_keeps_dormant_values(tmp_path: Path) -> None:
    model, optimizer, _ = trained()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    expected = sparsefx.masks(model)
    optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    sparsefx.save(model, tmp_path / "model")
    again = small_net(seed=3)
    sparsefx.load(again, tmp_path / "model")
    for name, mask in sparsefx.masks(again).items():
        assert torch.equal(mask, expected[name])
        assert not again.get_parameter(name)[~mask].any()


def test_trees_keep_their_kinds(tmp_path: Path) -> None:
    extra = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "fused": None, "name": "a", "big": float("inf")}],
        "flags": torch.tensor([True, False, True]),
        "type": torch.bfloat16,
        "empty": torch.zeros(0, 3),
    }
    sparsefx.save(tiny(), tmp_path / "model", extra=extra)
    found = sparsefx.load(tiny(), tmp_path / "model").extra
    assert found["groups"] == extra["groups"]
    assert isinstance(found["groups"][0]["betas"], tuple)
    assert torch.equal(found["flags"], extra["flags"])
    assert torch.equal(found["state"][0]["exp_avg"], extra["state"][0]["exp_avg"])
    assert found["state"][0]["step"].shape == ()
    assert (found["type"], found["empty"].shape) == (torch.bfloat16, (0, 3))
