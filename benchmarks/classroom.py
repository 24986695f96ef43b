"""Thirty learners log to the classroom's server at once: what is lost, what fails, how long a call takes.

    python benchmarks/classroom.py [--learners 30] [--steps 20] [--workers 4] [--output FOLDER]

About one minute on two cores. Every learner is a process with an experiment and a workspace of its own.
They wait for each other, then each logs RUNS runs (parameters, a metric at every step, a file, a tag) and
registers the toy ONNX model with an alias, as notebook 02 does. Afterwards everything is read back from the
server, and its log tells what it answered. Then all of them try the nine exercises at once, fail, retry and
solve, and the board is compared with what they did. Clients and server share this machine's cores, so a real
room is faster. Prints what it found and writes benchmarks/results/classroom.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import machine

from helpers import tracking  # first: importing helpers turns telemetry off
from helpers.models import catalog, export, onnx_chat_model
from helpers.workshop import board, classroom

import mlflow  # isort: skip

RUNS = 3
FILE = bytes(range(256)) * 400  # 100 kB, as a figure has
# What a learner's block of `mlflow.start_run` calls; the model is told apart.
LOGGING = ("start_run", "log_params", "log_metric", "log_artifact", "set_tag", "end_run")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--learners", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="metrics of a run (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="of the server (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=machine.RESULTS, help="folder of classroom.json")
    options = parser.parse_args()
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    export.onnx_folder(catalog.find("tiny-phi3"), "fp32")
    with tempfile.TemporaryDirectory(prefix="room-") as place:
        folder = Path(place)
        folder.chmod(0o755)  # root's PostgreSQL runs as another user
        with classroom.running(folder, port=None, workers=options.workers) as uri:
            result = measure(uri, folder, options.learners, options.steps)
            result["exercises"] = exercises(uri, options.learners)
    result = {"server workers": options.workers, **result}
    print(json.dumps(result, indent=2))
    machine.write("classroom", result, "psycopg2-binary", "uvicorn", folder=options.output)


def measure(uri: str, folder: Path, learners: int, steps: int) -> dict:
    """Let all learners log at once to the server at `uri` over `folder`; times in ms unless they say s."""
    log = folder / "mlflow.log"
    before = log.stat().st_size
    began = time.perf_counter()
    lessons = together(learn, uri, learners, steps)
    seconds = time.perf_counter() - began
    whole = [kept(uri, lesson, steps) for lesson in lessons]
    answers = re.findall(r'HTTP/[\d.]+" (\d{3})', log.read_bytes()[before:].decode(errors="replace"))
    calls = [call for lesson in lessons for call in lesson["calls"]]
    kinds = {kind for kind, _ in calls}
    logging = [taken for kind, taken in calls if kind in LOGGING]
    return {
        "learners": learners,
        "runs logged": sum(len(lesson["runs"]) for lesson in lessons),
        "runs expected": learners * RUNS,
        "runs lost": learners * RUNS - sum(one["runs"] for one in whole),
        "models registered": sum(one["model"] for one in whole),
        "learners with an error": sum(bool(lesson["error"]) for lesson in lessons),
        "errors": sorted({lesson["error"].splitlines()[-1] for lesson in lessons if lesson["error"]}),
        "requests answered": len(answers),
        "answered 4xx": sum(status.startswith("4") for status in answers),
        "answered 5xx": sum(status.startswith("5") for status in answers),
        "the whole room, s": round(seconds, 1),
        "logging calls": len(logging),
        "logging call, ms": spread(logging),
        "by call, ms": {kind: spread([t for k, t in calls if k == kind]) for kind in sorted(kinds)},
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum, in milliseconds."""
    if len(seconds) < 2:
        return {}
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
    figures = {"p50": statistics.median(seconds), "p95": p95, "max": max(seconds)}
    return {name: round(1000 * value, 1) for name, value in figures.items()}


# ---- a learner ----


def together(target: Callable, uri: str, learners: int, *args: object) -> list[dict]:
    """What all learners put into the queue, each in a process that has nothing but modules from here."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mlflow.pyfunc", "helpers.models.onnx_chat_model", "helpers.tracking"])
    start_line, answers = processes.Barrier(learners), processes.Queue()
    room = [
        processes.Process(target=target, args=(uri, number, *args, start_line, answers))
        for number in range(learners)
    ]
    for learner in room:
        learner.start()
    lessons = [answers.get(timeout=900) for _ in room]
    for learner in room:
        learner.join()
    return sorted(lessons, key=lambda lesson: lesson["experiment"])


def learn(uri: str, number: int, steps: int, start_line, answers) -> None:
    """One learner's lesson; puts its experiment, run ids, timed calls and error, if any, into `answers`."""
    calls: list[tuple[str, float]] = []
    runs: list[str] = []
    experiment, error = f"learner-{number:02}", ""
    warnings.simplefilter("ignore")  # that the model has no input example

    def timed(call: Callable, *args, kind: str = "", **options):
        began = time.perf_counter()
        result = call(*args, **options)
        calls.append((kind or call.__name__, time.perf_counter() - began))
        return result

    os.environ.pop("MLFLOW_WORKSPACE", None)  # a learner has only what the notebook gives
    try:
        start_line.wait(timeout=300)
        timed(tracking.connect, uri, experiment)
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "figure.bin"
            file.write_bytes(FILE)
            for _ in range(RUNS):
                runs.append(timed(mlflow.start_run).info.run_id)
                timed(mlflow.log_params, {"model": "tiny-phi3", "learner": number, "steps": steps})
                for step in range(steps):
                    timed(mlflow.log_metric, "tokens_per_second", number + step / 100, step=step)
                timed(mlflow.set_tag, "answer", "The capital of Spain is Madrid.")
                timed(mlflow.log_artifact, str(file))
                if len(runs) == RUNS:
                    timed(register, kind="log and register a model")
                timed(mlflow.end_run)
    except Exception:
        error = traceback.format_exc()
    answers.put({"experiment": experiment, "runs": runs, "calls": calls, "error": error})


