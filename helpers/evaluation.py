"""Which precision to ship: the same questions to every candidate, a gate, a promotion with its evidence."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import candidates as measuring
from helpers import processes

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion

    from helpers.models.catalog import Model

QUESTIONS = Path(__file__).with_name("questions.json")
MAX_DROP = 0.05  # of accuracy: five of the hundred questions
# In nats, and as a share: a text of fp32's costs exp(0.05), so five per cent more perplexity. By Pinsker's
# inequality, no event's probability is then off by more than sqrt(0.05 / 2), 16 points, on average.
MAX_KL = 0.05
# Notebook 01's model: measured beside the candidates, never shipped.
BASELINE = "slm-transformers"
# The longest text that fp32 writes for the others to read.
TEXT_TOKENS = 64
# Columns of a comparison that are measured, with their units; MB are 10**6 bytes.
ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
DISTANCE = ("kl_divergence", "top1_agreement")
COSTS = ("tokens_per_second", "first_token_ms", "load_seconds", "memory_mb", "size_mb")
MEASURED = ACCURACY + DISTANCE + COSTS


class GateError(ValueError):
    """A candidate that must not be promoted; its text says why."""


def questions(count: int = 100) -> pd.DataFrame:
    """So many of the hundred committed questions, spread evenly over the subjects.

    Returns:
        Columns `subject`, `question`, `answers` (list of accepted answers).
    """
    import numpy as np
    import pandas as pd

    everything = pd.DataFrame(json.loads(QUESTIONS.read_text(encoding="utf-8"))["questions"])
    return everything.iloc[np.linspace(0, len(everything), count, endpoint=False).astype(int)]


def open_prompts() -> list[str]:
    """What fp32 writes about, for all to read: six texts of 64 tokens."""
    return json.loads(QUESTIONS.read_text(encoding="utf-8"))["open_prompts"]


def is_correct(text: str, accepted: list[str]) -> bool:
    """Whether `text` holds one of the accepted answers as whole words; case, accents, marks are ignored."""
    return any(_words(answer) in _words(text) for answer in accepted)


def interval(accuracy: float, asked: int) -> tuple[float, float]:
    """Where the accuracy on all such questions lies with 95 % confidence, by Wilson's score (1927)."""
    from scipy.stats import binomtest

    low, high = binomtest(round(accuracy * asked), asked).proportion_ci(method="wilson")
    return float(low), float(high)


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
    candidates: Mapping[str, str], model: Model, count: int = 100, max_new_tokens: int = 16, rounds: int = 3
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Put the question set to every candidate; each becomes a run with its data, its model and its figures.

    Accuracy comes from one greedy answer a question, decoded in batches. KL divergence and agreement come
    from texts that fp32 writes first: each candidate reads them in one pass, and nothing is sampled; without
    fp32 they are NaN. Speed is the median of `rounds` single calls, in turns over the candidates so that a
    busy moment of the machine hits all of them. Load time and memory come from a fresh process for each: in
    this one, a model would reuse the memory that an earlier one had freed, and seem to need less.

    Args:
        candidates: name → model URI; `fp32`, or else the first, is the reference. Models of `Phi3Model`, or
            logged with `mlflow.transformers` and task `llm/v1/chat` (which have no stream: their time to
            first token is the time of an answer of one token).
        model: the catalogue entry, for its system message.
        count: how many questions; with fewer, accuracy is less certain.
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

    reference_among(candidates)
    prompts = [model.messages(prompt) for prompt in open_prompts()]
    asked = questions(count)["question"]
    chats = [model.messages(question) for question in asked]
    folders = {name: Path(mlflow.artifacts.download_artifacts(uri)) for name, uri in candidates.items()}
    costs = _frame(measuring.footprints(folders, prompts[0]))
    loaded = {name: mlflow.pyfunc.load_model(str(folder)) for name, folder in folders.items()}
    texts = {name: _texts(each, chats, max_new_tokens) for name, each in loaded.items()}
    answers = pd.DataFrame(texts, index=asked)
    measured = [costs, _frame(measuring.speeds(loaded, prompts[0], rounds))]
    if "fp32" in loaded:
        written = list(zip(prompts, _texts(loaded["fp32"], prompts, TEXT_TOKENS), strict=True))
        measured.append(_frame(measuring.divergences(loaded, "fp32", written)))
    table = score(answers).join(measured).reindex(columns=MEASURED).rename_axis("candidate")
    params = {"model": model.key, "questions": count, "max_new_tokens": max_new_tokens, "rounds": rounds}
    logged = {name: _log(name, uri, table.loc[name], params) for name, uri in candidates.items()}
    return table.join(_frame(logged, ("model_id", "run_id"))), answers


def _frame(rows: Mapping[str, object], columns: tuple[str, ...] | None = None) -> pd.DataFrame:
    """A row for each name."""
    import pandas as pd

    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _texts(loaded, chats: list, max_new_tokens: int) -> list[str]:
    return [answer.text for answer in measuring.answer(loaded, chats, max_new_tokens)]


def score(answers: pd.DataFrame) -> pd.DataFrame:
    """Judge all answers with `mlflow.genai.evaluate` in the active run.

    Each question becomes one trace, with every candidate's answer and a verdict on each. The answers were
    made before, in batches, so the traces say nothing of time or tokens.

    Args:
        answers: one row a question of `questions`, one column a candidate.
    Returns:
        One row a candidate: `accuracy`, from 0 to 1, and `accuracy_low` to `accuracy_high`, its interval.
    """
    import mlflow
    from mlflow.entities import Feedback
    from mlflow.genai.scorers import scorer

    @scorer
    def correct(outputs: dict, expectations: dict) -> list[Feedback]:
        accepted = expectations["answers"]
        return [Feedback(name=name, value=is_correct(text, accepted)) for name, text in outputs.items()]

    rows = [
        {
            "inputs": {"question": row.question},
            "outputs": answers.loc[row.question].to_dict(),
            "expectations": {"answers": row.answers},
            "tags": {"subject": row.subject},
        }
        for row in questions(len(answers)).itertuples()
    ]
    with _quiet():
        metrics = mlflow.genai.evaluate(data=rows, scorers=[correct]).metrics
    shares = {name: float(metrics[f"{name}/mean"]) for name in answers}
    found = {name: (share, *interval(share, len(rows))) for name, share in shares.items()}
    return _frame(found, ACCURACY)


