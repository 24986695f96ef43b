"""Two editions of the notebooks: the full one, and the student's with solutions taken out.

The notebooks in `notebooks/` are the source of both. One rule makes the student's: names, signatures and
docstrings of a cell tagged `solution` stay, since they are the task, and so does the call of the check.
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import nbformat

from helpers.workshop import notebooks, written

BLANK = "...  # your code here"


def blank(source: str) -> str:
    """Take the solution out of a cell: the bodies of functions, assigned values, and all other statements.

    Raises:
        ValueError: if nothing would be left to fill in, or no check to run.
    """
    # `ast.unparse` writes a name as it stands, and drops real comments.
    placeholder = ast.Name(BLANK)
    parts, checks = [], []
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef():
                docstring = node.body[:1] if ast.get_docstring(node) else []
                node.body = [*docstring, ast.Expr(placeholder)]
                parts.append(ast.unparse(node))
            case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
                parts.append(f"{ast.unparse(target)} = {BLANK}")
            case ast.Expr(ast.Call(ast.Attribute(ast.Name("exercises")))):
                checks.append(ast.unparse(node))
    if not (parts and checks):
        raise ValueError(f"A solution needs a name to fill in and a call of its check:\n{source}")
    return "\n\n\n".join(["\n".join(parts), *checks])


def student(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The student edition of a notebook: solutions replaced, outputs cleared."""
    edition = copy.deepcopy(book)
    # It speaks of outputs.
    edition.metadata.pop("made_from", None)
    for cell in edition.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            cell.source = blank(cell.source)
            cell.metadata["tags"] = ["exercise" if tag == "solution" else tag for tag in tags]
    return edition


def write(output: Path) -> list[Path]:
    """Write `student/` (solutions replaced, outputs cleared) and `full/` (as saved) below `output`.

    Returns:
        The files, student edition first.
    Raises:
        ValueError: if one of the files is there and has been worked in, or `output` cannot be a folder; then
            nothing is written.
    """
    books = {path.name: nbformat.read(path, as_version=4) for path in notebooks.NOTEBOOKS.values()}
    editions = {output / "student" / name: student(book) for name, book in books.items()}
    editions |= {output / "full" / name: book for name, book in books.items()}
    written.prepare([output / "student", output / "full"], editions, "student")
    for path, book in editions.items():
        notebooks.relink(book, path.parent)
        written.stamp(book, "student")
        nbformat.write(book, path)
    return list(editions)
