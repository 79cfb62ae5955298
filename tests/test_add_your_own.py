"""The code of docs/add_your_own.md, run as a user would: from a file outside the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROGRAM = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
steps = 301
{code}
before = sparsefx.masks(model)
total = sum(int(mask.sum()) for mask in before.values())
x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
for _ in range(steps):
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()
    assert sum(int(mask.sum()) for mask in sparsefx.masks(model).values()) == total
after = sparsefx.masks(model)
moved = sum(int((before[name] != after[name]).sum()) for name in before)
print(runtime.report()["algorithm"], moved > 0, {{name: int(mask.sum()) for name, mask in before.items()}} != {{
    name: int(mask.sum()) for name, mask in after.items()}})
"""


def _code() -> str:
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "add_your_own.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_a_method_of_ones_own_takes_fewer_than_ten_lines() -> None:
    assert len([line for line in _code().splitlines() if line.strip()]) < 10


def test_the_documented_method_runs_from_outside_the_package(tmp_path: Path) -> None:
    program = tmp_path / "mine.py"
    program.write_text(PROGRAM.format(code=_code()))
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); exec(open({str(program)!r}).read())",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["agreement", "True", "True"]
