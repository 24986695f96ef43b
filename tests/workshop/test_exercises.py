"""Each student edition runs to its end; there learners go wrong in many ways, and then right."""

import json
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest

from helpers.workshop import editions, exercises, notebooks

# What a learner might write, what the check says is wrong, and the hint (each in part).
FIRST_HINT = {  # while nothing is written
    "1.1": "Set the seed with `transformers.set_seed(seed)`",
    "1.2": "adds to a finished run",
    "1.3": "Load f'models:/slm-transformers/{number}'",
    "1.4": "`filter_string`, `order_by` and `max_results`",
    "2.1": "Copy the cell with %%writefile",
    "2.2": "table.groupby('max_new_tokens')",
    "2.3": "`stream.close()` ends the work",
    "2.4": "Its type is 'array'",
    "2.5": "says who passes",
}
_ASK = "chatbot(chosen.messages(question), max_new_tokens=16, do_sample={})"
_TEXT = "[0]['generated_text'][-1]['content']"
_WORDS = (
    "for _, row in runs.iterrows():\n"
    "    mlflow.log_metric('words_per_second', {}, run_id=row['run_id'])\n"
    "best_run = {}"
)
_RIGHT_WORDS = "len(row['tags.answer'].split()) / row['metrics.seconds']"
_TELL = "def tell(question, seed):\n    {}"
_MOVE = "def move_alias(alias, number, question, expected):\n    {}"
_SET = "client.set_registered_model_alias('slm-transformers', alias, number)"
_GATE = _MOVE.format(
    "asked = mlflow.pyfunc.load_model(f'models:/slm-transformers/{number}')\n"
    "    (reply,) = asked.predict({'messages': chosen.messages(question)})\n"
    "    moves = expected in reply['choices'][0]['message']['content']\n"
    f"    if moves: {_SET}\n"
    "    return moves"
)
_TRACES = "mlflow.search_traces(return_type='list', {})"
_MINE = "filter_string=f\"tags.model_version = '{version.name}/{version.version}'\""
_BETTER = (
    "better_model = exercises.own_file('attempt.py')\n"
    "source = Path(my_model).read_text(encoding='utf-8') + '''\n\n{}\n'''\n"
    "Path(better_model).write_text(source, encoding='utf-8')"
)
_CLASS = """class Better(MyModel):
    {}

    def tokens(self, prompt, **options):
        ids = self.tokenizer.encode(prompt)
        search = og.GeneratorParams(self.model)
        search.set_search_options(max_length=len(ids) + 32, **options)
        loop = og.Generator(self.model, search)
        loop.append_tokens(ids)
        while not loop.is_done():
            loop.generate_next_token()
            yield loop.get_next_tokens()[0]

mlflow.models.set_model(Better())"""
_WITH_PARAMS = """def predict(self, context, model_input, params=None):
        return [self.answer(prompt, **(params or {{}})) for prompt in model_input["prompt"]]

    def answer(self, prompt, {}):
        {}"""
_WITH_STREAM = """def predict(self, context, model_input):
        return [self.tokenizer.decode(list(self.tokens(model_input["prompt"].iloc[0])))]

    def predict_stream(self, context, model_input, params=None):
        prompt = model_input["prompt"].iloc[0]
        {}"""


def better(template: str, *parts: str) -> str:
    """The code of a cell that writes a class with these methods behind `MyModel`."""
    return _BETTER.format(_CLASS.format(template.format(*parts)))


_STOPS = """text, stream = "", self.tokenizer.create_stream()
        for token in self.tokens(prompt):
            text += stream.decode(token)
            for mark in stop:
                if mark and mark in text:
                    return text.partition(mark)[0]
        return text"""
_SEEDED = """options = {"random_seed": seed, "do_sample": True} if seed is not None else {}
        return self.tokenizer.decode(list(self.tokens(prompt, **options)))"""
_STREAMS = """stream = self.tokenizer.create_stream()
        for token in self.tokens(prompt):
            yield stream.decode(token)"""
