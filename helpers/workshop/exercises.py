"""The notebooks' exercises: each check tries what a learner wrote, and prints ✓, or ✗ with a hint.

`exercises.check_tell(globals())` stands at the end of a learner's cell; see `checking.exercise`. A check
compares results; the way to them is free. Its docstring is what it asks for.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import runpy
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from helpers import ROOT, places
from helpers.workshop.checking import NotChecked, NotYet, call, exercise, of_type, short

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import ActiveRun
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel, PythonModel

    from helpers.models.catalog import Model
    from helpers.models.onnx_chat_model import Phi3Model

_SILENT = "the model's answer is empty; take a model that answers."


@exercise("1.1", "Set the seed with `transformers.set_seed(seed)`, then ask with `do_sample=True`.")
def check_tell(tell: Callable[[str, int], str]) -> str:
    """Equal seeds give equal texts, of at most 16 tokens; other seeds give other texts."""
    texts = [call(tell, "Tell me a story about a robot.", seed) for seed in (1, 2, 1, 3)]
    for text in texts:
        of_type(str, text, "what `tell` returned", 'The text is reply[0]["generated_text"][-1]["content"].')
        # A word is at least one token.
        if (words := len(text.split())) > 16:
            wrong = f"`tell` returned {words} words, so more than 16 tokens."
            raise NotYet(wrong, "Let the model stop by itself: chatbot(…, max_new_tokens=16).")
    if texts[0] != texts[2]:
        wrong = f"seed 1 gave {short(texts[0])} and then {short(texts[2])}."
        raise NotYet(wrong, "Set the seed inside `tell`, right before the model is asked.")
    if not any(texts):
        raise NotChecked(_SILENT)
    if len(set(texts)) == 1:
        wrong = f"seeds 1, 2 and 3 all gave {short(texts[0])}."
        raise NotYet(wrong, "Greedy answers ignore the seed: ask with do_sample=True. Is it the seed given?")
    return "equal seeds give equal answers, other seeds other ones."


@exercise("1.2", "`mlflow.log_metric(…, run_id=…)` adds to a finished run; `search_runs` knows `order_by`.")
def check_best_run(best_run: str, study: ActiveRun) -> str:
    """Every run of the study has its metric, and `best_run` is the id of the one where it is highest."""
    import mlflow

    mine = f"tags.mlflow.parentRunId = '{study.info.run_id}'"
    runs = mlflow.search_runs([study.info.experiment_id], mine, output_format="list")
    logged = {run.info.run_id: run.data.metrics.get("words_per_second") for run in runs}
    if without := [*logged.values()].count(None):
        wrong = f"{without} of {len(runs)} runs have no metric `words_per_second`."
        raise NotYet(wrong, "Loop over `runs` and call mlflow.log_metric('words_per_second', …, run_id=…).")
    for run in runs:
        right = len(run.data.tags["answer"].split()) / run.data.metrics["seconds"]
        if not math.isclose(logged[run.info.run_id], right, rel_tol=1e-3, abs_tol=1e-3):
            wrong = f"a run has {logged[run.info.run_id]:.3g} words per second, but it is {right:.3g}."
            raise NotYet(wrong, "Count the words of the tag `answer`; divide by the metric `seconds`.")
    of_type(str, best_run, "`best_run`", "The table has a column run_id; take its first entry.")
    if best_run not in logged:
        wrong = f"{best_run!r} is none of the study's {len(runs)} runs."
        raise NotYet(wrong, "Search with the filter that made `runs`, and take the run's id.")
    if logged[best_run] < (most := max(logged.values())):
        wrong = f"it has {logged[best_run]:.3g} words per second; another run has {most:.3g}."
        raise NotYet(wrong, "order_by sorts upwards unless it says DESC: ['metrics.words_per_second DESC'].")
    return f"{most:.1f} words per second, the most of {len(runs)} runs."


@exercise("1.3", "Load f'models:/slm-transformers/{number}', ask it, and only then set the alias, or not.")
def check_move_alias(
    move_alias: Callable[[str, str, str, str], bool],
    candidate: PyFuncModel,
    chosen: Model,
    version: ModelVersion,
) -> str:
    """The alias moves if the version's answer holds the text, and only then; the return value says which."""
    import mlflow

    question = "What is the capital of Italy?"
    (completion,) = candidate.predict({"messages": chosen.messages(question)})
    text = completion["choices"][0]["message"]["content"]
    if not text.strip():
        raise NotChecked(_SILENT)
    client, alias = mlflow.MlflowClient(), f"exercise-{uuid.uuid4().hex[:8]}"
    held = text.split()[-1]
    hints = {
        False: "Set the alias inside an `if` that looks for `expected` in the answer.",
        True: "Ask with chosen.messages(question), whose system turn matters, and set the alias to `number`.",
    }
    try:
        for expected, moves in (("42 purple elephants", False), (held, True)):
            returned = call(move_alias, alias, version.version, question, expected)
            at = client.get_registered_model(version.name).aliases.get(alias, "none")
            right = version.version if moves else "none"
            if str(at) != str(right):
                wrong = (
                    f"the answer is {short(text)}, {expected!r} was expected, the alias is at version {at}"
                )
                raise NotYet(f"{wrong}, not at {right}.", hints[moves])
            if returned is not moves:
                raise NotYet(f"it returned {short(returned)}.", f"Return {moves} then.")
    finally:
        client.delete_registered_model_alias(version.name, alias)
    return f"the alias moves when the answer holds {held!r}, and stays where it does not."


