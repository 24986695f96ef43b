"""A real browser for the tests that look at pages as a person does, and the pictures that they take."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import ROOT

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:  # each file of tests says so and is skipped
    Browser = Page = None
else:
    expect.set_options(timeout=300_000)  # a page that is still loading on a busy machine is not wrong

SCREENSHOTS = ROOT / "out" / "screenshots"


@pytest.fixture(scope="session", autouse=True)
def chromium() -> str:
    """Path of the browser; without one the tests of this folder are skipped, before anything is started."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    reason = f"none of {', '.join(names)} is on PATH, nor Playwright's own; try apt install chromium"
    return own if Path(own).exists() else pytest.skip(reason)


# Not for the session: Playwright's event loop must be gone when other tests start theirs.
@pytest.fixture(scope="module")
def browser(chromium) -> Iterator[Browser]:
    arguments = ["--disable-gpu", "--disable-quic", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium refuses to start its sandbox as root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, request) -> Iterator[Page]:
    """A fresh browser profile for a file's tests, 1280 x 800 pixels; SCALE in the file zooms out."""
    scale = getattr(request.module, "SCALE", 1)
    with browser.new_context(
        viewport={"width": round(1280 / scale), "height": round(800 / scale)},
        device_scale_factor=scale,
        locale="en-GB",
        timezone_id="UTC",
    ) as context:
        context.set_default_timeout(300_000)
        yield context.new_page()


@pytest.fixture(scope="session")
def pictures() -> Path | None:
    """The folder in the environment variable PICTURES: the README's pictures are to be taken again."""
    return Path(os.environ["PICTURES"]) if os.environ.get("PICTURES") else None


@pytest.fixture
def picture(page, pictures) -> Callable[..., None]:
    """Keep what the page shows in out/screenshots and, for the README, in $PICTURES where that is set."""

    def take(name: str, readme: bool = False, **options) -> None:
        page.mouse.move(0, 0)  # no tooltip
        page.wait_for_timeout(1000)  # until what slides or fades has come to rest
        for folder in filter(None, (SCREENSHOTS, pictures if readme else None)):
            page.screenshot(path=folder / f"{name}.png", **options)

    return take