RIGHT = {
    "a stop text": better(_WITH_PARAMS, "stop=(), seed=None", _STOPS),
    "a seed": better(_WITH_PARAMS, "seed=None, stop=()", _SEEDED),
    "a stream": better(_WITH_STREAM, _STREAMS),
}
_SCORE = (
    "def score(table):\n"
    "    def ask(rows, limit):\n"
    "        return loaded.predict(rows[['prompt']], params={{'max_new_tokens': int(limit)}})\n"
    "    return {}"
)
_PEEK = "def peek(stream, count):\n    {}"
_SMALLEST = "def smallest(table, max_drop, max_kl):\n    return {}"
ATTEMPTS = [
    ("1.1", "del tell", "there is no `tell`", "Run the cells above"),
    ("1.1", "tell = ...", "`tell` is still empty", FIRST_HINT["1.1"]),
    ("1.1", "def tell(question): return ''", "it raised TypeError: tell() takes 1", FIRST_HINT["1.1"]),
    ("1.1", _TELL.format(f"return {_ASK.format(False)}{_TEXT}"), "2 and 3 all gave", "do_sample=True"),
    ("1.1", _TELL.format(f"return {_ASK.format(True)}{_TEXT}"), "seed 1 gave", "Set the seed inside `tell`"),
    ("1.1", _TELL.format(f"return {_ASK.format(True)}"), "which is no text", "content"),
    ("1.1", _TELL.format("return 'once ' * 17"), "17 words, so more than 16 tokens", "max_new_tokens=16"),
    ("1.2", "best_run = runs.run_id[0]", "tokens' is None, and should be", "divide the words"),
    ("1.2", _WORDS.format(_RIGHT_WORDS, "runs"), "is none of the 8 ids", "Search with the filter"),
    (
        "1.2",
        "rates = [r.data.metrics['words_per_second'] for r in map(mlflow.get_run, runs.run_id)]\n"
        "best_run = runs.run_id[rates.index(min(rates))]",
        "words per second, and another has",
        "DESC",
    ),
    ("1.3", _MOVE.format(f"{_SET}; return True"), "is at version 1, not at none", "inside an `if`"),
    ("1.3", _MOVE.format("return False"), "alias is at version none, not at 1", "chosen.messages(question)"),
    ("1.3", _MOVE.format("return 'no'"), "it returned 'no'", "Return False"),
    (
        "1.3",
        "other = mlflow.register_model(model_info.model_uri, 'slm-transformers')\n"
        + _GATE.replace("alias, number)", "alias, other.version)"),
        "the alias is at version 2, not at 1",
        "set the alias to `number`",
    ),
    ("1.4", f"slowest = {_TRACES.format(_MINE)}[0]", "is none of the 3 ids", "the tag that `chat` sets"),
    (
        "1.4",
        "with mlflow.start_span('slow'):\n"
        "    time.sleep(0.2)\n"
        "    mlflow.update_current_trace(tags={'model_version': f'{version.name}/{version.version}'})\n"
        "mlflow.flush_trace_async_logging()\n"
        "slowest = " + _TRACES.format(_MINE + ", order_by=['execution_time_ms']") + "[0].info.trace_id",
        "ms, and another has",
        "DESC",
    ),
    ("2.1", "better_model = 'nowhere.py'", "it raised FileNotFoundError", "%%writefile"),
    (
        "2.1",
        "better_model = my_model",
        "`MyModel` has no `predict_stream`, and its `predict` takes no",
        "Copy",
    ),
    (
        "2.1",
        "better_model = exercises.own_file('attempt.py')\n"
        "source = Path(my_model).read_text(encoding='utf-8').partition('mlflow.models.set')[0]\n"
        "Path(better_model).write_text(source, encoding='utf-8')",
        "the file does not say what is its model",
        "mlflow.models.set_model(MyModel())",
    ),
    (
        "2.1",
        better(_WITH_PARAMS, "stop=()", "return self.tokenizer.decode(list(self.tokens(prompt)))").replace(
            "**(params or {})", ""
        ),
        "neither params={'stop': [...]} nor params={'seed': ...} changes the answer",
        "Hand the value on",
    ),
    (
        "2.1",
        better(_WITH_PARAMS, "stop=(), seed=None", _STOPS.replace(".partition(mark)[0]", "")),
        "gave",
        "keep what is before it",
    ),
    (
        "2.1",
        better(
            _WITH_PARAMS,
            "seed=None, stop=()",
            _SEEDED.replace(
                '{"random_seed": seed, "do_sample": True} if seed is not None else {}', '{"do_sample": True}'
            ),
        ),
        "two calls gave two answers",
        "do_sample=seed is not None",
    ),
    (
        "2.1",
        better(_WITH_PARAMS, "seed=None, stop=()", _SEEDED.replace('"random_seed": seed, ', "")),
        "seeds 1, 2, 1 and 3 gave",
        "random_seed=seed",
    ),
    (
        "2.1",
        better(_WITH_STREAM, "yield self.tokenizer.decode(list(self.tokens(prompt)))"),
        "the stream gave [",
        "In the loop",
    ),
    ("2.2", _SCORE.format("ask(table, 6)"), "a row with a limit of 2 tokens got", "Each row's own limit"),
    (
        "2.2",
        _SCORE.format(
            "[text for limit, rows in table.groupby('max_new_tokens') for text in ask(rows, limit)]"
        ),
        "not in the order of the rows",
        "Put each group's answers at its rows' places",
    ),
    ("2.2", _SCORE.format("ask(table[:1], 6)"), "5 rows went in and 1 answers came out", FIRST_HINT["2.2"]),
    ("2.3", _PEEK.format("return ''.join(list(stream)[:count])"), "3 pieces were asked for", "too many"),
    (
        "2.3",
        _PEEK.format("return ''.join(next(stream) for _ in range(count))"),
        "the stream is still open",
        "contextlib.closing(stream)",
    ),
    ("2.3", _PEEK.format("return next(stream)"), "and `peek` returned 'Once '", "Join the pieces"),
    ("2.4", "cities_schema = {'type': 'aray'}", "it raised SchemaError", FIRST_HINT["2.4"]),
    ("2.4", "cities_schema = {'type': 'object'}", "it does not allow ['Rome'", FIRST_HINT["2.4"]),
    ("2.4", "cities_schema = {'type': 'array'}", "it also allows two cities", "minItems"),
    ("2.4", "cities_schema = {'type': 'array', 'minItems': 3}", "it also allows four cities", "maxItems"),
    (
        "2.4",
        "cities_schema = {'type': 'array', 'minItems': 3, 'maxItems': 3}",
        "it also allows numbers",
        "'items': {'type': 'string'}",
    ),
    (
        "2.4",
        "cities_schema = {'minItems': 3, 'maxItems': 3, 'items': {'type': 'string'}}",
        "something that is no list",
        "'type': 'array'",
    ),
    (
        "2.4",
        "cities_schema = {'type': 'array', 'minItems': 3, 'maxItems': 3, 'items': {'type': 'string'}}",
        "the answer was cut before it was whole",
        "maxLength",
    ),
    (
        "2.5",
        _SMALLEST.format("evaluation.gate(table, max_drop).query('passes')['size_mb'].idxmin()"),
        "with max_drop=0.4 and max_kl=2.0 it chose",
        "evaluation.gate(table, max_drop, max_kl)",
    ),
]


