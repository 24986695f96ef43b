"""Where a figure was measured, and where it is written."""

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

RESULTS = Path(__file__).parent / "results"
# What decides which integer kernels ONNX Runtime and llama.cpp take: x86-64's, then Arm's.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
PACKAGES = ("mlflow", "onnxruntime-genai", "onnxruntime", "transformers", "torch")


def facts(*packages: str) -> dict:
    """Processor, cores, memory, system and versions (of PACKAGES and what is named besides)."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (*PACKAGES, *packages)},
    }


def cpu_model() -> str:
    """The processor's name, as Linux tells it."""
    return _cpuinfo("model name") or platform.processor()


def cpu_flags() -> list[str]:
    """Those of FLAGS that the processor has, as Linux tells it; on other systems none."""
    has = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [flag for flag in FLAGS if flag in has]


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor; "" elsewhere."""
    info = Path("/proc/cpuinfo")
    values = re.findall(rf"^{field}\s*: (.+)", info.read_text("utf-8"), re.MULTILINE) if info.exists() else []
    return values[0] if values else ""


def write(name: str, result: dict, *packages: str, folder: Path = RESULTS) -> Path:
    """Write a result with the machine's facts to benchmarks/results/NAME.json, or into another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": facts(*packages), **result}, indent=2) + "\n", encoding="utf-8")
    return path
