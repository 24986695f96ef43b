"""Say what this machine has and what it lacks, one line each, before or after set-up; change nothing.

OK       it is there.
TO DO    the notebooks need it, here and now, also without a network. One of these means exit code 1.
NOTE     worth knowing.

At its top this file imports the standard library only: it also runs before set-up.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sqlite3
import sys
from importlib.util import find_spec
from pathlib import Path

from helpers import ROOT, environment
from helpers.environment import VENV

OK, TODO, NOTE = "OK", "TO DO", "NOTE"
Finding = tuple[str, str]  # OK, TO DO or NOTE; what is there, or what to do

ENVIRONMENT_SIZE = 2_500_000_000  # bytes, measured on Linux with torch's CPU build
# What the notebooks use by default.
EXPERIMENTS = ("small-language-models", "serving")
AGAIN = "Delete .venv, then run: make setup"


def report(model: str = "smollm2-135m", tracking_uri: str = "") -> int:
    """Print a line for each check; return 1 if something needed is missing, else 0.

    Args:
        model: catalogue key, Hub id or folder, whose files are looked for.
        tracking_uri: store to try; empty for the one that the notebooks would use.
    Raises:
        ValueError: for a model that cannot be meant.
    """
    findings = {"Python": _python(), "packages": _packages()}
    if findings["packages"][0] == OK:
        from helpers.models import catalog

        chosen = catalog.find(model, "--model")
        findings |= {"model": _model(chosen), "disk": _disk(chosen), "store": _store(tracking_uri)}
    for topic, (state, text) in findings.items():
        print(f"{state:<7}{topic:<12}{' '.join(text.split())}")
    todo = [topic for topic, (state, _) in findings.items() if state == TODO]
    print(f"Missing: {', '.join(todo)}." if todo else "Everything needed is here.")
    return 1 if todo else 0


def _python() -> Finding:
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if environment.python_version() in environment.PYTHONS:
        return OK, here
    return TODO, f"{here} is not 3.11, 3.12 or 3.13. Install one and name it: make setup PYTHON=python3.12"


def _packages() -> Finding:
    """Compare what is installed with the lock."""
    own = environment.python_of(VENV)
    if own.is_symlink() and not own.exists():
        return TODO, "the Python that .venv was made with is gone. Run: make setup"
    if Path(sys.prefix) != VENV and find_spec("mlflow") is None:
        free = shutil.disk_usage(ROOT).free / 1e9
        disk = f"it needs {ENVIRONMENT_SIZE / 1e9:.1f} GB of disk, and {free:,.1f} GB are free"
        return TODO, f"no environment yet. Run: make setup ({disk})"
    if find_spec("packaging") is None:
        return TODO, f"missing: packaging, and perhaps others. {AGAIN}"
    here = environment.installed()
    locked = environment.locked()
    missing = [name for name in locked if name not in here]
    other = [
        f"{name} {here[name]} instead of {version}"
        for name, version in locked.items()
        if name in here and here[name].partition("+")[0] != version
    ]
    if missing or other:
        wrong = [f"missing: {', '.join(missing)}"] * bool(missing) + [", ".join(other)] * bool(other)
        return TODO, f"{'; '.join(wrong)}. {AGAIN}"
    if Path(sys.prefix) == VENV and not environment.is_current():
        return TODO, "as locked, but set up elsewhere, by another Python or not to the end. Run: make setup"
    return OK, f"{len(locked)} as locked"


def _model(chosen) -> Finding:
    """Read every byte of a model's folders and compare it with their manifests."""
    from helpers import errors
    from helpers.models import catalog, folders

    if isinstance(chosen.origin, catalog.Folder):
        return OK, f"{chosen.key} is a folder of your own; it is read as it is"
    home = folders.weights_dir() / chosen.key
    whole = sorted(manifest.parent for manifest in home.glob(f"*/{folders.MANIFEST}"))
    try:
        for folder in whole:
            folders.verify(folder)
    except errors.ModelUnavailable as error:
        return TODO, str(error)
    # What is built here, or converted, needs no network.
    fetched = set() if isinstance(chosen.origin, catalog.Built) else {"checkpoint"}
    fetched |= {f"onnx-{precision}" for precision in chosen.published}
    names = [folder.name for folder in whole]
    if lacking := sorted(fetched - set(names)):
        return TODO, (
            f"{chosen.key} lacks {', '.join(lacking)} in {home.parent}. Run: make weights "
            f"MODEL={chosen.key}, or copy that folder from a machine that has it"
        )
    there = f"{', '.join(names)} in {home}, checksums right" if names else f"nothing in {home} yet"
    return OK, f"{there}; other parts are made when first used, without a network"


