"""The notebooks' exercises: each check tries what a learner wrote, and prints ✓, or ✗ with a hint.

`exercises.check_tell(globals())` stands at the end of a learner's cell. A check compares results; the way to
them is free. Its docstring is what it asks for. A check never raises.
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

from helpers import ROOT, places
from helpers.workshop import board

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import ActiveRun
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel, PythonModel

    from helpers.models.catalog import Model
    from helpers.models.onnx_chat_model import Phi3Model


class NotYet(Exception):
    """What is wrong with a result, and a hint; without one, the exercise's own is shown."""

    def __init__(self, wrong: str, hint: str = ""):
        super().__init__(wrong)
        self.hint = hint


class Empty(NotYet):
    """Nothing is written yet. It is shown as any other, and the board does not count it as an attempt."""


class NotChecked(Exception):
    """A model that says too little for a check; the text says what to take."""


def exercise(number: str, hint: str) -> Callable[[Callable[..., str]], Callable[[dict], None]]:
    """Make a check out of a function that returns what is right, or raises `NotYet` or `NotChecked`.

    The function's arguments name what it needs from the notebook, the learner's result first.

    Args:
        number: the exercise's, as in the notebook: "1.2".
        hint: shown while nothing is written yet, and when no closer hint is known.
    """

    def decorate(judge: Callable[..., str]) -> Callable[[dict], None]:
        def check(names: dict) -> None:
            advice = ""
            try:
                print(f"✓ Exercise {number} is solved: {judge(**_arguments(judge, names))}")
            except NotChecked as reason:
                print(f"– Exercise {number} was not checked: {reason}")
                return
            except (Exception, SystemExit) as error:
                wrong = error if isinstance(error, NotYet) else NotYet(f"it raised {short(error, 100)}")
                advice = wrong.hint or hint
                print(f"✗ Exercise {number}, not yet: {wrong}\n  Hint: {advice}")
                if isinstance(wrong, Empty):
                    return
            if names.get("board", True):
                board.report(number, solved=not advice, hint=advice)

        check.__name__, check.__doc__ = judge.__name__, judge.__doc__
        return check

    return decorate


def _arguments(judge: Callable, names: dict) -> dict[str, Any]:
    """What a judge asks for, by name."""
    wanted = list(inspect.signature(judge).parameters)
    for name in wanted:
        if name not in names:
            raise NotYet(f"there is no `{name}`.", "Run the cells above this one, from the top.")
    if names[wanted[0]] is ...:
        raise Empty(f"`{wanted[0]}` is still empty.")
    return {name: names[name] for name in wanted}


def call(function: Callable, *arguments: object) -> Any:
    """What a learner's function returns; one that returns nothing is still empty."""
    result = function(*arguments)
    if result is None:
        raise Empty(f"`{function.__name__}` returned nothing.")
    return result


def short(thing: object, length: int = 60) -> str:
    """A value or an exception in one line."""
    text = f"{type(thing).__name__}: {thing}" if isinstance(thing, BaseException) else repr(thing)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _highest(chosen: object, values: dict[str, float], unit: str, hint: str) -> float:
    """The highest of the values, by ids, if `chosen` is its id."""
    if str(chosen) not in values:
        raise NotYet(f"{short(chosen)} is none of the {len(values)} ids.", hint)
    if values[chosen] < (most := max(values.values())):
        raise NotYet(f"it has {values[chosen]:.4g} {unit}, and another has {most:.4g}.", hint)
    return most


