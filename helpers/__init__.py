"""What a reader of the notebooks need not type. Importing it is cheap, and turns telemetry and pickle off."""

import os
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository

SETTINGS = {  # in this process, in those that it starts, and in Spark's workers
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # A pickle runs any code that is in it; no model made here needs one (MLflow 3.17 reads them by default).
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    # Bars and hints to developers are debris in a saved notebook; long work has a progress line of ours.
    "HF_HUB_DISABLE_PROGRESS_BARS": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    # By default uvicorn kills a worker, with the requests in it, that does not answer its supervisor in 5
    # seconds. MLflow's can be as busy as that when a class starts at once.
    "UVICORN_TIMEOUT_WORKER_HEALTHCHECK": "60",
}
# The libraries read these when they are imported, so they are set first; a value of your own stays.
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

# The servers started here are on this machine: no proxy is asked for them. The lower-case name wins, and a
# lone star means every host.
_direct = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").replace(" ", "")
if _direct != "*":
    _hosts = [*filter(None, _direct.split(",")), "127.0.0.1", "localhost", "::1"]
    _direct = ",".join(dict.fromkeys(_hosts))
os.environ["no_proxy"] = os.environ["NO_PROXY"] = _direct

# tqdm says this at import where ipywidgets is absent; text bars are what saved notebooks want.
warnings.filterwarnings("ignore", message="IProgress not found")
# pyspark, where the extra is installed, says this whenever MLflow looks for it.
warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