CHECK_2_1 = "exercises.check_better_model(globals())"


def run(name: str, folder) -> nbformat.NotebookNode:
    """The student edition, run with the toy model; behind its end the attempts, and then our solutions."""
    full = nbformat.read(notebooks.NOTEBOOKS[name], as_version=4)
    solutions = {cell.id[-3:].replace("-", "."): cell for cell in full.cells if "solution" in cell.id}
    book = editions.student(full)
    for place, (number, code, _, _) in enumerate(ATTEMPTS):
        if number in solutions:
            check = solutions[number].source.splitlines()[-1]
            book.cells.append(nbformat.v4.new_code_cell(f"{code}\n\n{check}", id=f"attempt-{place}"))
    for place, code in enumerate(RIGHT.values() if name == "02" else ()):
        book.cells.append(nbformat.v4.new_code_cell(f"{code}\n\n{CHECK_2_1}", id=f"right-{place}"))
    book.cells += [
        nbformat.v4.new_code_cell(cell.source, id=f"solved-{cell.id}") for cell in solutions.values()
    ]
    nbformat.write(book, folder / "student.ipynb")
    parameters = {"model": "tiny-phi3", "tracking_uri": f"sqlite:///{folder}/mlflow.db", "serve": False}
    if name == "02":
        parameters["questions"] = 20
    return papermill.execute_notebook(
        folder / "student.ipynb", folder / "executed.ipynb", parameters, progress_bar=False
    )


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, str]:
    """What the cells of both notebooks printed, by their ids; a cell that raised would have ended it here."""
    books = [run(name, tmp_path_factory.mktemp(name)) for name in notebooks.NOTEBOOKS]
    cells = [cell for book in books for cell in book.cells if cell.cell_type == "code"]
    return {cell.id: "".join(output.get("text", "") for output in cell.outputs) for cell in cells}


@pytest.mark.attempts
@pytest.mark.parametrize("number", FIRST_HINT)
def test_an_unsolved_exercise_fails_its_check_with_its_hint_and_the_notebook_goes_on(number, printed):
    said = printed[f"solution-{number.replace('.', '-')}"]
    assert said.startswith(f"✗ Exercise {number}, not yet: ")
    wrong, hint = said.strip().split("\n  Hint: ")
    assert wrong.endswith(("is still empty.", "returned nothing."))
    assert FIRST_HINT[number] in hint


