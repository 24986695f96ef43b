"""Which precision to ship: the same questions to every candidate, a gate, a promotion with its evidence."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import environment

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel

    from helpers.models.catalog import Model

QUESTIONS = Path(__file__).with_name("questions.json")
MAX_DROP = 0.05  # of accuracy: two of the forty questions
BASELINE = "slm-transformers"  # notebook 01's model: measured beside the candidates, never shipped
# Columns of a comparison that are measured, with their units; MB are 10**6 bytes.
MEASURED = (
    "accuracy",
    "agreement",
    "tokens_per_second",
    "first_token_ms",
    "load_seconds",
    "memory_mb",
    "size_mb",
)
_LONG_ANSWER = "Write a long story about a small robot that learns to read."


class GateError(ValueError):
    """A candidate that must not be promoted; its text says why."""


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost; `seconds` is the whole call."""

    text: str
    completion_tokens: int
    time_to_first_token: float
    seconds: float

    def rate(self, first: float) -> float:
        """Tokens per second after the first, which took `first` seconds; NaN where no other came."""
        rest, seconds = self.completion_tokens - 1, self.seconds - first
        return rest / seconds if rest > 0 and seconds > 0 else math.nan


def questions() -> pd.DataFrame:
    """The committed question set: columns `subject`, `question`, `answers` (list of accepted answers)."""
    import pandas as pd

    return pd.DataFrame(json.loads(QUESTIONS.read_text(encoding="utf-8"))["questions"])


def is_correct(text: str, accepted: list[str]) -> bool:
    """Whether `text` holds one of the accepted answers as whole words; case, accents, marks are ignored."""
    return any(_words(answer) in _words(text) for answer in accepted)


def reference_among(names: Iterable[str]) -> str:
    """The candidate that the others are held against: fp32, or the first where there is none.

    Raises:
        ValueError: if there is no candidate at all.
    """
    names = list(names)
    if not names:
        raise ValueError("There is no candidate: give at least one name with the URI of a logged model.")
    return "fp32" if "fp32" in names else names[0]


