"""Try this project in a copy of its own: on this machine's other Pythons, or with the newest releases.

    python -m tools.elsewhere pythons          the supported Pythons of this machine but its own
    python -m tools.elsewhere pythons 3.12     this one
    python -m tools.elsewhere newest           the newest releases, beyond the ranges of pyproject.toml

Standard library only, so that it starts before anything is set up. The copies are removed afterwards; the
logs stay in out/elsewhere/.
"""

from __future__ import annotations

import datetime
import difflib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers import ROOT
from helpers.environment import PYTHONS, python_version

LOGS = ROOT / "out" / "elsewhere"
TABLE = ROOT / "docs" / "compatibility.md"
COLUMNS = (
    "date", "system", "Python", "mlflow", "transformers", "torch",
    "set-up", "notebooks, tiny-phi3", "fast tests", "minutes",
)  # fmt: skip
# These columns say which row a new result replaces.
KEY = slice(1, 4)
# The copy must see nothing of the environment, the store or the make that started this.
NOT_HANDED_ON = re.compile(r"VIRTUAL_ENV|PYTHON|WEIGHTS_DIR|MLFLOW_|MAKE|MFLAGS|PARAMS|MODEL$|NOTEBOOK$")
# The packages that the lesson is about: their newest releases are tried beyond the ranges.
WATCHED = ("mlflow", "transformers", "torch", "onnxruntime-genai")


def main(arguments: list[str]) -> int:
    """Run one of the two commands; return 0 if all that was tried passed, 1 if not, 2 for bad input."""
    command, *versions = arguments or [""]
    if command == "newest" and not versions:
        return newest()
    if command == "pythons" and set(versions) <= set(PYTHONS):
        return pythons(versions)
    given = " ".join(arguments)
    print(f"error: {given!r} is neither newest nor pythons with some of {', '.join(PYTHONS)}.")
    return 2


def pythons(versions: list[str]) -> int:
    """Try the project on each of these Pythons, by default on all others than this; keep the table.

    Returns:
        0 if every Python that is here passed, 1 if not. A Python that is not here is named and is no failure.
    """
    rows = []
    for version in versions or [version for version in PYTHONS if version != python_version()]:
        python = find_python(version)
        if python is None:
            print(f"Python {version}: not on this machine.")
            continue
        print(f"Python {version}: {python}", flush=True)
        rows.append(try_python(version, python))
        # Now, so that an interrupt of the next one loses nothing.
        TABLE.write_text(with_rows(TABLE.read_text("utf-8"), rows), encoding="utf-8")
    return int(any("failed" in cell for row in rows for cell in row))


def find_python(version: str) -> Path | None:
    """A Python of this version that starts: on PATH, of pyenv, or one that uv has installed."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local" / "share" / "uv" / "python"))
    found = [Path(on_path)] if on_path else []
    found += sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    found += sorted(uv.glob(f"cpython-{version}.*/bin/python{version}"), reverse=True)
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in found:
        # pyenv's own commands are on PATH for versions that are not switched on; they only print an error.
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if answer.stdout.strip() == version:
            return python
    return None


def try_python(version: str, python: Path) -> list[str]:
    """Set-up, both notebooks with tiny-phi3 and the fast tests that need no notebook; a row of the table."""
    steps = {
        "set-up": ["make", "setup", f"PYTHON={python}"],
        "notebooks": ["make", "run", "MODEL=tiny-phi3"],
        "tests": [".venv/bin/pytest", "-q", "-m", "not slow and not kernel", "tests"],
    }
    started = time.monotonic()
    with copy_of_the_project() as folder:
        results = dict.fromkeys(steps, "not run")
        for name, command in steps.items():
            log = LOGS / f"{version}-{name}.log"
            passed = run(command, folder, log)
            results[name] = _outcome(passed, log)
            print(f"  {name}: {results[name]} ({log.relative_to(ROOT)})", flush=True)
            if not passed and name == "set-up":
                break
        lock = locked(folder / "requirements.lock")
    minutes = f"{(time.monotonic() - started) / 60:.0f}"
    system = f"{platform.system()} {platform.machine()}"
    today = datetime.date.today().isoformat()
    packages = [lock[name] for name in ("mlflow", "transformers", "torch")]
    return [today, system, version, *packages, *results.values(), minutes]


def _outcome(passed: bool, log: Path) -> str:
    """`passed` or `failed`; for pytest with its own counts, such as `510 passed, 3 skipped`."""
    counts = re.findall(r"(\d+ (?:passed|failed|error|errors|skipped))\b", _last_line(log))
    if counts:
        return ", ".join(counts)
    return "passed" if passed else "failed"


def _last_line(log: Path) -> str:
    return (log.read_text("utf-8", errors="replace").strip().splitlines() or [""])[-1]


@contextmanager
def copy_of_the_project() -> Iterator[Path]:
    """A folder with the files that git knows or would add, removed at the end."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="elsewhere-", ignore_cleanup_errors=True) as name:
        folder = Path(name, ROOT.name)
        for file in filter(None, listed.split("\0")):
            if (ROOT / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, folder / file)
        yield folder


