"""The code blocks of the tutorials, run as they stand, one process a document and in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDS = {"tutorial_trainers.md": ("transformers", "accelerate", "lightning")}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("tutorial_*.md")))
def test_the_code_of_a_tutorial_runs(name: str, tmp_path: Path) -> None:
    for library in NEEDS.get(name, ()):
        pytest.importorskip(library, reason=f"{library} is not installed")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert blocks
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
