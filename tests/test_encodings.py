"""Every text file, and what a child process prints, is read and written in an encoding named in the code."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("helpers", "benchmarks", "tests", "notebooks")
ENCODING_AT = {"read_text": 0, "write_text": 1}  # its place among a method's arguments


def code(path: Path) -> str:
    """The Python of a module, or of a notebook's cells without IPython's own lines."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return text
    lines = [
        line for cell in json.loads(text)["cells"] if cell["cell_type"] == "code" for line in cell["source"]
    ]
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines if not line.startswith("%"))


def nameless(source: str) -> Iterator[int]:
    """Lines that leave an encoding to the system. Ruff's PLW1514 sees `Path(…)`, but not `folder / name`."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or "encoding" in {keyword.arg for keyword in call.keywords}:
            continue
        name = ast.unparse(call.func).rpartition(".")[2]
        constants = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        is_text = any(str(value) in ("r", "w", "a", "x", "r+", "w+", "a+") for value in constants)
        if len(call.args) <= ENCODING_AT.get(name, -1) or (name in ("open", "fdopen") and is_text):
            yield call.lineno


def test_every_text_file_is_read_and_written_in_a_named_encoding():
    sources = [path for name in FOLDERS for kind in ("*.py", "*.ipynb") for path in (ROOT / name).rglob(kind)]
    found = [f"{path}:{line}" for path in sources for line in nameless(code(path))]
    assert {path.relative_to(ROOT).parts[0] for path in sources} == set(FOLDERS)
    assert not found


def test_what_a_child_process_prints_is_read_in_a_named_encoding():
    sources = [path for name in ("helpers", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    assert not [path for path in sources if "text=True" in path.read_text("utf-8")]


@pytest.mark.parametrize(
    "line", ["(folder / name).read_text()", "path.write_text(text)", "open(name, 'w')", "log.open('a')"]
)
def test_a_line_that_leaves_it_to_the_system_is_found(line):
    assert list(nameless(line)) == [1]


# As on a system of another encoding, where Python is not told to use UTF-8.
C_LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def helpers(*words: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "helpers", *map(str, words)]
    return subprocess.run(command, env=os.environ | C_LOCALE | environment, capture_output=True)


@pytest.mark.command
@pytest.mark.parametrize(
    ("console", "words"),
    [
        ("", ["run", "-p", "model", "模型 …"]),
        ("ascii:strict", ["run", "-p", "model", "模型 …"]),
        ("cp1252", ["doctor", "--model", "tiny-phi3"]),
        ("cp932", ["fetch", "nö/✓", "--offline"]),
    ],
)
def test_a_console_that_cannot_show_a_character_stops_nothing(console, words):
    result = helpers(*words, PYTHONIOENCODING=console)
    said = (result.stdout + result.stderr).decode("ascii", "replace")
    assert "Unicode" not in said
    assert "Traceback" not in said
    assert result.returncode in (0, 1, 2)


@pytest.mark.kernel
def test_notebook_02_runs_where_utf_8_is_not_the_default(tmp_path):
    given = {"model": "tiny-phi3", "serve": False, "max_new_tokens": 9, "questions": 20}
    given["tracking_uri"] = f"sqlite:///{tmp_path}/mlflow.db"
    words = [word for name, value in given.items() for word in ("-p", name, value)]
    result = helpers("run", "02", *words, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr.decode("ascii", "replace")[-2000:]