@exercise("1.4", "search_traces takes `filter_string`, `order_by` and `max_results`, as search_runs does.")
def check_slowest(slowest: str, version: ModelVersion) -> str:
    """`slowest` is the id of the trace that took longest among those of this version."""
    import mlflow

    of_type(str, slowest, "`slowest`", "The id is in trace.info.trace_id.")
    mlflow.flush_trace_async_logging()
    mine = f"tags.model_version = '{version.name}/{version.version}'"
    found = mlflow.search_traces(filter_string=mine, include_spans=False, return_type="list")
    took = {trace.info.trace_id: trace.info.execution_duration for trace in found}
    if slowest not in took:
        wrong = f"{slowest!r} is none of the {len(took)} traces of {version.name}/{version.version}."
        raise NotYet(wrong, "Filter by the tag that `chat` sets: tags.model_version = '…'.")
    if took[slowest] < (most := max(took.values())):
        wrong = f"it took {took[slowest]} ms; another trace of this version took {most}."
        raise NotYet(wrong, "The newest comes first unless you ask for order_by=['execution_time_ms DESC'].")
    return f"{most} ms, the longest of {len(took)} traces."


@exercise(
    "2.1",
    "Copy the cell with %%writefile, let it write the file that `better_model` names, and give the class "
    "params={'stop': [...]}, params={'seed': ...} or `predict_stream`.",
)
def check_better_model(better_model: str, onnx_folder: Path) -> str:
    """The class in the file answers as before, and has a stop text, a seed or a stream besides."""
    import pandas as pd
    from mlflow.pyfunc import PythonModel, PythonModelContext

    model = _model_in(better_model)
    context = PythonModelContext({"phi3-mini-onnx": str(onnx_folder)}, {})
    model.load_context(context)

    def ask(**params: object) -> str:
        answers = call(model.predict, context, table, *([params] if params else []))
        of_type(list, answers, "what `predict` returned", "Return a list with one answer for each row.")
        of_type(str, answers[0], "the first answer of `predict`", "tokenizer.decode(…) makes text of tokens.")
        return answers[0]

    for beginning in ("Once upon a time, a robot", "The sea is", "1, 2, 3, 4,", "A dog and a cat"):
        table = pd.DataFrame({"prompt": [beginning]})
        whole = ask()
        # Tokens that make no character are decoded one way alone and another way in a stream.
        if len(whole) >= 16 and "\ufffd" not in whole:
            break
    else:
        raise NotChecked(f"the model's answer is {short(whole)}; take a model that says more.")
    if ask() != whole:
        wrong = "without `params`, two calls gave two answers."
        raise NotYet(wrong, "Sample only when `params` has a seed: do_sample=seed is not None.")
    trials = []
    if type(model).predict_stream is not PythonModel.predict_stream:
        trials.append(lambda: _try_stream(lambda: list(model.predict_stream(context, table)), whole))
    if "params" in inspect.signature(model.predict).parameters:
        trials += [lambda: _try_stop(ask, whole), lambda: _try_seed(ask, whole)]
    if not trials:
        name = type(model).__name__
        raise NotYet(f"`{name}` has no `predict_stream`, and its `predict` takes no `params`.")
    return _first_right(trials)


