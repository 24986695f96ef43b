"""Two editions of the notebooks: the full one, and the student's with solutions taken out.

The notebooks in `notebooks/` are the source of both. In a cell tagged `solution`, what stands to the right of
an assignment and what stands in a function are the solution; names, signatures and docstrings are the task.
"""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
from nbconvert.exporters import NotebookExporter
from nbconvert.preprocessors import ClearOutputPreprocessor, Preprocessor

from helpers.workshop import notebooks, written

BLANK = "...  # your code here"


class ReplaceSolutions(Preprocessor):
    """Turn each cell tagged `solution` into one tagged `exercise`, with `BLANK` in the solution's place."""

    def preprocess_cell(self, cell, resources, index):
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            cell.source = blank(cell.source)
            cell.metadata["tags"] = ["exercise" if tag == "solution" else tag for tag in tags]
        return cell, resources


def blank(source: str) -> str:
    """Take the solution out of a cell.

    Functions keep decorators, signature and docstring; assignments keep their names; calls of a check in
    `exercises` stay as they are. All else is part of the solution and goes.

    Raises:
        ValueError: if nothing would be left to fill in, or no check to run.
    """
    parts, checks = [], []
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        match node:
            case ast.FunctionDef():
                parts.append(_blank_function(source, node))
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                parts.append(f"{name} = {BLANK}")
            case ast.Expr(value=ast.Call()) if text.startswith("exercises."):
                checks.append(text)
    if not (parts and checks):
        raise ValueError(f"A solution needs a name to fill in and a call of its check:\n{source}")
    return "\n\n\n".join(["\n".join(parts), *checks])


def _blank_function(source: str, node: ast.FunctionDef) -> str:
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    body = node.body[0]
    last = body.end_lineno if ast.get_docstring(node) else body.lineno - 1
    return "\n".join([*lines[first - 1 : last], f"{' ' * body.col_offset}{BLANK}"])


def write(output: Path) -> list[Path]:
    """Write `student/` (solutions replaced, outputs cleared) and `full/` (as saved) below `output`.

    Returns:
        The files, student edition first.
    Raises:
        ValueError: if one of the files is there and has been worked in, or `output` cannot be had; then
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


def student(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The student edition of a notebook, which stays as it is."""
    exporter = NotebookExporter()
    exporter.register_preprocessor(ReplaceSolutions(), enabled=True)
    exporter.register_preprocessor(ClearOutputPreprocessor(), enabled=True)
    text, _ = exporter.from_notebook_node(book)
    edition = nbformat.reads(text, as_version=4)
    edition.metadata.pop("made_from", None)  # it speaks of outputs
    return edition