def run(command: list[str], folder: Path, log: Path) -> bool:
    """Run a command in a copy with its output in `log`; whether it passed."""
    own = {name: value for name, value in os.environ.items() if not NOT_HANDED_ON.match(name)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        ended = subprocess.run(command, cwd=folder, env=own, stdout=output, stderr=subprocess.STDOUT)
    return ended.returncode == 0


def locked(lock: Path) -> dict[str, str]:
    """Name → version of every line of a lock; of several lines for one package the last."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text("utf-8"), re.MULTILINE))


def with_rows(page: str, rows: list[list[str]]) -> str:
    """The page with these rows in its table; each replaces one with the same system, Python and mlflow."""
    head, _, rest = page.partition("|")
    lines = [line for line in f"|{rest}".splitlines() if line.startswith("|")][2:] if rest else []
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    replaced = [row[KEY] for row in rows]
    table = [row for row in table if row[KEY] not in replaced] + rows
    table.sort(key=lambda row: row[KEY])
    written = [COLUMNS, ["---"] * len(COLUMNS), *table]
    return head + "".join(f"| {' | '.join(row)} |\n" for row in written)


def newest() -> int:
    """Resolve the newest releases in a copy, install them, and run the contract's tests; report what changed.

    Returns:
        0 if MLflow's chat contract is as the tests hold it, 1 if it changed or could not be tried.
    """
    with copy_of_the_project() as folder:
        project = folder / "pyproject.toml"
        project.write_text(without_upper_bounds(project.read_text("utf-8")), encoding="utf-8")
        steps = {
            "lock": ["make", "lock", f"PYTHON={sys.executable}"],
            "set-up": ["make", "setup", f"PYTHON={sys.executable}"],
            "contract": [".venv/bin/pytest", "-q", "tests/contract"],
        }
        for name, command in steps.items():
            log = LOGS / f"newest-{name}.log"
            passed = run(command, folder, log)
            if not passed:
                break
        changes = lock_changes(ROOT / "requirements.lock", folder / "requirements.lock")
    last = log.read_text("utf-8", errors="replace").splitlines()[-40:]
    summary = f"## Newest releases: {name} {'passed' if passed else 'failed'}\n\n```diff\n{changes}```\n\n"
    summary += "```text\n" + "\n".join(last) + "\n```\n"
    print(summary)
    if target := os.environ.get("GITHUB_STEP_SUMMARY"):
        Path(target).write_text(summary, encoding="utf-8")
    return int(not passed)


def without_upper_bounds(project: str) -> str:
    """pyproject.toml's text without the upper bounds of the packages that the lesson is about."""
    names = "|".join(map(re.escape, WATCHED))
    return re.sub(rf'"((?:{names})>=[^,"]+),<[^"]+"', r'"\1"', project)


def lock_changes(before: Path, after: Path) -> str:
    """The lines of two locks that differ, each with + or -."""
    texts = [path.read_text("utf-8").splitlines() for path in (before, after)]
    lines = difflib.unified_diff(*texts, lineterm="", n=0)
    return "".join(f"{line}\n" for line in lines if re.match(r"[+-]\w", line))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
