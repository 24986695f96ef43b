"""The site in a real browser: without a network, and by axe-core's rules."""

import pytest

from helpers.workshop import site

pytestmark = pytest.mark.browser

axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="Playwright or axe is missing; `make setup` installs them"
)

PAGES = [name for name, _ in site.PAGES.values()]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """Where the site's folder is, as a browser sees it: plain files, no server."""
    return site.build(tmp_path_factory.mktemp("site")).parent.as_uri()


@pytest.fixture(scope="module")
def requests(page) -> list[tuple[str, str | None]]:
    """All that the pages ask for: address, and why it failed. The network is cut off."""
    asked: list[tuple[str, str | None]] = []
    page.context.set_offline(True)
    page.on("requestfinished", lambda request: asked.append((request.url, None)))
    page.on("requestfailed", lambda request: asked.append((request.url, request.failure)))
    return asked


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_without_a_network(name, address, requests, page, picture):
    requests.clear()
    page.goto(f"{address}/{name}")
    page.wait_for_load_state("networkidle")
    assert requests
    assert [request for request in requests if request[1]] == []
    assert [url for url, _ in requests if not url.startswith(("file:", "data:"))] == []
    for image in page.locator("main img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
    picture(f"site-{name.partition('.')[0]}")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_breaks_no_rule_of_axe(name, address, requests, page):
    page.goto(f"{address}/{name}")
    violations = axe.Axe().run(page).response["violations"]
    assert [(rule["id"], node["html"][:200]) for rule in violations for node in rule["nodes"]] == []