def compare(
    candidates: Mapping[str, str], model: Model, max_new_tokens: int = 24, rounds: int = 3
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Put the question set to every candidate; each becomes a run with its data, its model and its figures.

    Accuracy and agreement (share of answers that equal the reference's, word for word) come from one greedy
    answer a question, decoded in batches, scored by `mlflow.genai.evaluate`. Speed comes from single calls,
    in turns over the candidates so that a busy moment of the machine hits all of them, and is the median of
    `rounds`. Load time and memory come from a fresh process per candidate: in this one, a model would be
    given the memory that an earlier one had freed, and seem to need less.

    Args:
        candidates: name → model URI; `fp32`, or else the first, is the reference. Models of `Phi3Model`, or
            logged with `mlflow.transformers` and task `llm/v1/chat` (which have no stream: their time to
            first token is the time of an answer of one token).
        model: the catalogue entry, for its system message.
        max_new_tokens: longest answer to a question.
        rounds: single calls per candidate.
    Returns:
        The table: one row a candidate, the columns `MEASURED`, `model_id` and `run_id`. And the answers: one
        row a question, one column a candidate.
    Raises:
        ValueError: if there is no candidate.
    """
    import mlflow
    import pandas as pd

    reference = reference_among(candidates)
    asked = questions()["question"].tolist()
    chats = [model.messages(question) for question in asked]
    story = model.messages(_LONG_ANSWER)
    folders = {name: Path(mlflow.artifacts.download_artifacts(uri)) for name, uri in candidates.items()}
    footprints = {name: footprint(folder, story) for name, folder in folders.items()}
    with _quiet():
        loaded = {name: _load(folder) for name, folder in folders.items()}
        answers = pd.DataFrame(
            {
                name: [a.text for a in answer(served, chats, max_new_tokens)]
                for name, served in loaded.items()
            },
            index=pd.Index(asked, name="question"),
        )
        speeds = _speeds(loaded, story, rounds)
        rows = {}
        for name, uri in candidates.items():
            model_id = mlflow.models.get_model_info(uri).model_id
            with mlflow.start_run(run_name=name, nested=mlflow.active_run() is not None) as run:
                mlflow.log_params(
                    {
                        "candidate": name,
                        "model": model.key,
                        "max_new_tokens": max_new_tokens,
                        "rounds": rounds,
                    }
                )
                quality = score(answers[name], answers[reference], model_id)
                costs = speeds[name] | footprints[name] | {"size_mb": _size_mb(folders[name])}
                mlflow.log_metrics(costs, model_id=model_id)
            rows[name] = quality | costs | {"model_id": model_id, "run_id": run.info.run_id}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("candidate")
    return table[[*MEASURED, "model_id", "run_id"]], answers


def score(answers: pd.Series, reference: pd.Series, model_id: str | None = None) -> dict[str, float]:
    """Score one candidate's answers with `mlflow.genai.evaluate` in the active run, one trace a question.

    The questions are an MLflow dataset, named after its content, so that equal digests mean equal questions.
    The answers were made before, in batches: a trace holds question, answer and verdicts, but its duration is
    that of a look-up, and it has no tokens. `compare` measures speed with single calls.

    Args:
        answers: question → answer.
        reference: question → the reference's answer.
        model_id: the logged model that answered; the run and the metrics are linked to it.
    Returns:
        `accuracy` and `agreement`, both from 0 to 1.
    """
    import mlflow
    from mlflow.genai.scorers import scorer

    @mlflow.trace(name="answer")
    def look_up(question: str) -> str:
        return answers[question]

    @scorer
    def accuracy(outputs: str, expectations: dict) -> bool:
        return is_correct(outputs, expectations["answers"])

    @scorer
    def agreement(inputs: dict, outputs: str) -> bool:
        return _words(outputs) == _words(reference[inputs["question"]])

    with _quiet():
        result = mlflow.genai.evaluate(
            data=_dataset(), predict_fn=look_up, scorers=[accuracy, agreement], model_id=model_id
        )
    return {name: float(result.metrics[f"{name}/mean"]) for name in ("accuracy", "agreement")}


def gate(table: pd.DataFrame, max_drop: float = MAX_DROP) -> pd.DataFrame:
    """Pass the rows whose accuracy is at most `max_drop` below the reference's; the fastest of them wins.

    The `BASELINE` has its row, and may be the reference, but never wins.

    Args:
        table: `accuracy` (0 to 1) and `tokens_per_second`, indexed by candidate.
        max_drop: share of accuracy that may be lost, 0.05 for 5 points.
    Returns:
        The same table with `passes`, `winner` (True in one row) and `reason`.
    Raises:
        ValueError: if the table is empty.
        GateError: if there is nothing to ship: no row passes but the baseline's.
    """
    reference = reference_among(table.index)
    drop = table.loc[reference, "accuracy"] - table["accuracy"]
    passes = drop <= max_drop + 1e-9  # 0.05 and the like are not exact in binary; NaN never passes
    shippable = passes & (table.index != BASELINE)
    if not shippable.any():
        measured = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in table["accuracy"].items())
        raise GateError(
            f"No candidate is at most {max_drop * 100:g} points less accurate than {reference}: {measured}. "
            "Measure another precision, or allow more with max_drop."
        )
    winner = table.loc[shippable, "tokens_per_second"].idxmax()

    def reason(name: str) -> str:
        points, speeds = drop[name] * 100, table["tokens_per_second"]
        level = (
            "level with"
            if abs(points) < 0.05
            else f"{abs(points):.1f} points {'below' if points > 0 else 'above'}"
        )
        change = f"accuracy {table.loc[name, 'accuracy']:.1%}, {level} {reference}"
        if name == reference:
            change = f"accuracy {table.loc[name, 'accuracy']:.1%}, the reference"
        if not passes[name]:
            return f"{change}: more than the {max_drop * 100:g} allowed"
        if name == BASELINE:
            return f"{change}; the baseline, not for shipping"
        if name == winner:
            return f"{change}; the fastest of those that pass"
        return f"{change}; slower than {winner} ({speeds[name]:.0f} against {speeds[winner]:.0f} tokens/s)"

    names = table.index.to_series()
    return table.assign(passes=passes, winner=names == winner, reason=names.map(reason))


def promote(
    table: pd.DataFrame,
    candidate: str,
    version: ModelVersion,
    alias: str = "champion",
    max_drop: float = MAX_DROP,
) -> ModelVersion:
    """Give a registered version the alias, with the evidence as its tags; refuse one that fails the gate.

    Args:
        table: what `compare` returned.
        candidate: the row that speaks for this version.
        version: what `mlflow.register_model` returned for that candidate's model.
        alias: set on the version; the model before it keeps its version and loses the alias.
        max_drop: see `gate`.
    Returns:
        The version as the registry now has it.
    Raises:
        GateError: if the candidate fails the gate or is the baseline, or the version is not the model that
            was measured.
    """
    from mlflow import MlflowClient
    from mlflow.models import get_model_info

    if candidate not in table.index:
        raise GateError(f"{candidate!r} was not measured; there are {', '.join(table.index)}.")
    verdict = gate(table, max_drop).loc[candidate]
    if not verdict["passes"] or candidate == BASELINE:
        raise GateError(f"{candidate} is not promoted to @{alias}: {verdict['reason']}.")
    # An SQL registry keeps no model_id with the version, but the model itself does.
    registered = get_model_info(f"models:/{version.name}/{version.version}").model_id
    if registered != verdict["model_id"]:
        raise GateError(
            f"Version {version.version} of {version.name} is model {registered}, but {candidate} was "
            f"measured on {verdict['model_id']}. Register that one."
        )
    client = MlflowClient()
    evidence = {name: f"{verdict[name]:.4g}" for name in MEASURED}
    evidence |= {"candidate": candidate, "gate": verdict["reason"], "evaluation_run": verdict["run_id"]}
    for key, value in evidence.items():
        client.set_model_version_tag(version.name, version.version, key, value)
    client.set_registered_model_alias(version.name, alias, version.version)
    return client.get_model_version(version.name, version.version)


def answer(loaded: PyFuncModel, chats: list[list[dict[str, str]]], max_new_tokens: int) -> list[Answer]:
    """The greedy answers of a loaded model to chats (lists of `{"role", "content"}`), in order."""
    if "transformers" in loaded.metadata.flavors:
        return _answer_with_pipeline(loaded.get_raw_model(), chats, max_new_tokens)
    wrapper = loaded.unwrap_python_model()
    prompts = [wrapper.encode_messages(chat) for chat in chats]
    completions = wrapper.generate(prompts, {"max_new_tokens": max_new_tokens, "temperature": 0.0})
    return [
        Answer(c.text, c.completion_tokens, c.time_to_first_token, c.seconds)
        for c in (completion.result() for completion in completions)
    ]


def footprint(folder: Path, chat: list[dict[str, str]]) -> dict[str, float]:
    """Load a model in a fresh process and let it answer once.

    Args:
        folder: a model as MLflow saved it, on this machine.
        chat: what to ask.
    Returns:
        `load_seconds`: `mlflow.pyfunc.load_model`, with the imports it causes. `memory_mb`: what loading and
        answering added to the resident set of a process that has only imported MLflow.
    Raises:
        RuntimeError: if the process fails, with the last line it printed.
    """
    command = [sys.executable, "-m", "helpers.evaluation", str(folder), json.dumps(chat)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise RuntimeError(f"The model in {folder} could not be loaded and asked: {lines[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def _footprint_here(folder: str, chat: list[dict[str, str]]) -> dict[str, float]:
    import mlflow.pyfunc
    import psutil

    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    loaded = mlflow.pyfunc.load_model(folder)
    load_seconds = time.perf_counter() - start
    answer(loaded, [chat], max_new_tokens=16)
    return {"load_seconds": load_seconds, "memory_mb": (process.memory_info().rss - before) / 1e6}


def _answer_with_pipeline(pipeline, chats: list, max_new_tokens: int) -> list[Answer]:
    """The pipeline itself: behind `predict` it cannot be told to batch (unless it was logged so)."""
    start = time.perf_counter()
    texts = [
        row[0]["generated_text"]
        for row in pipeline(
            chats, batch_size=16, max_new_tokens=max_new_tokens, do_sample=False, return_full_text=False
        )
    ]
    seconds = time.perf_counter() - start
    counts = [len(ids) for ids in pipeline.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [Answer(text, n, float("nan"), seconds) for text, n in zip(texts, counts, strict=True)]


def _speeds(loaded: Mapping[str, PyFuncModel], chat: list, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over single calls of up to 24 tokens, one candidate after the other in every round."""
    import numpy as np

    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in loaded}
    for _ in range(rounds):
        for name, served in loaded.items():
            (whole,) = answer(served, [chat], max_new_tokens=24)
            first = whole.time_to_first_token
            if math.isnan(first):  # no stream
                first = answer(served, [chat], max_new_tokens=1)[0].seconds
            samples[name].append((first, whole.rate(first)))
    medians = {name: np.median(pairs, axis=0) for name, pairs in samples.items()}
    return {
        name: {"first_token_ms": float(first) * 1e3, "tokens_per_second": float(rate)}
        for name, (first, rate) in medians.items()
    }


def _load(folder: Path) -> PyFuncModel:
    import mlflow
    from mlflow.models import Model as Saved

    if "transformers" in Saved.load(folder).flavors:
        import transformers

        transformers.utils.logging.disable_progress_bar()
    return mlflow.pyfunc.load_model(str(folder))


def _dataset():
    """The question set in the tracking store, made there the first time.

    MLflow keeps no name unique: runs that start together may each make one, and one that is killed leaves an
    empty one. The oldest that is whole counts.
    """
    from mlflow.genai import datasets

    content = QUESTIONS.read_bytes()
    name = f"{json.loads(content)['name']}-{hashlib.sha256(content).hexdigest()[:8]}"
    records = [
        {
            "inputs": {"question": row.question},
            "expectations": {"answers": row.answers},
            "tags": {"subject": row.subject},
        }
        for row in questions().itertuples()
    ]

    def whole() -> list:
        found = datasets.search_datasets(filter_string=f"name = '{name}'", order_by=["created_time ASC"])
        return [dataset for dataset in found if len(dataset.to_df()) == len(records)]

    if not whole():
        datasets.create_dataset(name=name, tags={"licence": "MIT"}).merge_records(records)
    return whole()[0]  # the digest is computed when the records are read back


def _size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _words(text: str) -> str:
    """Lower-case words between single spaces, with a space at either end; accents and marks are gone."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = re.findall(r"[^\W_]+", plain.casefold())
    return f" {' '.join(words)} "


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`evaluate` with one worker and no rate limit; no progress bar and no closing lines in the notebook."""
    from mlflow.genai.evaluation import harness

    settings = {
        "MLFLOW_GENAI_EVAL_MAX_WORKERS": "1",
        "MLFLOW_GENAI_EVAL_PREDICT_RATE_LIMIT": "0",  # by default ten calls a second
        "MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION": "true",  # by default one more call, untraced
    }
    bar, harness.tqdm = harness.tqdm, None
    try:
        with environment.variables(**settings), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        harness.tqdm = bar


if __name__ == "__main__":
    print(json.dumps(_footprint_here(sys.argv[1], json.loads(sys.argv[2]))))
