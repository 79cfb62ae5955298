"""Imports go one way, and each thing is imported under one name; read off the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each layer may import itself and those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "report", "html", "schedules", "data", "inputs", "atomic_file", "plain_tree", "machine", "shards"),
    ("patterns",),
    (
        "algorithms",
        "ops",
        "sparse_parameter",
        "coupled_records",
        "dormant_values",
        "sharded_records",
        "model_record",
        "checkpoint",
        "layers",
        "permutation",
        "densities",
        "step_densities",
        "loaded_densities",
    ),
    ("program", "capture", "verify", "follow", "runtime", "analysis", "one_shot", "first_masks"),
    ("passes",),
    (
        "api",
        "onnx_audit",
        "lottery",
        "mask_once",
        "pruning",
        "channel_order",
        "sparse_file",
        "narrow",
        "acceleration",
        "training_backend",
        "live_rows",
    ),
    ("", "cli", "integrations", "demo"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Files that were split off one of these, by how their names start.
SPLIT_OFF = {
    "report_": "report",
    "runtime_": "runtime",
    "demo_": "demo",
    "targets": "cli",
    "pruning_": "pruning",
    "weights_file": "api",
    "sparse_file_": "sparse_file",
    "narrow_": "narrow",
    "onnx_": "onnx_audit",
}


def _files() -> list[Path]:
    library = [path for path in (ROOT / "sparsefx").rglob("*.py") if "passes" not in path.relative_to(ROOT / "sparsefx").parts]
    return sorted([*library, *(ROOT / "passes").rglob("*.py")])


def _room(path: Path) -> str:
    """The name of the room that a file is in: ``capture`` for ``sparsefx/capture/state.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "passes":
        return "passes"
    return "" if parts[1] == "__init__" else parts[1]


def _rank(room: str) -> int:
    if room in RANK:
        return RANK[room]
    for start, origin in SPLIT_OFF.items():
        if room.startswith(start):
            return RANK[origin]
    raise AssertionError(f"sparsefx/{room} has no layer yet: add it to LAYERS")


def _imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, full module name, and whether the import stands at the top of the file."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write sparsefx.x"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}" if node.module == "sparsefx" else node.module
                yield node.lineno, name, node in top


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = _rank(_room(path))
    for line, name, _ in _imports(path):
        parts = name.split(".")
        if parts[0] == "sparsefx":
            room = parts[1] if len(parts) > 1 else ""
            known = room in RANK or (ROOT / "sparsefx" / room).exists() or (ROOT / "sparsefx" / f"{room}.py").exists()
            assert _rank(room if known else "") <= own, f"{path.relative_to(ROOT)}:{line} imports {name}, which stands above it"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_passes_have_one_name(path: Path) -> None:
    for line, name, _ in _imports(path):
        assert name.split(".")[0] != "passes", f"{path}:{line} imports passes; sparsefx.passes is the one name"


def test_the_passes_folder_is_reached_by_the_symlink() -> None:
    assert (ROOT / "sparsefx" / "passes").is_symlink()
    assert (ROOT / "sparsefx" / "passes").resolve() == ROOT / "passes"


def test_model_zoos_are_imported_only_where_a_user_names_one() -> None:
    zoos = {"torchvision", "timm", "transformers", "lightning", "matplotlib"}
    for path in _files():
        if path.parent.name == "integrations":
            continue  # a callback for a library is imported by those who use that library
        for line, name, at_top in _imports(path):
            optional = name.split(".")[0] in zoos
            assert not (optional and at_top), f"{path}:{line} imports {name} at the top; it is an optional dependency"


def test_files_stay_readable() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in _files() if (lines := len(path.read_text().splitlines())) > 500}
    assert long == {}