def _model_in(path: str) -> PythonModel:
    """The last model class of a learner's file."""
    from mlflow.pyfunc import PythonModel

    if not isinstance(path, str | Path) or not Path(path).is_file():
        wrong = f"`better_model` is {short(path)}, which is not the path of a file."
        raise NotYet(wrong, "exercises.own_file('better_model.py') names it, %%writefile writes it.")
    try:
        # MLflow asks for type hints, which nothing here needs.
        with redirect_stderr(io.StringIO()):
            names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        wrong = f"running the file raised {short(error)}"
        raise NotYet(wrong, "Read the file from its first line.") from error
    classes = [value for value in names.values() if isinstance(value, type) and value is not PythonModel]
    models = [value for value in classes if issubclass(value, PythonModel)]
    if not models or "set_model(" not in Path(path).read_text(encoding="utf-8"):
        needs = "It needs class MyModel(mlflow.pyfunc.PythonModel) and mlflow.models.set_model(MyModel())."
        raise NotYet("the file does not say what is its model.", needs)
    return models[-1]()


def _first_right(trials: list[Callable[[], str]]) -> str:
    """What the first trial that succeeds says. One whose parameter has no effect says nothing."""
    found = None
    for trial in trials:
        try:
            if right := trial():
                return right
        except NotYet as wrong:
            found = found or wrong
    wrong = "neither params={'stop': [...]} nor params={'seed': ...} changes the answer."
    raise found or NotYet(wrong, "Hand the value on to the method with the loop.")


def _try_stream(predict_stream: Callable[[], list], whole: str) -> str:
    """Pieces that together are the answer."""
    pieces = call(predict_stream)
    if len(pieces) < 2 or "".join(map(str, pieces)).strip() != whole.strip():
        wrong = f"the stream gave {short(pieces)}, and `predict` returned {short(whole)}."
        raise NotYet(wrong, "In the loop: yield stream.decode(token), with stream = ….create_stream().")
    return f"a stream of {len(pieces)} pieces, which together are the answer."


def _try_stop(ask: Callable[..., str], whole: str) -> str:
    """Answers that end before a text, within a token or across several; "" if no text has an effect."""
    middle = len(whole) // 2
    texts = {mark: ask(stop=[mark]) for mark in (whole[middle], whole[middle : middle + 6])}
    if set(texts.values()) == {whole}:
        return ""
    for mark, text in texts.items():
        if text != (before := whole.partition(mark)[0]):
            wrong = f"params={{'stop': [{mark!r}]}} gave {short(text)}, not {short(before)}."
            raise NotYet(wrong, "Look for it in all of the answer so far, and keep what is before it.")
    return "the answer ends before a stop text, also before one of several tokens."


def _try_seed(ask: Callable[..., str], whole: str) -> str:
    """Equal answers for equal seeds, others for other seeds; "" if no seed has an effect."""
    first, second = ([ask(seed=seed) for seed in (1, 2, 3, 4)] for _ in range(2))
    if set(first) == {whole}:
        return ""
    if first != second or len(set(first)) == 1:
        wrong = f"seeds 1 to 4 gave {short(first)} and then {short(second)}."
        raise NotYet(wrong, "set_search_options(…, do_sample=True, random_seed=seed) samples by a seed.")
    return "equal seeds give equal answers, other seeds other ones."


