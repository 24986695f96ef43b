"""What a reader of the notebooks should not have to type. Importing it is cheap and turns telemetry off."""

import os
import warnings

# The libraries read these when they are imported, so they are set first; a value of your own stays.
for _name in (
    "MLFLOW_DISABLE_TELEMETRY",
    "HF_HUB_DISABLE_TELEMETRY",
    "ORT_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
):
    os.environ.setdefault(_name, "true")

# tqdm says this at import where ipywidgets is absent; text bars are what saved notebooks want.
warnings.filterwarnings("ignore", message="IProgress not found")