def _log(name: str, uri: str, figures: pd.Series, params: dict) -> tuple[str, str]:
    """Make a run that holds a candidate's data, model and figures together; return model_id and run_id."""
    import mlflow
    from mlflow.entities import LoggedModelInput

    model_id = mlflow.models.get_model_info(uri).model_id
    # A question's accepted answers become one text: data sets have no column of lists.
    asked = questions(params["questions"]).assign(answers=lambda table: table["answers"].map("|".join))
    data = mlflow.data.from_pandas(asked, name=QUESTIONS.stem, targets="answers")
    with mlflow.start_run(run_name=name, nested=mlflow.active_run() is not None) as run:
        mlflow.log_params({"candidate": name, **params})
        mlflow.log_input(data, context="evaluation", model=LoggedModelInput(model_id) if model_id else None)
        mlflow.log_metrics(figures.dropna().to_dict(), model_id=model_id, dataset=data)
    return model_id, run.info.run_id


def gate(table: pd.DataFrame, max_drop: float = MAX_DROP, max_kl: float = MAX_KL) -> pd.DataFrame:
    """Pass the rows that are near enough to the reference in accuracy and in KL; the fastest of them wins.

    The `BASELINE` has its row, and may be the reference, but never wins. Where KL was not measured, because
    there is no fp32, accuracy alone decides.

    Args:
        table: `accuracy` (0 to 1), `kl_divergence` (nats) and `tokens_per_second`, indexed by candidate.
        max_drop: share of accuracy that may be lost, 0.05 for 5 points.
        max_kl: mean KL divergence that is allowed, in nats.
    Returns:
        The same table with `passes`, `winner` (True in one row) and `reason`.
    Raises:
        ValueError: if the table is empty.
        GateError: if there is nothing to ship: no row passes but the baseline's.
    """
    reference = reference_among(table.index)
    drop = table.loc[reference, "accuracy"] - table["accuracy"]
    kl = table["kl_divergence"]
    # 0.05 and the like are not exact in binary. NaN never passes.
    accurate = drop <= max_drop + 1e-9
    near = (kl <= max_kl) | kl.isna().all()
    reasons = {}
    for name, row in table.iterrows():
        if name == reference:
            reasons[name] = f"accuracy {row['accuracy']:.1%}, the reference"
            continue
        level = f"accuracy {row['accuracy']:.1%}, {_level(drop[name] * 100)} {reference}"
        distance = _bounded(f"KL {kl[name]:.2g} nats", near[name], max_kl)
        if near[name] and math.isnan(kl[name]):
            distance = "KL not measured, for lack of fp32"
        reasons[name] = f"{_bounded(level, accurate[name], max_drop * 100)}; {distance}"
    passes = accurate & near
    shippable = passes & (table.index != BASELINE)
    if not shippable.any():
        found = "".join(f"\n{name}: {reason}." for name, reason in reasons.items())
        raise GateError(
            f"No candidate passes.{found}\nMeasure another precision, or allow more with max_drop or max_kl."
        )
    # A candidate that gave no answer has no speed.
    rates = table["tokens_per_second"].fillna(0)
    winner = rates[shippable].idxmax()
    for name in table.index[passes]:
        reasons[name] += f"; {_place(name, winner, rates)}"
    return table.assign(passes=passes, winner=table.index == winner, reason=table.index.map(reasons))


def _place(name: str, winner: str, rates: pd.Series) -> str:
    """Why a candidate that passes the gate is shipped, or is not."""
    if name == BASELINE:
        return "the baseline, not for shipping"
    if name == winner:
        return "the fastest of those that pass"
    return f"slower than {winner} ({rates[name]:.0f} against {rates[winner]:.0f} tokens/s)"


def _level(points: float) -> str:
    if abs(points) < 0.05:
        return "level with"
    return f"{abs(points):.1f} points {'below' if points > 0 else 'above'}"


def _bounded(value: str, holds: bool, bound: float) -> str:
    return f"{value} ({bound:g} allowed)" if holds else f"{value}: more than the {bound:g} allowed"


def promote(table: pd.DataFrame, candidate: str, version: ModelVersion, **bounds: float) -> ModelVersion:
    """Make a registered version the champion, with the evidence as its tags; refuse one that fails the gate.

    The version that was the champion before stays, without the alias.

    Args:
        table: what `compare` returned.
        candidate: the row that speaks for this version.
        version: what `mlflow.register_model` returned for that candidate's model.
        bounds: max_drop and max_kl, if others than those of `gate`.
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
    verdict = gate(table, **bounds).loc[candidate]
    if not verdict["passes"] or candidate == BASELINE:
        raise GateError(f"{candidate} is not promoted to @champion: {verdict['reason']}.")
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
    client.set_registered_model_alias(version.name, "champion", version.version)
    return client.get_model_version(version.name, version.version)


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
        "MLFLOW_GENAI_EVAL_PREDICT_RATE_LIMIT": "0",  # by default ten calls a second, of scorers too
    }
    bar, harness.tqdm = harness.tqdm, None
    try:
        with processes.variables(**settings), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        harness.tqdm = bar
