"""Faults of an MLflow store: one sentence for each, and what they left behind is fixed on the next start."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from helpers.errors import StoreFault

OWNER = "process"  # the tag that says which process writes a run: `machine:pid:start`
LOCK_SECONDS = 20  # MLflow's own patience with a locked database, in the middle of its work
# Parts of the messages of SQLite, the operating system, safetensors (Rust) and MLflow's client (3.17).
_LOCKED = "database is locked"
_DAMAGED = ("file is not a database", "database disk image is malformed", "database schema is corrupt")
_NEWER = "Can't locate revision identified by"
_FULL = ("database or disk is full", "No space left on device", "Disk quota exceeded", "StorageFull")
_GONE = ("Connection refused", "Connection aborted", "Connection reset", "timed out", "timeout exception")


def explain(error: BaseException) -> str | None:
    """The sentence for an error of MLflow that a reader can fix; None for any other."""
    text = _text(error)
    if _is_full(text):
        place = re.search(r"No space left on device: (?:'[^']+' -> )?'([^']+)'", text)  # the target of a copy
        return (
            f"The disk is full{f' ({place[1]})' if place else ''}. Free some of it and run again: "
            "what was logged before is kept, what was being written is not used."
        )
    if _LOCKED in text:
        return (
            "The database of the MLflow store is locked: another program holds it for too long. "
            "End that program (a notebook, a server, a database viewer) and run again."
        )
    if any(part in text for part in _DAMAGED):
        return _damaged(_this_database(), "as SQLite finds")
    if _NEWER in text:
        return _newer(_this_database())
    if gone := re.search(r"No such artifact: '(.*)'", text):
        named = f" ({gone[1]})" if gone[1] else ""
        return f"Files of this model or run{named} are gone from the MLflow store. {START_OVER}"
    address = re.search(r"API request to (https?://[^/\s]+)", text)
    if address and any(part in text for part in _GONE):
        return (
            f"The server at {address[1]} does not answer any more. Start it again and run again: "
            "what it had stored and the models on this machine are kept."
        )
    return None


START_OVER = (
    "Put them back, or run the notebook again that logs it; "
    "to start over with an empty store: rm -rf mlflow.db* mlruns"
)
_ANOTHER = "name another store: tracking_uri sqlite:////path/my.db"


def _damaged(database: object, reason: object) -> str:
    return (
        f"{database} is damaged ({reason}). Put a copy of it in its place, move it away to start with an "
        f"empty store, or {_ANOTHER}"
    )


def _newer(database: object) -> str:
    return (
        f"{database} was written by a newer MLflow than {version('mlflow')}, which is installed here. "
        f"Install that version, or {_ANOTHER}"
    )


def unwritable(place: object, reason: object) -> str:
    return f"{place} cannot be written to ({reason}), so the MLflow store cannot be there: {_ANOTHER}"


def _this_database() -> object:
    import mlflow

    from helpers import parameters

    return parameters.sqlite_file(mlflow.get_tracking_uri()) or "The database of the MLflow store"


def speak_plainly(on_full_disk: Callable[[], None]) -> None:
    """In a notebook, show such errors as their one sentence rather than as a stack of MLflow's frames.

    Args:
        on_full_disk: called when the disk was full, to free some and to end what could not be ended.
    """
    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return

    def show(shell, kind, error, frames, tb_offset=None) -> None:
        sentence = explain(error)
        shown = (StoreFault, StoreFault(sentence), frames) if sentence else (kind, error, frames)
        shell.showtraceback(shown, tb_offset=tb_offset)
        if _is_full(_text(error)):
            with contextlib.suppress(Exception):  # still full: the next start does it
                on_full_disk()

    shell.set_custom_exc((Exception,), show)


def guard(experiment: str) -> None:
    """Fix what earlier faults left in an experiment, and be ready for later ones."""
    _close_abandoned(experiment)
    speak_plainly(on_full_disk=lambda: _close_abandoned(experiment, mine=True))


def refuse_unusable(database: Path, patience: float | None = None) -> None:
    """Try whether a database, which may not be there yet, can be written by the MLflow that is installed.

    Standard library only: the doctor calls it before set-up.

    Args:
        patience: seconds to wait for the right to write; MLflow alone would try for minutes.
    Raises:
        StoreFault: if its folder is read-only, if another program keeps the lock, or if it is damaged or
            written by a newer MLflow.
    """
    try:
        # SQLite writes a journal beside the database.
        with tempfile.TemporaryFile(dir=database.parent):
            pass
        if not database.exists():
            return
        patience = LOCK_SECONDS if patience is None else patience
        with contextlib.closing(sqlite3.connect(database, timeout=patience)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            revision = _revision(connection)
    except OSError as error:
        raise StoreFault(explain(error) or unwritable(database.parent, error.strerror)) from None
    except sqlite3.Error as error:
        if any(part in str(error) for part in _DAMAGED):
            raise StoreFault(_damaged(database, error)) from None
        sentence = explain(error)
        raise StoreFault(f"{database}: {sentence}" if sentence else unwritable(database, error)) from None
    if state != "ok":
        raise StoreFault(_damaged(database, " ".join(state.split())))
    if _is_newer(revision):
        raise StoreFault(_newer(database))


def _revision(connection: sqlite3.Connection) -> str | None:
    """The revision of a database's tables, as Alembic notes it; None if MLflow has not made them yet."""
    with contextlib.suppress(sqlite3.OperationalError, TypeError):
        return connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
    return None


