"""The board in a real browser while two learners, each a process of its own, run the checks of exercises."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="Playwright or axe is missing; `make setup` installs them"
)
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from helpers import ROOT, processes
from helpers.workshop import board

pytestmark = pytest.mark.browser

SOON = 3000  # ms from a verdict to the board
LEARNER = """
import sys
import pandas as pd
from helpers import evaluation, tracking
from helpers.workshop import exercises

uri, name, board = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
tracking.connect(uri, name)
columns = {"accuracy": 0.5, "kl_divergence": 0.0, "tokens_per_second": 40.0, "size_mb": [9.0, 5.0, 3.0]}
table = pd.DataFrame(columns, index=["fp32", "int8", "int4"])


def right(table, max_drop, max_kl):
    return evaluation.gate(table, max_drop, max_kl).query("passes")["size_mb"].idxmin()


def wrong(table, max_drop, max_kl):
    return "fp32"


for line in sys.stdin:
    smallest = {"right": right, "wrong": wrong}[line.strip()]
    exercises.check_smallest(globals())
    print("---", flush=True)
"""


class Kernel:
    """A learner's process; `check` lets it run the check of exercise 2.5 and returns what that printed."""

    def __init__(self, uri: str, name: str, on_board: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEARNER, uri, name, str(on_board)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            cwd=ROOT,
        )

    def check(self, answer: str) -> str:
        self.process.stdin.write(f"{answer}\n")
        self.process.stdin.flush()
        lines = []
        while (line := self.process.stdout.readline()) != "---\n":
            assert line, "the learner's process has ended"
            lines.append(line)
        return "".join(lines)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def learners(classroom_server) -> Iterator[dict[str, Kernel]]:
    kernels = {
        "anna": Kernel(classroom_server, "anna"),
        "ben": Kernel(classroom_server, "ben"),
        "zoe": Kernel(classroom_server, "zoe", False),
    }
    yield kernels
    for kernel in kernels.values():
        kernel.end()


@pytest.fixture(scope="module")
def shown(classroom_server) -> Iterator[str]:
    """The board's address, from a process of its own as `make board` starts one."""
    port = processes.free_port()
    code = f"from helpers.workshop import board; board.serve({classroom_server!r}, {port})"

    def answers(url: str) -> bool:
        urllib.request.urlopen(url, timeout=5).close()
        return True

    with processes.running([sys.executable, "-c", code], port, "the board", 120, healthy=answers) as url:
        yield url


def test_a_check_is_on_the_board_in_three_seconds(learners, shown, page, picture):
    page.goto(shown)
    for name in ("anna", "ben"):
        assert learners[name].check("wrong").startswith("✗ Exercise 2.5")
    rows = {name: page.get_by_role("row").filter(has_text=name) for name in learners}
    expect(rows["anna"]).to_contain_text("✗ 1, 0 min")
    assert learners["anna"].check("right").startswith("✓ Exercise 2.5")
    expect(rows["anna"]).to_contain_text("✓ 2", timeout=SOON)
    expect(rows["ben"]).to_contain_text("✗ 1, 0 min", timeout=SOON)
    for attempt in range(2, board.MANY_ATTEMPTS + 1):
        learners["ben"].check("wrong")
        expect(rows["ben"]).to_contain_text(f"✗ {attempt}, ", timeout=SOON)
    expect(page.get_by_role("status")).to_have_text("3 learners, 1 needs help.", timeout=SOON)
    expect(page.get_by_role("row").nth(1)).to_contain_text("ben")  # on top, below the headings
    expect(rows["ben"]).to_contain_text("2.5: Take the least size_mb")
    expect(page.get_by_role("row").last).to_contain_text("Solved")
    picture("board")


def test_with_the_switch_off_a_check_leaves_nothing(learners, shown, page):
    assert learners["zoe"].check("right").startswith("✓ Exercise 2.5")
    learners["zoe"].end()  # which waits for what is queued
    page.goto(shown)
    expect(page.get_by_role("row").filter(has_text="zoe")).not_to_contain_text("✓")


def test_the_board_breaks_no_rule_of_axe_and_is_reached_by_keyboard(learners, shown, page):
    page.goto(shown)
    violations = Axe().run(page).response["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"][:200]) for rule in violations] == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "rows"
    page.wait_for_timeout(SOON)  # it has refreshed, and the focus is where it was
    assert page.evaluate("document.activeElement.id") == "rows"


def test_it_prints_and_works_without_scripts(learners, shown, page):
    page.goto(shown)
    assert page.pdf().startswith(b"%PDF")
    with page.context.browser.new_context(java_script_enabled=False) as context:
        plain = context.new_page()
        plain.goto(shown)
        expect(plain.get_by_role("row").filter(has_text="anna")).to_contain_text("✓ 2")
