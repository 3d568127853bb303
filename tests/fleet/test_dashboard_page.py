"""The dashboard's page in a real browser: what it shows, whom it believes, and what it says when the server is gone.

Needs Chromium, of the system or named by CHROMIUM, and the package playwright, which drives it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from ledgers import AskedHere, add_devices, decision, digest, report, run_step
from served import DASHBOARD_KEY, KEYS, Hub, board_of

from emutune.fleet.config import Limits
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Result
from emutune.fleet.security import new_secret, secret_sha256, self_made_certificate
from emutune.fleet.server.app import create_app, serve

pytestmark = [
    pytest.mark.slow,
    # A browser may be greeting the server, or taking leave, in the moment when the server's loop ends.
    pytest.mark.filterwarnings("ignore:unclosed (transport )?<.*[sS]ocket:ResourceWarning"),
]

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright: it drives the browser"
)
HOSTILE = "<img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"
WAIT_MS = 15_000


def chromium() -> str:
    """The browser's path."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed (on Debian: apt-get install chromium); CHROMIUM may name one")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    with playwright.sync_playwright() as driver:
        # No sandbox inside of containers, where tests run as root.
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


class Page:
    """A page that was opened, and everything that went wrong on it."""

    def __init__(self, browser: Any, url: str, key: str | None = DASHBOARD_KEY, **context: Any) -> None:
        # The authority is the fleet's own.
        self.context = browser.new_context(ignore_https_errors=True, **context)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"{url}/dashboard" + ("" if key is None else f"#key={key}"))

    def state(self, pattern: str) -> None:
        """Wait until the state line says something."""
        playwright.expect(self.page.locator("#state")).to_have_text(re.compile(pattern), timeout=WAIT_MS)

    def shows(self, selector: str, text: str) -> None:
        playwright.expect(self.page.locator(selector)).to_contain_text(text, timeout=WAIT_MS)

    def rows(self, table: str) -> list[list[str]]:
        rows = self.page.locator(f"#{table} tbody tr")
        return [row.locator("th, td").all_inner_texts() for row in rows.all()]


@contextmanager
def running(directory: Path, port: int = 0, steps_total: int = 3) -> Iterator[tuple[str, Callable[[], None]]]:
    """A server in a thread of its own, until the block ends: its URL, and what tells it that its end has come."""
    started, stop = threading.Event(), threading.Event()
    told: list[Any] = []
    (directory / "catalogue" / "tokenizer").mkdir(parents=True, exist_ok=True)

    async def run() -> None:
        with Ledger(directory / "ledger.sqlite") as ledger:
            work = directory / "work"
            board = board_of(ledger, work / "uploads", steps_total, name="lab")
            hub = Hub(ledger, directory)
            app = create_app(
                hub,
                AskedHere(ledger),
                {"b" * 64: directory / "catalogue"},
                work,
                Limits(),
                lambda *_: None,
                board,
            )
            tls = self_made_certificate(directory / "tls", [])
            server = await serve(app, "127.0.0.1", port, tls.certificate, tls.key)
            told.extend([server.port, asyncio.get_running_loop(), board])
            started.set()
            await asyncio.to_thread(stop.wait)
            await server.stop()
            board.close()

    thread = threading.Thread(target=asyncio.run, args=[run()])
    thread.start()
    try:
        assert started.wait(30)
        real, loop, board = told

        def farewell() -> None:
            asyncio.run_coroutine_threadsafe(board.say_farewell(), loop).result(10)

        yield f"https://127.0.0.1:{real}", farewell
    finally:
        stop.set()
        thread.join(30)
        # What it left open is warned of here, not in another test.
        gc.collect()


def make_ledger(directory: Path) -> Ledger:
    """A ledger of two steps, one of them under way, among devices whose words are not to be trusted."""
    directory.mkdir(exist_ok=True)
    ledger = Ledger(directory / "ledger.sqlite")
    add_devices(ledger, "ue1", "ue2")
    # The protocol takes no such name; the page must not rely on that.
    ledger.add_device(HOSTILE, digest("hostile"))
    assert ledger.enrol(HOSTILE, digest("hostile"), secret_sha256(KEYS["ue2"]))
    run_step(ledger, 0, "ue1", "ue2")
    ledger.report("ue1", report("ue1-1"))
    ledger.begin_step(1, [decision(1, "ue1"), decision(1, "ue2", f"ue2-1 {HOSTILE}")])
    ledger.result("1-ue2", Result(outcome="failed", reason=HOSTILE))
    ledger.close_lease("1-ue2", "failed")
    ledger.audit("refused", None, None, HOSTILE)
    ledger.audit("data deleted", HOSTILE, None, HOSTILE)
    return ledger


