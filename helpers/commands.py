"""The command line: `python -m helpers --help`. Each command imports only what it needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from helpers import ROOT, environment, places

INTERRUPTED = 130  # the exit code that a shell gives to Ctrl-C
app = typer.Typer(
    help="A small language model becomes an MLflow model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run_command(words: list[str]) -> int:
    """Run one command; return its exit code (0 done, 1 failed, 2 bad input)."""
    try:
        code = app(_joined(words), prog_name="python -m helpers", standalone_mode=False) or 0
    except typer.TyperException as error:
        return _failed(_sentence(error), error.exit_code)
    except ValueError as error:  # every bad value of ours is one, with a sentence of its own
        return _failed(error, 2)
    except (RuntimeError, OSError) as error:
        return _failed(error, 1)
    if code == INTERRUPTED:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
    return code


def _sentence(error: typer.TyperException) -> str:
    """What is wrong with the words of a command. Of a number: its value, the range, an example."""
    option = getattr(error, "param", None)
    if error.__cause__ is None or getattr(option, "min", None) is None:
        return f"{error.format_message().removesuffix('.')}. See: python -m helpers --help"
    name, value = option.opts[0], error.__cause__.errors()[0]["input"]
    kind = "whole number" if isinstance(option.min, int) else "number"
    allowed = f"a {kind} from {option.min:,} to {option.max:,}"
    return f"{name} {value} is not {allowed}. For example: {name} {option.default}"


def _failed(reason: object, code: int) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return code


def _joined(words: list[str]) -> list[str]:
    """Write `-p NAME VALUE` as `-p NAME=VALUE`: Typer (0.29) has no option with two values that repeats."""
    joined, rest = [], list(words)
    while rest:
        joined.append(rest.pop(0))
        if joined[-1] in ("-p", "--parameter") and len(rest) > 1:
            joined.append(f"{rest.pop(0)}={rest.pop(0)}")
    return joined


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError("a name and a value are needed, as in: -p max_new_tokens 16")
    return name, value


ModelName = Annotated[str, Argument(metavar="MODEL", help="Catalogue key, Hub id or folder.")]
Store = Annotated[str, Option(help="MLflow store.", show_default="mlflow.db beside this project")]
Port = Annotated[int, Option(min=1, max=65_535)]
Output = Annotated[Path, Option(help="Folder to write into.", show_default="out")]
OUT = ROOT / "out"


@app.command()
def doctor(
    model: Annotated[str, Option(help="Catalogue key, Hub id or folder.")] = "smollm2-135m",
    tracking_uri: Store = "",
) -> int:
    """Say what is here and what is missing.

    Works before and after set-up, and changes nothing. TO DO: the notebooks need it here and now; the line
    says how to get it, and the exit code is 1. NOTE: worth knowing.
    """
    from helpers.workshop import doctor

    return doctor.report(model, tracking_uri)


@app.command()
def setup() -> None:
    """Make .venv hold what requirements.lock says.

    With WHEELHOUSE=FOLDER in the environment everything comes from that folder, without a network.
    """
    environment.setup()


@app.command()
def wheelhouse(output: Annotated[Path, Option(help="Folder of the wheels.")] = Path("wheelhouse")) -> None:
    """Gather all locked wheels, for machines without a network."""
    from helpers.workshop import wheelhouse, written

    written.make_folder(output)
    wheels = wheelhouse.make(output.resolve())
    folder = places.relative(output)
    print(f"{folder}: {wheels} wheels. Set up from them: make run WHEELHOUSE={folder}")


@app.command()
def lock() -> None:
    """Resolve pyproject.toml again and write requirements.lock."""
    environment.write_lock()


@app.command()
def audit() -> int:
    """Look the locked packages up for known vulnerabilities."""
    return environment.audit()


@app.command()
def fetch(
    model: ModelName = "smollm2-135m",
    precision: Annotated[
        list[str] | None, Option(help="fp32, int8 or int4; repeat for several.", show_default="all three")
    ] = None,
    offline: Annotated[bool, Option("--offline", help="Only check what is there.")] = False,
) -> None:
    """Fetch and convert a model; all else then runs offline."""
    from helpers.models import catalog, export, fetch
    from helpers.models.folders import verify, weights_dir

    chosen = catalog.find(model, "fetch")
    folders = [fetch.checkpoint(chosen, offline=offline)]
    for each in precision or export.compared(chosen):
        folders.append(export.onnx_folder(chosen, each, offline=offline))
    for folder in folders:
        if folder.is_relative_to(weights_dir()):
            verify(folder)
        print(f"{places.relative(folder)}: whole")


@app.command()
def run(
    notebooks: Annotated[
        list[str] | None, Argument(metavar="NOTEBOOK", help="01, 02 or both.", show_default="both")
    ] = None,
    parameters: Annotated[
        list[str] | None,
        Option(
            *("-p", "--parameter"),
            metavar="NAME VALUE",
            help="A notebook parameter; papermill --help-notebook NOTEBOOK lists them.",
        ),
    ] = None,
    output: Output = OUT,
) -> None:
    """Run the notebooks headless."""
    from helpers.workshop import notebooks as headless

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what CI sends works like Ctrl-C
    chosen = headless.select(notebooks or [], dict(map(_pair, parameters or [])))
    for page in headless.run(chosen, output):
        print(f"Read it: {places.relative(page)}")


@app.command()
def ui(port: Port = 5000, tracking_uri: Store = "") -> int:
    """Show runs, models and traces in MLflow's own pages."""
    from helpers import parameters, tracking

    store = tracking.open_store(parameters.store(tracking_uri, "--tracking-uri"))
    if store.startswith(("http://", "https://")):
        raise ValueError(f"{parameters.without_password(store)} is a server: open that in a browser.")
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    # The store's address may hold a password, and everybody can read the words of a command.
    own = os.environ | {"MLFLOW_BACKEND_STORE_URI": store}
    if os.name != "nt":
        os.execve(sys.executable, command, own)
    # On Windows that would end this process, and the shell would not wait for the other.
    return subprocess.run(command, env=own).returncode


