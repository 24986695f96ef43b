"""What only a host can run is held against published schemas, zizmor and the Makefile; no run was seen."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from helpers import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
CONFIG = ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
DEVCONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def steps(path: Path) -> list[dict]:
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.command
@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", [form for form in FORMS if form != CONFIG]),
        ("github-issue-config", [CONFIG]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_a_file_keeps_to_its_published_schema(schema, files):
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.command
def test_zizmor_finds_nothing_in_the_workflows():
    zizmor = shutil.which("zizmor")
    if zizmor is None:
        pytest.skip("zizmor is not installed; try: uv pip install zizmor")
    command = [zizmor, "--offline", "--no-progress", "--persona=auditor", *WORKFLOWS]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@each_workflow
def test_an_action_is_pinned_by_commit_and_names_its_version(path):
    used = re.findall(r"uses: (.*)", path.read_text("utf-8"))
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", line)] == []


@each_workflow
def test_a_workflow_has_no_secret_and_no_permission_but_what_a_job_names(path):
    text = path.read_text("utf-8")
    assert yaml.safe_load(text)["permissions"] == {}
    assert "secrets" not in text
    assert "write" not in text or path.stem == "pages"


@each_workflow
def test_what_a_workflow_runs_is_a_make_target(path):
    commands = [shlex.split(step["run"]) for step in steps(path) if "run" in step]
    assert commands
    for make, target, *variables in commands:
        assert make == "make"
        assert target in TARGETS
        assert all(re.match("[A-Z]+=", variable) for variable in variables)


def test_the_workflows_try_every_supported_python():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))["jobs"].values()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["requires-python"]
    assert wanted == ">=3.11,<3.14"
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_the_devcontainer_calls_make_targets_and_forwards_jupyter():
    commands = [DEVCONTAINER["onCreateCommand"], DEVCONTAINER["updateContentCommand"]]
    commands += DEVCONTAINER["postAttachCommand"].values()
    for command in commands:
        make, target, *_ = command.split()
        assert make == "make"
        assert target in TARGETS
    assert DEVCONTAINER["forwardPorts"] == [8888]
    assert re.fullmatch(r"mcr\.microsoft\.com/devcontainers/python:\d+-3\.1[123]-\w+", DEVCONTAINER["image"])


def test_binder_installs_the_lock_and_starts_with_the_settings_of_make_lab():
    folder = ROOT / ".binder"
    lines = (folder / "requirements.txt").read_text("utf-8").splitlines()
    assert {"-r ../requirements.lock", "-e ."} <= set(lines)
    assert '"$PWD/.jupyter"' in (folder / "start").read_text("utf-8")
    for name in ("postBuild", "start"):
        assert (folder / name).stat().st_mode & 0o111


def test_the_citation_names_the_version_and_the_licence_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert f"## {project['version']} " in (ROOT / "CHANGELOG.md").read_text("utf-8")
