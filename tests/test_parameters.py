"""A wrong parameter ends in one sentence: its value, what is allowed, how to set it."""

import http.server
import socket
import threading

import pytest

from helpers import ROOT, parameters
from helpers.parameters import ParameterError

GOOD = {"model": "smollm2-135m"}


def refused(**given) -> str:
    with pytest.raises(ParameterError) as caught:
        parameters.check(**GOOD | given)
    return str(caught.value)


def test_the_defaults_pass_and_name_the_model():
    chosen = parameters.check(
        model="smollm2-135m",
        question="Why?",
        max_new_tokens=64,
        tracking_uri="",
        experiment="e",
        offline=False,
        seed=7,
    )
    assert chosen.key == "smollm2-135m"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("offline", "false", "True or False"),
        ("offline", 1, "True or False"),
        ("max_new_tokens", 0, "a whole number from 1"),
        ("max_new_tokens", -3, "a whole number from 1"),
        ("max_new_tokens", 12.5, "a whole number from 1"),
        ("max_new_tokens", "many", "a whole number from 1"),
        ("max_new_tokens", True, "a whole number from 1"),
        ("threads", -1, "a whole number from 0"),
        ("seed", "lucky", "a whole number from 0"),
        ("precision", "int5", "one of fp32, int8, int4"),
        ("precision", 4, "one of fp32, int8, int4"),
        ("question", "", "a text with at least one character"),
        ("prompt", None, "a text with at least one character"),
        ("experiment", "  ", "a text with at least one character"),
        ("tracking_uri", 5000, "a text"),
        ("tracking_uri", "mlruns", "a server"),
        ("tracking_uri", "file:///tmp/mlruns", "a server"),
        ("tracking_uri", "mysql://me@db/mlflow", "a server"),  # these need drivers that are not locked
        ("tracking_uri", "postgresql+psycopg://me@db/mlflow", "a server"),
        ("tracking_uri", "databricks", "a server"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed_and_how_to_set_it(name, value, allowed):
    sentence = refused(**{name: value})
    assert f"{name}={value!r}" in sentence
    assert allowed in sentence
    assert f"-p {name} " in sentence


@pytest.mark.parametrize("name", ["experiment", "question", "prompt"])
@pytest.mark.parametrize("value", [2024, 3.5, True])
def test_a_text_that_papermill_took_for_something_else_is_given_with_r(name, value):
    sentence = refused(**{name: value})
    assert sentence.startswith(f"{name}={value!r} is not a text.")
    assert f"-r {name} {value}" in sentence
    assert "-p name" not in sentence


@pytest.mark.parametrize(
    "value", ["./mlruns", "mlruns", "file:///tmp/mlruns", "databricks", "sqlite:///no/my.db"]
)
def test_a_store_of_the_environment_is_refused_in_the_variables_name(monkeypatch, value):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    sentence = refused(tracking_uri="")
    assert sentence.startswith("MLFLOW_TRACKING_URI=")
    assert "export MLFLOW_TRACKING_URI=" in sentence
    assert "tracking_uri" not in sentence.replace("MLFLOW_TRACKING_URI", "")
    with pytest.raises(ParameterError, match="MLFLOW_TRACKING_URI="):
        parameters.store("")


def test_a_name_that_no_notebook_declares_is_the_notebooks_mistake():
    with pytest.raises(TypeError, match="no field quetsion"):
        parameters.check(**GOOD, quetsion="Why?")


@pytest.mark.command
def test_a_headless_run_refuses_the_environment_s_store_before_it_starts(monkeypatch, capsys):
    from helpers.__main__ import main

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    for command in (["run", "01"], ["ui"], ["serve"]):
        assert main(command) == 2
        assert capsys.readouterr().err.startswith("error: MLFLOW_TRACKING_URI='./mlruns' is not")


def test_a_command_s_option_is_refused_in_its_name():
    with pytest.raises(
        ParameterError, match=r"--tracking-uri='mlruns' is not .* Set it with --tracking-uri "
    ):
        parameters.store("mlruns", "--tracking-uri")


def test_a_folder_is_no_database(tmp_path):
    assert "is a folder, not a file" in refused(tracking_uri=f"sqlite:///{tmp_path}")
    assert "is a folder, not a file" in refused(tracking_uri="sqlite:///")


@pytest.mark.parametrize(
    "name", ["a%2Fb", "a%20b", "a?b", "a#b", "a b", "100%", "数据", "Größe", "a;b&c=d+e"]
)
def test_the_path_of_a_database_survives_being_a_uri(tmp_path, name):
    import sqlalchemy

    folder = tmp_path / name
    folder.mkdir()
    uri = parameters.sqlite_uri(folder / "my.db")
    assert sqlalchemy.make_url(uri).database == str(folder / "my.db")
    for given in (uri, f"sqlite:///{folder}/my.db"):  # as made here, and as pasted from a shell
        assert parameters.sqlite_file(given) == folder / "my.db"
        assert parameters.resolved(given) == uri


@pytest.mark.parametrize("where", [True, False, "local", "local[2]", "yarn", "k8s://https://cluster:6443"])
def test_spark_runs_nowhere_here_or_on_a_cluster(where):
    parameters.check(**GOOD, spark=where)


@pytest.mark.parametrize(
    "where", ["false", "True", "", "local[0]", "127.0.0.1:7077", "spark://host", "spark://", "mesos://h:1", 1]
)
def test_what_is_no_place_for_spark_is_named_with_what_is(where):
    sentence = refused(spark=where)
    assert sentence.startswith(f"spark={where!r} is not True, False or the address of a master")
    assert "-p spark spark://127.0.0.1:7077" in sentence


def test_one_master_of_several_has_to_answer():
    with socket.create_server(("127.0.0.1", 0)) as master:
        address = f"127.0.0.1:{master.getsockname()[1]}"
        parameters.check(**GOOD, spark=f"spark://{address}")
        parameters.check(**GOOD, spark=f"spark://127.0.0.1:9,{address}")
    sentence = refused(spark="spark://127.0.0.1:9,127.0.0.1:70000")
    assert sentence.startswith("spark='spark://127.0.0.1:9,127.0.0.1:70000' does not answer (")
    assert "-p spark True" in sentence


def test_an_unknown_model_is_answered_with_the_catalogue():
    sentence = refused(model="phi-33")
    assert "phi-33" in sentence
    assert "smollm2-135m, phi-3-mini" in sentence
    assert sentence.count("Set it with") == 1


def test_a_server_that_does_not_answer_is_named():
    sentence = refused(tracking_uri="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in sentence
    assert "mlflow server" in sentence


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2"])
def test_a_database_that_is_not_there_is_named_in_one_line(scheme):
    uri = f"{scheme}://me@127.0.0.1:9/mlflow"
    sentence = refused(tracking_uri=uri)
    assert sentence.startswith(f"tracking_uri={uri!r} cannot be opened (connection to server at")
    assert "Connection refused" in sentence
    assert "\n" not in sentence


def test_a_database_that_never_answers_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"postgresql://me:hunter2@127.0.0.1:{silent.getsockname()[1]}/mlflow"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        sentence = refused(tracking_uri="")
    assert "timeout expired" in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize(
    "uri", ["postgresql://me@127.0.0.1:port/db", "postgresql://me@127.0.0.1/db?nonsense=1"]
)
def test_a_database_address_that_cannot_be_read_is_one_line(uri):
    sentence = refused(tracking_uri=uri)
    assert sentence.startswith(f"tracking_uri={uri!r} cannot be opened (")
    assert "\n" not in sentence


def test_a_server_that_answers_passes_even_when_it_asks_for_a_password():
    class Locked(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        parameters.check(**GOOD, tracking_uri=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_relative_database_lies_in_the_project_wherever_the_process_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "only-here").mkdir()
    parameters.check(**GOOD, tracking_uri="sqlite:///helpers/my.db")
    assert f"{ROOT}/only-here/my.db" in refused(tracking_uri="sqlite:///only-here/my.db")
    assert not any((tmp_path / "only-here").iterdir())


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("sqlite:///my.db", f"sqlite:///{ROOT}/my.db"),
        ("sqlite:////a/my.db", "sqlite:////a/my.db"),
        ("postgresql://me@db/mlflow", "postgresql+psycopg2://me@db/mlflow"),
        ("postgresql+psycopg2://me@db/mlflow", "postgresql+psycopg2://me@db/mlflow"),
        ("http://host:5000", "http://host:5000"),
        ("", ""),
    ],
)
def test_what_mlflow_gets_depends_on_no_folder_and_on_no_driver_that_is_not_locked(uri, resolved):
    assert parameters.resolved(uri) == resolved


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("serve", "false", False),
        ("serve", "True", True),
        ("max_new_tokens", "16", 16),
        ("question", "16", "16"),
        ("spark", "false", False),
        ("spark", "local[2]", "local[2]"),
    ],
)
def test_command_line_text_becomes_the_declared_type(name, text, value):
    converted = parameters.from_texts(GOOD | {name: text})[name]
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("serve", word) for word in ("yes", "1", "on", "maybe")],
        *[("seed", text) for text in ("1.5", "lots")],
        *[("spark", word) for word in ("yes", "1", "maybe")],
    ],
)
def test_text_of_another_type_is_refused(name, text):
    with pytest.raises(ParameterError, match=f"{name}='{text}' is not"):
        parameters.from_texts(GOOD | {name: text})


