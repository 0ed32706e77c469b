"""``report.html`` in a real browser: Chromium without a window, driven by selenium.

Skipped where either is missing. Accessibility is checked by axe-core, which comes from ``$AXE_JS`` or the
package axe-playwright-python (installed without what it depends on; see the Makefile).
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from report_files import add_all, make_run

from enmp_jax.report import write

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed: pip install selenium"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"
)
EVIL = "<script>alert(1)</script>"
TASKS = ("cars", "dtd", EVIL, "a task with a long name & an <img src=x onerror=alert(2)>")
LAYERS, PROJECTIONS = 12, 3
A4 = 688
"""Pixels between margins of 14 mm, at 96 to the inch."""


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a run with everything there is, by the kind of its heat map; and one of two runs."""
    folder = tmp_path_factory.mktemp("pages")
    for kind in ("mask", "weights"):
        run = add_all(make_run(folder / kind, 3, "projection", LAYERS, TASKS), said=f"As good: {EVIL}.")
        if kind == "weights":
            mask = json.loads((run / "mask.json").read_text())
            mask["weights"] = [
                [layer, name, task, (layer * 7 % 24) / 10]
                for layer in range(LAYERS) for name in mask["projections"] for task in TASKS
                if [layer, name, task] not in mask["pruned"]
            ]  # fmt: skip
            (run / "mask.json").write_text(json.dumps(mask))
        write.write_report(run)
    runs = [folder / "mask", folder / "weights"]
    gain = {"difference": 0.1, "low": 0, "high": 0.2, "p": 0.1}
    both = write.write_comparison(runs, [None, gain], folder / "both.html")
    return {"mask": runs[0] / "report.html", "weights": runs[1] / "report.html", "both": both}


def show(browser, page, width=1200, dark=False, media="screen"):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    return lambda script, *given: browser.execute_script(f"return {script}", *given)


VIEWS = [(1200, False), (1200, True), (360, False)]


@pytest.mark.parametrize(("width", "dark"), VIEWS)
@pytest.mark.parametrize("kind", ["mask", "weights", "both"])
def test_nothing_is_loaded_and_nothing_goes_wrong_or_beyond_the_edge(browser, pages, kind, width, dark):
    js = show(browser, pages[kind], width, dark)
    assert browser.get_log("browser") == []
    assert js("performance.getEntriesByType('resource').length") == 0
    assert js("document.documentElement.scrollWidth") <= width
    light = js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]") > 128
    assert light != dark


def test_there_is_a_mark_for_everything(browser, pages):
    js = show(browser, pages["mask"])
    cells = "[...document.querySelectorAll('table.heat td')]"
    assert js(f"{cells}.length") == LAYERS * PROJECTIONS * len(TASKS)
    pruned = json.loads((pages["mask"].parent / "mask.json").read_text())["pruned"]
    assert js(f"{cells}.filter(x => x.textContent == '×').length") == len(pruned)
    found = "x.querySelectorAll('.mark.found').length"
    tracks = js(f"[...document.querySelectorAll('table.dots')].map(x => {found})")
    assert tracks == [len(TASKS) + 1, 1, 2]  # tasks and their mean; controls; methods
    curves = js("[...document.querySelectorAll('.plot path.curve')].map(x => x.getAttribute('class'))")
    assert sorted(curves) == sorted(
        ["curve random cloud", "curve merged thin", "curve found thin", "curve expert squares"] * 3
        + ["curve merged rule"]
    )


def test_the_pointer_is_told_the_right_module(browser, pages):
    js = show(browser, pages["mask"])
    mask = json.loads((pages["mask"].parent / "mask.json").read_text())
    layer, projection, task = mask["pruned"][0]
    column = mask["projections"].index(projection)
    row = f"document.querySelector('table.heat').tBodies[0].rows[{PROJECTIONS * TASKS.index(task) + column}]"
    cell = js(f"{row}.querySelectorAll('td')[{layer}]")
    webdriver.ActionChains(browser).move_to_element(cell).perform()
    told = js("document.querySelector('output').textContent")
    assert told.startswith(f"{task}, layer {layer}, {projection.rsplit('.', 1)[1]}: left out; ")
    module = (layer * PROJECTIONS + column) * len(TASKS) + TASKS.index(task)
    assert f"leaving it out alone: {100 * (0.001 * module - 0.01):+.2f} points" in told
    assert "left out by 1 of 3 seeds" in told