@exercise("1.1", "Set the seed with `transformers.set_seed(seed)`, then ask with `do_sample=True`.")
def check_tell(tell: Callable[[str, int], str]) -> str:
    """Equal seeds give equal texts, of at most 16 tokens; other seeds give other texts."""
    texts = [call(tell, "Tell me a story about a robot.", seed) for seed in (1, 2, 1, 3)]
    if not isinstance(texts[0], str):
        wrong = f"`tell` returned {short(texts[0])}, which is no text."
        raise NotYet(wrong, 'The text is reply[0]["generated_text"][-1]["content"].')
    # A word is at least one token.
    if (words := max(len(text.split()) for text in texts)) > 16:
        wrong = f"`tell` returned {words} words, so more than 16 tokens."
        raise NotYet(wrong, "Let the model stop by itself: chatbot(…, max_new_tokens=16).")
    if texts[0] != texts[2]:
        wrong = f"seed 1 gave {short(texts[0])} and then {short(texts[2])}."
        raise NotYet(wrong, "Set the seed inside `tell`, right before the model is asked.")
    if not any(texts):
        raise NotChecked("the model's answers are empty; take a model that answers.")
    if len(set(texts)) == 1:
        wrong = f"seeds 1, 2 and 3 all gave {short(texts[0])}."
        hint = "Greedy answers ignore the seed: ask with do_sample=True, and set the seed that `tell` gets."
        raise NotYet(wrong, hint)
    return "equal seeds give equal answers, other seeds other ones."


@exercise("1.2", "`mlflow.log_metric(…, run_id=…)` adds to a finished run; `search_runs` knows `order_by`.")
def check_best_run(best_run: str, study: ActiveRun) -> str:
    """Every run of the study has its metric, and `best_run` is the id of the one where it is highest."""
    import mlflow

    mine = f"tags.mlflow.parentRunId = '{study.info.run_id}'"
    speeds = {}
    for run in mlflow.search_runs([study.info.experiment_id], mine, output_format="list"):
        logged = run.data.metrics.get("words_per_second")
        right = len(run.data.tags["answer"].split()) / run.data.metrics["seconds"]
        if logged is None or not math.isclose(logged, right, rel_tol=1e-3, abs_tol=1e-3):
            wrong = f"`words_per_second` of {run.info.run_name!r} is {logged}, and should be {right:.3g}."
            raise NotYet(wrong, "For each of `runs`, divide the words of the tag `answer` by `seconds`.")
        speeds[run.info.run_id] = logged
    hint = "Search with the filter that made `runs` and order_by=['metrics.words_per_second DESC']."
    most = _highest(best_run, speeds, "words per second", hint)
    return f"{most:.1f} words per second, the most of {len(speeds)} runs."


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
    held = text.strip().rpartition(" ")[2]
    client, alias = mlflow.MlflowClient(), f"exercise-{uuid.uuid4().hex[:8]}"
    inside = "Set the alias inside an `if` that looks for `expected` in the answer."
    to_number = "Ask with chosen.messages(question), with its system turn, and set the alias to `number`."
    try:
        for expected, moves, hint in (("42 purple elephants", False, inside), (held, True, to_number)):
            returned = call(move_alias, alias, version.version, question, expected)
            at = client.get_registered_model(version.name).aliases.get(alias, "none")
            right = version.version if moves else "none"
            if str(at) != str(right):
                given = f"the answer is {short(text)}, {expected!r} was expected"
                raise NotYet(f"{given}, the alias is at version {at}, not at {right}.", hint)
            if returned is not moves:
                raise NotYet(f"it returned {short(returned)}.", f"Return {moves} then.")
    finally:
        client.delete_registered_model_alias(version.name, alias)
    return f"the alias moves when the answer holds {held!r}, and stays where it does not."


