"""The pages of a made-up run in headless Chromium, opened from disk."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from synthetic import write_run

from medsae_ray.config import Settings
from medsae_ray.report.pages import ROOM
from medsae_ray.report.serve import report_server
from medsae_ray.run import Run
from medsae_ray.stages.report import report

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium on the PATH")
PACKAGES = Path(__file__).parent / "node_modules"
needs_packages = pytest.mark.skipif(not PACKAGES.exists(), reason="needs `npm ci --prefix tests/report`")
NASTY = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The report of 300 neurons."""
    run = tmp_path_factory.mktemp("pages") / "run"
    write_run(run, 300, 200)
    report(Run(str(run)), Settings(run=str(run)))
    return run / "report"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, folder):
    """A page that must meet no error, no dialog and no request beyond the report's folder."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda told: wrong.append(told.text) if told.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda request: None if request.url.startswith(folder.as_uri()) else wrong.append(request.url),
    )
    yield page
    assert not wrong
    page.close()


def opened(page, folder, name):
    started = time.monotonic()
    page.goto(f"{folder.as_uri()}/{name}")
    if not name.startswith("index"):
        page.wait_for_selector("html[data-ready]", timeout=10_000)
    return time.monotonic() - started


def rows(page):
    return page.locator("#neurons tbody tr")


def test_search_filter_and_sort(page, folder):
    opened(page, folder, "neurons.html")
    every = page.locator("#count").inner_text()
    assert every.startswith("300 of 300")
    page.fill("#q", "script alert")
    assert rows(page).count() >= 1
    assert NASTY in rows(page).first.inner_text()
    page.fill("#q", "")
    page.select_option("#state", "dead")
    shown = rows(page).locator("td:nth-child(9)").all_inner_texts()
    assert shown
    assert set(shown) == {"dead"}
    assert "state=dead" in page.url
    page.click("#reset")
    assert page.locator("#count").inner_text() == every
    head = page.locator("#neurons thead th").nth(6)
    head.click()
    page.wait_for_selector("#neurons thead th:nth-child(7)[aria-sort]")
    order = page.locator("#neurons thead th").nth(6).get_attribute("aria-sort")
    told = rows(page).locator("td:nth-child(7)").all_inner_texts()
    numbers = [float(text) for text in told if text != "–"]
    assert len(numbers) > 5
    assert numbers == sorted(numbers, reverse=order == "descending")


def test_a_card_its_overlay_and_its_neighbours(page, folder):
    opened(page, folder, "neurons.html")
    page.check("#named")
    link = rows(page).first.locator("a")
    number = int(link.inner_text())
    link.click()
    page.wait_for_selector(f'html[data-ready="{number}"]')
    assert page.locator("h1").inner_text().startswith(f"Neuron {number}:")
    canvas = page.locator("#card canvas").first
    assert canvas.is_visible()
    page.uncheck("#overlay")
    assert not canvas.is_visible()
    page.keyboard.press("o")
    assert canvas.is_visible()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f'html[data-ready="{number + 1}"]')
    page.click("#previous")
    page.wait_for_selector(f'html[data-ready="{number}"]')
    assert page.url.endswith(f"#{number}")
    page.goto(f"{folder.as_uri()}/neuron.html#99999")
    assert "numbered 0 to 299" in page.locator("#card").inner_text()


def test_what_a_model_wrote_is_text(page, folder):
    opened(page, folder, "neurons.html")
    page.fill("#q", "alert(1)")
    rows(page).first.locator("a").click()
    page.wait_for_selector("#card h1")
    assert NASTY in page.locator("#card h1").inner_text()
    assert page.locator("#card script").count() == 0


def test_an_injected_script_is_not_run(browser, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "report")
    index = tmp_path / "report" / "index.html"
    index.write_text(index.read_text().replace("</main>", "<script>document.title = 'run'</script></main>"))
    page = browser.new_page()
    page.goto(index.as_uri())
    assert page.title() != "run"
    page.close()


@pytest.mark.parametrize("name", ["index.html", "neurons.html", "neuron.html#0"])
def test_a_phone_needs_no_sideways_scrolling(page, folder, name):
    page.set_viewport_size({"width": 375, "height": 812})
    opened(page, folder, name)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_packages
@pytest.mark.parametrize("name", ["index.html", "neurons.html", "neuron.html#0"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_axe_finds_no_serious_violation(browser, folder, name, scheme, width):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    opened(page, folder, name)
    page.add_script_tag(path=PACKAGES / "axe-core" / "axe.min.js")
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 20
    assert [v for v in found["violations"] if v["impact"] in ("serious", "critical")] == []
    context.close()


@needs_packages
def test_the_vendored_table_library_is_the_packages():
    vendored = ROOM / "assets" / "vendor" / "dataTables-3.1.5.min.js"
    assert vendored.read_bytes() == (PACKAGES / "datatables.net/js/dataTables.min.js").read_bytes()


def test_served_to_this_machine_alone(browser, folder):
    asked, wrong = [], []
    with report_server(folder) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}"
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
        page.goto(f"{site}/neurons.html")
        page.wait_for_selector("html[data-ready]")
        assert rows(page).count() == 50
        assert all(url.startswith(site) for url in asked)
        assert not wrong
        # A name that another site points here, and a way out of the folder.
        request = page.context.request
        assert request.get(f"{site}/index.html", headers={"Host": "elsewhere.example"}).status == 403
        assert request.get(f"{site}/%2e%2e/radiographs/_manifest.json").status == 404
        page.close()
        server.shutdown()