def test_what_an_operator_sees(browser: Any, tmp_path: Path) -> None:
    with make_ledger(tmp_path) as ledger, running(tmp_path) as (url, _):
        seen = Page(browser, url)
        seen.state(r"Running: 1 of 3 steps are done; the last begun is step 1\.")
        assert seen.page.title() == "lab: 1 of 3 steps"
        assert seen.page.locator("#facts").inner_text().split("\n")[:3] == ["Steps", "1 of 3", "done"]
        assert [row[:2] for row in seen.rows("devices")] == [
            ["ue1", "fetches an emulator"],
            ["ue2", "between tasks"],
            [HOSTILE, "between tasks"],
        ]
        seen.shows("#step-title", "Step 1")
        assert [row[0] for row in seen.rows("steps")] == ["1", "0"]
        seen.page.get_by_role("button", name="Show step 0").click()
        seen.shows("#step-title", "Step 0")
        first = seen.rows("leases")[0]
        assert first == [
            "ue1",
            "on the device, E 0.500",
            "1.00 s",
            "2.00 s",
            "1.00 kB",
            "1.00 kB",
            "21.00",
            "20.00",
            "accepted: 21.00, was 25.00",
        ]
        # What happens next arrives by itself, and does not lead away from the step that is looked at.
        ledger.transferred("1-ue1", 2.5, 1000)
        seen.shows("#devices", "trains")
        ledger.adapter("1-ue1", digest("b"), 64)
        ledger.evaluation("1-ue1", 21.0, 22.0, False)
        ledger.close_lease("1-ue1", "done")
        ledger.end_step(1, 2.5)
        seen.state("2 of 3")
        assert [row[0] for row in seen.rows("steps")] == ["1", "0"]
        seen.shows("#step-title", "Step 0")
        seen.page.get_by_role("button", name="Follow the latest").click()
        seen.shows("#leases", "refused: 22.00 is worse than 21.00")
        assert seen.page.locator("#charts svg").count() == 3
        assert "measured 2.00 s" in str(seen.page.locator("#charts svg").first.get_attribute("aria-label"))
        assert seen.page.locator("#charts circle").count() >= 6
        assert {address.split("/")[2] for address in seen.asked if not address.startswith("data:")} == {
            url.split("/")[2]
        }
        assert seen.faults == []


def test_nothing_that_a_device_says_is_run(browser: Any, tmp_path: Path) -> None:
    with make_ledger(tmp_path), running(tmp_path) as (url, _):
        seen = Page(browser, url)
        seen.state("Running")
        for table in ("devices", "leases", "refusals", "deletions", "faults"):
            seen.shows(f"#{table}", HOSTILE)
            assert seen.page.locator(f"#{table} :is(img, script)").count() == 0
        assert seen.page.title() == "lab: 1 of 3 steps"
        # Should it ever get into the page, neither a script nor a handler may run.
        blocked = seen.page.evaluate(
            "() => { try { document.body.innerHTML = '<b>x</b>'; return 'put in' } catch { return 'refused' } }"
        )
        assert blocked == "refused"
        with suppress(playwright.Error):
            seen.page.evaluate(
                "() => { const made = document.createElement('script'); made.append('document.title = 1');"
                " document.body.append(made); }"
            )
        assert seen.page.title() == "lab: 1 of 3 steps"


