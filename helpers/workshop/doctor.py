"""Say what this machine has and what it lacks, one line each, before or after set-up; change nothing.

OK       it is there.
TO DO    needed: without it the notebooks do not run here and now, also without a network. That is Python, the
         packages as locked, a kernel that starts, the model's files, disk, and a tracking store that can be
         written. One of these ends the report with exit code 1.
NOTE     worth knowing: what the store takes, memory, cores, ports of `make ui`, `classroom`, `serve` and
         `lab`, files that are made when first used, a wheelhouse that does not fit.

Standard library only. What needs packages is asked of the environment's own Python, in child processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from helpers import ROOT, environment, errors, faults, parameters, places, tracking
from helpers.models import catalog, folders

OK, TODO, NOTE = "OK", "TO DO", "NOTE"
Finding = tuple[str, str]  # OK, TO DO or NOTE; what is there, or what to do

ENVIRONMENT_SIZE = 2_500_000_000  # bytes, measured on Linux with torch's CPU build
MEMORY = 4_000_000_000  # bytes: 3.1 GB measured at most, one notebook at a time, and room for the system
EXPERIMENTS = ("small-language-models", "serving")  # what the notebooks use by default
PORTS = {
    5000: "`make ui` and `make classroom` need another (macOS keeps 5000 for AirPlay): make ui PORT=5001, "
    'make classroom PARAMS="--port 5001"',
    8000: '`make serve` needs another: make serve PARAMS="--port 8001"',
    8888: "JupyterLab takes the next free one by itself",
}


def report(model: str = "smollm2-135m", tracking_uri: str = "") -> int:
    """Print a line for each check; return 1 if something needed is missing, else 0.

    Args:
        model: catalogue key, Hub id or folder, whose files are looked for.
        tracking_uri: store to try; empty for the one that the notebooks would use.
    Raises:
        ValueError: for a model that cannot be meant.
    """
    chosen = catalog.find(model)
    environment_python = _environment_python()
    checks = {
        "Python": _python,
        "packages": lambda: _inside(environment_python, "packages"),
        "kernel": lambda: _inside(environment_python, "kernel"),
        "model": lambda: _model(environment_python, model),
        "disk": lambda: _disk(chosen),
        "tracking": lambda: _tracking(environment_python, tracking_uri),
        "store": lambda: _store(tracking_uri),
        "memory": lambda: _memory(chosen),
        "cores": _cores,
        **{f"port {port}": lambda port=port: _port(port) for port in PORTS},
        "wheelhouse": _wheelhouse,
    }
    with ThreadPoolExecutor() as pool:
        waiting = {topic: pool.submit(check) for topic, check in checks.items()}
        findings = {topic: future.result() for topic, future in waiting.items()}
    findings["offline"] = _offline({topic for topic, (state, _) in findings.items() if state == TODO})
    for topic, (state, text) in findings.items():
        print(f"{state:<7}{topic:<12}{' '.join(text.split())}")
    todo = [topic for topic, (state, _) in findings.items() if state == TODO]
    print(f"Missing: {', '.join(todo)}." if todo else "Everything needed is here.")
    return 1 if todo else 0


def _environment_python() -> Path | None:
    """The Python whose packages count: .venv's, or this one where it has them (conda); None before set-up."""
    binary = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if binary.exists():
        return binary
    return Path(sys.executable) if find_spec("mlflow") else None


def _inside(python: Path | None, check: str, *arguments: str) -> Finding:
    """Let a function of this module run in the environment; what it returns, or why it could not."""
    if python is None and (ROOT / ".venv").exists():
        return TODO, "the Python that .venv was made with is gone. Run: make setup"
    if python is None:
        return TODO, "no environment yet. Run: make setup"
    code = (
        "import json, sys; from helpers.workshop import doctor;"
        f"print(json.dumps(doctor.{check}(*sys.argv[1:])))"
    )
    command = [python, "-X", "utf8", "-c", code, *arguments]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        return TODO, f"could not be checked ({reason}). {_REPAIR}"
    return tuple(json.loads(child.stdout.splitlines()[-1]))


_REPAIR = "Delete .venv/setup.stamp, then run: make setup"


def _python() -> Finding:
    lowest, highest = environment.SUPPORTED
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if lowest <= sys.version_info[:2] <= highest:
        return OK, here
    return TODO, f"{here} is not 3.11, 3.12 or 3.13. Install one and name it: make setup PYTHON=python3.12"


