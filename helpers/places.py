"""Where the files of an MLflow store lie on this disk: how paths become URIs, and a store that has moved.

MLflow (3.17) keeps absolute places in its database, and decodes `%XX` in them once more than it encodes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from os.path import exists as _exists  # False also where another user's folder cannot be read
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

FOLDER = "mlruns"  # beside the database
# Table, column, and which of its rows hold places.
_COLUMNS = (
    ("experiments", "artifact_location", "experiment_id <> 0"),  # MLflow's own: see `settle`
    ("runs", "artifact_uri", "1"),
    ("logged_models", "artifact_location", "1"),
    ("model_versions", "storage_location", "1"),
    ("model_versions", "source", "1"),
    ("trace_tags", "value", "key = 'mlflow.artifactLocation'"),
)


class Place(NamedTuple):
    """A place in the database, and where it is since the store has moved."""

    table: str
    column: str
    stored: str
    old: Path  # the artifact folder of the store when this was written
    new: Path


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
    the user's cache, with a plain name that is made of the folder's; `make_link` makes it.
    """
    if unquote(str(folder)) == str(folder):
        return folder / FOLDER
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "small-language-models" / name / FOLDER


def make_link(folder: Path) -> None:
    """Make the link that `artifacts` speaks of, if there has to be one."""
    link = artifacts(folder).parent
    if link != folder and not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            link.symlink_to(folder, target_is_directory=True)


def local_path(place: str) -> Path | None:
    """The path of a place in the database; None for one that is not on a disk here, such as `s3://…`."""
    if place.startswith("file:"):
        return Path(url2pathname(urlsplit(place).path))
    return Path(place) if Path(place).is_absolute() else None


def moved(connection: sqlite3.Connection, folder: Path) -> list[Place]:
    """The places in a database that belong below `folder`, its artifact folder, and name another.

    A store has moved from a folder if files of its runs or models are found here under the same names, or if
    neither the old folder nor this one is there any more. Places on other disks are left alone.
    """
    found = list(_places(connection, folder))
    homes = {place.old for place in found if place.new != folder and _exists(place.new)}
    if not _exists(folder):
        homes |= {place.old for place in found if not _exists(place.old)}
    kept = [place for place in found if place.old in homes]
    # A copy of the database alone: what has stayed behind is still found there.
    return [
        place
        for place in kept
        if place.table == "experiments" or _exists(place.new) or not _exists(local_path(place.stored))
    ]


def _places(connection: sqlite3.Connection, folder: Path) -> Iterator[Place]:
    for table, column, rows in _COLUMNS:
        if not connection.execute(
            "SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column)
        ).fetchone():
            continue  # a store of an older MLflow
        query = f"SELECT DISTINCT {column} FROM {table} WHERE {rows} AND {column} LIKE '%{FOLDER}%'"
        for (stored,) in connection.execute(query).fetchall():
            path = local_path(stored)
            if path is None or FOLDER not in path.parts:
                continue
            depth = len(path.parts) - path.parts[::-1].index(FOLDER)
            old = Path(*path.parts[:depth])
            if old != folder and not (_exists(old) and _exists(folder) and old.samefile(folder)):
                yield Place(table, column, stored, old, folder.joinpath(*path.parts[depth:]))


def settle(database: Path, folder: Path) -> None:
    """Let every place of a store that has moved name `folder`, its artifact folder, in one transaction.

    MLflow makes an experiment `Default` whose files would lie in the working folder of that moment, and its
    pages make experiments whose files only a server finds. Their next runs, too, get a place below `folder`.
    """
    with contextlib.closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as connection:
        changed = moved(connection, folder)
        strays = [
            (number, place)
            for number, place in connection.execute(
                "SELECT experiment_id, artifact_location FROM experiments"
            )
            if (number == 0 and (path := local_path(place)) and not path.is_relative_to(folder))
            or place.startswith("mlflow-artifacts:")
        ]
        if not changed and not strays:
            return
        connection.execute("BEGIN IMMEDIATE")
        for table, column, stored, _, new in changed:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (new.as_uri(), stored))
        for number, _ in strays:
            new = (folder / str(number)).as_uri()
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, number)
            )
        connection.execute("COMMIT")
    for old in sorted({place.old.parent for place in changed}):
        print(f"The MLflow store was moved here from {old}; its runs and models are found again.")
