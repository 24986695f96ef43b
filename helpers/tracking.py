"""The MLflow store that a notebook writes to."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import unicodedata
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import ROOT, errors, faults, parameters, places
from helpers.models import folders, logged

if TYPE_CHECKING:
    from mlflow.entities import Experiment, LoggedModel

OWNER = "process"  # the tag that names the process of a run
LARGE = 100_000  # bytes from which a file is shared
_entered: str | None = None  # the workspace that `connect` chose


# Connect.


def default_uri() -> str:
    """The store used when none is named: `MLFLOW_TRACKING_URI`, or `mlflow.db` beside this project."""
    return parameters.resolved(os.environ.get(parameters.VARIABLE) or "sqlite:///mlflow.db")


def connect(tracking_uri: str, experiment: str) -> str:
    """Point MLflow at a store and an experiment, making both when they are missing.

    On a server with workspaces (`make classroom`) the experiment's name also chooses the workspace, so that
    thirty learners who all register `slm-onnx` do not move each other's aliases. `MLFLOW_WORKSPACE` wins.

    Runs of this experiment that a killed process left open are ended.

    Args:
        tracking_uri: a server or database URI; empty for `default_uri()`. On a database, also on PostgreSQL,
            the artifacts are files of this machine.
        experiment: name of the experiment that the runs belong to.
    Returns:
        The URI now in use.
    Raises:
        errors.StoreFault: if the store cannot be used, or the experiment has been deleted.
    """
    # By default MLflow's client asks a server that is gone for four minutes; this is half a minute.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    # Shards of MLflow's 500 MB would cut SmolLM2's one file in two, and `share_files` could share neither.
    os.environ.setdefault("MLFLOW_HUGGINGFACE_MODEL_MAX_SHARD_SIZE", "1GB")
    # MLflow puts these tags on every run.
    tags = json.loads(os.environ.get("MLFLOW_RUN_CONTEXT", "{}"))
    os.environ["MLFLOW_RUN_CONTEXT"] = json.dumps(tags | {OWNER: _process(os.getpid())})
    # `mlflow run` starts a run for the project and hands it on; the notebook's runs are its own.
    os.environ.pop("MLFLOW_RUN_ID", None)
    uri = open_store(tracking_uri)
    _enter_workspace(uri, experiment)
    _wait_for_workspaces(uri)
    number = choose_experiment(
        experiment, f"choose another name: -p experiment {shlex.quote(experiment + '-2')}"
    )
    end_abandoned(number)
    faults.explain_in_notebook(on_full_disk=lambda: end_abandoned(number, mine=True))
    return uri


def open_store(tracking_uri: str = "") -> str:
    """Point MLflow at a store; one in a SQLite file is made, checked, and settled where it has moved to.

    Returns the URI now in use. Raises errors.StoreFault if a SQLite file cannot be read and written here.
    """
    import mlflow
    from filelock import FileLock

    uri = parameters.resolved(tracking_uri) or default_uri()
    file = parameters.sqlite_file(uri)
    if file:
        faults.refuse_unusable(file)
    _quiet()
    mlflow.set_tracking_uri(uri)
    if file:
        # Two notebooks that start at once would both create the database's tables.
        with FileLock(f"{file}.lock"):
            mlflow.MlflowClient().search_experiments(max_results=1)
            places.settle(file, places.make_link(file.parent))
    return uri


def choose_experiment(name: str, otherwise: str) -> str:
    """Make an experiment the current one, and make it when it is missing; return its id.

    Raises errors.StoreFault if it was deleted, or keeps its files in a folder that does not exist.
    `otherwise` says what can be done about it.
    """
    import mlflow
    from filelock import FileLock

    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http:", "https:")):
        return _enter_experiment(name, otherwise).experiment_id
    # MLflow would put artifacts under the working directory, which differs between papermill and Jupyter.
    # PostgreSQL has no file here; its artifacts lie where the project's own do.
    file = parameters.sqlite_file(uri) or ROOT / "mlflow.db"
    folder = places.make_link(file.parent)
    with FileLock(f"{file}.lock"):
        experiment = _enter_experiment(name, otherwise, artifact_location=folder.as_uri())
    kept = places.local_path(experiment.artifact_location)
    if kept and not kept.is_relative_to(folder) and not kept.parent.exists():
        raise errors.StoreFault(
            f"The experiment {name!r} keeps its files in {kept}, which is gone. To go on, {otherwise}"
        )
    return experiment.experiment_id


def _enter_experiment(name: str, otherwise: str, **options: str) -> Experiment:
    """Choose an experiment, made with these options when it is missing; refuse a deleted one.

    MLflow's own `set_experiment(name)` (3.17) does not choose an experiment that somebody else made at the
    same moment, or that was made by a request whose answer was lost: runs would go to another experiment.
    """
    import mlflow

    found = mlflow.get_experiment_by_name(name)
    if found and found.lifecycle_stage == "deleted":
        how = how_to_restore(name, found.experiment_id, mlflow.get_tracking_uri())
        raise errors.StoreFault(f"The experiment {how} Or {otherwise}")
    try:
        number = found.experiment_id if found else mlflow.create_experiment(name, **options)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        number = mlflow.get_experiment_by_name(name).experiment_id
    return mlflow.set_experiment(experiment_id=number)


def how_to_restore(name: str, number: object, uri: str) -> str:
    """Say of a deleted experiment, by its name, that it was deleted, and which command restores it."""
    uri = shlex.quote(parameters.without_password(uri))
    workspace = os.environ.get("MLFLOW_WORKSPACE")
    inside = f"MLFLOW_WORKSPACE={shlex.quote(workspace)} " if workspace else ""
    return (
        f"{name!r} was deleted, and its name stays taken. Restore it: "
        f"{parameters.VARIABLE}={uri} {inside}mlflow experiments restore --experiment-id {number}"
    )


def _enter_workspace(uri: str, experiment: str) -> None:
    """Make and enter the experiment's workspace; a server that has none is used as it is."""
    import mlflow

    global _entered
    if _entered and os.environ.get("MLFLOW_WORKSPACE") == _entered:
        # An earlier call chose it, so it may be left.
        mlflow.set_workspace(None)
    _entered = None
    if not uri.startswith(("http:", "https:")) or os.environ.get("MLFLOW_WORKSPACE"):
        return
    name = _workspace_name(experiment)
    try:
        mlflow.create_workspace(name)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            return
    mlflow.set_workspace(name)
    _entered = name


