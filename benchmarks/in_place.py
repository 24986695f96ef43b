"""Log a large model into the current run without a second copy of its files, not even for a moment.

`log_model` (MLflow 3.17) writes a temporary copy and copies that to the store, and loads the model again to
try its input example. This gives a flavor's `save_model` the store's own folder:

    with in_place.model("phi3-mlflow-model") as place:
        mlflow.transformers.save_model(chatbot, **place)
    mlflow.pyfunc.load_model(f"models:/{place['mlflow_model'].model_id}")
"""

import contextlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def model(name: str) -> Iterator[dict]:
    """Yield `path` and `mlflow_model`, the arguments that `save_model` needs.

    If saving fails, the model is marked FAILED and what it wrote is removed.

    Raises:
        ValueError: if the store's artifacts are not on this machine; use `log_model` there.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model
    from mlflow.utils.file_utils import get_local_path_or_none

    run_id = mlflow.active_run().info.run_id
    logged = mlflow.initialize_logged_model(name, source_run_id=run_id)
    place = logged.artifact_location
    path = get_local_path_or_none(place)
    try:
        if path is None:
            raise ValueError(f"Artifacts go to {place}, not to a disk here: use log_model.")
        ids = {"model_uuid": logged.model_id, "model_id": logged.model_id, "run_id": run_id}
        yield {"path": path, "mlflow_model": Model(artifact_path=place, **ids)}
    except BaseException:
        mlflow.finalize_logged_model(logged.model_id, "FAILED")
        if path:
            shutil.rmtree(path, ignore_errors=True)
        raise
    mlflow.finalize_logged_model(logged.model_id, "READY")
    mlflow.MlflowClient().log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
