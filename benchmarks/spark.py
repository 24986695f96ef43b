"""Rows per second of `mlflow.pyfunc.spark_udf` on one core and on two, beside the model called directly.

python benchmarks/spark.py --model models:/slm-onnx@champion
Needs the extra `spark` and Java. The model is looked up in MLFLOW_TRACKING_URI, else in mlflow.db here.
"""

import argparse
import logging
import time

import mlflow
import pandas as pd

from helpers import scoring, tracking

COUNTRIES = ["Spain", "France", "Italy", "Japan", "Norway", "Peru", "Kenya", "Canada"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models:/slm-onnx@champion")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    mlflow.set_tracking_uri(tracking.default_uri())
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # spark_udf warns that env_manager="local" is local

    model = mlflow.pyfunc.load_model(options.model)
    template = model.unwrap_python_model().apply_chat_template
    ask = [f"What is the capital of {COUNTRIES[n % len(COUNTRIES)]}? ({n})" for n in range(options.rows)]
    table = pd.DataFrame({"prompt": [template([{"role": "user", "content": text}]) for text in ask]})
    params = {"max_new_tokens": options.tokens}
    print(f"{options.rows} rows, {options.tokens} tokens at most, {options.model}")
    print("| | start, s | table, s | rows/s |\n|---|---|---|---|")
    started = time.perf_counter()
    expected = model.predict(table, params=params)
    _line("the model itself, all cores", 0, time.perf_counter() - started, options.rows)
    del model
    for cores in (1, 2):
        started = time.perf_counter()
        session = scoring.spark_session(cores)
        answer = mlflow.pyfunc.spark_udf(
            session, options.model, env_manager="local", result_type="string", params=params,
            model_config={"threads": 1},
        )  # fmt: skip
        spread = session.createDataFrame(table.reset_index(names="row")).repartition(cores).cache()
        spread.limit(1).withColumn("answer", answer("prompt")).toPandas()  # workers and their libraries start
        ready = time.perf_counter()
        scored = spread.withColumn("answer", answer("prompt")).toPandas()
        done = time.perf_counter()
        session.stop()
        assert scored.sort_values("row")["answer"].tolist() == expected
        _line(f"Spark, {cores} core{'s' * (cores > 1)}", ready - started, done - ready, options.rows)


def _line(name: str, start: float, seconds: float, rows: int) -> None:
    print(f"| {name} | {start:.1f} | {seconds:.1f} | {rows / seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