def _is_newer(revision: str | None) -> bool:
    """Whether the installed MLflow has no script that leads to this revision; not known before set-up."""
    spec = find_spec("mlflow")
    if revision is None or spec is None:
        return False
    scripts = (Path(spec.origin).parent / "store/db_migrations/versions").glob("*.py")
    found = (re.search(r"^revision = \W(\w+)", path.read_text(encoding="utf-8"), re.M) for path in scripts)
    return revision not in {match[1] for match in found if match}


def _close_abandoned(experiment: str, mine: bool = False) -> None:
    """End the runs whose process has gone (or is this one), and drop model files they left half-written.

    MLflow cannot end the run of a process that was killed, nor one whose disk or server was gone by then. A
    model whose logging was killed or interrupted stays pending, with what had been copied of it (3.17).
    """
    import mlflow
    from mlflow.utils.file_utils import local_file_uri_to_path

    client, here = mlflow.MlflowClient(), f"tags.{OWNER} LIKE '{_machine()}:%'"
    abandoned = [
        run
        for run in client.search_runs([experiment], f"attributes.status = 'RUNNING' and {here}")
        if (mine and run.data.tags[OWNER] == this_process()) or _owner_is_gone(run)
    ]
    models = mlflow.search_logged_models([experiment], output_format="list")
    pending = [model for model in models if model.status == "PENDING"]
    sources = ", ".join(f"'{model.source_run_id}'" for model in pending)
    runs = client.search_runs([experiment], f"attributes.run_id IN ({sources}) and {here}") if pending else []
    over = {run.info.run_id for run in runs if run.info.status != "RUNNING"}
    over |= {run.info.run_id for run in abandoned}
    half_made = [  # asked again: a run may have ended well since
        model
        for model in pending
        if model.source_run_id in over and client.get_logged_model(model.model_id).status == "PENDING"
    ]
    for model in half_made:  # first: on a full disk nothing can be noted before some is free
        if model.artifact_location.startswith("file:"):
            shutil.rmtree(local_file_uri_to_path(model.artifact_location), ignore_errors=True)
    for model in half_made:
        client.finalize_logged_model(model.model_id, "FAILED")
    for run in abandoned:
        status = "FAILED" if run.data.tags[OWNER] == this_process() else "KILLED"
        client.set_terminated(run.info.run_id, status)
        print(f"The run {run.info.run_name!r} had not been ended; it is marked {status} now.")


def _owner_is_gone(run) -> bool:
    """Whether no process has the number in the run's tag, or one that began at another time.

    A tag of an earlier version has no such time; its process counts as alive while any has the number.
    """
    number, _, start = run.data.tags[OWNER].removeprefix(f"{_machine()}:").partition(":")
    now = _start(int(number))
    return not now or start not in ("", now)


def this_process() -> str:
    """`machine:pid:start`, the value of the tag OWNER."""
    return f"{_machine()}:{os.getpid()}:{_start(os.getpid())}"


def _start(pid: int) -> str:
    """When a process began, as the system noted it then, whatever the clock says today; "" if there is none.

    Linux counts from the start of the machine, to which psutil would add today's idea of that start.
    """
    import psutil

    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # After the name, which stands in brackets and may hold spaces (proc(5)).
        state, *fields = stat.rpartition(")")[2].split()
        return fields[18] if state not in "ZX" else ""
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(psutil.Process(pid).create_time())
    return ""


def _machine() -> str:
    """Where a process number means something: containers may share a host's name, not its numbers."""
    with contextlib.suppress(OSError):
        return f"{platform.node()}/{os.stat('/proc/self/ns/pid').st_ino}"
    return platform.node()


def _is_full(text: str) -> bool:
    return any(part in text for part in _FULL)


def _text(error: BaseException | None) -> str:
    """What the error says, and all that led to it: a run that cannot be ended hides why it had to."""
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)
