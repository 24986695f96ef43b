"""Seconds that each section of the executed notebooks took, for the table in TEACHING.md.

    make run && python benchmarks/sections.py [--folder out]

Cells tagged `solution` are left out, for learners write their own.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import nbformat

from helpers.environment import ROOT
from helpers.workshop import notebooks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "out", help="of the notebooks that were run")
    folder = parser.parse_args().folder
    for name in (path.name for path in notebooks.NOTEBOOKS.values()):
        if not (folder / name).is_file():
            parser.error(f"{folder / name} is not there. Make it: make run")
        seconds = sections(nbformat.read(folder / name, nbformat.NO_CONVERT))
        print(f"{name}: {sum(seconds.values()):.0f} s")
        for title, value in seconds.items():
            print(f"{value:6.1f}  {title}")


def sections(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """Heading of the second level → seconds of its cells, as papermill noted them."""
    seconds: dict[str, float] = {}
    title = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            title = ([title, *re.findall("^## (.*)$", cell.source, re.MULTILINE)])[-1]
        elif cell.cell_type == "code" and "solution" not in cell.metadata.get("tags", []):
            seconds[title] = seconds.get(title, 0) + cell.metadata["papermill"]["duration"]
    return seconds


if __name__ == "__main__":
    main()
