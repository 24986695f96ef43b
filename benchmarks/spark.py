"""Rows per second of `mlflow.pyfunc.spark_udf` on one core and on two, beside the model called directly.

    python benchmarks/spark.py [--repeats 5] [--model models:/slm-onnx@champion]

Needs the extra `spark` and Java. The model is looked up in MLFLOW_TRACKING_URI, else in mlflow.db here. The
three ways take turns, `--repeats` times; shown are medians, and written to benchmarks/results/spark.json.
"""

import argparse
import logging
import statistics
import time

import machine
import mlflow
import pandas as pd
from mlflow.store.artifact.utils.models import get_model_name_and_version

from helpers import scoring, tracking

COUNTRIES = ["Spain", "France", "Italy", "Japan", "Norway", "Peru", "Kenya", "Canada"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models:/slm-onnx@champion")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    mlflow.set_tracking_uri(tracking.default_uri())
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # spark_udf warns that env_manager="local" is local

    client = mlflow.MlflowClient()
    name, number = get_model_name_and_version(client, options.model)
    uri, tags = f"models:/{name}/{number}", client.get_model_version(name, number).tags
    model = mlflow.pyfunc.load_model(uri)
    template = model.unwrap_python_model().apply_chat_template
    ask = [f"What is the capital of {COUNTRIES[n % len(COUNTRIES)]}? ({n})" for n in range(options.rows)]
    table = pd.DataFrame({"prompt": [template([{"role": "user", "content": text}]) for text in ask]})
    params = {"max_new_tokens": options.tokens}
    expected = model.predict(table, params=params)
    runs = {"the model itself, all cores": [], "Spark, 1 core": [], "Spark, 2 cores": []}
    for _ in range(options.repeats):
        started = time.perf_counter()
        assert model.predict(table, params=params) == expected
        runs["the model itself, all cores"].append((0, time.perf_counter() - started))
        runs["Spark, 1 core"].append(score(uri, table, params, 1, expected))
        runs["Spark, 2 cores"].append(score(uri, table, params, 2, expected))
    figures = {name: _medians(pairs, options.rows) for name, pairs in runs.items()}
    print(f"{options.rows} rows, {options.tokens} tokens at most, {uri}")
    print(pd.DataFrame(figures).T.to_string())
    measured = {"version": f"{name}/{number}", **tags}  # its precision, or the candidate it was chosen as
    machine.write("spark", {"settings": vars(options), "model": measured, "figures": figures}, "pyspark")


def score(
    uri: str, table: pd.DataFrame, params: dict, cores: int, expected: list[str]
) -> tuple[float, float]:
    """Seconds to start Spark with its workers, and to score the table; the answers are the model's own."""
    started = time.perf_counter()
    session = scoring.spark_session(f"local[{cores}]")
    answer = mlflow.pyfunc.spark_udf(
        session, uri, env_manager="local", result_type="string", params=params, model_config={"threads": 1}
    )
    spread = session.createDataFrame(table.reset_index(names="row")).repartition(cores).cache()
    spread.limit(1).withColumn("answer", answer("prompt")).toPandas()  # workers and their libraries start
    ready = time.perf_counter()
    scored = spread.withColumn("answer", answer("prompt")).toPandas()
    done = time.perf_counter()
    session.stop()
    assert scored.sort_values("row")["answer"].tolist() == expected
    return ready - started, done - ready


def _medians(pairs: list[tuple[float, float]], rows: int) -> dict[str, float]:
    start, seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"start, s": round(start, 1), "table, s": round(seconds, 1), "rows/s": round(rows / seconds, 1)}


if __name__ == "__main__":
    main()
