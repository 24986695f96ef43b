"""A test that starts a process says why by a marker; one that does not fails the collection.

What a test starts is read from its source and from all that it calls in this project: its fixtures, the
modules beside it, the helpers. Only what makes models, once, is not followed.
"""

import ast
import importlib.util
import tomllib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

# What starts a process, by its full name or the beginning of it → what that is.
STARTERS = {
    **dict.fromkeys(("subprocess.Popen", "subprocess.run", "subprocess.call"), "command"),
    **dict.fromkeys(("subprocess.check_", "subprocess.get", "multiprocessing.", "pty.spawn"), "command"),
    **dict.fromkeys(("os.system", "os.popen", "os.fork", "os.spawn", "os.posix_spawn"), "command"),
    **dict.fromkeys(("asyncio.create_subprocess_", "concurrent.futures.ProcessPool"), "command"),
    "helpers.__main__.main": "command",
    **dict.fromkeys(("papermill.execute_notebook", "nbclient.", "jupyter_client."), "kernel"),
    "nbconvert.preprocessors.ExecutePreprocessor": "kernel",
    "helpers.processes.running": "server",
    **dict.fromkeys(("playwright.sync_api.sync_playwright", "playwright.async_api."), "browser"),
    **dict.fromkeys(("venv.", "virtualenv.", "helpers.environment.setup."), "environment"),
    **dict.fromkeys(("mlflow.models.predict", "mlflow.run.", "mlflow.projects.run"), "environment"),
    "pyspark.": "spark",
}
NOT_FOLLOWED = ("helpers.models.", "helpers.__main__.")
# These do not make a test slow: a command ends by itself in a moment, and a key case is seen at once.
FAST = {"command", "key"}


@pytest.hookimpl(tryfirst=True)  # before `-m` leaves tests out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse tests that start something and do not say so; mark those `slow` whose reason makes them so.

    Raises:
        pytest.UsageError: naming each such test and the marker it lacks.
    """
    settings = tomllib.loads(config.inipath.read_text("utf-8"))["tool"]["pytest"]["ini_options"]
    reasons = {line.partition(":")[0] for line in settings["markers"]} - {"slow"}
    wrong = {}
    for item in items:
        given = {mark.name for mark in item.iter_markers()} & reasons
        if given - FAST:
            if "key" not in given:
                item.add_marker("slow")
        elif isinstance(item, pytest.Function):
            started = {STARTERS[starter]: starter for starter in _started_by(item)}
            for kind in sorted(started.keys() - given, key=lambda kind: kind != "command"):
                name = item.nodeid.partition("[")[0]
                wrong[name] = f"{name} starts a process ({started[kind]}) and has no marker: {kind}."
    if wrong:
        listed = f"The reasons are {', '.join(sorted(reasons - {'key'}))}; pyproject.toml explains them."
        raise pytest.UsageError("\n".join([*wrong.values(), listed]))


def _started_by(item: pytest.Function) -> set[str]:
    """The names in STARTERS that a test and its fixtures reach."""
    modules = [_module(item.path)]
    modules += [_module(file) for folder in item.path.parents if (file := folder / "conftest.py").is_file()]
    entry = item.cls.__name__ if item.cls else item.originalname
    reached = _reach(modules[0], entry)
    for name in item.fixturenames:
        reached |= next((_reach(module, name) for module in modules if name in module.mentions), set())
    return reached


def _reach(module: SimpleNamespace, name: str) -> set[str]:
    """The names in STARTERS that a definition of a module mentions, or what it calls."""
    found, seen, waiting = set(), set(), [(module, name)]
    while waiting:
        module, name = waiting.pop()
        if (module.file, name) in seen or name not in module.mentions:
            continue
        seen.add((module.file, name))
        for mentioned in module.mentions[name]:
            root, *rest = mentioned.split(".")
            full = ".".join([module.imports.get(root, root), *rest])
            found |= {starter for starter in STARTERS if f"{full}.".startswith(starter)}
            if root not in module.imports:
                waiting.append((module, root))
            elif not full.startswith(NOT_FOLLOWED):
                waiting += _definition(full)
    return found


def _definition(full: str) -> list[tuple[SimpleNamespace, str]]:
    """Where this project defines `package.module.name…`; empty when another one does."""
    parts = full.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if file := _file(".".join(parts[:length])):
            return [(_module(file), parts[length])]
    return []


@cache
def _file(name: str) -> Path | None:
    """The file of a module, if it is one of this project."""
    root = Path(__file__).resolve().parents[1]
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    file = Path(found.origin) if found and found.has_location else Path()
    return file if file.is_relative_to(root) and ".venv" not in file.parts else None


@cache
def _module(file: Path) -> SimpleNamespace:
    """What each definition at the top of a file mentions, in dots, and what its imported names stand for."""
    imports, mentions = {}, {}
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            whole = {alias.name.partition(".")[0] for alias in node.names if not alias.asname}
            imports |= {name: name for name in whole}
            imports |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            mentions[node.name] = _mentioned(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            mentions |= {name: _mentioned(node) for target in targets for name in _mentioned(target)}
    return SimpleNamespace(file=file, imports=imports, mentions=mentions)


def _mentioned(node: ast.AST) -> set[str]:
    """Names and chains of attributes in a piece of source: `a`, `b.c.d`."""
    found = set()
    for child in ast.walk(node):
        chain = []
        while isinstance(child, ast.Attribute):
            chain.append(child.attr)
            child = child.value
        if isinstance(child, ast.Name):
            found.add(".".join([child.id, *reversed(chain)]))
    return found