def _wait_for_workspaces(uri: str) -> None:
    """Let MLflow's two clients, of runs and of models, hear from a busy server that it has workspaces.

    They ask once and wait three seconds (MLflow 3.17), which is too short when thirty learners start at once.
    Each remembers the answer, and does not ask again.
    """
    import mlflow

    if not uri.startswith(("http:", "https:")) or not os.environ.get("MLFLOW_WORKSPACE"):
        return
    client = mlflow.MlflowClient()
    for _ in range(10):
        try:
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
        except mlflow.MlflowException as error:
            if "server-info" in str(error):
                continue
        # Anything else shows in what comes next.
        return


def _workspace_name(experiment: str) -> str:
    """Lower case, digits and hyphens, as MLflow wants it; a name in another script gets a number for it."""
    plain = unicodedata.normalize("NFKD", experiment).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain)[:40].strip("-")
    return name if len(name) > 1 else f"learner-{hashlib.sha256(experiment.encode()).hexdigest()[:12]}"


def _quiet() -> None:
    """Keep confirmations out of saved notebooks; warnings and errors still show."""
    from mlflow.store.model_registry import abstract_store
    from mlflow.tracking._model_registry import fluent

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What this one logs as an error is raised as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # "Created version 1 …" goes to stderr past every logger (MLflow 3.17).
    for module in (fluent, abstract_store):
        module.eprint = lambda *_: None


# End the runs that a killed process left open.