def register() -> None:
    """Log the toy model behind the wrapper and make it the candidate, under the name that all use."""
    example = {"prompt": "What is the capital of Spain?"}
    info = mlflow.pyfunc.log_model(
        name="phi3-mlflow-model",
        signature=mlflow.models.infer_signature(example, ["Madrid"], onnx_chat_model.DEFAULT_PARAMS),
        python_model=onnx_chat_model.__file__,
        artifacts={"phi3-mini-onnx": str(export.onnx_folder(catalog.find("tiny-phi3"), "fp32"))},
        pip_requirements=tracking.requirements("mlflow-skinny", "pandas", "onnxruntime-genai"),
        registered_model_name="slm-onnx",
    )
    mlflow.MlflowClient().set_registered_model_alias("slm-onnx", "candidate", info.registered_model_version)


# ---- exercises ----


def exercises(uri: str, learners: int, reads: int = 7) -> dict:
    """Let all learners try all exercises at once, and compare the board with what they did."""
    began = time.perf_counter()
    tried = together(solve, uri, learners)
    seconds = time.perf_counter() - began
    client, lost, strange, times = mlflow.MlflowClient(uri), 0, 0, []
    for _ in range(reads):
        began = time.perf_counter()
        shown = {learner.name: learner.outcomes for learner in board.read(client)}
        times.append(time.perf_counter() - began)
    for one in tried:
        outcomes = shown.get(one["experiment"], {})
        for exercise, (attempts, solved) in one["exercises"].items():
            found = outcomes.get(exercise, board.Outcome(False, 0, 0, ""))
            lost += max(0, attempts - found.attempts) + (solved and not found.solved)
            strange += max(0, found.attempts - attempts) + (found.solved and not solved)
            strange += not solved and found.hint != f"a hint for {one['experiment']}"
    return {
        "outcomes": sum(attempts for one in tried for attempts, _ in one["exercises"].values()),
        "outcomes lost": lost,
        "outcomes attributed to another": strange,
        "all outcomes sent, s": round(seconds, 1),
        "a check waits, ms": spread([taken for one in tried for taken in one["waited"]]),
        "board read, ms": {"min": round(1000 * min(times), 1), **spread(times)},
    }


def solve(uri: str, number: int, start_line, answers) -> None:
    """One learner's exercises: some solved at once, some after wrong attempts, some not at all."""
    experiment = f"learner-{number:02}"
    todo = {
        exercise: (1 + (number + place) % 3, (number + place) % 5 != 0)
        for place, exercise in enumerate(board.EXERCISES)
    }
    waited = []
    os.environ.pop("MLFLOW_WORKSPACE", None)
    start_line.wait(timeout=300)
    tracking.connect(uri, experiment)
    for exercise, (attempts, solved) in todo.items():
        for attempt in range(1, attempts + 1):
            began = time.perf_counter()
            board.report(exercise, solved and attempt == attempts, f"a hint for {experiment}")
            waited.append(time.perf_counter() - began)
    board.wait(600)
    answers.put({"experiment": experiment, "exercises": todo, "waited": waited})


# ---- what is there afterwards ----


def kept(uri: str, lesson: dict, steps: int) -> dict[str, int]:
    """How many of a learner's runs are whole on the server, and whether the learner's own model is."""
    tracking.connect(uri, lesson["experiment"])
    client = mlflow.MlflowClient()
    found = mlflow.search_runs(output_format="list")
    runs = sum(run.info.run_id in lesson["runs"] and is_whole(client, run, steps) for run in found)
    try:
        version = client.get_model_version_by_alias("slm-onnx", "candidate")
    except mlflow.MlflowException:
        return {"runs": runs, "model": 0}
    return {"runs": runs, "model": int(version.run_id in lesson["runs"] and version.status == "READY")}


def is_whole(client: mlflow.MlflowClient, run, steps: int) -> bool:
    """Whether a run has ended with its parameters, every step of its metric, its tag and its file."""
    history = client.get_metric_history(run.info.run_id, "tokens_per_second")
    number = int(run.data.params.get("learner", -1))
    with tempfile.TemporaryDirectory() as place:
        file = Path(client.download_artifacts(run.info.run_id, "figure.bin", place))
        same = hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(FILE).digest()
    return (
        same
        and run.info.status == "FINISHED"
        and len(run.data.params) == 3
        and run.data.tags.get("answer", "").endswith("Madrid.")
        and [(point.step, point.value) for point in history] == [(s, number + s / 100) for s in range(steps)]
    )


if __name__ == "__main__":
    main()
