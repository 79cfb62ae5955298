"""The code of every document, run as it stands: one process a document, in an empty folder, on a small model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from sparsefx.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NEEDS = {"tutorial_trainers.md": ("transformers", "accelerate", "lightning")}
# Documents that speak of "your model" are given one.
_MODEL = """
import torch
import sparsefx
torch.manual_seed(0)
def build_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
model, x, steps = build_model(), torch.randn(4, 32), 30
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
loader = [(torch.randn(4, 32), torch.randn(4, 16)) for _ in range(4)]
"""
BEFORE = {
    "README.md": _MODEL,
    "add_your_own.md": _MODEL,
    "guide.md": _MODEL + "sparsefx.sparsify(model)\nruntime = sparsefx.attach(model, optimizer, total_steps=steps)\n",
    "pruning.md": _MODEL + "example_inputs = x\nwith torch.no_grad():\n    model[0].weight[::2] = 0\n",
    "deployment.md": _MODEL
    + "calibration_loader = [torch.randn(4, 32) for _ in range(4)]\nloader, batch = calibration_loader, x\n"
    + "weight, dense = torch.randn(16, 32), build_model()\n",
}
# A search takes as long as it is told.
FASTER = {"seconds=10": "seconds=0.1"}


def _blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if _blocks(one, "python")], ids=lambda document: document.name)
def test_the_code_of_a_document_runs(document: Path, tmp_path: Path) -> None:
    for library in NEEDS.get(document.name, ()):
        pytest.importorskip(library, reason=f"{library} is not installed")
    program = tmp_path / "program.py"
    text = BEFORE.get(document.name, "") + "\n".join(_blocks(document, "python"))
    for slow, fast in FASTER.items():
        text = text.replace(slow, fast)
    program.write_text(text)
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def _commands() -> list[str]:
    lines = [line for document in DOCUMENTS for block in _blocks(document, "sh") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("sparsefx ")})


@pytest.mark.parametrize("line", _commands())
def test_a_documented_command_is_understood(line: str) -> None:
    group: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line, comments=True)
    command = group.commands[name]
    # Parsed, with every option checked, and not carried out.
    assert command.make_context(name, arguments).params


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