def test_the_key_leaves_the_address_and_opens_alone(browser: Any, tmp_path: Path) -> None:
    with make_ledger(tmp_path), running(tmp_path) as (url, _):
        seen = Page(browser, url)
        seen.state("Running")
        assert seen.page.url == f"{url}/dashboard"
        assert not [address for address in seen.asked[1:] if DASHBOARD_KEY in address]
        seen.page.reload()
        seen.state("Running")
        for wrong in (new_secret(), KEYS["ue2"]):
            other = Page(browser, url, wrong)
            other.state("locked")
            other.shows("#wrong", "The server does not know this key.")
            assert not other.page.locator("#page").is_visible()
            asked = len(other.asked)
            other.page.wait_for_timeout(2500)
            assert len(other.asked) == asked, "a wrong key is tried once"
        asking = Page(browser, url, None)
        asking.state("locked")
        asking.page.get_by_label("Key of the dashboard").fill(DASHBOARD_KEY)
        asking.page.keyboard.press("Enter")
        asking.state("Running")
        assert asking.page.url == f"{url}/dashboard"


def test_what_it_says_when_the_server_is_gone(browser: Any, tmp_path: Path) -> None:
    with make_ledger(tmp_path):
        with running(tmp_path) as (url, _):
            seen = Page(browser, url)
            seen.state("Running")
        seen.state(r"No connection to the server since \d\d:\d\d:\d\d")
        seen.shows("#devices", "fetches an emulator")
        port = int(url.rsplit(":", 1)[1])
        with running(tmp_path, port) as (_, farewell):
            seen.state("Running")
            assert [row[0] for row in seen.rows("steps")] == ["1", "0"]
            farewell()
            seen.state("The server is being stopped")
        seen.state(r"The server was stopped at .*\. 1 of 3 steps are done; the same command goes on")


def test_what_it_says_when_all_is_done(browser: Any, tmp_path: Path) -> None:
    with make_ledger(tmp_path) as ledger:
        with running(tmp_path, steps_total=2) as (url, _):
            seen = Page(browser, url)
            seen.state("Running")
            ledger.close_lease("1-ue1", "done")
            ledger.end_step(1, 1.0)
            seen.state(r"The run has ended\. All 2 steps are done\.")
        seen.state(
            r"The run has ended\. All 2 steps are done, and the server has stopped; this is the state of"
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_three_hundred_devices_fit(browser: Any, tmp_path: Path, scheme: str, width: int) -> None:
    names = [f"ue{number}" for number in range(1, 301)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        add_devices(ledger, *names)
        ledger.begin_step(0, [decision(0, name) for name in names])
        ledger.close_lease("0-ue77", "expired")
        ledger.revoke("ue300")
    with running(tmp_path) as (url, _):
        seen = Page(browser, url, color_scheme=scheme, viewport={"width": width, "height": 900})
        seen.state("Running")
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
        assert [row[0] for row in seen.rows("devices")] == names[:25]
        seen.shows("#devices-pager", "1 to 25 of 300")
        seen.page.locator("#devices-pager").get_by_role("button", name="Next").click()
        seen.shows("#devices-pager", "26 to 50 of 300")
        seen.page.get_by_label("Find").fill("ue29")
        playwright.expect(seen.page.locator("#devices tbody tr")).to_have_count(11)
        find = seen.page.get_by_label("Find")
        for button, found in (("late: 1", "ue77"), ("revoked: 1", "ue300")):
            seen.page.get_by_role("button", name=button).click()
            playwright.expect(seen.page.locator("#devices tbody tr")).to_have_count(1)
            assert seen.rows("devices")[0][0] == found
            seen.page.get_by_role("button", name=button).click()
            playwright.expect(find).to_have_value("")
        seen.shows("#doing", "fetches an emulator: 299")
        assert lowest_contrast(seen.page) >= 4.5
        assert seen.faults == []
        seen.context.close()


def lowest_contrast(page: Any) -> float:
    """The lowest ratio of luminances between a text that is seen and what lies behind it (WCAG 2)."""
    return float(
        page.evaluate(
            """() => {
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const light = (rgb) => {
            const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const behind = (element) => {
            for (let at = element; at; at = at.parentElement) {
                const rgb = parse(getComputedStyle(at).backgroundColor);
                if (rgb.length < 4 || rgb[3] > 0) return rgb;
            }
            return [255, 255, 255];
        };
        let lowest = 21;
        for (const element of document.querySelectorAll('body *')) {
            const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
            if (!own || !element.checkVisibility() || element.closest(':disabled, svg, noscript')) continue;
            const [one, two] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
            lowest = Math.min(lowest, (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05));
        }
        return lowest;
    }"""
        )
    )