def test_the_keyboard_reaches_every_cell(browser, pages):
    js = show(browser, pages["weights"])
    keys, inside = webdriver.Keys, "document.activeElement.closest('table.heat') != null"

    def press(*given):
        webdriver.ActionChains(browser).send_keys(*given).perform()

    for _ in range(20):
        press(keys.TAB)
        if js(inside):
            break
    assert js("document.activeElement.tagName") == "TD"
    assert js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    told = "document.querySelector('output').textContent"
    assert js(told).startswith("cars, layer 0, ")
    press(keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_DOWN)
    assert js(told).startswith("cars, layer 2, k_proj: weight 1.4; ")  # 2 * 7 % 24 = 14
    press(keys.END, keys.ARROW_RIGHT)
    assert js(told).startswith(f"cars, layer {LAYERS - 1}, k_proj")
    press(*[keys.ARROW_DOWN] * 5)
    assert js(told).startswith(f"{EVIL}, layer {LAYERS - 1}")
    press(keys.TAB)
    assert not js(inside)  # one stop, not one for each cell


@pytest.mark.parametrize("kind", ["mask", "both"])
def test_a_chart_of_curves_is_read_by_pointer_and_keys(browser, pages, kind):
    js = show(browser, pages[kind])
    plot, told = js("document.querySelector('.plot')"), "document.getElementById('curves-told').textContent"
    here = "document.querySelector('.plot .here').getAttribute('d')"
    history = [json.loads(line) for line in (pages["mask"].parent / "history.jsonl").read_text().splitlines()]
    best = {step: [100 * r["best"] for r in history if r["generation"] == step] for step in (1, 19)}

    def expected(step):
        low, high = (f"{end(best[step]):.1f}" for end in (min, max))
        return f"best so far {low} to {high} %" if low != high else f"best so far {low} %"

    def press(*keys):
        webdriver.ActionChains(browser).send_keys(*keys).perform()

    browser.execute_script("document.querySelector('.plot').focus()")
    assert js("document.activeElement.className") == "plot"
    assert js(told).startswith("16 masks evaluated") and js(here) == "M0 0v1000"
    press(webdriver.Keys.ARROW_RIGHT)
    assert js(told).startswith("32 masks evaluated")
    assert kind == "both" or expected(1) in js(told)
    press(webdriver.Keys.END, webdriver.Keys.ARROW_RIGHT)
    assert js(told).startswith("320 masks evaluated") and js(here) == "M1000 0v1000"
    assert (expected(19) if kind == "mask" else f"mask {best[19][0]:.1f} %") in js(told)
    assert js("document.querySelector('.plot').getAttribute('aria-valuetext')") == js(told)
    webdriver.ActionChains(browser).move_to_element(plot).perform()  # its middle
    assert js(told).startswith(("160 masks", "176 masks"))
    assert kind == "both" or "plain merge (search split) 71.0 %" in js(told)


def test_names_are_text(browser, pages):
    for kind, scripts in (("mask", 3), ("both", 2)):
        js = show(browser, pages[kind])
        assert EVIL in js("document.body.innerText")
        assert js("[document.scripts.length, document.images.length]") == [scripts, 0]


@pytest.mark.parametrize(("width", "dark"), VIEWS)
@pytest.mark.parametrize("kind", ["weights", "both"])
def test_axe_finds_nothing_serious(browser, pages, kind, width, dark):
    found = os.environ.get("AXE_JS")
    spec = importlib.util.find_spec("axe_playwright_python")
    if not found and spec is not None:
        found = str(Path(spec.origin).parent / "axe.min.js")
    if not found:
        pytest.skip("no axe-core here: pip install --no-deps axe-playwright-python, or set AXE_JS")
    show(browser, pages[kind], width, dark)
    # by the driver, past the page's own policy that lets no other script run
    browser.execute_script(Path(found).read_text())
    result = browser.execute_async_script("axe.run().then(arguments[0])")
    serious = [v for v in result["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"]) for v in serious] == []
    assert len(result["passes"]) > 10


@pytest.mark.parametrize("kind", ["mask", "weights", "both"])
def test_paper_shows_all_of_it(browser, pages, kind):
    js = show(browser, pages[kind], A4, dark=True, media="print")
    wide = "x.firstChild.scrollWidth > x.clientWidth + 1"
    sizes = "[x.firstChild.className, x.firstChild.scrollWidth, x.clientWidth]"
    assert js(f"[...document.querySelectorAll('.scroll')].filter(x => {wide}).map(x => {sizes})") == []
    assert js("document.documentElement.scrollWidth") <= A4
    white = js("getComputedStyle(document.body).backgroundColor")
    assert white == "rgb(255, 255, 255)"  # dark is for screens
    paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
    assert len(browser.execute_cdp_cmd("Page.printToPDF", paper)["data"]) > 20_000
