"""The MLflow store a notebook writes to, and what one answer costs."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from helpers import ROOT, errors, faults, parameters, places
from helpers.models import folders

LARGE = 100_000  # bytes from which a file is shared
_entered: str | None = None  # the workspace that `connect` chose


def default_uri() -> str:
    """The store used when none is named: `MLFLOW_TRACKING_URI`, or `mlflow.db` beside this project."""
    return parameters.resolved(os.environ.get(parameters.VARIABLE) or "sqlite:///mlflow.db")


def open_store(tracking_uri: str = "") -> str:
    """Point MLflow at a store; one in a SQLite file is made, checked, and settled where it has moved to.

    Args:
        tracking_uri: a server or database URI; empty for `default_uri()`.
    Returns:
        The URI now in use.
    Raises:
        errors.StoreFault: if a SQLite file cannot be read and written here.
    """
    import mlflow

    uri = parameters.resolved(tracking_uri) or default_uri()
    file = parameters.sqlite_file(uri)
    if file:
        faults.refuse_unusable(file)
    _quiet()
    mlflow.set_tracking_uri(uri)
    if file:
        # Two notebooks that start at once would both create the database's tables.
        with _lock(file):
            mlflow.MlflowClient().search_experiments(max_results=1)
            places.settle(file, _artifacts(file))
    return uri


def _artifacts(file: Path | None) -> Path:
    """The artifact folder of a database, to be reached by MLflow; None: one that is no file."""
    folder = file.parent if file else ROOT
    try:
        places.make_link(folder)
    except OSError as error:
        link = places.artifacts(folder).parent
        raise errors.StoreFault(faults.unwritable(link, error.strerror)) from None
    return places.artifacts(folder)


@contextlib.contextmanager
def _lock(file: Path | None) -> Iterator[None]:
    """Be the only one that makes tables or experiments in a database; None: one that is no file."""
    from filelock import FileLock

    lock = FileLock(f"{file or ROOT / 'mlflow.db'}.lock")
    try:
        lock.acquire()
    except OSError as error:
        raise errors.StoreFault(faults.unwritable(lock.lock_file, error.strerror)) from None
    try:
        yield
    finally:
        lock.release()


def connect(tracking_uri: str, experiment: str) -> str:
    """Point MLflow at a store and an experiment, making both when they are missing.

    On a server with workspaces (`make classroom`) the experiment's name also chooses the workspace, so that
    thirty learners who all register `slm-onnx` do not move each other's aliases. `MLFLOW_WORKSPACE` wins.

    Runs of this experiment that a killed process left open are ended: see `faults.guard`.

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
    # Shards of MLflow's 500 MB would cut SmolLM2's one file in two, which `share_files` could not know again.
    os.environ.setdefault("MLFLOW_HUGGINGFACE_MODEL_MAX_SHARD_SIZE", "1GB")
    context = json.loads(os.environ.get("MLFLOW_RUN_CONTEXT", "{}"))  # tags for every run, says MLflow
    os.environ["MLFLOW_RUN_CONTEXT"] = json.dumps(context | {faults.OWNER: faults.this_process()})
    # `mlflow run` starts a run for the project and hands it on; the notebook's runs are its own.
    os.environ.pop("MLFLOW_RUN_ID", None)
    uri = open_store(tracking_uri)
    _enter_workspace(uri, experiment)
    faults.guard(
        choose_experiment(experiment, f"choose another name: -p experiment {shlex.quote(experiment + '-2')}")
    )
    return uri


def choose_experiment(name: str, otherwise: str) -> str:
    """Make an experiment the current one, and make it when it is missing; return its id.

    Args:
        otherwise: what can be done instead of restoring one that has been deleted.
    Raises:
        errors.StoreFault: if it was deleted, or keeps its files in a folder that is not there.
    """
    import mlflow

    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http:", "https:")):
        _refuse_deleted(name, otherwise)
        return mlflow.set_experiment(name).experiment_id
    # MLflow would put artifacts under the working directory, which differs between papermill and Jupyter.
    file = parameters.sqlite_file(uri)
    folder = _artifacts(file)
    with _lock(file):
        _refuse_deleted(name, otherwise)
        if mlflow.get_experiment_by_name(name) is None:
            mlflow.create_experiment(name, artifact_location=folder.as_uri())
        experiment = mlflow.set_experiment(name)
    kept = places.local_path(experiment.artifact_location)
    if (
        kept
        and not kept.is_relative_to(folder)
        and (experiment.experiment_id == "0" or not kept.parent.exists())
    ):
        raise errors.StoreFault(
            f"The experiment {name!r} keeps its files in {kept}, which does not belong to this project or is "
            f"gone. To go on, {otherwise}"
        )
    return experiment.experiment_id


def _refuse_deleted(name: str, otherwise: str) -> None:
    import mlflow

    found = mlflow.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "deleted":
        return
    given = {parameters.VARIABLE: parameters.without_password(mlflow.get_tracking_uri())}
    if workspace := os.environ.get("MLFLOW_WORKSPACE"):
        given["MLFLOW_WORKSPACE"] = workspace
    settings = " ".join(f"{variable}={shlex.quote(value)}" for variable, value in given.items())
    raise errors.StoreFault(
        f"The experiment {name!r} was deleted, and its name stays taken. Restore it: {settings} "
        f"mlflow experiments restore --experiment-id {found.experiment_id} Or {otherwise}"
    )


