"""`python -m helpers`: the commands of helpers/commands.py, two of which work before set-up as well."""

from __future__ import annotations

import io
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from helpers import environment


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code (0 done, 1 failed, 2 bad input)."""
    for stream in (sys.stdout, sys.stderr):
        # A console of another encoding than UTF-8 shows "?" for what it does not know, and nothing stops.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if arguments is None else arguments
    if not find_spec("typer") or not find_spec("mlflow"):
        return _before_set_up(words)
    from helpers import commands

    return commands.run_command(words)


def _before_set_up(words: list[str]) -> int:
    """Run `setup` or `doctor` on a Python that has no packages; all other commands need them."""
    if words == ["setup"]:
        environment.setup()
        return 0
    if words[:1] == ["doctor"]:
        own = environment.python_of(environment.VENV)
        if own.exists() and Path(sys.prefix) != environment.VENV:
            return subprocess.run([own, "-m", "helpers", *words]).returncode
        from helpers.workshop import doctor

        return doctor.report()
    print("error: this Python lacks the packages. Run make setup, then .venv/bin/python", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