@exercise("2.2", "One call, one set of params: table.groupby('max_new_tokens') gathers what can share one.")
def check_score(score: Callable[[pd.DataFrame], Any], loaded: PyFuncModel, wrapper: Phi3Model) -> str:
    """Every row is answered within its own limit, in the table's order, with one call for each limit."""
    import pandas as pd

    limits = [6, 2, 4, 2, 6]
    prompts = [f"Count to {number}: 1, 2," for number in range(10, 15)]
    right = [
        loaded.predict({"prompt": prompt}, params={"max_new_tokens": limit})[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    if not any(right):
        raise NotChecked(_SILENT)
    table = pd.DataFrame({"prompt": prompts, "max_new_tokens": limits}, index=list("abcde"))
    # The calls are counted; the model answers as ever.
    with mock.patch.object(wrapper, "generate", wraps=wrapper.generate) as generate:
        answers = call(score, table)
    if isinstance(answers, str | dict | pd.DataFrame) or not isinstance(answers, Iterable):
        raise NotYet(f"`score` returned a {type(answers).__name__}.", "Return a list, or a Series, of texts.")
    answers = list(answers)
    if len(answers) != len(right):
        raise NotYet(f"{len(right)} rows went in and {len(answers)} answers came out.")
    if answers != right and sorted(map(str, answers)) == sorted(right):
        wrong = "the answers are right, but not in the order of the rows."
        raise NotYet(wrong, "Put each group's answers at its rows' places: answers.loc[rows.index] = …")
    for limit, got, wanted in zip(limits, answers, right, strict=True):
        if got != wanted:
            wrong = f"a row with a limit of {limit} tokens got {short(got)}, not {short(wanted)}."
            raise NotYet(wrong, "Each row's own limit goes into params={'max_new_tokens': int(limit)}.")
    if generate.call_count > 3:
        raise NotYet(f"all answers are right, but 3 limits took {generate.call_count} calls.")
    return f"5 rows with 3 limits were answered in {generate.call_count} calls, in order."


@exercise("2.3", "`itertools.islice(stream, count)` takes that many pieces; `stream.close()` ends the work.")
def check_peek(peek: Callable[[Iterator[str], int], str]) -> str:
    """The first pieces are read, no more, and the stream is closed."""

    def write(taken: list[str]) -> Iterator[str]:
        for piece in ("Once ", "upon ", "a ", "time, ", "a ", "robot"):
            taken.append(piece)
            yield piece

    for count in (1, 3):
        taken: list[str] = []
        stream = write(taken)
        text = call(peek, stream, count)
        if text != (right := "".join(taken[:count])):
            wrong = f"the first {count} of the pieces make {right!r}, and `peek` returned {short(text)}."
            raise NotYet(wrong, "Join the pieces with ''.join(…).")
        if len(taken) > count:
            wrong = f"{count} pieces were asked for and {len(taken)} taken."
            raise NotYet(wrong, "list(stream) and zip(stream, …) take too many, itertools.islice does not.")
        if inspect.getgeneratorstate(stream) != inspect.GEN_CLOSED:
            wrong = "the stream is still open, and the model goes on writing."
            raise NotYet(wrong, "Call stream.close(), or use `with contextlib.closing(stream):`.")
    return "the reader leaves after the pieces it wanted, and the model stops."


@exercise("2.4", "Its type is 'array'; `items` describes one city, `minItems` and `maxItems` how many.")
def check_cities_schema(cities_schema: dict, loaded: PyFuncModel, wrapper: Phi3Model, chosen: Model) -> str:
    """The schema allows lists of three texts and nothing else, and the model can answer within it."""
    from jsonschema import Draft202012Validator, SchemaError

    of_type(dict, cities_schema, "`cities_schema`", "Write the schema as a dict, as `schema` above.")
    try:
        Draft202012Validator.check_schema(cities_schema)
    except SchemaError as error:
        raise NotYet(f"this is no JSON schema: {short(error.message)}") from error
    allows = Draft202012Validator(cities_schema).is_valid
    if not allows(["Rome", "Oslo", "Lima"]):
        raise NotYet("it does not allow ['Rome', 'Oslo', 'Lima'].")
    for shape, example, hint in (
        ("two cities", ["Rome", "Oslo"], "Set minItems to 3."),
        ("four cities", ["Rome", "Oslo", "Lima", "Bern"], "Set maxItems to 3."),
        ("numbers", [1, 2, 3], "Say what an item is: 'items': {'type': 'string'}."),
        ("something that is no list", {"cities": "Rome"}, "Set 'type': 'array' at the top."),
    ):
        if allows(example):
            raise NotYet(f"it also allows {shape}: {json.dumps(example)}.", hint)
    asked = wrapper.apply_chat_template(chosen.messages("Which three cities should I visit in Italy?"))
    given = {"json_schema": json.dumps(cities_schema), "max_new_tokens": 128}
    try:
        (text,) = loaded.predict({"prompt": asked}, params=given)
    except Exception as error:
        raise NotYet(f"the model refused it: {short(error)}") from error
    # A weak model may never end a text by itself.
    if not text.endswith("]"):
        wrong = f"the answer was cut before it was whole: {short(text)}"
        raise NotYet(wrong, "Bound the length of each item with maxLength, 20 for example.")
    return f"the shape holds, {text}; what stands in it is up to the model."


@exercise("2.5", "`evaluation.gate` with both bounds says who passes; a column's `idxmin()` names the least.")
def check_smallest(smallest: Callable[[pd.DataFrame, float, float], str], table: pd.DataFrame) -> str:
    """Of those that pass the gate, the one with the least on disk is named, whatever was measured."""
    from helpers import evaluation

    # The baseline is not for shipping.
    table = table.drop(evaluation.BASELINE, errors="ignore")
    others = table["size_mb"].drop(evaluation.reference_among(table.index))
    if others.empty:
        raise NotChecked("only one candidate was measured; there is nothing to choose from.")
    # The same candidates, as if the smallest had lost 30 points and was a nat away from fp32.
    weak = table.assign(accuracy=0.8, kl_divergence=0.0)
    weak.loc[others.idxmin(), ["accuracy", "kl_divergence"]] = 0.5, 1.0
    cases = [(table, 0.05, 0.05), (weak, 0.05, 0.05), (weak, 0.4, 2.0)]
    for measured, max_drop, max_kl in cases:
        verdict = evaluation.gate(measured, max_drop, max_kl)
        right = verdict.query("passes")["size_mb"].idxmin()
        name = call(smallest, measured.copy(), max_drop, max_kl)
        if not isinstance(name, str) or name not in table.index:
            raise NotYet(f"it returned {short(name)}.", f"Return a name: {', '.join(table.index)}.")
        if name != right:
            chose = f"with max_drop={max_drop} and max_kl={max_kl} it chose {name} ({verdict.reason[name]})"
            raise NotYet(
                f"{chose}, and {right} passes with {measured.size_mb[right]:.0f} MB.",
                "Take the least size_mb of evaluation.gate(table, max_drop, max_kl).query('passes').",
            )
    chosen = smallest(table, evaluation.MAX_DROP, evaluation.MAX_KL)
    return f"of those that pass, {chosen} is the smallest here."


def own_file(name: str) -> str:
    """Where a learner's file goes: `out/` of this project, or a new folder if nothing can be written there.

    The path is relative, so that what `%%writefile` prints names no folder of one machine; papermill and
    Jupyter start in different folders.
    """
    folder = ROOT / "out"
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="own-file-"))
    return places.relative(folder / name)
