"""The MLflow store a notebook writes to, and what one answer costs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from helpers import faults, parameters

ROOT = Path(__file__).resolve().parents[1]
_entered: str | None = None  # the workspace that `connect` chose


def default_uri() -> str:
    """The store used when none is named: `MLFLOW_TRACKING_URI`, or `mlflow.db` beside this project."""
    return parameters.resolved(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")


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
        faults.StoreFault: if the database stays locked by another program.
    """
    import mlflow
    from filelock import FileLock

    uri = parameters.resolved(tracking_uri) or default_uri()
    _quiet()
    # By default MLflow's client asks a server that is gone for four minutes; this is half a minute.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    context = json.loads(os.environ.get("MLFLOW_RUN_CONTEXT", "{}"))  # tags for every run, says MLflow
    os.environ["MLFLOW_RUN_CONTEXT"] = json.dumps(context | {faults.OWNER: faults.this_process()})
    # `mlflow run` starts a run for the project and hands it on; the notebook's runs are its own.
    os.environ.pop("MLFLOW_RUN_ID", None)
    mlflow.set_tracking_uri(uri)
    _enter_workspace(uri, experiment)
    if uri.startswith(("http:", "https:")):
        faults.guard(mlflow.set_experiment(experiment).experiment_id)
        return uri
    # MLflow would put artifacts under the working directory, which differs between papermill and Jupyter;
    # and two notebooks that start at once would both create the database's tables.
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:") else None
    artifacts = (file.parent if file else ROOT) / "mlruns"
    with FileLock(f"{file or ROOT / 'mlflow.db'}.lock"):
        if file:
            faults.refuse_if_locked(file)
        if mlflow.get_experiment_by_name(experiment) is None:
            mlflow.create_experiment(experiment, artifact_location=artifacts.as_uri())
        faults.guard(mlflow.set_experiment(experiment).experiment_id)
    return uri


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
