"""The notebooks run from top to bottom, and are stored small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = ("quantize_and_chat.ipynb", "transformers_api.ipynb")
MOST_BYTES = 40_000


def test_every_notebook_is_here() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_stored_small_and_without_what_libraries_say_of_themselves(name: str) -> None:
    assert (FOLDER / name).stat().st_size < MOST_BYTES
    cells = [cell for cell in json.loads((FOLDER / name).read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
def test_every_cell_works(tmp_path: Path, tiny_model_folder: Path) -> None:
    """With a model that quantizes in seconds; what the stored notebooks show is the real one's."""
    for package in ("nbclient", "ipykernel", "peft"):
        pytest.importorskip(package, reason=f"it is not installed: pip install {package}")
    command = [sys.executable, ROOT / "docs" / "run_notebooks.py", tmp_path, "--model", tiny_model_folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == set(NOTEBOOKS)