def packages() -> Finding:
    """In the environment: compare what is installed with the lock."""
    installed = environment.installed()
    locked = environment.locked()
    missing = sorted(name for name in locked if name not in installed)
    other = sorted(
        f"{name} {installed[name]} instead of {version}"
        for name, version in locked.items()
        if name in installed and installed[name].partition("+")[0] != version
    )
    if missing or other:
        wrong = [f"missing: {', '.join(missing)}"] * bool(missing) + [", ".join(other)] * bool(other)
        return TODO, f"{'; '.join(wrong)}. {_REPAIR}"
    if Path(sys.prefix) == ROOT / ".venv" and not environment.is_current():
        return TODO, "as locked, but set up elsewhere, by another Python or not to the end. Run: make setup"
    return OK, f"{len(locked)} as locked"


def kernel() -> Finding:
    """In the environment: start the kernel that Jupyter and papermill would start, and ask whose it is."""
    from jupyter_client.kernelspec import NoSuchKernel
    from jupyter_client.manager import start_new_kernel

    heard = []
    try:
        manager, client = start_new_kernel(kernel_name="python3", startup_timeout=60)
    except (NoSuchKernel, RuntimeError, OSError) as error:
        return TODO, f"python3 does not start ({' '.join(str(error).split())}). {_REPAIR}"
    try:
        hook = lambda message: heard.append(message["content"].get("text", ""))  # noqa: E731
        client.execute_interactive("import sys; print(sys.prefix)", timeout=60, output_hook=hook)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    prefix = "".join(heard).strip()
    if not prefix or not Path(prefix).samefile(sys.prefix):
        spec = Path(manager.kernel_spec.resource_dir)
        return TODO, f"python3 belongs to {prefix}, not to this project. Remove or rename {spec}"
    return OK, "python3 starts and is this environment's"


def _model(python: Path | None, name: str) -> Finding:
    if python is not None:
        return _inside(python, "model", name)
    folder = folders.weights_dir() / catalog.find(name).key
    if any(folder.glob("*/manifest.json")):
        return NOTE, f"{name} lies in {folder.parent}; its checksums are read once there is an environment"
    return TODO, f"{name} is not in {folder.parent}. After make setup, run: make weights"


def model(name: str) -> Finding:
    """In the environment: read every byte of a model's folders and compare it with their manifests."""
    from helpers.models import export, fetch

    chosen = catalog.find(name)
    if isinstance(chosen.origin, catalog.Folder):
        return OK, f"{name} is a folder of your own; it is read as it is"
    home = folders.weights_dir() / chosen.key
    wanted = {"checkpoint": fetch.recipe(chosen)}
    wanted |= {f"onnx-{recipe}": export.onnx_recipe(chosen, recipe) for recipe in export.compared(chosen)}
    try:
        whole = [part for part, recipe in wanted.items() if folders.is_complete(home / part, recipe)]
        for part in whole:
            folders.verify(home / part)
    except errors.ModelUnavailable as error:
        return TODO, str(error)
    size = sum(folders.total_size(home / part) for part in whole) / 1e6
    there = f"{name}: {', '.join(whole)} in {home.parent}, {size:,.0f} MB, checksums right" if whole else ""
    fetched = {"checkpoint"} if not isinstance(chosen.origin, catalog.Built) else set()
    fetched |= {f"onnx-{precision}" for precision in chosen.published}
    absent = [part for part in wanted if part not in whole]
    if fetched & set(absent):
        lacking = ", ".join(part for part in absent if part in fetched)
        return TODO, (
            f"{name} lacks {lacking} in {home.parent}. Run: make weights MODEL={name}, "
            "or copy that folder from a machine that has it"
        )
    if absent:
        return NOTE, f"{there or name}; {', '.join(absent)} will be made when first used, without a network"
    return OK, there


