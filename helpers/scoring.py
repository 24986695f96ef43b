"""A Spark session for scoring tables, here or on a cluster; the scoring itself is MLflow's `spark_udf`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from helpers import SETTINGS, processes

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# What a task hands the model at once: four of the wrapper's batches, which it sorts by length.
ROWS_PER_BATCH = 64
WORKER_SECONDS = 120  # how long a cluster may take to give this process its first worker
LOG_LINES = 15


def spark_session(where: bool | str = True) -> SparkSession:
    """Start Spark in this process; before a cluster, wait until one of its workers takes work.

    Spread a table over as many partitions as there are cores: `table.repartition(…defaultParallelism)`. On
    this machine each task loads the model once; on a cluster each Python worker does, and keeps it.

    Args:
        where: True for all cores of this machine, `local[2]` for two; nothing listens beyond loopback then.
            Or the address of a master, such as `spark://host:7077`. Its workers need the same Python version
            and the model's packages: at the path of this interpreter, unless PYSPARK_PYTHON names another.
    Raises:
        RuntimeError: if pyspark or Java is missing, Spark does not start (with the last lines of its log), or
            no worker takes work within WORKER_SECONDS.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise RuntimeError(f"spark={where} needs pyspark: uv pip install -e '.[spark]'") from None
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise RuntimeError(f"spark={where} needs Java 17 or newer on PATH, or JAVA_HOME; none was found.")
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas >= 3")
    master = "local[*]" if where is True else where
    builder = SparkSession.builder.master(master).appName("score a table").config(map=_settings())
    with tempfile.NamedTemporaryFile(prefix="spark-", suffix=".log") as log:
        try:
            with processes.variables(**_variables(master)), _errors_into(log.fileno()):
                session = builder.getOrCreate()
        except Exception as error:
            log.seek(0)
            last_lines = log.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
            raise RuntimeError("\n".join([f"Spark did not start: {error}", *last_lines])) from None
    if not master.startswith("local"):
        _wait_for_worker(session, master)
    return session


def _settings() -> dict[str, object]:
    return {
        "spark.sql.execution.arrow.maxRecordsPerBatch": ROWS_PER_BATCH,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # A worker on another machine does not import this package: no telemetry and no pickle there either.
        **{f"spark.executorEnv.{name}": os.environ[name] for name in SETTINGS},
    }


def _variables(master: str) -> dict[str, str]:
    """The environment that Spark starts with."""
    here = master.startswith("local")
    elsewhere = None if here else os.environ.get("PYSPARK_PYTHON")
    # Without it, workers run the first python3 on PATH.
    chosen = {"PYSPARK_PYTHON": elsewhere or sys.executable}
    if here or processes.is_loopback(re.sub(r"\w+://|:\d+.*", "", master)):
        chosen["SPARK_LOCAL_IP"] = "127.0.0.1"
    return chosen


def _wait_for_worker(session: SparkSession, master: str) -> None:
    """Do nothing on a worker, once. Spark itself waits without end, and says so only in its log."""
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(session.sparkContext.parallelize([0], 1).count)
        try:
            work.result(WORKER_SECONDS)
        except Exception as error:
            session.stop()
            # Of an error in a worker, Java's many frames follow after these lines.
            reason = "\n".join(str(error).splitlines()[:LOG_LINES])
            if isinstance(error, TimeoutError):
                reason = f"none within {WORKER_SECONDS} s"
            raise RuntimeError(
                f"No worker of {master} took work: {reason}. The page of the master lists its workers; one "
                "needs a free core and 1 GB of memory. With spark=True this machine does the work."
            ) from None


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