def test_a_store_that_is_not_named_stays_out_of_the_notebook(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/secret.db")
    assert parameters.from_texts(GOOD | {"tracking_uri": ""}) == GOOD | {"tracking_uri": ""}


def test_in_a_notebook_the_error_is_one_line():
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    with capture_output() as captured:
        shell.run_cell("from helpers import parameters; parameters.check(model='smollm2-135m', seed=-1)")
    printed = (captured.stdout + captured.stderr).strip()
    assert printed.startswith("ParameterError: seed=-1 is not")
    assert "\n" not in printed


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:hunter2@db:5432/mlflow", "postgresql://me:***@db:5432/mlflow"),
        ("https://me:hunter2%40@host", "https://me:***@host"),
        ("mysql+pymysql://me:hunter2@a@host/db", "mysql+pymysql://me:***@host/db"),
    ],
)
def test_a_password_is_no_parameter_and_is_not_shown(uri, shown):
    said = refused(tracking_uri=uri)
    assert said.startswith(
        f"tracking_uri={shown!r} holds a password, and parameters are saved in the notebook."
    )
    assert "MLFLOW_TRACKING_URI" in said


def test_a_password_in_the_environment_may_be_used_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    said = refused(tracking_uri="")
    assert said.startswith("MLFLOW_TRACKING_URI='http://me:***@127.0.0.1:9' does not answer")
    assert "hunter2" not in said


@pytest.mark.parametrize("uri", ["", "sqlite:///a/b@c.db", "http://host:5000", "postgresql://me@db/mlflow"])
def test_an_address_without_a_password_is_shown_as_it_is(uri):
    assert parameters.without_password(uri) == uri
