"""A clone has LF everywhere, also where Git is set to Windows' line endings, as its installer there does."""

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.environment import ROOT

IGNORED = (".git", ".venv", "weights", "out", "mlruns", "wheelhouse", "classroom", "__pycache__")


def git(*arguments: str | Path) -> None:
    subprocess.run(["git", *arguments], check=True, capture_output=True)


@pytest.mark.command
@pytest.mark.skipif(not shutil.which("git"), reason="Git is not installed")
@pytest.mark.parametrize("settings", [["core.autocrlf=true"], ["core.autocrlf=false", "core.eol=crlf"]])
def test_a_clone_for_windows_has_no_carriage_return(settings, tmp_path):
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    shutil.copytree(ROOT, origin, ignore=shutil.ignore_patterns(*IGNORED))
    git("init", "--quiet", origin)
    git("-C", origin, "add", "--all")
    author = ("-c", "user.name=A Test", "-c", "user.email=test@example.org")
    git("-C", origin, *author, "commit", "--quiet", "--message", "As it is")
    git("clone", "--quiet", *(part for setting in settings for part in ("-c", setting)), origin, clone)

    files = {path.relative_to(clone): path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    texts = {path: text for path, text in files.items() if b"\0" not in text and ".git" not in path.parts}
    assert {Path(".ci/run"), Path("Makefile"), Path("notebooks/01_TransformerPipeline.ipynb")} <= set(texts)
    assert [path for path, text in texts.items() if b"\r\n" in text] == []
