"""The steps of the rehearsal. Each runs in a process of its own, which ends with it: its memory is its own.

    python benchmarks/rehearsal_steps.py STEP FOLDER GEOMETRY RESULT

writes the step's figures as JSON to RESULT: seconds of what is measured (imports are not), tokens per second,
bytes of the model. A step begins by removing what an interrupted try of its own has left.
"""

import json
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import in_place
import random_phi3

from helpers import tracking
from helpers.models import folders, onnx_chat_model

QUESTION = [{"role": "user", "content": "What is the capital of Spain?"}]
TOKENS = {"transformers": 16, "onnx": 64}  # of each answer
ROWS = 8  # of the batch
ARRAY_BYTES = 2**30  # larger than any cache


class Stage:
    """Where the files of one rehearsal are."""

    def __init__(self, folder: Path, geometry: random_phi3.Geometry):
        self.folder, self.geometry = folder, geometry
        self.checkpoint, self.onnx = folder / "checkpoint", folder / "onnx-int4"

    def models(self, step: str) -> Path:
        return self.folder / "models" / step

    @contextmanager
    def run(self, step: str):
        """A run whose models go to a folder of this step's own, emptied before."""
        import mlflow

        shutil.rmtree(self.models(step), ignore_errors=True)
        tracking.connect(f"sqlite:///{self.folder}/mlflow.db", "rehearsal")
        if mlflow.get_experiment_by_name(step) is None:
            mlflow.create_experiment(step, artifact_location=self.models(step).as_uri())
        mlflow.set_experiment(step)
        with mlflow.start_run(run_name=step):
            yield

    def load(self, step: str):
        """The model that `step` logged, loaded by MLflow, and the seconds that took."""
        import mlflow

        tracking.connect(f"sqlite:///{self.folder}/mlflow.db", "rehearsal")
        found = mlflow.search_logged_models(
            [mlflow.get_experiment_by_name(step).experiment_id],
            order_by=[{"field_name": "creation_timestamp", "ascending": False}],
            max_results=1,
            output_format="list",
        )
        started = time.perf_counter()
        return mlflow.pyfunc.load_model(f"models:/{found[0].model_id}"), time.perf_counter() - started