@exercise("1.4", "search_traces takes `filter_string`, `order_by` and `max_results`, as search_runs does.")
def check_slowest(slowest: str, version: ModelVersion) -> str:
    """`slowest` is the id of the trace that took longest among those of this version."""
    import mlflow

    mlflow.flush_trace_async_logging()
    mine = f"tags.model_version = '{version.name}/{version.version}'"
    found = mlflow.search_traces(filter_string=mine, include_spans=False, return_type="list")
    took = {trace.info.trace_id: trace.info.execution_duration for trace in found}
    hint = "Filter by the tag that `chat` sets, with order_by=['execution_time_ms DESC']."
    most = _highest(slowest, took, "ms", hint)
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
        if not isinstance(answers, list) or not isinstance(answers[0], str):
            wrong = f"`predict` returned {short(answers)}."
            raise NotYet(wrong, "Return a list with a text for each row: tokenizer.decode(…) makes it.")
        return answers[0]

    table = pd.DataFrame({"prompt": ["The sea is"]})
    whole = ask()
    if ask() != whole:
        wrong = "without `params`, two calls gave two answers."
        raise NotYet(wrong, "Sample only when `params` has a seed: do_sample=seed is not None.")
    # Tokens that make no character are decoded one way alone and another way in a stream.
    if len(whole) < 16 or "\ufffd" in whole:
        raise NotChecked(f"the model's answer is {short(whole)}; take a model that says more.")
    if type(model).predict_stream is not PythonModel.predict_stream:
        return _try_stream(list(model.predict_stream(context, table)), whole)
    if "params" not in inspect.signature(model.predict).parameters:
        name = type(model).__name__
        raise NotYet(f"`{name}` has no `predict_stream`, and its `predict` takes no `params`.")
    if right := _try_stop(ask, whole) or _try_seed(ask, whole):
        return right
    wrong = "neither params={'stop': [...]} nor params={'seed': ...} changes the answer."
    hint = "Hand the value on to the method with the loop; look for a stop text in all of the answer so far."
    raise NotYet(wrong, hint)


def _model_in(path: str) -> PythonModel:
    """The last model class of a learner's file."""
    from mlflow.pyfunc import PythonModel

    # MLflow asks for type hints, which nothing here needs.
    with redirect_stderr(io.StringIO()):
        names = runpy.run_path(str(path))
    classes = [value for value in names.values() if inspect.isclass(value)]
    models = [each for each in classes if issubclass(each, PythonModel) and each is not PythonModel]
    if not models or "set_model(" not in Path(path).read_text(encoding="utf-8"):
        needs = "It needs class MyModel(mlflow.pyfunc.PythonModel) and mlflow.models.set_model(MyModel())."
        raise NotYet("the file does not say what is its model.", needs)
    return models[-1]()


def _try_stream(pieces: list, whole: str) -> str:
    """Pieces that together are the answer."""
    if len(pieces) < 2 or "".join(map(str, pieces)).strip() != whole.strip():
        wrong = f"the stream gave {short(pieces)}, and `predict` returned {short(whole)}."
        raise NotYet(wrong, "In the loop: yield stream.decode(token), with stream = ….create_stream().")
    return f"a stream of {len(pieces)} pieces, which together are the answer."


