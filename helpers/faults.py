"""Faults of an MLflow store, each in one sentence that says how to go on."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from helpers.errors import StoreFault

LOCK_SECONDS = 20  # as long as MLflow itself waits for a lock
START_OVER = (
    "Put them back, or run the notebook again that logs it; "
    "to start over with an empty store: rm -rf mlflow.db* mlruns"
)
_ANOTHER = "name another store: tracking_uri sqlite:////path/my.db"
# Parts of the messages of SQLite, the operating system, safetensors (Rust) and MLflow's client (3.17).
_FULL = ("database or disk is full", "No space left on device", "Disk quota exceeded", "StorageFull")
_SILENT = ("Connection refused", "Connection aborted", "Connection reset", "timed out", "timeout exception")


def explain(error: BaseException) -> str | None:
    """The sentence for an error of MLflow that a reader can fix; None for any other."""
    text = _text(error)
    if _mentions(text, _FULL):
        # Of a copy that failed, the second path is the full one.
        place = re.search(r"No space left on device: (?:'[^']+' -> )?'([^']+)'", text)
        return (
            f"The disk is full{f' ({place[1]})' if place else ''}. Free some of it and run again: "
            "what was logged before is kept, what was being written is not used."
        )
    if "database is locked" in text:
        return (
            "The database of the MLflow store is locked: another program holds it for too long. "
            "End that program (a notebook, a server, a database viewer) and run again."
        )
    if gone := re.search(r"No such artifact: '(.*)'", text):
        named = f" ({gone[1]})" if gone[1] else ""
        return f"Files of this model or run{named} are gone from the MLflow store. {START_OVER}"
    if missing := re.search(r"(Registered model alias|Registered Model|Model Version) .+ not found", text):
        return (
            f"{missing[0]} in this MLflow store. `make run` registers slm-transformers and slm-onnx; "
            "`make ui` shows what is registered."
        )
    address = re.search(r"API request to (https?://[^/\s]+)", text)
    if address and _mentions(text, _SILENT):
        return (
            f"The server at {address[1]} does not answer any more. Start it again and run again: "
            "what it had stored and the models on this machine are kept."
        )
    return None


def _text(error: BaseException | None) -> str:
    """The messages of an error and of all that led to it: a failed clean-up hides the first cause."""
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


def _mentions(text: str, parts: tuple[str, ...]) -> bool:
    return any(part in text for part in parts)


def explain_in_notebook(on_full_disk: Callable[[], None]) -> None:
    """In a notebook, show an error of the store as its one sentence in place of MLflow's frames.

    Args:
        on_full_disk: called after a full disk was reported, to free what a failed log has written.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return

    def show(shell, kind, error, frames, tb_offset=None) -> None:
        sentence = explain(error)
        shown = (StoreFault, StoreFault(sentence), frames) if sentence else (kind, error, frames)
        shell.showtraceback(shown, tb_offset=tb_offset)
        if _mentions(_text(error), _FULL):
            # If the disk is still full, the next `connect` does it.
            with contextlib.suppress(Exception):
                on_full_disk()

    shell.set_custom_exc((Exception,), show)


def refuse_unusable(database: Path, patience: float | None = None) -> None:
    """Try whether a database file, which may not exist yet, can be written by the installed MLflow.

    Args:
        patience: seconds to wait for a lock; None for LOCK_SECONDS. MLflow alone would try for minutes.
    Raises:
        StoreFault: if its folder is read-only, if another program keeps the lock, or if it is damaged or
            written by a newer MLflow.
    """
    state = "ok"
    is_newer = False
    try:
        # SQLite writes a journal beside the database.
        with tempfile.TemporaryFile(dir=database.parent):
            pass
        if database.exists():
            patience = LOCK_SECONDS if patience is None else patience
            with contextlib.closing(sqlite3.connect(database, timeout=patience)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
                (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                is_newer = _is_newer(connection)
    except (OSError, sqlite3.OperationalError) as error:
        if sentence := explain(error):
            raise StoreFault(f"{database}: {sentence}") from None
        place, reason = (database.parent, error.strerror) if isinstance(error, OSError) else (database, error)
        raise StoreFault(
            f"{place} cannot be written to ({reason}), so the MLflow store cannot be there: {_ANOTHER}"
        ) from None
    except sqlite3.DatabaseError as error:
        state = str(error)
    if state != "ok":
        raise StoreFault(
            f"{database} is damaged ({' '.join(state.split())}). Put a copy of it in its place, move it away "
            f"to start with an empty store, or {_ANOTHER}"
        )
    if is_newer:
        raise StoreFault(
            f"{database} was written by a newer MLflow than {version('mlflow')}, which is installed here. "
            f"Install that version, or {_ANOTHER}"
        )


def _is_newer(connection: sqlite3.Connection) -> bool:
    """Whether the installed MLflow has no script for the revision of a database's tables.

    Alembic notes the revision in the database, and MLflow (3.17) names each script after its revision.
    """
    try:
        rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError:
        return False  # MLflow has not made its tables yet
    scripts = Path(find_spec("mlflow").origin).parent / "store" / "db_migrations" / "versions"
    return any(not list(scripts.glob(f"{revision}_*.py")) for (revision,) in rows)