def _disk(chosen) -> Finding:
    """Compare what is free with what is still to come."""
    from helpers.models import catalog, folders

    weights = folders.weights_dir()
    # Where a model's size is not known, that of the default model counts.
    size = chosen.disk or catalog.CATALOGUE["smollm2-135m"].disk
    # In sizes of the checkpoint: it and its ONNX folders in fp32, int8 and int4 have 2.75, with a published
    # int4 1.36. A run logs the same, and while it copies needs int4 once more.
    needed = (3.08 if chosen.published else 5.75) * size - folders.total_size(weights / chosen.key)
    place = next(folder for folder in (weights, *weights.parents) if folder.exists())
    free, folder = min((shutil.disk_usage(folder).free, str(folder)) for folder in (ROOT, place))
    text = f"{folder} has {free / 1e9:,.1f} GB free, {max(0, needed) / 1e9:,.1f} GB needed"
    if free < needed:
        return TODO, f"{text}. Free some, or set WEIGHTS_DIR to a folder on another disk"
    return OK, text


def _store(given: str) -> Finding:
    """Try the store without leaving anything in it."""
    from helpers import errors, parameters, tracking

    try:
        uri = parameters.store(given, "--tracking-uri") or tracking.default_uri()
    except errors.ParameterError as error:
        return TODO, str(error)
    if file := parameters.sqlite_file(uri):
        return _database(file)
    if uri.startswith(("http://", "https://")):
        return _server(uri.rstrip("/"))
    return OK, f"{parameters.without_password(uri)} can be opened"


def _database(file: Path) -> Finding:
    """Whether a database can be written, whether it has moved, and what it names that is gone."""
    from helpers import errors, faults, parameters, places, tracking

    try:
        faults.refuse_unusable(file, patience=2)
    except errors.StoreFault as error:
        return TODO, str(error)
    if not file.exists():
        return OK, f"{file} will be made"
    folder = places.artifacts(file.parent)
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        moved = places.moved(connection, folder)
        deleted = _rows(connection, DELETED)
        versions = _rows(connection, VERSIONS)
    now = {place.stored: place.new for place in moved}
    where = {version: now.get(stored) or places.local_path(stored) for version, stored in versions}
    gone = [version for version, path in where.items() if path and not os.path.exists(path / "MLmodel")]
    found = [
        f"the experiment {tracking.how_to_restore(name, number, parameters.sqlite_uri(file))}"
        for number, name in deleted
    ]
    if moved:
        found.append(f"it was moved here from {moved[0].old.parent}, and is set right when next used")
    if gone:
        found.append(f"the files of {', '.join(gone[:3])} are gone from {folder}. {faults.START_OVER}")
    if any(name in EXPERIMENTS for _, name in deleted):
        return TODO, f"{file}: {'; '.join(found)}"
    return NOTE if found else OK, "; ".join([f"{file} can be written", *found])


DELETED = "SELECT experiment_id, name FROM experiments WHERE lifecycle_stage = 'deleted'"
VERSIONS = (
    "SELECT name || '/' || version, coalesce(storage_location, source, '') FROM model_versions "
    "WHERE current_stage <> 'Deleted_Internal'"
)


def _rows(connection: sqlite3.Connection, query: str) -> list[tuple]:
    """What a query finds; nothing in a database whose tables are not made yet."""
    with contextlib.suppress(sqlite3.OperationalError):
        return connection.execute(query).fetchall()
    return []


def _server(url: str) -> Finding:
    """Ask a tracking server which experiments were deleted."""
    import requests

    from helpers import parameters, tracking

    shown = parameters.without_password(url)
    query = {"max_results": 1000, "view_type": "DELETED_ONLY"}
    try:
        reply = requests.post(f"{url}/api/2.0/mlflow/experiments/search", json=query, timeout=10)
        if reply.status_code in (401, 403):
            return NOTE, f"{shown} asks who you are: set MLFLOW_TRACKING_USERNAME and …_PASSWORD"
        reply.raise_for_status()
        deleted = {each["name"]: each["experiment_id"] for each in reply.json().get("experiments", [])}
    except (OSError, ValueError) as error:
        return TODO, f"{shown} does not answer as MLflow does ({type(error).__name__}). Ask who runs it"
    for name in EXPERIMENTS:
        if name in deleted:
            return TODO, f"{shown}: the experiment {tracking.how_to_restore(name, deleted[name], url)}"
    return OK, f"{shown} answers and finds experiments"
