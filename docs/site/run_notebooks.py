"""Run the notebooks of docs/notebooks and write their outputs into them: `make notebooks`.

python docs/site/run_notebooks.py [NAME…]
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
TIMEOUT_S = 600
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}


def main(*names: str) -> None:
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = run(path)
        notebook.metadata = METADATA  # without the versions of this machine
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def run(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a fresh run. The first error of a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", record_timing=False).execute()
    return notebook


if __name__ == "__main__":
    main(*sys.argv[1:])