def bandwidth(stage: Stage) -> dict:
    """How fast all cores together read memory: the best of several passes over an array.

    Of numpy's reductions, bitwise or reads fastest: it does the least beside reading.
    """
    import numpy as np

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = np.array_split(np.ones(ARRAY_BYTES // 8, np.int64), cores)
    seconds = []
    with ThreadPoolExecutor(cores) as threads:
        for _ in range(30):
            started = time.perf_counter()
            list(threads.map(np.bitwise_or.reduce, parts))
            seconds.append(time.perf_counter() - started)
    rates = [ARRAY_BYTES / each for each in seconds]
    return {
        "seconds": sum(seconds),
        "bytes_per_second": max(rates),
        "median_bytes_per_second": statistics.median(rates),
    }


def bandwidth_again(stage: Stage) -> dict:
    return bandwidth(stage)


def checkpoint(stage: Stage) -> dict:
    """Draw the weights and write them."""
    shutil.rmtree(stage.checkpoint, ignore_errors=True)
    started = time.perf_counter()
    random_phi3.write(stage.checkpoint, stage.geometry)
    return {"seconds": time.perf_counter() - started, "model_bytes": folders.total_size(stage.checkpoint)}


def pipeline(stage: Stage) -> dict:
    """Load the checkpoint and ask it directly, as notebook 01 does."""
    started = time.perf_counter()
    chatbot = _pipeline(stage)
    loaded = time.perf_counter() - started
    started = time.perf_counter()
    reply = chatbot(QUESTION, max_new_tokens=TOKENS["transformers"], do_sample=False)
    seconds = time.perf_counter() - started
    assert reply[0]["generated_text"][-1]["content"].strip()
    return {
        "seconds": loaded + seconds,
        "load_seconds": loaded,
        "tokens_per_second": TOKENS["transformers"] / seconds,
        "bytes_per_token": _checkpoint_bytes_per_token(stage),
    }


def transformers_log(stage: Stage) -> dict:
    """`mlflow.transformers.log_model`, much as in notebook 01."""
    import mlflow

    chatbot = _pipeline(stage)
    with stage.run("transformers_log"):
        started = time.perf_counter()
        mlflow.transformers.log_model(chatbot, name="phi3-mlflow-model", **_transformers_contract())
        seconds = time.perf_counter() - started
    return _logged(stage, "transformers_log", seconds, stage.checkpoint, keep=False)


def transformers_log_in_place(stage: Stage) -> dict:
    """The same by `mlflow.transformers.save_model` into the store's own folder."""
    import mlflow

    chatbot = _pipeline(stage)
    with stage.run("transformers_log_in_place"):
        started = time.perf_counter()
        with in_place.model("phi3-mlflow-model") as place:
            mlflow.transformers.save_model(chatbot, **place, **_transformers_contract())
        seconds = time.perf_counter() - started
    return _logged(stage, "transformers_log_in_place", seconds, stage.checkpoint)


def transformers_answer(stage: Stage) -> dict:
    """Load what was logged and ask it through OpenAI's contract."""
    loaded, load_seconds = stage.load("transformers_log_in_place")
    started = time.perf_counter()
    (completion,) = loaded.predict({"messages": QUESTION})
    seconds = time.perf_counter() - started
    tokens = completion["usage"]["completion_tokens"]
    assert tokens == TOKENS["transformers"], completion
    return {
        "seconds": load_seconds + seconds,
        "load_seconds": load_seconds,
        "tokens_per_second": tokens / seconds,
        "bytes_per_token": _checkpoint_bytes_per_token(stage),
    }


def onnx(stage: Stage) -> dict:
    """Convert the checkpoint as the published folder was: round to nearest, blocks of 32, int8 arithmetic."""
    import lean_builder

    shutil.rmtree(stage.onnx, ignore_errors=True)
    started = time.perf_counter()
    lean_builder.main(
        *("-m", "none", "-i", stage.checkpoint, "-o", stage.onnx, "-p", "int4", "-e", "cpu"),
        *("-c", stage.folder / "tmp" / "cache"),
    )
    return {"seconds": time.perf_counter() - started, "model_bytes": folders.total_size(stage.onnx)}


def onnx_log(stage: Stage) -> dict:
    """`mlflow.pyfunc.log_model`, much as in notebook 02: MLflow loads the model and tries the example."""
    import mlflow

    with stage.run("onnx_log"):
        started = time.perf_counter()
        mlflow.pyfunc.log_model(name="phi3-mlflow-model", **_onnx_contract(stage))
        seconds = time.perf_counter() - started
    return _logged(stage, "onnx_log", seconds, stage.onnx, keep=False)


def onnx_log_in_place(stage: Stage) -> dict:
    """The same by `mlflow.pyfunc.save_model` into the store's own folder, which loads nothing."""
    import mlflow

    with stage.run("onnx_log_in_place"):
        started = time.perf_counter()
        with in_place.model("phi3-mlflow-model") as place:
            mlflow.pyfunc.save_model(**place, **_onnx_contract(stage))
        seconds = time.perf_counter() - started
    return _logged(stage, "onnx_log_in_place", seconds, stage.onnx)


def onnx_answer(stage: Stage) -> dict:
    """Load what was logged; ask it for one answer, a stream and a batch."""
    loaded, load_seconds = stage.load("onnx_log_in_place")
    wrapper = loaded.unwrap_python_model()
    prompt = wrapper.apply_chat_template(QUESTION)
    params = {"max_new_tokens": TOKENS["onnx"]}
    started = time.perf_counter()
    (answer,) = loaded.predict({"prompt": prompt}, params=params)
    first_answer = time.perf_counter() - started
    assert answer
    pieces, streamed = _timed(lambda: list(loaded.predict_stream({"prompt": prompt}, params=params)))
    assert "".join(pieces) == answer, "the stream is not the answer"
    rows, batch = _timed(lambda: loaded.predict({"prompt": [prompt] * ROWS}, params=params))
    assert rows == [answer] * ROWS, "a row's answer depends on its batch"
    decoded = [wrapper.generate([prompt], params)[0].result() for _ in range(3)]
    assert {row.completion_tokens for row in decoded} == {TOKENS["onnx"]}
    rates = [(row.completion_tokens - 1) / (row.seconds - row.time_to_first_token) for row in decoded]
    return {
        "seconds": load_seconds + first_answer + streamed + batch,
        "load_seconds": load_seconds,
        "tokens_per_second": statistics.median(rates),
        "time_to_first_token": statistics.median(row.time_to_first_token for row in decoded),
        "answer_tokens_per_second": TOKENS["onnx"] / first_answer,
        "stream_tokens_per_second": TOKENS["onnx"] / streamed,
        "batch_tokens_per_second": ROWS * TOKENS["onnx"] / batch,
        "bytes_per_token": _onnx_bytes_per_token(stage),
    }


def _pipeline(stage: Stage):
    import transformers

    return transformers.pipeline("text-generation", model=str(stage.checkpoint), dtype="bfloat16")


def _transformers_contract() -> dict:
    from huggingface_hub import ModelCard

    return {
        "task": "llm/v1/chat",
        "model_config": {"max_new_tokens": TOKENS["transformers"], "do_sample": False},
        "pip_requirements": tracking.requirements("mlflow", "transformers", "torch", "accelerate"),
        "model_card": ModelCard("---\nlicense: mit\n---\nrandom weights"),
    }


def _onnx_contract(stage: Stage) -> dict:
    from mlflow.models import infer_signature

    example, defaults = {"prompt": "Hi"}, onnx_chat_model.DEFAULT_PARAMS | {"max_new_tokens": 8}
    return {
        "python_model": onnx_chat_model.__file__,
        "artifacts": {"phi3-mini-onnx": str(stage.onnx)},
        "signature": infer_signature(example, ["Hi"], defaults),
        "input_example": (example, defaults),
        "pip_requirements": tracking.requirements("mlflow-skinny", "pandas", "onnxruntime-genai"),
    }


def _logged(stage: Stage, step: str, seconds: float, model: Path, keep: bool = True) -> dict:
    """Figures of a logging step; without `keep` its files go, as the next step logs them again."""
    size = folders.total_size(stage.models(step))
    if not keep:
        shutil.rmtree(stage.models(step))
    return {"seconds": seconds, "logged_bytes": size, "model_bytes": folders.total_size(model)}


def _timed(work):
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _checkpoint_bytes_per_token(stage: Stage) -> int:
    """Of the first matrix a token reads one row, of the others everything."""
    geometry = stage.geometry
    return geometry.checkpoint_bytes - 2 * geometry.vocabulary * geometry.hidden


def _onnx_bytes_per_token(stage: Stage) -> int:
    """The same in the ONNX file, by the lengths that it states for its weights."""
    import onnx

    graph = onnx.load(stage.onnx / "model.onnx", load_external_data=False).graph
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    return sum(
        int(entry.value)
        for weight in graph.initializer
        if weight.name not in looked_up
        for entry in weight.external_data
        if entry.key == "length"
    )


STEPS = {
    step.__name__: step
    for step in (
        bandwidth,
        checkpoint,
        pipeline,
        transformers_log,
        transformers_log_in_place,
        transformers_answer,
        onnx,
        onnx_log,
        onnx_log_in_place,
        bandwidth_again,
        onnx_answer,
    )
}

if __name__ == "__main__":
    name, folder, geometry, result = sys.argv[1:]
    figures = STEPS[name](Stage(Path(folder), random_phi3.read(geometry)))
    Path(result).write_text(json.dumps(figures), encoding="utf-8")
