"""The command line: `python -m helpers --help`. Each command imports only what it needs."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
from pathlib import Path

from helpers import ROOT, environment

# What a command's numbers may be, both ends included.
RANGES = {
    "port": (1, 65_535),
    "trace_sampling": (0, 1),
    "max_queue": (1, 10_000),
    "max_body": (1, 1_000_000_000),
    "timeout": (0.1, 86_400),
    "grace": (0, 86_400),
    "workers": (1, 64),
}


class _Parser(argparse.ArgumentParser):
    """Argparse's own, but what is wrong is one sentence, as it is everywhere here, without the usage."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}. See: {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code (0 done, 1 failed, 2 bad input)."""
    for stream in (sys.stdout, sys.stderr):
        # A console of another encoding than UTF-8 shows "?" for what it does not know, and nothing stops.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        options = _parser().parse_args(_spread(sys.argv[1:] if arguments is None else arguments))
        _check_numbers(vars(options))
        return options.command(options) or 0
    except ValueError as error:  # every bad value of ours is one, with a sentence of its own
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130


def _spread(arguments: list[str]) -> list[str]:
    """Replace a last `--words TEXT` (make's PARAMS) by its words, split as a shell does but run by none."""
    if arguments[-2:-1] != ["--words"]:
        return arguments
    try:
        return [*arguments[:-2], *shlex.split(arguments[-1])]
    except ValueError as error:
        raise ValueError(f"PARAMS={arguments[-1]!r} cannot be split into words: {error}.") from None


def _check_numbers(options: dict) -> None:
    """Raise ValueError for a number outside its range; NaN is outside of every one."""
    for name, (lowest, highest) in RANGES.items():
        value = options.get(name)
        if value is not None and not lowest <= value <= highest:
            relation = f"more than {highest}" if value > highest else f"less than {lowest}"
            allowed = f"--{name.replace('_', '-')} takes a number from {lowest} to {highest}."
            raise ValueError(f"{name}={value} is {relation}. {allowed}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m helpers", description="A small language model becomes an MLflow model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="say what is here and what is missing, before or after set-up",
        description="One line each: OK; TO DO with the mend, for what the notebooks need here and now, also "
        "without a network (exit code 1); NOTE for what is worth knowing. Changes nothing.",
    )
    doctor.add_argument(
        "--model", default="smollm2-135m", help="catalogue key, Hub id or folder (default: %(default)s)"
    )
    doctor.add_argument(
        "--tracking-uri", default="", help="store to try (default: mlflow.db beside this project)"
    )
    doctor.set_defaults(command=_doctor)

    setup = commands.add_parser("setup", help="make .venv hold what requirements.lock says")
    setup.add_argument(
        "--wheelhouse",
        type=Path,
        default=os.environ.get("WHEELHOUSE") or None,
        help="install from this folder alone, without a network (default: $WHEELHOUSE)",
    )
    setup.set_defaults(command=_setup)

    wheelhouse = commands.add_parser(
        "wheelhouse", help="gather all locked wheels, so that other machines are set up without a network"
    )
    wheelhouse.add_argument(
        "--output",
        type=Path,
        default=environment.WHEELHOUSE,
        help="folder of the wheels (default: wheelhouse)",
    )
    wheelhouse.set_defaults(command=_wheelhouse)

    lock = commands.add_parser("lock", help="resolve pyproject.toml again and write requirements.lock")
    lock.set_defaults(command=lambda options: environment.write_lock())

    audit = commands.add_parser("audit", help="look the locked packages up for known vulnerabilities")
    audit.set_defaults(command=lambda options: environment.audit())

    fetch = commands.add_parser(
        "fetch", help="fetch a model and convert it to ONNX, so that all else runs offline"
    )
    fetch.add_argument(
        "model",
        nargs="?",
        default="smollm2-135m",
        help="catalogue key, Hub id or folder (default: %(default)s)",
    )
    fetch.add_argument(
        "--precision", action="append", help="fp32, int8 or int4; repeat for several (default: all three)"
    )
    fetch.add_argument("--offline", action="store_true", help="only check what is there")
    fetch.set_defaults(command=_fetch)

    run = commands.add_parser("run", help="run the notebooks headless")
    run.add_argument(
        "notebooks",
        nargs="*",
        metavar="NOTEBOOK",
        help="01, 02 or both (default: both)",
    )
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="parameters",
        help="a notebook parameter; papermill --help-notebook NOTEBOOK lists them",
    )
    run.add_argument(
        "--output",
        type=Path,
        default=ROOT / "out",
        help="folder of the executed notebooks (default: out)",
    )
    run.set_defaults(command=_run)

    serve = commands.add_parser("serve", help="put an OpenAI endpoint before a registered model")
    serve.add_argument(
        "--model",
        default="models:/slm-onnx@champion",
        help="model URI, of what the notebooks log (default: %(default)s)",
    )
    serve.add_argument(
        "--host", default="127.0.0.1", help="another than loopback needs a key (default: %(default)s)"
    )
    serve.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    serve.add_argument("--api-key", help="asked of clients; better given as OPENAI_SERVER_API_KEY")
    serve.add_argument(
        "--tracking-uri", help="store of the model and of traces (default: mlflow.db beside this project)"
    )
    serve.add_argument(
        "--trace-sampling", type=float, default=0.0, help="share of answers that leave a trace (default: 0)"
    )
    serve.add_argument(
        "--max-queue", type=int, default=64, help="requests at once; more get 429 (default: %(default)s)"
    )
    serve.add_argument(
        "--max-body", type=int, default=1_000_000, help="bytes of a request (default: %(default)s)"
    )
    serve.add_argument(
        "--timeout", type=float, default=600, help="seconds for an answer (default: %(default)s)"
    )
    serve.add_argument(
        "--grace", type=int, default=30, help="seconds to finish answers when stopped (default: %(default)s)"
    )
    serve.set_defaults(command=_serve)

    classroom = commands.add_parser(
        "classroom", help="one MLflow server for a room, on PostgreSQL, installed where it is missing"
    )
    classroom.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "classroom",
        help="keeps what is logged (default: classroom)",
    )
    classroom.add_argument(
        "--host",
        default="127.0.0.1",
        help="an address of this machine, or 0.0.0.0 for all; whoever reaches it may change everything "
        "(default: %(default)s)",
    )
    classroom.add_argument("--port", type=int, default=5000, help="default: %(default)s")
    classroom.add_argument("--workers", type=int, default=4, help="processes (default: %(default)s)")
    classroom.add_argument(
        "--allowed-hosts",
        default="",
        help="further names, separated by commas, under which learners reach this machine",
    )
    classroom.set_defaults(command=_classroom)

    container = commands.add_parser("containerfile", help="write a container context for a registered model")
    container.add_argument(
        "--model", default="models:/slm-onnx@champion", help="model URI (default: %(default)s)"
    )
    container.add_argument("--output", type=Path, required=True, help="folder to write, for docker build")
    container.set_defaults(command=_containerfile)

    site = commands.add_parser("site", help="write notebooks and guides as a static site to out/site")
    site.set_defaults(command=_site)

    student = commands.add_parser(
        "student", help="write the student edition of the notebooks, and the full one beside it"
    )
    student.add_argument(
        "--output",
        type=Path,
        default=ROOT / "out",
        help="folder of student/ and full/ (default: out)",
    )
    student.set_defaults(command=_student)

    save = commands.add_parser("save", help="execute the notebooks and save them in place with their outputs")
    save.set_defaults(command=_save)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from helpers.workshop import doctor

    return doctor.report(options.model, options.tracking_uri)