def has_files(model_uri: str) -> bool:
    """Whether the files of a model are still in the store: its entry outlives a deleted folder."""
    import mlflow

    try:
        files = mlflow.artifacts.list_artifacts(model_uri)
    except mlflow.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise
        return False
    return any(file.path.rpartition("/")[2] == "MLmodel" for file in files)


def refuse_if_gone(model_uri: str) -> None:
    """Refuse a model whose files are no longer in the store.

    A model that the store does not know is not refused here: what loads it says so.

    Raises:
        errors.StoreFault: naming the model, where its files were, and how to go on.
    """
    import mlflow

    if not model_uri.startswith("models:") or has_files(model_uri):
        return
    with contextlib.suppress(mlflow.MlflowException):
        raise errors.StoreFault(
            f"The files of {model_uri} are gone: {_place(model_uri)} has none. {faults.START_OVER}"
        )


def _place(model_uri: str) -> str:
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    return ModelsArtifactRepository.get_underlying_uri(model_uri)


def share_files(model_uri: str) -> None:
    """Let a logged model's large files be those that `weights/` or an earlier model has, not further copies.

    Files with the same bytes become one file with several names (hard links), which is read-only: a write
    through one name cannot harm the others, and deleting a name leaves them alone. Where that cannot be had
    (a server's store, another disk, a file of another user, Windows, which refuses to delete what is
    read-only) the copy stays.

    Args:
        model_uri: `models:/…` of a logged model.
    """
    folder = places.local_path(_place(model_uri))
    if folder is None or os.name == "nt":
        return
    fetched = [made.parent.rglob("*") for made in folders.weights_dir().glob(f"*/*/{folders.MANIFEST}")]
    logged = (path for path in folder.parents[1].glob("*/artifacts/**/*") if folder not in path.parents)
    twins: dict[int, dict[int, Path]] = {}
    for path in [*itertools.chain(*fetched), *filter(_is_read_only, logged)]:
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            about = path.stat()
            twins.setdefault(about.st_size, {}).setdefault(about.st_ino, path)
    for path in folder.rglob("*"):
        if path.is_file() and (size := path.stat().st_size) >= LARGE:
            same = (twin for twin in twins.get(size, {}).values() if filecmp.cmp(path, twin, shallow=False))
            if twin := next(same, None):
                _link(path, twin)
            _make_read_only(path)


def _is_read_only(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        return not path.stat().st_mode & 0o222
    return False


def _make_read_only(path: Path) -> None:
    if not _is_read_only(path):
        path.chmod(0o444)


def _link(path: Path, twin: Path) -> None:
    """Make `path` another name of `twin`, in one step; or leave it, if the system does not allow that."""
    spare = path.with_name(f".{path.name}.link")
    try:
        _make_read_only(twin)
        os.link(twin, spare)
        os.replace(spare, path)
    except OSError:
        spare.unlink(missing_ok=True)


def _enter_workspace(uri: str, experiment: str) -> None:
    """Make and enter the experiment's workspace; a server that has none is used as it is."""
    import mlflow

    global _entered
    if _entered and os.environ.get("MLFLOW_WORKSPACE") == _entered:  # ours, of an earlier call
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


def _workspace_name(experiment: str) -> str:
    """Lower case, digits and hyphens, as MLflow wants it; a name in another script gets a number for it."""
    plain = unicodedata.normalize("NFKD", experiment).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain)[:40].strip("-")
    return name if len(name) > 1 else f"learner-{hashlib.sha256(experiment.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def model_in_place(name: str) -> Iterator[dict]:
    """Log a large model into the current run without a second copy of its files, not even for a moment.

    `log_model` (MLflow 3.17) writes a temporary copy and copies that to the store, and loads the model again
    to try its input example. This gives a flavor's `save_model` the store's own folder:

        with tracking.model_in_place("phi3-mlflow-model") as place:
            mlflow.transformers.save_model(chatbot, **place)
        mlflow.pyfunc.load_model(f"models:/{place['mlflow_model'].model_id}")

    Yields:
        `path` and `mlflow_model`, the arguments that `save_model` needs. If it fails, the model is marked
        FAILED and what it wrote is removed.
    Raises:
        ValueError: if the store's artifacts are not on this machine; use `log_model` there.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model
    from mlflow.utils.file_utils import get_local_path_or_none

    run = mlflow.active_run()
    logged = mlflow.initialize_logged_model(name, source_run_id=run.info.run_id)
    path = get_local_path_or_none(logged.artifact_location)
    try:
        if path is None:
            raise ValueError(
                f"Artifacts go to {logged.artifact_location}, not to a disk here: use log_model."
            )
        yield {
            "path": path,
            "mlflow_model": Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=run.info.run_id,
            ),
        }
    except BaseException:
        mlflow.finalize_logged_model(logged.model_id, "FAILED")
        if path:
            shutil.rmtree(path, ignore_errors=True)
        raise
    mlflow.finalize_logged_model(logged.model_id, "READY")
    mlflow.MlflowClient().log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])


def requirements(*packages: str) -> list[str]:
    """Pin packages to what is installed, without a build tag: nobody else's index has `torch==2.13.0+cpu`."""
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]


def _quiet() -> None:
    """Keep confirmations out of saved notebooks; warnings and errors still show."""
    from mlflow.store.model_registry import abstract_store
    from mlflow.tracking._model_registry import fluent

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors are raised as well
    for module in (fluent, abstract_store):  # "Created version 1 …" goes to stderr past every logger (3.17)
        module.eprint = lambda *_: None
