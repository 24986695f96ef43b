"""A command writes over a file only if a command wrote it and nobody has changed it since.

A notebook carries a digest of its cells and their outputs in its metadata, a page one in its last line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import places

if TYPE_CHECKING:
    from nbformat import NotebookNode

KEY = "written_as"  # in a notebook's metadata


def stamp(book: NotebookNode) -> None:
    """Note in a notebook that a command wrote it as it is now."""
    book.metadata[KEY] = _digest(book)


def stamped(page: str) -> str:
    """Return an HTML page with a last line that says that a command wrote it."""
    # A file's text is read with these line ends; a model may write any.
    page = page.replace("\r\n", "\n").replace("\r", "\n")
    return f"{page}\n<!-- {KEY} {hashlib.sha256(page.encode()).hexdigest()} -->\n"


def prepare(files: Collection[Path]) -> None:
    """Make the folders of the notebooks and pages that a command will write.

    Raises:
        ValueError: if one of them is there and is somebody's work, and nothing has been made then; also if a
            folder cannot be had.
    """
    for path in files:
        if os.path.lexists(path) and not _is_own(path):
            raise ValueError(
                f"{places.relative(path)} has been worked in, or was not written by this project. "
                "Move it away, or name another folder with --output."
            )
    for path in files:
        make_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder that can be written in, unless it is there; a ValueError says why that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        if os.access(folder, os.W_OK):
            return
        reason = "Permission denied"
    raise ValueError(f"{str(folder)!r} cannot be used as a folder ({reason}). Name another with --output.")


def _is_own(path: Path) -> bool:
    import nbformat

    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".html":
            text = path.read_text(encoding="utf-8")
            return text == stamped(text.rpartition("\n<!-- ")[0])
        book = nbformat.read(path, as_version=4)
        return book.metadata.get(KEY) == _digest(book)
    except (ValueError, AttributeError):  # neither a text nor a notebook
        return False


def _digest(book: NotebookNode) -> str:
    cells = [[cell.cell_type, cell.source, cell.get("outputs")] for cell in book.cells]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()
