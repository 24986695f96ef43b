"""The notebooks' exercises: each check runs what a learner made and says what is wrong, and a hint.

`exercises.check_tell(globals())` stands at the end of a learner's cell; see `checking.exercise`. Each check's
docstring is the claim that it holds the result against.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import runpy
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import ROOT
from helpers.workshop.checking import NotChecked, Wrong, call, exercise, of_type, short

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import ActiveRun
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel, PythonModel, PythonModelContext
    from transformers import TextGenerationPipeline

    from helpers.models.catalog import Model
    from helpers.models.onnx_chat_model import Completion, Phi3Model


_SILENT = "the model's answer is empty; take a model that answers."


@exercise("1.1", "Set the seed with `transformers.set_seed(seed)`, then ask with `do_sample=True`.")
def check_tell(tell: Callable[[str, int], str], chatbot: TextGenerationPipeline) -> str:
    """Equal seeds give equal answers of `chatbot`, of at most 16 tokens, other seeds other ones."""
    story, limit, said = "Tell me a story about a robot.", 16, []
    where = 'The text is reply[0]["generated_text"][-1]["content"].'
    for seed in (1, 2, 1, 3):
        with _answers(chatbot) as answers:
            text = call(tell, story, seed)
        of_type(str, text, "what `tell` returned", where)
        said.append(text)
        if not answers:
            raise Wrong(
                f"`tell` returned {short(text)}, and `chatbot` was not asked.",
                "Ask inside `tell`, at every call: chatbot(chosen.messages(question), …).",
            )
        written, tokens = answers[-1]
        if tokens > limit:
            raise Wrong(
                f"the model wrote {tokens} tokens, and at most {limit} were asked for.",
                "Let the model stop by itself: chatbot(…, max_new_tokens=16).",
            )
        if text.strip() != written.strip():
            raise Wrong(f"`tell` returned {short(text)}, and the model wrote {short(written)}.", where)
    if said[0] != said[2]:
        raise Wrong(
            f"seed 1 gave {short(said[0])} and then {short(said[2])}.",
            "Set the seed inside `tell`, right before the model is asked: transformers.set_seed(seed).",
        )
    if not any(said):
        raise NotChecked(_SILENT)
    if len(set(said)) == 1:
        raise Wrong(
            f"seeds 1, 2 and 3 all gave {short(said[0])}.",
            "Greedy answers ignore the seed: ask with do_sample=True. And is the seed you set the one given?",
        )
    return "equal seeds give equal answers, other seeds other ones."


@exercise("1.2", "`mlflow.log_metric(…, run_id=…)` adds to a finished run; `search_runs` knows `order_by`.")
def check_best_run(best_run: str, study: ActiveRun) -> str:
    """Every run of the study has its metric, and `best_run` is the id of the one where it is highest."""
    import mlflow

    runs = mlflow.search_runs(
        [study.info.experiment_id],
        f"tags.mlflow.parentRunId = '{study.info.run_id}'",
        output_format="list",
    )
    logged = {run.info.run_id: run.data.metrics.get("words_per_second") for run in runs}
    if without := [run for run in logged if logged[run] is None]:
        raise Wrong(
            f"{len(without)} of {len(runs)} runs have no metric `words_per_second`.",
            "Loop over `runs` and call mlflow.log_metric('words_per_second', …, run_id=…) for each.",
        )
    for run in runs:
        words, seconds = len(run.data.tags["answer"].split()), run.data.metrics["seconds"]
        if abs(logged[run.info.run_id] - words / seconds) > 1e-3 * (words / seconds + 1):
            raise Wrong(
                f"run {run.info.run_id} has {logged[run.info.run_id]:.3g} words per second, but its answer "
                f"has {words} words in {seconds:.3g} s, {words / seconds:.3g} per second.",
                "Words are what `split()` makes of the tag `answer`; divide by the metric `seconds`.",
            )
    of_type(str, best_run, "`best_run`", "The table has a column run_id; take its first entry.")
    if best_run not in logged:
        raise Wrong(
            f"{best_run!r} is none of the study's {len(runs)} runs.",
            "Search with the filter that made `runs`, and take the run's id.",
        )
    if logged[best_run] < max(logged.values()):
        raise Wrong(
            f"it has {logged[best_run]:.3g} words per second; another run has {max(logged.values()):.3g}.",
            "order_by sorts upwards unless it says DESC: ['metrics.words_per_second DESC'].",
        )
    return f"{logged[best_run]:.1f} words per second, the most of {len(runs)} runs."


@exercise("1.3", "Load f'models:/slm-transformers/{number}', ask it, and only then set the alias, or not.")
def check_move_alias(
    move_alias: Callable[[str, str, str, str], bool],
    candidate: PyFuncModel,
    chosen: Model,
    version: ModelVersion,
) -> str:
    """The alias moves to a version that is loaded, asked and answers as expected, and to no other; the return
    value says which."""
    import mlflow

    question = "What is the capital of Italy?"  # not the notebook's, which a function may use unasked
    client, alias = mlflow.MlflowClient(), f"exercise-{uuid.uuid4().hex[:8]}"
    (completion,) = candidate.predict({"messages": chosen.messages(question)})
    text = completion["choices"][0]["message"]["content"]
    if not text.strip():
        raise NotChecked(_SILENT)
    expected = (re.findall(r"\w+", text) or text.split())[-1]
    never = "42 purple elephants"

    def at() -> str | None:
        found = client.get_registered_model(version.name).aliases.get(alias)
        return found and str(found)

    try:
        with _loaded() as asked:
            moved = call(move_alias, alias, version.version, question, never)
            if at():
                raise Wrong(
                    f"the alias moved although the answer does not hold {never!r}.",
                    "Set the alias inside an `if` that looks for `expected` in the answer.",
                )
            if moved is not False:
                raise Wrong(
                    f"the gate was shut, and the function returned {short(moved)}.", "Return False then."
                )
            moved = call(move_alias, alias, version.version, question, expected)
        if not at():
            raise Wrong(
                f"the alias did not move, although the answer, {short(text)}, holds {expected!r}.",
                "Ask with chosen.messages(question), whose system turn matters, and set the alias then.",
            )
        if at() != str(version.version):
            raise Wrong(f"the alias is at version {at()}, not at {version.version}.", "Set it to `number`.")
        if moved is not True:
            raise Wrong(f"the alias moved, and the function returned {short(moved)}.", "Return True then.")
        _check_asked(asked, version, question)
    finally:
        client.delete_registered_model_alias(version.name, alias)
    return f"the alias moves when the answer holds {expected!r}, and stays where it does not."


@exercise("1.4", "search_traces takes `filter_string`, `order_by` and `max_results`, as search_runs does.")
def check_slowest(slowest: str, version: ModelVersion) -> str:
    """`slowest` is the id of the trace that took longest among those of this version."""
    import mlflow

    of_type(str, slowest, "`slowest`", "The id is in trace.info.trace_id.")
    mlflow.flush_trace_async_logging()
    mine = f"tags.model_version = '{version.name}/{version.version}'"
    found = mlflow.search_traces(filter_string=mine, include_spans=False, return_type="list")
    took = {trace.info.trace_id: trace.info.execution_duration for trace in found}
    if not took:
        raise Wrong("no trace has this version's tag.", "Run the cells of this section first.")
    if slowest not in took:
        raise Wrong(
            f"{slowest!r} is none of the {len(took)} traces of {version.name}/{version.version}.",
            "Filter by the tag that `chat` sets: " + mine.replace(f"{version.name}/{version.version}", "…"),
        )
    if took[slowest] < max(took.values()):
        raise Wrong(
            f"it took {took[slowest]} ms; another trace of this version took {max(took.values())}.",
            "The newest comes first unless you ask for order_by=['execution_time_ms DESC'].",
        )
    return f"{took[slowest]} ms, the longest of {len(took)} traces."


@exercise(
    "2.1",
    "Copy the cell with %%writefile, let it write the file that `better_model` names, and give the class "
    "params={'stop': [...]}, params={'seed': ...} or `predict_stream`.",
)
def check_better_model(better_model: str, onnx_folder: Path) -> str:
    """The class in the file answers as before, and has a stop text, a seed or a stream besides."""
    import pandas as pd
    from mlflow.pyfunc import PythonModel, PythonModelContext

    context = PythonModelContext({"phi3-mini-onnx": str(onnx_folder)}, {})
    model = _model_in(better_model, context)

    def ask(**params: object) -> str:
        answers = call(model.predict, context, table, *([params] if params else []))
        of_type(list, answers, "what `predict` returned", "Return a list with one answer for each row.")
        return answers[0]

    for beginning in ("Once upon a time, a robot", "The sea is", "1, 2, 3, 4,", "A dog and a cat"):
        table = pd.DataFrame({"prompt": [beginning]})
        whole = ask()
        of_type(str, whole, "the first answer of `predict`", "tokenizer.decode(…) makes text of tokens.")
        # Tokens that make no character are decoded one way alone and another way in a stream.
        if len(whole) >= 16 and "\ufffd" not in whole:
            break
    else:
        raise NotChecked(f"the model's answer is {short(whole)}; take a model that says more.")
    if ask() != whole:
        raise Wrong(
            "without `params`, two calls gave two answers.",
            "Sample only when `params` has a seed: do_sample=seed is not None.",
        )
    trials = []
    if type(model).predict_stream is not PythonModel.predict_stream:
        trials.append(lambda: _try_stream(model, context, table, whole))
    if "params" in inspect.signature(model.predict).parameters:
        trials += [lambda: _try_stop(ask, whole), lambda: _try_seed(ask, whole)]
    if not trials:
        name = type(model).__name__
        raise Wrong(f"`{name}` has no `predict_stream`, and its `predict` takes no `params`.")
    wrongs = []
    for trial in trials:
        try:
            if right := trial():
                return right
        except Wrong as wrong:
            wrongs.append(wrong)
    if wrongs:
        raise wrongs[0]
    raise Wrong(
        "`predict` takes `params`, but neither params={'stop': [...]} nor params={'seed': ...} changes the "
        "answer.",
        "Hand the value on to the method with the loop.",
    )


@exercise("2.2", "One call, one set of params: table.groupby('max_new_tokens') gathers what can share one.")
def check_score(score: Callable[[pd.DataFrame], Any], loaded: PyFuncModel, wrapper: Phi3Model) -> str:
    """Every row is answered with its own limit, in the table's order, with one call for each limit."""
    import pandas as pd

    limits = [6, 2, 4, 2, 6]
    prompts = [f"Count to {number}: 1, 2," for number in range(10, 10 + len(limits))]
    index = [f"row {number}" for number in range(len(limits))]
    table = pd.DataFrame({"prompt": prompts, "max_new_tokens": limits}, index=index)
    right = [
        loaded.predict({"prompt": prompt}, params={"max_new_tokens": limit})[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    if not any(right):
        raise NotChecked(_SILENT)
    with _calls(wrapper) as calls:
        answers = call(score, table.copy())
    if isinstance(answers, str | dict | pd.DataFrame) or not hasattr(answers, "__iter__"):
        raise Wrong(f"`score` returned a {type(answers).__name__}.", "Return a list, or a Series, of texts.")
    answers = list(answers)
    if len(answers) != len(right):
        raise Wrong(f"{len(table)} rows went in and {len(answers)} answers came out.")
    if answers != right and sorted(map(str, answers)) == sorted(right):
        raise Wrong(
            "the answers are right, but not in the order of the rows.",
            "Put each group's answers at its rows' places: answers.loc[rows.index] = … in a Series.",
        )
    for row, (got, wanted) in enumerate(zip(answers, right, strict=True)):
        if got != wanted:
            raise Wrong(
                f"row {row}, with a limit of {limits[row]} tokens, got {short(got)}, not {short(wanted)}.",
                "Each row's own limit goes into params={'max_new_tokens': int(limit)} of its call.",
            )
    if len(calls) > len(set(limits)):
        raise Wrong(f"all answers are right, but {len(set(limits))} limits took {len(calls)} calls.")
    return f"{len(limits)} rows with {len(set(limits))} limits were answered in {len(calls)} calls, in order."


@exercise("2.3", "`itertools.islice(stream, count)` takes that many pieces; `stream.close()` ends the work.")
def check_peek(peek: Callable[[Iterator[str], int], str], loaded: PyFuncModel, chat_prompt: str) -> str:
    """The first pieces are read, no more, and the stream is closed."""
    pieces = list(loaded.predict_stream({"prompt": chat_prompt}))
    if not pieces:
        raise NotChecked(_SILENT)
    for count in {1, max(1, min(3, len(pieces) - 1))}:
        taken = []

        def stream(taken: list[str] = taken) -> Iterator[str]:
            for piece in loaded.predict_stream({"prompt": chat_prompt}):
                taken.append(piece)
                yield piece

        running = stream()
        text = call(peek, running, count)
        if text != "".join(pieces[:count]):
            raise Wrong(
                f"the first {count} of the pieces make {short(''.join(pieces[:count]))}, and `peek` returned "
                f"{short(text)}.",
                "Join the pieces with ''.join(…).",
            )
        if len(taken) > count:
            raise Wrong(
                f"{count} pieces were asked for and {len(taken)} taken: the model wrote them for nobody.",
                "list(stream) and a `break` one piece late take too many; itertools.islice(stream, count) "
                "does not.",
            )
        if inspect.getgeneratorstate(running) != inspect.GEN_CLOSED:
            raise Wrong(
                "the stream is still open, and the model goes on writing.",
                "Call stream.close(), or use `with contextlib.closing(stream):`.",
            )
    return "the reader leaves after the pieces it wanted, and the model stops."


@exercise("2.4", "Its type is 'array'; `items` describes one city, `minItems` and `maxItems` how many.")
def check_cities_schema(cities_schema: dict, loaded: PyFuncModel, wrapper: Phi3Model, chosen: Model) -> str:
    """The schema allows lists of three texts and nothing else, and the model keeps to it."""
    from jsonschema import Draft202012Validator, SchemaError

    of_type(dict, cities_schema, "`cities_schema`", "Write the schema as a dict, as `schema` above.")
    try:
        Draft202012Validator.check_schema(cities_schema)
    except SchemaError as error:
        raise Wrong(f"this is no JSON schema: {short(error.message)}") from error
    allows = Draft202012Validator(cities_schema).is_valid
    if not allows(["Rome", "Oslo", "Lima"]):
        raise Wrong("it does not allow ['Rome', 'Oslo', 'Lima'].")
    shapes = {
        "two cities": (["Rome", "Oslo"], "Set minItems to 3."),
        "four cities": (["Rome", "Oslo", "Lima", "Bern"], "Set maxItems to 3."),
        "numbers": ([1, 2, 3], "Say what an item is: 'items': {'type': 'string'}."),
        "something that is no list": ({"cities": "Rome"}, "Set 'type': 'array' at the top."),
    }
    for shape, (example, hint) in shapes.items():
        if allows(example):
            raise Wrong(f"it also allows {shape}: {json.dumps(example)}.", hint)
    asked = wrapper.apply_chat_template(chosen.messages("Which three cities should I visit in Italy?"))
    given = {"json_schema": json.dumps(cities_schema), "max_new_tokens": 128}
    try:
        (text,) = loaded.predict({"prompt": asked}, params=given)
    except Exception as error:
        raise Wrong(f"the model refused it: {short(error)}") from error
    try:
        answer = json.loads(text)
    except ValueError:
        raise Wrong(
            f"the answer was cut before it was whole: {short(text)}",
            "A weak model may never end a text: bound each item with maxLength, 20 for example.",
        ) from None
    if not allows(answer):
        raise Wrong(
            f"the model's answer, {text}, breaks it.",
            "Some keywords do not bind the model; keep to type, items, minItems, maxItems and maxLength.",
        )
    return f"the shape holds, {text}; what stands in it is up to the model."


@exercise("2.5", "`evaluation.gate` with both bounds says who passes; a column's `idxmin()` names the least.")
def check_smallest(smallest: Callable[[pd.DataFrame, float, float], str], table: pd.DataFrame) -> str:
    """Of those that pass the gate, the one with the least on disk is named, whatever was measured."""
    from helpers import evaluation

    table = table.drop(evaluation.BASELINE, errors="ignore")  # it is not for shipping
    others = table["size_mb"].drop(evaluation.reference_among(table.index))
    if others.empty:
        raise NotChecked("only one candidate was measured; there is nothing to choose from.")
    # The same candidates, as if the smallest had lost 30 points, or was a nat away from fp32.
    equal = table.assign(accuracy=0.8, kl_divergence=0.0)
    weak, far = equal.copy(), equal.copy()
    weak.loc[others.idxmin(), "accuracy"] = 0.5
    far.loc[others.idxmin(), "kl_divergence"] = 1.0
    cases = [(table, 0.05, 0.05), (weak, 0.05, 0.05), (weak, 0.4, 0.05), (far, 0.05, 0.05), (far, 0.05, 2.0)]
    for measured, max_drop, max_kl in cases:
        verdict = evaluation.gate(measured, max_drop, max_kl)
        right = verdict.query("passes")["size_mb"].idxmin()
        name = call(smallest, measured.copy(), max_drop, max_kl)
        asked = f"with max_drop={max_drop} and max_kl={max_kl} it chose"
        if not isinstance(name, str) or name not in table.index:
            raise Wrong(f"it returned {short(name)}.", f"Return a name: {', '.join(table.index)}.")
        if not verdict.loc[name, "passes"]:
            raise Wrong(
                f"{asked} {name}: {verdict.loc[name, 'reason']}.",
                "Keep only rows that pass: evaluation.gate(table, max_drop, max_kl).query('passes').",
            )
        if name != right:
            sizes = measured["size_mb"]
            raise Wrong(
                f"{asked} {name} ({sizes[name]:.0f} MB), and {right} passes with {sizes[right]:.0f} MB.",
                "Take the least size_mb among those that pass, and hand both bounds on to the gate.",
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
    return Path(os.path.relpath(folder / name)).as_posix()


def _model_in(path: str, context: PythonModelContext) -> PythonModel:
    """The model that a learner's file hands to `set_model`, loaded as MLflow would."""
    from mlflow.pyfunc import PythonModel

    place = "It is the path of your file: exercises.own_file('better_model.py')."
    if not isinstance(path, str | Path):
        raise Wrong(f"`better_model` is {short(path)}, and not the path of a file.", place)
    if not Path(path).is_file():
        raise Wrong(f"there is no file {str(path)!r}.", 'Write it with %%writefile "{better_model}".')
    try:
        with redirect_stderr(io.StringIO()):  # MLflow asks for type hints, which nothing here needs.
            names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise Wrong(
            f"running the file raised {short(error)}", "Read the file from its first line."
        ) from error
    models = {
        value.__name__: value
        for value in names.values()
        if isinstance(value, type) and issubclass(value, PythonModel) and value is not PythonModel
    }
    if not models:
        raise Wrong("the file has no model class.", "Start it with class MyModel(mlflow.pyfunc.PythonModel).")
    last = list(models)[-1]
    told = re.findall(r"set_model\((\w+)", Path(path).read_text(encoding="utf-8"))
    if not told:
        raise Wrong(
            "the file does not say which class is the model.",
            f"End it with mlflow.models.set_model({last}()).",
        )
    model = models.get(told[-1], models[last])()
    try:
        model.load_context(context)
    except Exception as error:
        raise Wrong(f"`load_context` raised {short(error)}") from error
    return model


def _try_stream(model: PythonModel, context: PythonModelContext, table: pd.DataFrame, whole: str) -> str:
    """Pieces that together are the answer."""

    def predict_stream() -> list[str]:
        return list(model.predict_stream(context, table))

    pieces = call(predict_stream)
    inside = "Inside the loop: yield stream.decode(token), with stream = self.tokenizer.create_stream()."
    for piece in pieces:
        of_type(str, piece, "a piece of the stream", inside)
    if len(pieces) < 2:
        raise Wrong(f"the stream came in {len(pieces)} piece: {short(''.join(pieces))}.", inside)
    if "".join(pieces).strip() != whole.strip():
        raise Wrong(
            f"the pieces make {short(''.join(pieces))}, and `predict` returned {short(whole)}.", inside
        )
    return f"a stream of {len(pieces)} pieces, which together are the answer."


def _try_stop(ask: Callable[..., str], whole: str) -> str:
    """Answers that end before a text, within a token or across several; "" if no text is heeded."""
    middle = len(whole) // 2
    for mark in (whole[middle], whole[middle : middle + 6]):
        text, before = ask(stop=[mark]), whole.partition(mark)[0]
        if text == before:
            continue
        if text == whole:
            if mark == whole[middle]:
                return ""
            raise Wrong(
                f"the answer goes on after {mark!r}, a text of several tokens.",
                "Look for the stop text in all of the answer so far, not in the last token.",
            )
        hint = "Keep what is before the text: answer.partition(stop)[0]."
        raise Wrong(f"params={{'stop': [{mark!r}]}} gave {short(text)}, not {short(before)}.", hint)
    return "the answer ends before a stop text, also before one of several tokens."


def _try_seed(ask: Callable[..., str], whole: str) -> str:
    """Equal answers for equal seeds, others for other seeds; "" if no seed is heeded."""
    seeds = (1, 2, 3, 4)
    said, again = ([ask(seed=seed) for seed in seeds] for _ in range(2))
    if set(said) == {whole}:
        return ""
    options = "set_search_options(…, do_sample=True, random_seed=seed) samples by a seed."
    for seed, first, second in zip(seeds, said, again, strict=True):
        if first != second:
            raise Wrong(f"seed {seed} gave {short(first)} and then {short(second)}.", options)
    if len(set(said)) == 1:
        raise Wrong(f"seeds 1 to 4 all gave {short(said[0])}.", options)
    return "equal seeds give equal answers, other seeds other ones."


def _check_asked(asked: list[tuple[str, str]], version: ModelVersion, question: str) -> None:
    """Whether it was this version that was loaded and asked, and this question that was put to it."""
    uri = f"models:/{version.name}/{version.version}"
    questions = [data for loaded, data in asked if loaded in (uri, version.source)]
    if not questions:
        others = ", ".join(sorted({loaded for loaded, _ in asked})) or "none"
        raise Wrong(
            f"version {version.version} was to be loaded and asked; your function did so with {others}.",
            "Inside the function: mlflow.pyfunc.load_model(f'models:/slm-transformers/{number}').predict(…).",
        )
    if not any(question in data for data in questions):
        raise Wrong(
            f"version {version.version} was not asked {question!r}, but {short(questions[-1])}.",
            "Hand the function's own `question` to chosen.messages(question).",
        )


@contextmanager
def _answers(chatbot: TextGenerationPipeline) -> Iterator[list[tuple[str, int]]]:
    """What the pipeline writes in this block: text and number of tokens of each answer."""
    answers, postprocess = [], chatbot.postprocess

    def postprocess_and_remember(outputs: dict, *args: object, **options: object) -> list[dict]:
        sequence, asked = outputs["generated_sequence"][0][0], outputs["input_ids"].shape[-1]
        text = chatbot.tokenizer.decode(sequence[asked:], skip_special_tokens=True)
        answers.append((text, len(sequence) - asked))
        return postprocess(outputs, *args, **options)

    chatbot.postprocess = postprocess_and_remember
    try:
        yield answers
    finally:
        del chatbot.postprocess


@contextmanager
def _loaded() -> Iterator[list[tuple[str, str]]]:
    """What the models are asked that this block loads: URI and input, as text, of each call."""
    import mlflow

    asked, load = [], mlflow.pyfunc.load_model

    def load_and_listen(model_uri: str, *args: object, **options: object) -> PyFuncModel:
        model = load(model_uri, *args, **options)
        predict = model.predict

        def predict_and_remember(data: Any, *args: object, **options: object) -> Any:
            asked.append((model_uri, str(data.to_dict() if hasattr(data, "to_dict") else data)))
            return predict(data, *args, **options)

        model.predict = predict_and_remember
        return model

    mlflow.pyfunc.load_model = load_and_listen
    try:
        yield asked
    finally:
        mlflow.pyfunc.load_model = load


@contextmanager
def _calls(wrapper: Phi3Model) -> Iterator[list[list[Completion]]]:
    """What the loaded model writes in this block: one list of Completions for each call."""
    calls, generate = [], wrapper.generate

    def generate_and_remember(prompts: list, params: dict | None = None) -> list[Completion]:
        calls.append(generate(prompts, params))
        return calls[-1]

    wrapper.generate = generate_and_remember
    try:
        yield calls
    finally:
        del wrapper.generate
