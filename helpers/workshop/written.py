"""A command writes only over what the same command wrote before, never over a source or somebody's work.

A notebook that a command wrote carries a digest of its content in its metadata, a page one in its last line.
A file without one, or one that was changed since, is not the command's to replace.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import places

if TYPE_CHECKING:
    from nbformat import NotebookNode

KEY = "written_as"  # in a notebook's metadata


def stamp(book: NotebookNode, command: str) -> None:
    """Note in a notebook that `command` wrote it as it is now."""
    book.metadata[KEY] = _of_notebook(book, command)


def stamped(page: str, command: str) -> str:
    """Return the HTML page with a last line that says that `command` wrote it."""
    # A file's text is read with these line ends; a model may write any.
    page = page.replace("\r\n", "\n").replace("\r", "\n")
    return f"{page}\n<!-- written as {_digest(command, page)} -->\n"


def prepare(folders: Iterable[Path], files: Iterable[Path], command: str) -> None:
    """Make the folders of a command's files, unless one of the files is there and not the command's own.

    Args:
        folders: made where they are missing.
        files: the notebooks and pages that the command will write.
        command: `run` or `student`.
    Raises:
        ValueError: for such a file, and nothing has been made then; also if a folder cannot be had.
    """
    for path in files:
        if os.path.lexists(path) and not _is_own(path, command):
            raise ValueError(
                f"{places.relative(path)} has been worked in, or was not written by `{command}`. "
                "Move it away, or name another folder with --output."
            )
    for folder in folders:
        make_folder(folder)


def make_folder(folder: Path) -> None:
    """Make a folder that can be written in, unless it is there.

    Raises:
        ValueError: if that is impossible; for example because a file has this name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        if os.access(folder, os.W_OK):
            return
        reason = "Permission denied"
    raise ValueError(f"{str(folder)!r} cannot be used as a folder ({reason}). Name another with --output.")


def _is_own(path: Path, command: str) -> bool:
    import nbformat

    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".ipynb":
            book = nbformat.read(path, as_version=4)
            return book.metadata.get(KEY) == _of_notebook(book, command)
        text = path.read_text(encoding="utf-8")
        return text == stamped(text.rpartition("\n<!-- ")[0], command)
    except Exception:  # What cannot be read is not what the command wrote.
        return False


def _of_notebook(book: NotebookNode, command: str) -> str:
    """Digest of what a reader could miss; with papermill's notes, since it copies all other metadata."""
    cells = [[cell.cell_type, cell.source, cell.get("outputs")] for cell in book.cells]
    return _digest(command, json.dumps([cells, book.metadata.get("papermill")], sort_keys=True))


def _digest(command: str, text: str) -> str:
    return hashlib.sha256(f"{command}\0{text}".encode()).hexdigest()
