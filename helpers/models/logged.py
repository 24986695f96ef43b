"""Code yes, pickles no: a look into a logged model before anything in it is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import PurePosixPath

from helpers.errors import ModelUnavailable, StoreFault
from helpers.faults import START_OVER

# Files that Python, joblib or PyTorch reads with pickle. Models made here have none of them.
PICKLES = (".pkl", ".pickle", ".joblib", ".bin", ".pt", ".pth", ".ckpt")


def check(model_uri: str) -> None:
    """Refuse a logged model whose files are gone, or that would be read with pickle, which runs any code.

    MLflow's own switch, MLFLOW_ALLOW_PICKLE_DESERIALIZATION, is deprecated since 3.18, and its successor
    refuses models from code as well. So this reads the MLmodel file and the names of all files itself.

    Args:
        model_uri: of a logged model, or a folder with one.
    Raises:
        StoreFault: if the store knows the model and has no files of it.
        ModelUnavailable: naming the model, the pickle, and how to log it instead.
        mlflow.exceptions.MlflowException: if the store cannot say. A model that it does not know is not
            refused: whatever loads it says so.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    files = list_files(model_uri)
    if "MLmodel" not in files:
        if model_uri.startswith("models:"):
            with contextlib.suppress(MlflowException):
                raise StoreFault(
                    f"The files of {model_uri} are gone: {place(model_uri)} has none. {START_OVER}"
                )
        return
    # A class that was logged as a file stands under `model_code_path`, a pickled one under `python_model`.
    if "python_model" in Model.load(model_uri).flavors.get("python_function", {}):
        raise ModelUnavailable(
            f"{model_uri} is a pickled Python class, and a pickle runs any code that is in it. "
            "Log the class as a file: log_model(python_model='my_model.py')."
        )
    for file in files:
        if PurePosixPath(file).suffix.lower() in PICKLES:
            raise ModelUnavailable(
                f"{model_uri} holds {file}, which is read with pickle, and a pickle runs any code that is in "
                "it. Log the model again with its weights as safetensors or ONNX."
            )


def list_files(model_uri: str) -> list[str]:
    """The path of every file in a model's folder; none if that was deleted, which its entry outlives."""
    from mlflow.exceptions import MlflowException

    try:
        return list(_walk(model_uri))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise
        return []


def _walk(model_uri: str) -> Iterator[str]:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.tracking.artifact_utils import _get_root_uri_and_artifact_path

    # Private, because mlflow.artifacts.list_artifacts (3.17) takes no folder below `models:/name@alias`.
    root, path = _get_root_uri_and_artifact_path(model_uri)
    repository = get_artifact_repository(root)
    folders = [path]
    while folders:
        for entry in repository.list_artifacts(folders.pop() or None):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                yield PurePosixPath(entry.path).relative_to(path).as_posix()


def place(model_uri: str) -> str:
    """Where the files of a registered or logged model lie, as its store names it."""
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    return ModelsArtifactRepository.get_underlying_uri(model_uri)
