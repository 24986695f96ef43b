"""Where the files of an MLflow store lie on this disk, and a store that has moved with its folder.

MLflow (3.17) keeps absolute places in its database, and decodes `%XX` in them once more than it encodes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os.path
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

FOLDER = "mlruns"  # beside the database
# Table, column, and which of its rows hold places.
_COLUMNS = (
    ("experiments", "artifact_location", "experiment_id <> 0"),
    ("runs", "artifact_uri", "1"),
    ("logged_models", "artifact_location", "1"),
    ("model_versions", "storage_location", "1"),
    ("model_versions", "source", "1"),
    ("trace_tags", "value", "key = 'mlflow.artifactLocation'"),
)
# MLflow puts the files of `Default` (number 0) into the working folder of that moment, and its pages make
# experiments whose files only a server finds. Their next runs get a place below the artifact folder.
_SETTLE_STRAYS = """
UPDATE experiments SET artifact_location = :folder || '/' || experiment_id
WHERE artifact_location LIKE 'mlflow-artifacts:%'
   OR experiment_id = 0
  AND (artifact_location LIKE 'file:%' OR artifact_location LIKE '/%')
  AND substr(artifact_location, 1, length(:folder) + 1) <> :folder || '/'
"""


class Place(NamedTuple):
    """A place in the database, and where it is since the store has moved."""

    table: str
    column: str
    stored: str
    old: Path  # the artifact folder when this was written
    new: Path


def relative(path: Path | str, start: Path | str = ".") -> str:
    """The way from a folder (by default the working one) to a path, with `/`.

    On Windows there is no such way to another drive; it is the whole path then.
    """
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return Path(path).absolute().as_posix()


def as_uri(path: Path) -> str:
    """The URI of a file or folder as MLflow takes it, say in `artifacts`, whatever its name is.

    MLflow does not read the last part of an artifact's URI as it reads the others. A slash at the end makes
    that part empty: the content of a folder with such a name is then logged without the name.
    """
    uri = path.absolute().as_uri()
    return f"{uri}/" if path.is_dir() and uri.rpartition("/")[2] != path.name else uri


def artifacts(folder: Path) -> Path:
    """The artifact folder of a database in `folder`.

    MLflow cannot read a model below a folder named like `a%2Fb`. Such a folder is reached through a link in
    the user's cache, whose name is a hash of the folder's path; `make_link` makes it.
    """
    if unquote(str(folder)) == str(folder):
        return folder / FOLDER
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "small-language-models" / name / FOLDER


def make_link(folder: Path) -> Path:
    """Make the link that `artifacts` needs for a folder, if it needs one, and return the artifact folder."""
    link = artifacts(folder).parent
    if link != folder and not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        # Another process may make the same link at the same time.
        with contextlib.suppress(FileExistsError):
            link.symlink_to(folder, target_is_directory=True)
    return artifacts(folder)


def local_path(place: str) -> Path | None:
    """The path of a place in the database; None for one that is not on a disk here, such as `s3://…`."""
    if place.startswith("file:"):
        return Path(url2pathname(urlsplit(place).path))
    return Path(place) if Path(place).is_absolute() else None


def moved(connection: sqlite3.Connection, folder: Path) -> list[Place]:
    """The places in a database that belong below `folder`, its artifact folder, and name another.

    A store has moved from a folder if files of its runs or models are found here under the same names, or if
    neither the old folder nor this one exists any more. Places on other disks are left alone.
    """
    # os.path.exists, unlike Path.exists, says False of a folder of another user that cannot be read.
    exists = os.path.exists
    found = list(_elsewhere(connection, folder))
    homes = {place.old for place in found if place.new != folder and exists(place.new)}
    if not exists(folder):
        homes |= {place.old for place in found if not exists(place.old)}
    # If the database alone was copied, what stayed behind is still found there.
    return [
        place
        for place in found
        if place.old in homes
        and (place.table == "experiments" or exists(place.new) or not exists(local_path(place.stored)))
    ]


def _elsewhere(connection: sqlite3.Connection, folder: Path) -> Iterator[Place]:
    """The places in a database that lie below an artifact folder other than `folder`."""
    for table, column, rows in _COLUMNS:
        try:
            found = connection.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {rows}").fetchall()
        except sqlite3.OperationalError:
            continue  # a store of an older MLflow
        for (stored,) in found:
            path = local_path(stored or "")
            if path is None or FOLDER not in path.parts:
                continue
            depth = len(path.parts) - path.parts[::-1].index(FOLDER)
            old = Path(*path.parts[:depth])
            # One folder may be reached through a link.
            same = os.path.exists(old) and os.path.exists(folder) and old.samefile(folder)
            if not same and old != folder:
                yield Place(table, column, stored, old, folder.joinpath(*path.parts[depth:]))


def settle(database: Path, folder: Path) -> None:
    """Let every place of a store that has moved name `folder`, its artifact folder, in one transaction."""
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection, connection:
        changed = moved(connection, folder)
        for table, column, stored, _, new in changed:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (new.as_uri(), stored))
        connection.execute(_SETTLE_STRAYS, {"folder": folder.as_uri()})
    for old in sorted({place.old.parent for place in changed}):
        print(f"The MLflow store was moved here from {old}; its runs and models are found again.")