def _try_stop(ask: Callable[..., str], whole: str) -> str:
    """An answer that ends before a text that several tokens make; "" if the text has no effect."""
    mark = whole[len(whole) // 2 :][:6]
    text, before = ask(stop=[mark]), whole.partition(mark)[0]
    if text == whole:
        return ""
    if text != before:
        wrong = f"params={{'stop': [{mark!r}]}} gave {short(text)}, not {short(before)}."
        raise NotYet(wrong, "Look for it in all of the answer so far, and keep what is before it.")
    return f"the answer ends before the stop text {mark!r}."


def _try_seed(ask: Callable[..., str], whole: str) -> str:
    """Equal answers for equal seeds, others for other seeds; "" if no seed has an effect."""
    texts = [ask(seed=seed) for seed in (1, 2, 1, 3)]
    if set(texts) == {whole}:
        return ""
    if texts[0] != texts[2] or len(set(texts)) == 1:
        wrong = f"seeds 1, 2, 1 and 3 gave {', '.join(short(text, 30) for text in texts)}."
        raise NotYet(wrong, "set_search_options(…, do_sample=True, random_seed=seed) samples by a seed.")
    return "equal seeds give equal answers, other seeds other ones."


@exercise("2.2", "One call, one set of params: table.groupby('max_new_tokens') gathers what can share one.")
def check_score(score: Callable[[pd.DataFrame], Iterable[str]], loaded: PyFuncModel) -> str:
    """Every row is answered within its own limit, in the table's order."""
    import pandas as pd

    limits = [6, 2, 4, 2, 6]
    prompts = [f"Count to {number}: 1, 2," for number in range(10, 15)]
    right = [
        loaded.predict({"prompt": prompt}, params={"max_new_tokens": limit})[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    table = pd.DataFrame({"prompt": prompts, "max_new_tokens": limits}, index=list("abcde"))
    answers = list(call(score, table))
    if len(answers) != len(right):
        raise NotYet(f"{len(right)} rows went in and {len(answers)} answers came out.")
    if answers != right and sorted(map(str, answers)) == sorted(right):
        wrong = "the answers are right, but not in the order of the rows."
        raise NotYet(wrong, "Put each group's answers at its rows' places: answers.loc[rows.index] = …")
    for limit, got, wanted in zip(limits, answers, right, strict=True):
        if got != wanted:
            wrong = f"a row with a limit of {limit} tokens got {short(got)}, not {short(wanted)}."
            raise NotYet(wrong, "Each row's own limit goes into params={'max_new_tokens': int(limit)}.")
    return "5 rows with 3 limits were answered in order, each within its own limit."


@exercise("2.3", "`itertools.islice(stream, count)` takes that many pieces; `stream.close()` ends the work.")
def check_peek(peek: Callable[[Iterator[str], int], str]) -> str:
    """The first pieces are read, no more, and the stream is closed."""
    pieces = iter(("Once ", "upon ", "a ", "time, ", "a ", "robot"))
    stream = (piece for piece in pieces)
    text = call(peek, stream, 3)
    taken = 6 - len(list(pieces))
    if text != "Once upon a ":
        wrong = f"the first 3 of the pieces make 'Once upon a ', and `peek` returned {short(text)}."
        raise NotYet(wrong, "Join the pieces with ''.join(…).")
    if taken > 3:
        wrong = f"3 pieces were asked for and {taken} taken."
        raise NotYet(wrong, "list(stream) and zip(stream, …) take too many, itertools.islice does not.")
    if inspect.getgeneratorstate(stream) != inspect.GEN_CLOSED:
        wrong = "the stream is still open, and the model goes on writing."
        raise NotYet(wrong, "Call stream.close(), or use `with contextlib.closing(stream):`.")
    return "the reader leaves after the pieces it wanted, and the model stops."


@exercise("2.4", "Its type is 'array'; `items` describes one city, `minItems` and `maxItems` how many.")
def check_cities_schema(cities_schema: dict, loaded: PyFuncModel, wrapper: Phi3Model, chosen: Model) -> str:
    """The schema allows lists of three texts and nothing else, and the model can answer within it."""
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(cities_schema)
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
    (text,) = loaded.predict({"prompt": asked}, params=given)
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
    # The same candidates, as if the smallest had lost 30 points and was a nat away from the reference.
    smaller = table["size_mb"].drop(evaluation.reference_among(table.index)).nsmallest(1).index
    weak = table.assign(accuracy=0.8, kl_divergence=0.0)
    weak.loc[smaller, ["accuracy", "kl_divergence"]] = 0.5, 1.0
    for measured, max_drop, max_kl in [(table, 0.05, 0.05), (weak, 0.05, 0.05), (weak, 0.4, 2.0)]:
        right = evaluation.gate(measured, max_drop, max_kl).query("passes")["size_mb"].idxmin()
        name = call(smallest, measured.copy(), max_drop, max_kl)
        if str(name) != right:
            raise NotYet(
                f"with max_drop={max_drop} and max_kl={max_kl} it chose {short(name)}, and {right} passes "
                f"with {measured.size_mb[right]:.0f} MB.",
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