def _disk(chosen: catalog.Model) -> Finding:
    """Compare what is free with what is still to come, each on its own disk."""
    weights = folders.weights_dir()
    size = chosen.disk or catalog.CATALOGUE["smollm2-135m"].disk  # not known: what is measured for ours
    # Of the checkpoint's size, ONNX has as much in fp32, half in int8, a quarter in int4, and 0.36 in a
    # published int4. weights/ holds each once; a run logs the same, and while it copies needs int4 once more.
    made, logged = (1.36, 1.72) if chosen.published else (2.75, 3.0)
    to_come = max(0, round(made * size) - folders.total_size(weights / chosen.key))
    needs = [(ROOT, round(logged * size) + (0 if (ROOT / ".venv").exists() else ENVIRONMENT_SIZE))]
    place = next(folder for folder in (weights, *weights.parents) if folder.exists())
    if os.stat(place).st_dev == os.stat(ROOT).st_dev:
        needs[0] = (ROOT, needs[0][1] + to_come)
    else:
        needs.append((place, to_come))
    lines = []
    for folder, needed in needs:
        free = shutil.disk_usage(folder).free
        lines.append(f"{folder} has {free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB needed")
        if free < needed:
            hint = "set WEIGHTS_DIR to a folder on another disk" if folder == place else "move this project"
            return TODO, f"{lines[-1]}. Free some, or {hint}"
    return OK, "; ".join(lines)


def _tracking(python: Path | None, given: str) -> Finding:
    """Try the store as far as the standard library can, without leaving anything in it."""
    try:
        uri = parameters.store(given, "--tracking-uri") or tracking.default_uri()
    except errors.ParameterError as error:
        return TODO, str(error)
    parts = urlsplit(uri)
    if file := parameters.sqlite_file(uri):
        return _inside(python, "database", str(file)) if python else database(str(file))
    if parts.scheme in ("http", "https"):
        return _server(uri.rstrip("/"))
    place = f"{parts.scheme}://{parts.hostname or ''}"
    if find_spec("sqlalchemy"):  # so the check above has opened it
        return OK, f"{place} can be opened"
    return NOTE, f"{place} is tried when a notebook connects"


def database(path: str) -> Finding:
    """Ask whether a database can be written, whether it has moved, and what it names that is gone."""
    file = Path(path)
    try:
        faults.refuse_unusable(file, patience=2)
    except errors.StoreFault as error:
        return TODO, str(error)
    if not file.exists():
        return OK, f"{file} will be made"
    folder = places.artifacts(file.parent)
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        moved = places.moved(connection, folder)
        deleted, versions = (_rows(connection, query) for query in (_DELETED, _VERSIONS))
    found = (
        [f"it was moved here from {moved[0].old.parent}, and is set right when next used"] if moved else []
    )
    now = {place.stored: place.new for place in moved}
    where = {version: now.get(place) or places.local_path(place) for version, place in versions}
    gone = [version for version, place in where.items() if place and not os.path.exists(place / "MLmodel")]
    if gone:
        more = " and others" if len(gone) > 3 else ""
        found.append(f"the files of {', '.join(gone[:3])}{more} are gone from {folder}. {faults.START_OVER}")
    uri = shlex.quote(parameters.sqlite_uri(file))
    found += [_restore(name, number, uri) for number, name in deleted]
    if any(name in EXPERIMENTS for _, name in deleted):
        return TODO, f"{file}: {'; '.join(found)}"
    return (NOTE, f"{file} can be written; {'; '.join(found)}") if found else (OK, f"{file} can be written")


_DELETED = "SELECT experiment_id, name FROM experiments WHERE lifecycle_stage = 'deleted'"
_VERSIONS = (
    "SELECT name || '/' || version, coalesce(storage_location, source, '') FROM model_versions "
    "WHERE current_stage <> 'Deleted_Internal'"
)


def _restore(name: str, number: object, uri: str) -> str:
    command = f"{parameters.VARIABLE}={uri} mlflow experiments restore --experiment-id {number}"
    return f"the experiment {name!r} was deleted, and its name stays taken. Restore it: {command}"


def _rows(connection: sqlite3.Connection, query: str) -> list[tuple]:
    """What a query finds; nothing in a database whose tables are not made yet."""
    with contextlib.suppress(sqlite3.OperationalError):
        return connection.execute(query).fetchall()
    return []


