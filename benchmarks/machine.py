"""Where a figure was measured, and where it is written."""

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mlflow", "onnxruntime-genai", "onnxruntime", "transformers", "torch")


def facts(*packages: str) -> dict:
    """Processor, cores, system and versions (of PACKAGES and what is named besides)."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (*PACKAGES, *packages)},
    }


def cpu_model() -> str:
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def write(name: str, result: dict, *packages: str, folder: Path = RESULTS) -> Path:
    """Write a result with the machine's facts to benchmarks/results/NAME.json, or into another folder."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": facts(*packages), **result}, indent=2) + "\n")
    return path