@pytest.mark.attempts
@pytest.mark.parametrize("number", FIRST_HINT)
def test_with_the_solution_put_back_the_check_passes_with_one_line(number, printed):
    said = printed[f"solved-solution-{number.replace('.', '-')}"]
    assert said.startswith(f"✓ Exercise {number} is solved: ")
    assert said.count("\n") == 1


@pytest.mark.attempts
@pytest.mark.parametrize(("place", "kind"), list(enumerate(RIGHT)), ids=RIGHT)
def test_each_of_the_three_things_solves_the_exercise(place, kind, printed):
    said = printed[f"right-{place}"]
    assert said.startswith("✓ Exercise 2.1 is solved: ")
    words = {"a stop text": "before the stop text", "a seed": "equal seeds", "a stream": "a stream of"}
    assert words[kind] in said


@pytest.mark.attempts
@pytest.mark.parametrize("place", range(len(ATTEMPTS)), ids=[f"{a[0]}: {a[2]}" for a in ATTEMPTS])
def test_a_wrong_result_gets_what_is_wrong_and_a_hint(place, printed):
    number, _, wrong, hint = ATTEMPTS[place]
    said = printed[f"attempt-{place}"]
    assert said.startswith(f"✗ Exercise {number}, not yet: ")
    assert wrong in said.partition("\n  Hint: ")[0]
    assert hint in said.partition("\n  Hint: ")[2]


CHECKS = [value for name, value in vars(exercises).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_without_the_cells_above_says_so_instead_of_raising(check, capsys):
    check({})
    assert "Hint: " in capsys.readouterr().out


def test_a_model_whose_answer_is_empty_leaves_the_class_unchecked(tiny_phi3_onnx, tmp_path, capsys):
    silent = silenced(tiny_phi3_onnx, tmp_path / "silent")
    exercises.check_better_model({"better_model": own_class(tmp_path), "onnx_folder": silent})
    assert capsys.readouterr().out.startswith("– Exercise 2.1 was not checked: the model's answer is ''")


def own_class(folder: Path) -> Path:
    """The file that notebook 02's cell with %%writefile writes."""
    book = nbformat.read(notebooks.NOTEBOOKS["02"], as_version=4)
    (source,) = [cell.source for cell in book.cells if cell.source.startswith("%%writefile")]
    file = folder / "my_model.py"
    file.write_text(source.partition("\n")[2], encoding="utf-8")
    return file


def silenced(onnx: Path, folder: Path) -> Path:
    """A copy of an ONNX folder in which every token ends the answer."""
    shutil.copytree(onnx, folder)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = list(range(config["model"]["vocab_size"]))
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_learners_file_is_written_wherever_the_project_lies(tmp_path, monkeypatch, capsys):
    """By the notebook's own line, from another working directory, as IPython does it."""
    from IPython.core.interactiveshell import InteractiveShell

    project = tmp_path / "it's 50% of a{b}c in $HOME, Übung 日本"
    project.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(exercises, "ROOT", project)
    shell = InteractiveShell()
    shell.user_ns["my_model"] = exercises.own_file("my_model.py")
    assert shell.run_cell('%%writefile "{my_model}"\nname = "{ö} $HOME %"\n').success
    assert (project / "out" / "my_model.py").read_text(encoding="utf-8") == 'name = "{ö} $HOME %"\n'
    assert str(tmp_path) not in capsys.readouterr().out


def test_a_learners_file_goes_to_a_folder_of_its_own_where_the_project_cannot_be_written(
    tmp_path, monkeypatch
):
    (tmp_path / "out").write_text("no folder can be made here", encoding="utf-8")
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    file = Path(exercises.own_file("my_model.py"))
    file.write_text("x = 1", encoding="utf-8")
    assert file.resolve().parent != tmp_path
    shutil.rmtree(file.parent)


@pytest.mark.parametrize(
    ("raised", "said"),
    [(OSError("the store\nis gone"), "OSError: the store is gone"), (SystemExit(3), "SystemExit: 3")],
    ids=["an error", "sys.exit"],
)
def test_a_check_that_cannot_go_on_is_a_verdict_as_well(raised, said, capsys):
    @exercises.exercise("9.9", "Look again.")
    def check(answer):
        """Any."""
        raise raised

    check({"answer": 1})
    assert capsys.readouterr().out == (f"✗ Exercise 9.9, not yet: it raised {said}\n  Hint: Look again.\n")