def _store(given: str) -> Finding:
    """Say what the artifacts beside a database take, each file counted once, and how to free it."""
    file = parameters.sqlite_file(given or tracking.default_uri())
    folder = places.artifacts(file.parent) if file else None
    if folder is None or not folder.is_dir():
        return OK, "nothing is logged on this disk yet"
    seen: dict[tuple, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            about = path.lstat()
            key = (about.st_dev, about.st_ino, about.st_nlink, about.st_size)
            seen[key] = seen.get(key, 0) + path.is_file()
    own = sum(size for (*_, names, size), count in seen.items() if count == names)
    shared = sum(size for (*_, names, size), count in seen.items() if 0 < count < names)
    uri = shlex.quote(parameters.sqlite_uri(file))
    return NOTE, (
        f"{folder} takes {own / 1e6:,.0f} MB of disk, and shares {shared / 1e6:,.0f} MB with weights/. "
        "To free some, delete runs and logged models in MLflow's pages (make ui), then: "
        f"{parameters.VARIABLE}={uri} mlflow gc --backend-store-uri {uri} To start over with an empty store: "
        f"rm -rf {shlex.quote(str(file))}* {shlex.quote(str(file.parent / places.FOLDER))}"
    )


def _server(url: str) -> Finding:
    """Ask the server's database for an experiment, and its artifact store to take and drop a few bytes."""
    artifact = f"{url}/api/2.0/mlflow-artifacts/artifacts/doctor-{uuid.uuid4().hex}"
    try:
        found = _request(f"{url}/api/2.0/mlflow/experiments/search", "POST", b'{"max_results": 1}')
        where = [each["artifact_location"] for each in json.loads(found).get("experiments", [])]
        found = _request(f"{url}/api/2.0/mlflow/experiments/search", "POST", _DELETED_THERE)
        deleted = [each for each in json.loads(found).get("experiments", []) if each["name"] in EXPERIMENTS]
        if deleted:
            name, number = deleted[0]["name"], deleted[0]["experiment_id"]
            return TODO, f"{url}: {_restore(name, number, url)}"
        if where and not where[0].startswith("mlflow-artifacts:"):
            return NOTE, f"{url} answers; models do not go through it but straight to {where[0]}"
        _request(artifact, "PUT", b"doctor")
        _request(artifact, "DELETE")
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (401, 403):
                return NOTE, f"{url} asks who you are: set MLFLOW_TRACKING_USERNAME and …_PASSWORD"
            return TODO, f"{url} answers {error.code} to {error.url.removeprefix(url)}. Ask who runs it"
    except (OSError, ValueError) as error:  # ValueError: what answers is no MLflow
        reason = getattr(error, "reason", error)
        return TODO, f"{url} does not answer as MLflow does ({reason}). Ask who runs it"
    return OK, f"{url} answers, finds experiments and takes artifacts"


_DELETED_THERE = b'{"max_results": 1000, "view_type": "DELETED_ONLY"}'


def _request(url: str, method: str, body: bytes | None = None) -> bytes:
    headers = {"Content-Type": "application/json" if method == "POST" else "application/octet-stream"}
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read()


def _memory(chosen: catalog.Model) -> Finding:
    needed = max(MEMORY, chosen.memory or 0)
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return NOTE, f"not known here, {needed / 1e9:.1f} GB needed"
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container may take
    if limit.exists() and (text := limit.read_text("utf-8").strip()).isdigit():
        total = min(total, int(text))
    text = f"{total / 1e9:.1f} GB, {needed / 1e9:.1f} GB needed"
    if total < needed:
        return NOTE, f"{text}: take a smaller model, or close other programs and keep one notebook open"
    return OK, text


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (OK, f"{cores}") if cores > 1 else (NOTE, "1: everything takes about twice the time that is said")


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.settimeout(1)
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    return (NOTE, f"is taken; {PORTS[port]}") if taken else (OK, "is free")


def _wheelhouse() -> Finding:
    folder = Path(os.environ.get("WHEELHOUSE") or environment.WHEELHOUSE).resolve()
    if not folder.exists():
        return OK, "none; only a machine without a network needs one (make wheelhouse)"
    try:
        environment.check_wheelhouse(folder)
    except SystemExit as error:
        return NOTE, str(error)
    return OK, f"{folder} can set up machines like this one without a network"


def _offline(todo: set[str]) -> Finding:
    waits = todo & {"Python", "packages", "kernel", "model"}
    if waits:
        return NOTE, f"nothing before this is done: {', '.join(sorted(waits))}"
    return OK, "all but wheelhouse, lock, audit, bench and some tests; in the notebooks set offline = True"