def end_abandoned(experiment_id: str, mine: bool = False) -> None:
    """End the runs whose process has gone, and drop model files that they left half-written.

    MLflow cannot end the run of a process that was killed, nor one whose disk or server was gone by then. A
    model whose logging was killed or interrupted stays pending, with what had been copied of it (3.17).
    With `mine`, the open runs of this process are ended, too.
    """
    import mlflow

    client = mlflow.MlflowClient()
    here = f"tags.{OWNER} LIKE '{platform.node()}:%'"
    abandoned = []
    for run in client.search_runs([experiment_id], f"attributes.status = 'RUNNING' and {here}"):
        owner = run.data.tags[OWNER]
        if owner != _process(int(owner.split(":")[1])):
            abandoned.append((run, "KILLED"))
        elif mine and owner == _process(os.getpid()):
            abandoned.append((run, "FAILED"))
    half_made = _half_made_models(experiment_id, here, {run.info.run_id for run, _ in abandoned})
    # Remove the files first: on a full disk nothing can be written to the store before.
    for model in half_made:
        if path := places.local_path(model.artifact_location):
            shutil.rmtree(path, ignore_errors=True)
    for model in half_made:
        client.finalize_logged_model(model.model_id, "FAILED")
    for run, status in abandoned:
        client.set_terminated(run.info.run_id, status)
        print(f"The run {run.info.run_name!r} had not been ended; it is marked {status} now.")


def _half_made_models(experiment_id: str, here: str, abandoned: set[str]) -> list[LoggedModel]:
    """The pending models whose run is abandoned or over; `here` selects the runs of this machine."""
    import mlflow

    client = mlflow.MlflowClient()
    models = mlflow.search_logged_models([experiment_id], output_format="list")
    pending = [model for model in models if model.status == "PENDING"]
    if not pending:
        return []
    sources = ", ".join(f"'{model.source_run_id}'" for model in pending)
    runs = client.search_runs([experiment_id], f"attributes.run_id IN ({sources}) and {here}")
    over = abandoned | {run.info.run_id for run in runs if run.info.status != "RUNNING"}
    # Read each status again: another process may have finished the model since the search.
    return [
        model
        for model in pending
        if model.source_run_id in over and client.get_logged_model(model.model_id).status == "PENDING"
    ]


def _process(pid: int) -> str:
    """`machine:pid:start`, the value of the tag OWNER; without a start if the process has ended.

    Another process may get the number later, but it starts at another time.
    """
    import psutil

    start = ""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            # On Linux psutil adds the start of the machine, which moves when the clock is put forward.
            since = psutil.boot_time() if psutil.LINUX else 0
            start = f"{process.create_time() - since:.2f}"
    return f"{platform.node()}:{pid}:{start}"


# The files of logged models.


def has_files(model_uri: str) -> bool:
    """Whether the files of a model are still in the store: its entry outlives a deleted folder."""
    return "MLmodel" in logged.list_files(model_uri)


def share_files(model_uri: str) -> None:
    """Let a logged model's large files be those that `weights/` or another model has, not further copies.

    Files with the same bytes become one file with several names (hard links), which is read-only: a write
    through one name cannot harm the others, and deleting a name leaves them alone. Where that cannot be had
    (a server's store, another disk, a file of another user, Windows, which refuses to delete what is
    read-only) the copy stays.
    """
    folder = places.local_path(logged.place(model_uri))
    if folder is None or os.name == "nt":
        return
    finished = folders.weights_dir().glob(f"*/*/{folders.MANIFEST}")
    known = [path for manifest in finished for path in manifest.parent.rglob("*")]
    known += [path for path in folder.parents[1].glob("*/artifacts/**/*") if folder not in path.parents]
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size >= LARGE:
            for twin in known:
                if _link(path, twin):
                    break
            path.chmod(0o444)


def _link(path: Path, twin: Path) -> bool:
    """Make `path` another name of `twin`, in one step, if they are alike and the system allows it."""
    spare = path.with_name(f".{path.name}.link")
    try:
        if path.samefile(twin):
            return True
        # It compares the sizes first.
        if not filecmp.cmp(path, twin, shallow=False):
            return False
        twin.chmod(0o444)
        os.link(twin, spare)
        os.replace(spare, path)
    except OSError:
        spare.unlink(missing_ok=True)
        return False
    return True


def requirements(*packages: str) -> list[str]:
    """Pin packages to what is installed, without a build tag: nobody else's index has `torch==2.13.0+cpu`."""
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]
