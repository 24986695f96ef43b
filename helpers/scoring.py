"""A Spark session for scoring tables on this machine; the scoring itself is MLflow's `spark_udf`."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# What a task hands the model at once: four of the wrapper's batches, which it sorts by length.
ROWS_PER_BATCH = 64
LOG_LINES = 15


def spark_session(cores: int) -> SparkSession:
    """Start Spark in this process, with room for `cores` tasks at a time; nothing listens beyond loopback.

    Each task loads the model once and keeps it for its partition, so spread a table over as many partitions
    as there are cores: `table.repartition(cores)`.

    Raises:
        RuntimeError: if pyspark or Java is missing, or Spark does not start; with the last lines of its log.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise RuntimeError("spark=True needs pyspark: uv pip install -e '.[spark]'") from None
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise RuntimeError("spark=True needs Java 17 or newer on PATH, or JAVA_HOME; none was found.")
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas >= 3")
    # Without it, workers run the first python3 on PATH.
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    settings = {
        "spark.sql.execution.arrow.maxRecordsPerBatch": ROWS_PER_BATCH,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    builder = SparkSession.builder.master(f"local[{cores}]").appName("score a table").config(map=settings)
    with tempfile.NamedTemporaryFile(prefix="spark-", suffix=".log") as log:
        try:
            with _errors_into(log.fileno()):
                return builder.getOrCreate()
        except Exception as error:
            last_lines = Path(log.name).read_text("utf-8", "replace").splitlines()[-LOG_LINES:]
            raise RuntimeError("\n".join([f"Spark did not start: {error}", *last_lines])) from None


@contextlib.contextmanager
def _errors_into(target: int) -> Iterator[None]:
    """Let processes that are started in this block write their errors to the file `target`.

    Java and its Python workers keep what they inherit: their start-up notes stay out of the notebook.
    """
    kept = os.dup(2)
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
