"""Say what this machine has and what it lacks, one line each, before or after set-up; change nothing.

OK       it is there.
TO DO    the notebooks need it, here and now, also without a network. One of these means exit code 1.
NOTE     worth knowing.

At its top this file imports the standard library only: it also runs before set-up.
"""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from helpers import ROOT, environment
from helpers.environment import VENV

OK, TODO, NOTE = "OK", "TO DO", "NOTE"
Finding = tuple[str, str]  # OK, TO DO or NOTE; what is there, or what to do

ENVIRONMENT_SIZE = 2_500_000_000  # bytes, measured on Linux with torch's CPU build
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

        chosen = catalog.find(model)
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
    if not (find_spec("mlflow") and find_spec("packaging")):
        free = shutil.disk_usage(ROOT).free / 1e9
        disk = f"it needs {ENVIRONMENT_SIZE / 1e9:.1f} GB of disk, and {free:,.1f} GB are free"
        step = AGAIN if VENV.exists() else "Run: make setup"
        return TODO, f"no complete environment here. {step} ({disk})"
    here = environment.installed()
    locked = environment.locked()
    wrong = [
        f"{name} is {here.get(name, 'missing')}, not {version}"
        for name, version in locked.items()
        if here.get(name, "").partition("+")[0] != version
    ]
    if wrong:
        return TODO, f"{', '.join(wrong)}. {AGAIN}"
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
    from helpers import errors, faults, parameters, tracking

    try:
        uri = parameters.store(given, "--tracking-uri") or tracking.default_uri()
        if file := parameters.sqlite_file(uri):
            faults.refuse_unusable(file, patience=2)
    except (errors.ParameterError, errors.StoreFault) as error:
        return TODO, str(error)
    if uri.startswith(("http://", "https://")):
        return _server(uri.rstrip("/"))
    return OK, f"{file or parameters.without_password(uri)} can be used"


def _server(url: str) -> Finding:
    """Ask a tracking server for its version, which no other server has there."""
    import requests

    from helpers import parameters

    shown = parameters.without_password(url)
    code = requests.get(f"{url}/version", timeout=10).status_code
    if code in (401, 403):
        return NOTE, f"{shown} asks who you are: set MLFLOW_TRACKING_USERNAME and …_PASSWORD"
    if code != 200:
        return TODO, f"{shown} does not answer as MLflow does (HTTP {code}). Ask who runs it"
    return OK, f"{shown} answers"