@app.command()
def serve(
    model: Annotated[str, Option(help="Model URI, of what the notebooks log.")] = "models:/slm-onnx@champion",
    host: Annotated[str, Option(help="Another than loopback needs a key.")] = "127.0.0.1",
    port: Port = 8000,
    api_key: Annotated[
        str | None, Option(help="Asked of clients; better given as OPENAI_SERVER_API_KEY.")
    ] = None,
    tracking_uri: Store = "",
    trace_sampling: Annotated[
        float, Option(min=0.0, max=1.0, help="Share of answers that leave a trace.")
    ] = 0.0,
    max_queue: Annotated[int, Option(min=1, max=10_000, help="Requests at once; more get 429.")] = 64,
    max_body: Annotated[int, Option(min=1, max=1_000_000_000, help="Bytes of a request.")] = 1_000_000,
    timeout: Annotated[float, Option(min=0.1, max=86_400, help="Seconds for an answer.")] = 600,
    grace: Annotated[int, Option(min=0, max=86_400, help="Seconds to finish answers when stopped.")] = 30,
) -> None:
    """Put an OpenAI endpoint before a registered model."""
    from helpers.serving import openai_server

    openai_server.serve(
        model,
        host=host,
        port=port,
        api_key=api_key,
        tracking_uri=tracking_uri,
        trace_sampling=trace_sampling,
        max_queue=max_queue,
        max_body=max_body,
        timeout=timeout,
        grace=grace,
    )


@app.command()
def classroom(
    folder: Annotated[Path, Option(help="Keeps what is logged.", show_default="here")] = ROOT / "classroom",
    host: Annotated[
        str,
        Option(help="An address of this machine, or 0.0.0.0; whoever reaches it may change everything."),
    ] = "127.0.0.1",
    port: Port = 5000,
    workers: Annotated[int, Option(min=1, max=64, help="Processes.")] = 4,
    allowed_hosts: Annotated[
        str, Option(help="Further names, separated by commas, under which learners reach this machine.")
    ] = "",
) -> None:
    """Start one MLflow server for a room, on PostgreSQL."""
    from helpers.workshop import classroom

    classroom.serve(folder, host=host, port=port, workers=workers, allowed_hosts=allowed_hosts)


@app.command()
def board(
    tracking_uri: Annotated[
        str, Option(help="The classroom's server.", show_default="http://127.0.0.1:5000")
    ] = "",
    port: Port = 8050,
    anonymous: Annotated[bool, Option("--anonymous", help="Show numbers in place of names.")] = False,
    once: Annotated[bool, Option("--once", help="Print a line for each learner, and end.")] = False,
) -> None:
    """Show who has solved which exercise, and who needs help."""
    from helpers.workshop import board

    if once:
        print(board.text(tracking_uri, anonymous))
    else:
        board.serve(tracking_uri, port, anonymous)


@app.command()
def kit(
    platforms: Annotated[list[str], Argument(metavar="PLATFORM…", help="Such as macos-arm64:3.12.")],
    output: Annotated[Path, Option(help="Folder to gather it in.")] = Path("kit"),
) -> int:
    """Gather wheels for other kinds of laptops, and the models."""
    from helpers.workshop import kit

    return kit.make(platforms, output)


@app.command()
def site() -> None:
    """Write notebooks and guides as web pages to out/site."""
    from helpers.workshop import site

    print(f"Read it: {places.relative(site.build())}")


@app.command()
def student(output: Output = OUT) -> None:
    """Write the notebooks without solutions, and with them."""
    from helpers.workshop import editions

    for path in editions.write(output):
        print(places.relative(path))


@app.command()
def save() -> None:
    """Execute the notebooks and save them with their outputs."""
    from helpers.workshop import notebooks

    notebooks.save()
