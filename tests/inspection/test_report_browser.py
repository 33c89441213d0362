"""The report in a real browser, headless Chromium: every screen, what a reader does, what must not happen.

Skipped where chromium or its driver is missing: they are no Python packages.
"""

import base64
import http.server
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from sklearn.metrics import adjusted_rand_score
from synthetic_inspection import HOSTILE, inspection

from moefy.inspection.record import Inspection
from moefy.inspection.report import Report, server, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("browser tests need chromium and chromedriver", allow_module_level=True)

SCREENS = ("overview", "L1", "L1.E3", "prompt", "compare", "hunt", "search=the", "L99")
OPEN_SECONDS, EXPERT_SECONDS = 1.0, 0.1


class Page:
    """A browser at a report."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome

    def open(self, url: str, *, width: int = 1280) -> "Page":
        self.chrome.get("about:blank")
        self.emulate("Emulation.setDeviceMetricsOverride", width=width, height=900,
                     deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.chrome.get_log("browser")
        self.chrome.get_log("performance")
        self.chrome.get(url)
        return self.wait(lambda: self.js("return document.body.dataset.ready === 'yes'"))

    def emulate(self, command: str, **given: Any) -> None:
        self.chrome.execute_cdp_cmd(command, given)

    def media(self, **features: str) -> None:
        """Emulate a medium (`media`) and preferences such as `prefers_color_scheme`."""
        media = features.pop("media", "")
        pairs = [{"name": n.replace("_", "-"), "value": v} for n, v in features.items()]
        self.emulate("Emulation.setEmulatedMedia", media=media, features=pairs)

    def js(self, script: str, *given: Any) -> Any:
        return self.chrome.execute_script(script, *given)

    def wait(self, true: Callable[[], Any]) -> "Page":
        WebDriverWait(self.chrome, 60, poll_frequency=0.02).until(lambda _: true())
        return self

    def go(self, place: str) -> "Page":
        """Change the address and wait until that screen is drawn."""
        drawn = self.js("return performance.getEntriesByType('measure').length")
        self.js("location.hash = arguments[0]", place)
        if self.js("return decodeURIComponent(location.hash.slice(1))") != place:
            raise AssertionError(place)
        return self.wait(lambda: self.measures() > drawn)

    def measures(self) -> int:
        return self.js("return performance.getEntriesByType('measure').length")

    def key(self, key: str) -> "Page":
        drawn = self.measures()
        self.one("body").send_keys(key)
        return self.wait(lambda: self.measures() > drawn)

    def one(self, selector: str) -> Any:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def count(self, selector: str) -> int:
        return len(self.chrome.find_elements(By.CSS_SELECTOR, selector))

    @property
    def text(self) -> str:
        """All text of the screen, folded parts too."""
        return self.js("return document.getElementById('screen').textContent")

    @property
    def place(self) -> str:
        return self.js("return location.hash")

    def problems(self) -> list[str]:
        """What the console has to complain about."""
        return [entry["message"] for entry in self.chrome.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for, whatever came of it."""
        messages = [json.loads(e["message"])["message"] for e in self.chrome.get_log("performance")]
        return [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture(scope="module")
def chrome(tmp_path_factory) -> Iterator[Chrome]:
    options = Options()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspection(layers=3, experts=8, documents=60, examples=120)


@pytest.fixture(scope="module")
def report(found, tmp_path_factory) -> Path:
    return write_report(found, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(chrome, report) -> Iterator[Page]:
    page = Page(chrome).open(report.as_uri())
    page.media()
    page.js("localStorage.clear()")
    yield page.open(report.as_uri())
    assert page.problems() == []


def test_every_screen_shows_and_nothing_is_asked_for(page, report):
    for place in SCREENS:
        page.go(place)
        assert page.count("#screen h1, #screen h2") > 0, place
        assert "cannot be shown" not in page.text, place
    assert set(page.requests()) <= {report.as_uri(), "data:,"}
    assert page.js("return performance.getEntriesByType('resource').length") == 0


def test_policy_forbids_connections_and_foreign_scripts(page):
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = Thread(target=listening.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{listening.server_address[1]}/x"
        said = page.chrome.execute_async_script(
            """const [url, done] = arguments, image = new Image(), script = document.createElement("script");
            script.textContent = "document.title = 'ran'";
            document.head.append(script);
            image.onerror = () => fetch(url).then(() => done("reached"), () => done("refused"));
            image.src = url;""",
            url,
        )
        listening.shutdown()
        thread.join()
    assert (said, hits) == ("refused", [])
    assert page.chrome.title != "ran"
    assert len(page.problems()) >= 2


def test_hostile_text_is_shown_as_it_is(page, found):
    assert page.js("return document.querySelectorAll('#screen b, #screen img').length") == 0
    assert page.chrome.title != "run"
    page.go("L0.E0")
    page.wait(lambda: page.count(".context") > 10)
    shown = page.text
    for piece in ("</script>", "<b>bold</b>", "\U0001f642", "שלום", "{{DATA}}", "&amp;", "\\u003c"):
        assert piece in shown, piece
    assert (
        page.js("return document.querySelectorAll('#screen b, #screen img, #screen script').length")
        == 0
    )
    # A direction that a text turns around ends with it.
    isolated = "return [...document.querySelectorAll('.context')].every(" \
        "(one) => getComputedStyle(one).unicodeBidi.includes('isolate'))"  # fmt: skip
    assert page.js(isolated)
    page.go("search=<b>bold")
    marks = page.js("return [...document.querySelectorAll('mark')].map((m) => m.textContent)")
    assert marks == ["<b>bold"]
    assert HOSTILE.startswith("A </script>")


def test_a_split_character_shows_once(page):
    page.go("L0.E0")
    page.wait(lambda: page.count(".context") > 10)
    lines = page.js("return [...document.querySelectorAll('.context')].map((c) => c.textContent)")
    held = [line for line in lines if "\U0001f642" in line]
    assert held
    assert all(line.count("\U0001f642") == 1 for line in held)


def test_overview_says_how_good_before_what(page, found):
    heads = page.js("return [...document.querySelectorAll('h2')].map((h) => h.textContent)")
    assert heads[0] == "Before you believe the rest"
    assert page.one("[data-fact=bigram_skill] .value").text.startswith("0.930 [0.910, 0.950]")
    for layer, bar in enumerate(page.chrome.find_elements(By.CSS_SELECTOR, ".bars .stacked")):
        widths = page.js(
            "return [...arguments[0].children].map((c) => c.getBoundingClientRect().width)", bar
        )
        share = found.tables["layers"]["share_token"][layer]
        assert widths[0] / sum(widths) == pytest.approx(share, abs=0.01)
        assert sum(widths) == pytest.approx(bar.size["width"], rel=0.01)
    best = max(found.tables["causal"]["csi"])
    row = found.tables["causal"]["csi"].index(best)
    name = f"L{found.tables['causal']['layer'][row]}.E{found.tables['causal']['expert'][row]}"
    table = page.js(
        "return [...document.querySelectorAll('h2')].find((h) => h.textContent.startsWith('The ten'))"
        ".parentElement.querySelector('tbody tr').textContent"
    )
    assert table.startswith(name)


def test_what_is_missing_is_said(chrome, found, tmp_path):
    tables = {name: found.tables[name] for name in ("layers", "documents")}
    bare = Inspection(found.meta, found.honesty, tables)
    page = Page(chrome).open(write_report(bare, tmp_path / "bare.html").as_uri())
    assert "effects of ablation" in page.text
    for place in SCREENS:
        page.go(place)
        assert "cannot be shown" not in page.text, place
    assert "moefy diff" in page.go("hunt").text
    assert "--prompt" in page.go("prompt").text
    assert page.problems() == []


def test_layer_table_sorts_by_its_head(page, found):
    page.go("L1")
    head = [
        h for h in page.chrome.find_elements(By.CSS_SELECTOR, "button.sort") if h.text == "load"
    ]
    head[0].click()
    names = page.js(
        "return [...document.querySelectorAll('.experts tbody a')].map((a) => a.textContent)"
    )
    experts = found.tables["experts"]
    loads = [v for v, layer in zip(experts["load"], experts["layer"], strict=True) if layer == 1]
    order = sorted(range(len(loads)), key=lambda e: -loads[e])
    assert names == [f"L1.E{e}" for e in order]
    assert page.one("[aria-sort]").get_attribute("aria-sort") == "descending"
    page.one("[aria-sort] button").click()
    names = page.js(
        "return [...document.querySelectorAll('.experts tbody a')].map((a) => a.textContent)"
    )
    assert names == [f"L1.E{e}" for e in reversed(order)]


def test_unknown_figures_can_be_chosen(page):
    page.go("L1")
    assert "figure of tomorrow" not in page.one(".experts thead").text
    page.one(".chooser summary").click()
    (box,) = page.chrome.find_elements(By.XPATH, "//label[contains(., 'figure of tomorrow')]/input")
    box.click()
    assert "figure of tomorrow" in page.one(".experts thead").text


def test_expert_page_has_every_panel_with_both_shards(page, found):
    page.go("L2.E5")
    heads = page.js("return [...document.querySelectorAll('h2, h3')].map((h) => h.textContent)")
    for head in (
        "Examples over the whole range", "Strongest", "By tenths", "At random", "At the border",
        "Cancelling", "Figures", "Domains", "Without this expert", "Tokens",
        "Direct effect on logits", "How large its contribution is", "Neurons of a concept",
        "Member neurons",
    ):  # fmt: skip
        assert head in heads, head
    tags = page.js("return [...document.querySelectorAll('.tag')].map((t) => t.textContent)")
    assert {"select", "held out"} <= set(tags)


def test_windows_colour_the_tokens_they_belong_to(page, found):
    page.go("L2.E5")
    page.wait(lambda: page.count(".example .context") > 0)
    examples, experts = found.tables["examples"], found.tables["experts"]
    at = next(
        i
        for i, key in enumerate(
            zip(*(examples[n] for n in ("layer", "expert", "panel")), strict=True)
        )
        if key == (2, 5, "top")
    )
    byte = base64.b64decode(examples["window"][at])[24]
    largest = experts["norm_max"][2 * 8 + 5]
    text = found.texts[str(examples["document"][at])]
    ends, position = [0, *text["ends"]], examples["position"][at]
    focus = page.one(".spectrum .example .focus")
    assert focus.get_attribute("textContent") == text["text"][
        ends[position] : ends[position + 1]
    ].replace("\n", "↵")
    shown = focus.get_attribute("data-tip").removeprefix("norm ")
    assert float(shown.replace(",", "")) == pytest.approx(byte / 254 * largest, rel=0.011)


def test_cells_of_few_documents_are_grey(page, found):
    page.go("L0.E1")
    domains = found.tables["domains"]
    few = sum(
        n < 30
        for layer, expert, n in zip(
            domains["layer"], domains["expert"], domains["documents"], strict=True
        )
        if (layer, expert) == (0, 1)
    )
    table = "[...document.querySelectorAll('h2')].find((h) => h.textContent === 'Domains').parentElement"
    assert page.js(f"return {table}.querySelectorAll('tr.thin').length") == few


def test_permalinks_open_what_they_name(page, report):
    page.open(report.as_uri() + "#L2.E7")
    assert page.one("h1").text == "L2.E7"
    page.open(report.as_uri() + "#L3.E0")
    assert "No such place" in page.text


def test_keys_lead_everywhere(page):
    page.go("L0.E7")
    assert page.key("j").place == "#L1.E0"
    assert page.key("k").place == "#L0.E7"
    assert page.key(Keys.ARROW_LEFT).place == "#L0.E6"
    assert page.key("J").place == "#L1.E6"
    assert page.key("o").place == "#overview"
    seen = {page.key("r").place for _ in range(40)}  # each time another, or nothing is drawn
    assert len(seen) > 1
    assert all(place.startswith("#L") for place in seen)
    page.one("body").send_keys("?")
    assert page.one("dialog").is_displayed()
    page.one("dialog button").click()
    page.one("body").send_keys("/")
    box = page.one("#search")
    assert box == page.chrome.switch_to.active_element
    box.send_keys("jjj")
    assert page.place in seen, "keys in a field are text"


def test_search_finds_contexts_tokens_labels_and_experts(page, found):
    page.go("search=SCRIPT>")
    assert "Contexts (1)" in page.text
    page.go("search=</script")
    assert "L0.E0" in page.text.split("Contexts")[0]
    page.go("search=L2.E4")
    assert page.count("#screen a[href='#L2.E4']") >= 1
    page.go("L1.E1")
    page.one("#label").send_keys("quotes & <i>brackets</i>" + Keys.TAB)
    page.go("search=BRACKETS<")
    assert "quotes & <i>brackets</i>" in page.text
    box = page.one("#search")
    drawn = page.measures()
    box.send_keys("zzzz no such text" + Keys.ENTER)
    page.wait(lambda: page.measures() > drawn)
    assert "Contexts (0)" in page.text


def test_labels_are_kept_given_out_and_taken_in(page, report, tmp_path):
    page.go("L1.E2")
    page.one("#label").send_keys("dates 日" + Keys.TAB)
    page.open(report.as_uri() + "#L1.E2")
    assert page.one("#label").get_attribute("value") == "dates 日"
    page.emulate("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.js(
        "[...document.querySelectorAll('#bar button')].find((b) => b.textContent === 'labels').click()"
    )
    page.js(
        "[...document.querySelectorAll('dialog button')].find((b) => b.textContent === 'export').click()"
    )
    page.wait((tmp_path / "labels.json").exists)
    given = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))
    assert given["labels"] == {"L1.E2": "dates 日"}
    (tmp_path / "more.json").write_text(
        json.dumps({"kind": "labels", "labels": {"L0.E0": "new", "bad": "x", "L0.E1": 3}})
    )
    drawn = page.measures()
    page.one("dialog input[type=file]").send_keys(str(tmp_path / "more.json"))
    page.wait(lambda: page.measures() > drawn)
    assert "1 labels taken in" in page.one("dialog").text
    page.open(report.as_uri() + "#L0.E0")
    assert page.one("#label").get_attribute("value") == "new"


def test_compare_reads_a_second_inspection(page, found, tmp_path):
    other = inspection(layers=3, experts=8, documents=20, examples=10, seed=1)
    owner = found.meta["layers"][0]["owner"]
    # The same experts under other names in layer 0, others elsewhere.
    other.meta["layers"][0]["owner"] = [(e + 3) % 8 for e in owner]
    other.meta["layers"][1]["owner"] = other.meta["layers"][1]["owner"][::-1]
    path = other.save(tmp_path)
    page.go("compare")
    drawn = page.measures()
    page.one("#screen input[type=file]").send_keys(str(path))
    page.wait(lambda: page.measures() > drawn)
    lines = page.js(
        "return [...[...document.querySelectorAll('h2')].find((h) => h.textContent.startsWith('Overlap'))"
        ".parentElement.querySelectorAll('tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    for layer, line in enumerate(lines):
        expected = adjusted_rand_score(
            found.meta["layers"][layer]["owner"], other.meta["layers"][layer]["owner"]
        )
        assert float(line[1].replace("\N{MINUS SIGN}", "-")) == pytest.approx(expected, abs=6e-3)
    assert float(lines[0][2]) == 1
    assert lines[0][3].startswith("L0.E")
    (tmp_path / "bad.json").write_text("{}")
    page.one("#screen input[type=file]").send_keys(str(tmp_path / "bad.json"))
    page.wait(lambda: "no inspection" in page.text)


def test_prompt_map_is_coloured_by_share(page, found):
    page.go("prompt")
    cells = page.js(
        """const shown = document.querySelector("canvas"), canvas = shown.cloneNode();
        const paint = canvas.getContext("2d", { willReadFrequently: true });
        paint.drawImage(shown, 0, 0);
        const size = arguments[0], [across, down] = [canvas.width / size[0], canvas.height / size[1]];
        return Array.from({ length: size[1] - 2 }, (_, row) => Array.from({ length: size[0] }, (_, column) =>
          [...paint.getImageData((column + 0.5) * across, (row + 0.5) * down, 1, 1).data]));""",
        [len(found.prompts[0]["ends"]), 8 + 2],
    )
    share = found.prompts[0]["layers"][0]["share"]
    most = max(abs(v) for row in share for v in row)
    for expert, row in enumerate(cells):
        for token, (red, _, blue, _) in enumerate(row):
            value = share[token][expert] / most
            if abs(value) > 0.25:
                assert (blue > red) == (value > 0), (expert, token, value)
    lines = page.js(
        "return [...document.querySelectorAll('#screen section:last-of-type tbody tr')]"
        ".map((line) => [...line.cells].slice(2).map((cell) => cell.textContent))"
    )
    assert len(lines) == len(share)
    for line in lines:
        *parts, logit = (float(cell.replace("\N{MINUS SIGN}", "-")) for cell in line)
        assert sum(parts) == pytest.approx(logit, abs=0.03)


def test_a_comparison_of_two_models_opens_on_its_differences(page, found, tmp_path):
    """As `moefy diff` makes it: no experts, and how much routing is shared, layer by layer."""
    tables = {name: found.tables[name] for name in found.tables if name.startswith("hunt")}
    tables["saturation"] = {
        "layer": [0, 1],
        "saturation": [0.75, 0.5],
        "saturation_load": [0.5, 0.25],
    }
    compared = Inspection({**found.meta, "layers": []}, {}, tables, found.texts)
    page.open(write_report(compared, tmp_path / "report.html").as_uri())
    assert page.js("return document.body.dataset.screen") == "hunt"
    assert "Router saturation" in page.text and "0.75" in page.text
    page.go("overview")
    assert "Two models compared" in page.text and "Not in this report" not in page.text


def test_hunt_marks_the_token_that_was_to_come(page, found):
    page.go("hunt")
    page.wait(lambda: page.count(".example .focus") > 0)
    hunt = found.tables["hunt"]
    text = found.texts[str(hunt["document"][0])]
    ends, at = [0, *text["ends"]], hunt["position"][0] + 1
    expected = text["text"][ends[at] : ends[at + 1]].replace("\n", "↵")
    assert page.one(".example .focus").get_attribute("textContent") == expected


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("place", SCREENS)
def test_no_screen_is_wider_than_the_window(page, report, width, place):
    page.open(f"{report.as_uri()}#{place}", width=width)
    assert page.js("return document.documentElement.scrollWidth") <= width


def test_dark_and_light(page, report):
    ground = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert page.js(ground) > 200
    page.media(prefers_color_scheme="dark")
    page.wait(lambda: page.js(ground) < 60)
    page.one("body").send_keys("t")
    assert page.js(ground) > 200
    page.media()
    page.one("body").send_keys("t")
    assert page.js(ground) < 60


def test_paper_is_light_and_unfolded(page):
    page.go("L0.E0")
    folded = "return document.querySelectorAll('#screen details:not([open]):not(.chooser)').length"
    assert page.js(folded) > 0
    page.one("body").send_keys("t")
    page.media(media="print")
    page.js("dispatchEvent(new Event('beforeprint'))")
    assert page.js(folded) == 0
    assert not page.one("#bar").is_displayed()
    assert page.js("return getComputedStyle(document.documentElement).colorScheme") == "light"
    page.js("dispatchEvent(new Event('afterprint'))")
    page.media()
    assert page.js(folded) > 0
    printed = page.chrome.execute_cdp_cmd("Page.printToPDF", {})
    assert len(printed["data"]) > 10_000


def test_a_notebook_frame_works_and_keeps_to_itself(chrome, found, tmp_path):
    (tmp_path / "notebook.html").write_text(
        f"<!doctype html><title>notebook</title><body data-ready=yes>{Report(found)._repr_html_()}",
        encoding="utf-8",
    )
    page = Page(chrome).open((tmp_path / "notebook.html").as_uri())
    chrome.switch_to.frame(page.one("iframe"))
    page.wait(lambda: page.js("return document.body.dataset.ready === 'yes'"))
    page.go("L1.E3")
    assert page.one("h1").text == "L1.E3"
    page.one("#label").send_keys("x" + Keys.TAB)
    page.go("L1.E4").go("L1.E3")
    assert page.one("#label").get_attribute("value") == "x"
    refused = page.js("try { return parent.document.title } catch { return 'refused' }")
    assert refused == "refused"
    chrome.switch_to.default_content()


def test_a_folder_loads_its_files_when_they_are_needed(chrome, found, tmp_path):
    index = write_report(found, tmp_path / "folder")
    with server(index.parent) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{running.server_address[1]}/"
        page = Page(chrome).open(url)
        assert not [request for request in page.requests() if "layer_" in request]
        page.go("L1.E3")
        assert page.count(".spectrum") == 5
        asked = {request for request in page.requests() if "layer_" in request}
        assert asked == {url + "layer_01.json.gz", url + "layer_01.windows.gz"}
        assert page.problems() == []
        (index.parent / "layer_02.json.gz").unlink()
        assert "moefy serve" in page.go("L2").text
        page.problems()
        running.shutdown()
        thread.join()


@pytest.mark.slow
def test_opens_within_a_second_and_experts_within_a_tenth(chrome, tmp_path):
    """The best of a few: what else the machine does is not the page's."""
    report = write_report(inspection(), tmp_path / "full.html")
    opened = []
    for _ in range(3):
        page = Page(chrome).open(report.as_uri())
        (first,) = page.js(
            "return performance.getEntriesByName('moefy overview').map((e) => e.toJSON())"
        )
        opened.append((first["startTime"] + first["duration"]) / 1e3)
    page.go("L5")
    shown = []
    for expert in range(6):
        page.go(f"L5.E{expert}")
        last = page.js("return performance.getEntriesByName('moefy expert').at(-1).duration")
        shown.append(last / 1e3)
    assert min(opened) < OPEN_SECONDS, opened
    assert min(shown) < EXPERT_SECONDS, shown