def _setup(options: argparse.Namespace) -> None:
    environment.setup(wheelhouse=options.wheelhouse and options.wheelhouse.resolve())


def _wheelhouse(options: argparse.Namespace) -> None:
    from helpers.workshop import written

    written.make_folder(options.output)
    wheels = environment.make_wheelhouse(options.output.resolve())
    folder = os.path.relpath(options.output)
    print(f"{folder}: {wheels} wheels. Set up from them: make run WHEELHOUSE={folder}")


def _fetch(options: argparse.Namespace) -> None:
    from helpers.models import catalog, export, fetch

    model = catalog.find(options.model)
    folders = [fetch.checkpoint(model, offline=options.offline)]
    folders += [
        export.onnx_folder(model, precision, offline=options.offline)
        for precision in options.precision or export.compared(model)
    ]
    for folder in folders:
        if folder.is_relative_to(fetch.weights_dir()):
            fetch.verify(folder)
        print(f"{os.path.relpath(folder)}: whole")


def _run(options: argparse.Namespace) -> None:
    from helpers.workshop import notebooks

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what CI sends works like Ctrl-C
    chosen = notebooks.select(options.notebooks, dict(options.parameters))
    for page in notebooks.run(chosen, options.output):
        print(f"Read it: {os.path.relpath(page)}")


def _serve(options: argparse.Namespace) -> None:
    from helpers.serving import openai_server

    given = {name: value for name, value in vars(options).items() if name not in ("command", "model")}
    openai_server.serve(options.model, **given)


def _classroom(options: argparse.Namespace) -> None:
    from helpers.workshop import classroom

    classroom.serve(**{name: value for name, value in vars(options).items() if name != "command"})


def _containerfile(options: argparse.Namespace) -> None:
    from helpers import parameters, tracking
    from helpers.serving import containerfile
    from helpers.workshop import written

    written.make_folder(options.output.absolute().parent)
    tracking.open_store(parameters.store(""))
    print(
        f"Build it: docker build {os.path.relpath(containerfile.write(options.model, options.output).parent)}"
    )


def _site(options: argparse.Namespace) -> None:
    from helpers.workshop import site

    print(f"Read it: {os.path.relpath(site.build())}")


def _student(options: argparse.Namespace) -> None:
    from helpers.workshop import editions

    for path in editions.write(options.output):
        print(os.path.relpath(path))


def _save(options: argparse.Namespace) -> None:
    from helpers.workshop import notebooks

    notebooks.save()


if __name__ == "__main__":
    sys.exit(main())
