"""Faults of an MLflow store: said in one sentence, and what they left behind mended on the next start."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

OWNER = "process"  # the tag that says which process writes a run: `machine:pid`
LOCK_SECONDS = 20  # MLflow's own patience with a locked database, in the middle of its work
# Parts of the messages of SQLite, the operating system, safetensors (Rust) and MLflow's client (3.17).
_LOCKED = "database is locked"
_FULL = ("database or disk is full", "No space left on device", "Disk quota exceeded", "StorageFull")
_GONE = ("Connection refused", "Connection aborted", "Connection reset", "timed out", "timeout exception")


class StoreFault(RuntimeError):
    """The MLflow store could not be read or written; the text says why, what is kept, and what to do."""

    def _render_traceback_(self) -> list[str]:  # IPython's hook: show the sentence, not forty frames
        return [f"{type(self).__name__}: {self}"]


def explain(error: BaseException) -> str | None:
    """The sentence for an error of MLflow that a reader can mend; None for any other."""
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
    address = re.search(r"API request to (https?://[^/\s]+)", text)
    if address and any(part in text for part in _GONE):
        return (
            f"The server at {address[1]} does not answer any more. Start it again and run again: "
            "what it had stored and the models on this machine are kept."
        )
    return None


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
            with contextlib.suppress(Exception):  # still full: the next start mends it
                on_full_disk()

    shell.set_custom_exc((Exception,), show)


def guard(experiment: str) -> None:
    """Mend what earlier faults left in an experiment, and be ready for later ones."""
    _close_abandoned(experiment)
    speak_plainly(on_full_disk=lambda: _close_abandoned(experiment, mine=True))


def refuse_if_locked(database: Path) -> None:
    """Wait for the right to write, but not for long: MLflow alone would try for minutes to open the store.

    Raises:
        StoreFault: if another program keeps the lock.
    """
    if not database.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=LOCK_SECONDS)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except sqlite3.OperationalError as error:
        if sentence := explain(error):
            raise StoreFault(f"{database}: {sentence}") from None


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
    """Whether no process, or only one younger than the run, has the number in the run's tag."""
    import psutil

    try:
        owner = psutil.Process(int(run.data.tags[OWNER].rpartition(":")[2]))
    except psutil.NoSuchProcess:
        return True
    # A minute, because clocks are set.
    return owner.create_time() * 1000 > run.info.start_time + 60_000


def this_process() -> str:
    """`machine:pid`, the value of the tag OWNER."""
    return f"{_machine()}:{os.getpid()}"


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
