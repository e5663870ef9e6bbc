"""The page as a reader sees and works it, in headless Chromium."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from maestro_core import artifact
from maestro_core.artifact import Score
from maestro_core.profile import Latency, Profile
from maestro_core.profile_store import ProfileStore
from server.app import create_app
from server.engine import Engine
from server.service import Service
from server.settings import Settings
from tests.conftest import TINY_RANKS, tiny_contents, tiny_manifest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
Wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
Replaced = pytest.importorskip("selenium.common.exceptions").StaleElementReferenceException

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
PICTURE, OTHER_PICTURE, *_ = EXAMPLES
POINT_MS = (100.0, 200.0, 400.0, 800.0, 1600.0)
OVERHEAD_MS = 0.25
WAIT_S = 30.0
PHONE_PX = 360


@dataclass(frozen=True, slots=True)
class Site:
    """A server, and the gate at which its calibrations stop while it is closed."""

    address: str
    gate: threading.Event


@contextmanager
def serving(settings: Settings, port: int = 0) -> Iterator[Site]:
    """Serve from a thread; calibrations go on once the gate is set."""
    gate = threading.Event()
    service = Service(settings, on_progress=lambda _: gate.wait(WAIT_S))
    with socket.create_server(("127.0.0.1", port)) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(settings, service), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Site(f"http://127.0.0.1:{listening.getsockname()[1]}", gate)
        finally:
            gate.set()
            server.should_exit = True
            thread.join(WAIT_S)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    manifest = replace(tiny_manifest(), labels=(*(file.stem for file in EXAMPLES), *"defghij"))
    artifact.save(tmp_path / "tiny.maestro", manifest, tiny_contents())
    return Settings(
        artifact=tmp_path / "tiny.maestro",
        state_dir=tmp_path / "state",
        threads=1,
        max_batch=2,
        calibration_budget_s=1.0,
    )


@pytest.fixture
def profiled(settings: Settings) -> Settings:
    """Return the settings of a host whose latencies are POINT_MS, whatever it is."""
    key = Engine(artifact.load(settings.artifact), intra_op_threads=1).profile_key(1)
    latencies = tuple(
        Latency(point, batch, ms * batch, ms * batch, ms * batch, ms * batch, 100, ms, ms * batch)
        for point, ms in enumerate(POINT_MS)
        for batch in (1, 2)
    )
    profile = Profile(
        key, "2026-01-02T03:04:05+00:00", "quick", "precision", OVERHEAD_MS, latencies
    )
    ProfileStore(settings.state_dir).save(profile)
    return settings


@pytest.fixture
def site(profiled: Settings) -> Iterator[Site]:
    with serving(profiled) as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


class Reader:
    """Reads and works the page as a person would."""

    def __init__(self, browser: Any, site: Site, width_px: int = 1280) -> None:
        self.browser, self.site = browser, site
        browser.get_log("browser")
        size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(site.address)

    def find(self, css: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return str(self.find(css).text)

    def until(self, holds: Callable[[], Any]) -> None:
        """Wait until it holds; what the page replaces meanwhile is looked up again."""
        Wait(self.browser, WAIT_S, 0.05, (Replaced,)).until(lambda _: holds())

    def until_ready(self) -> "Reader":
        self.until(lambda: self.text("#status") == "Ready" and self.text("#choice"))
        return self

    def move(self, key: str) -> tuple[float, str]:
        """Press a key on the slider; return the target that it then shows, and the choice."""
        self.find("#target").send_keys(key)
        shown = self.text("#target-value").removesuffix(" ms")
        self.until(lambda: float(self.find("#choice").get_attribute("data-target")) == float(shown))
        return float(shown), self.text("#choice")

    def choose(self, file: Path) -> None:
        self.find("#file").send_keys(str(file))

    def block(self, *addresses: str) -> None:
        """Let none of these calls through, as if the server were gone; without any, let all."""
        self.browser.execute_cdp_cmd("Network.enable", {})
        self.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": addresses})

    def evaluate(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def scrolls_sideways(self) -> bool:
        script = "return document.documentElement.scrollWidth > window.innerWidth"
        return bool(self.browser.execute_script(script))


@pytest.fixture
def reader(browser: Any, site: Site) -> Reader:
    return Reader(browser, site).until_ready()


def test_moving_the_slider_changes_the_point(reader: Reader) -> None:
    for key in (Keys.END, Keys.PAGE_DOWN, Keys.PAGE_DOWN, Keys.PAGE_DOWN, Keys.PAGE_DOWN):
        target_ms, choice = reader.move(key)
        in_time = [i for i, ms in enumerate(POINT_MS) if ms + OVERHEAD_MS <= target_ms]
        assert choice.startswith(f"Point {in_time[-1]},"), target_ms

    target_ms, choice = reader.move(Keys.HOME)
    assert target_ms < POINT_MS[0]
    assert choice.startswith("Point 0,")
    assert "No point makes" in reader.text("#choice-why")


def test_the_table_shows_what_was_measured(reader: Reader) -> None:
    reader.find("summary").click()
    rows = reader.browser.find_elements(By.CSS_SELECTOR, "#points tbody tr")

    p95_ms = [row.find_elements(By.TAG_NAME, "td")[3].text for row in rows]
    assert p95_ms == ["100 ms", "200 ms", "400 ms", "800 ms", "1600 ms"]
    assert len(rows) == len(TINY_RANKS)


def check_answer(reader: Reader, picture: Path) -> None:
    """Hold what the page says against the server's own answer at the point that it names."""
    reader.until(lambda: reader.find("#answer").is_displayed())
    query = f"/infer?point={reader.text('[data-fact=point]')}"
    headers = {"content-type": "image/png"}
    answer = httpx.post(
        reader.site.address + query, content=picture.read_bytes(), headers=headers
    ).json()

    assert reader.text("#answer-label") == answer["labels"][0]
    assert reader.text("[data-fact=accuracy]") == f"{100 * answer['accuracy']:.2f} %"
    assert reader.text("[data-fact=total]").endswith(" ms")
    assert reader.text("#met") in ("✓ in time", "✗ late")


def test_a_chosen_picture_is_answered_and_counted(reader: Reader) -> None:
    reader.choose(PICTURE)

    check_answer(reader, PICTURE)
    reader.until(lambda: "100.0 %" in reader.text("#used"))


def test_a_dropped_picture_is_answered(reader: Reader) -> None:
    picture = OTHER_PICTURE
    script = """
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(arguments[0])], "a.png", {type: "image/png"}));
        const options = {dataTransfer: data, bubbles: true, cancelable: true};
        document.body.dispatchEvent(new DragEvent("drop", options));
    """
    reader.browser.execute_script(script, list(picture.read_bytes()))

    check_answer(reader, picture)


def test_a_file_may_be_chosen_twice(reader: Reader) -> None:
    reader.choose(PICTURE)
    check_answer(reader, PICTURE)
    example = reader.find("#examples button:last-child")
    example.click()
    reader.until(lambda: example.get_attribute("aria-pressed") == "true")

    reader.choose(PICTURE)

    reader.until(lambda: example.get_attribute("aria-pressed") == "false")
    check_answer(reader, PICTURE)


def test_moving_the_slider_asks_again(reader: Reader) -> None:
    reader.choose(PICTURE)
    reader.until(lambda: reader.find("#answer").is_displayed())

    before = reader.text("[data-fact=asked]")
    target_ms, _ = reader.move(Keys.END)
    reader.until(lambda: reader.text("[data-fact=asked]") != before)

    assert reader.text("[data-fact=asked]") == f"{target_ms:.0f} ms"


def test_a_file_that_is_no_picture_is_refused_in_plain_words(
    reader: Reader, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"junk")
    (tmp_path / "notes.txt").write_text("hello")

    reader.choose(tmp_path / "broken.png")
    reader.until(lambda: "neither a PNG nor a JPEG" in reader.text("#try-error"))
    reader.choose(tmp_path / "notes.txt")
    reader.until(lambda: reader.text("#try-error") == "notes.txt is not a PNG or JPEG picture")

    reader.choose(OTHER_PICTURE)
    reader.until(lambda: reader.find("#answer").is_displayed())
    assert not reader.find("#try-error").is_displayed()


def test_a_calibration_is_watched_and_cancelled(reader: Reader) -> None:
    reader.find("#start").send_keys(Keys.ENTER)
    reader.until(lambda: reader.find("#job-progress").is_displayed())
    reader.until(lambda: "known well enough" in reader.text("#job-figures"))
    assert not reader.find("#start").is_enabled()

    reader.find("#cancel").send_keys(Keys.ENTER)
    reader.until(lambda: reader.text("#job-state") == "Cancelling")
    reader.site.gate.set()
    reader.until(lambda: reader.text("#job-state").startswith("Cancelled"))
    assert reader.find("#start").is_enabled()
    assert not reader.find("#job").is_displayed()


def test_a_calibration_that_runs_already_is_joined(reader: Reader) -> None:
    job = httpx.post(f"{reader.site.address}/profile", json={"kind": "quick"}).json()

    reader.find("#start").click()
    reader.until(lambda: "under way already" in reader.text("#job-state"))
    httpx.delete(f"{reader.site.address}/profile/jobs/{job['id']}")
    reader.site.gate.set()

    reader.until(lambda: reader.text("#job-state").startswith("Cancelled"))


def test_the_admin_token_is_asked_for_where_one_is_set(browser: Any, profiled: Settings) -> None:
    guarded = profiled.model_copy(update={"admin_token": Settings(admin_token="s3").admin_token})
    with serving(guarded) as site:
        reader = Reader(browser, site).until_ready()
        assert not reader.find("#token").is_displayed()

        reader.find("#start").click()
        reader.until(lambda: reader.find("#token").is_displayed())
        assert reader.text("#job-error") == "This needs the admin token"

        reader.find("#token").send_keys("€" + Keys.ENTER)
        reader.until(lambda: reader.text("#job-error") == "This is not the admin token")
        reader.find("#token").send_keys(Keys.BACKSPACE + "s3" + Keys.ENTER)

        reader.until(lambda: reader.find("#cancel").is_displayed())
        assert not reader.find("#job-error").is_displayed()


def test_the_page_waits_for_the_first_calibration_and_goes_on(
    browser: Any, settings: Settings
) -> None:
    with serving(settings) as site:
        reader = Reader(browser, site)
        reader.until(lambda: reader.text("#status") == "Calibrating")
        assert reader.find("#waiting-progress").is_displayed()
        assert not reader.find("#main").is_displayed()

        site.gate.set()

        reader.until_ready()
        assert not reader.find("#waiting").is_displayed()


def test_a_first_calibration_that_was_cancelled_is_not_waited_for(
    browser: Any, settings: Settings
) -> None:
    with serving(settings) as site:
        reader = Reader(browser, site)
        reader.until(lambda: reader.text("#status") == "Calibrating")
        job = httpx.get(f"{site.address}/v2/health/ready").json()["calibration"]
        httpx.delete(f"{site.address}/profile/jobs/{job['id']}").raise_for_status()
        site.gate.set()

        reader.until(lambda: reader.text("#status") == "Not ready")
        assert reader.text("#waiting-text").startswith("The calibration was cancelled; ")
        assert not reader.find("#waiting-progress").is_displayed()


def test_a_server_that_is_gone_is_said_and_found_again(reader: Reader) -> None:
    reader.block("*/metrics", "*/infer*")
    reader.until(lambda: reader.text("#status") == "Not connected")
    assert "does not answer" in reader.text("#waiting-text")
    above, main = reader.find("#waiting").rect, reader.find("#main").rect
    assert above["y"] + above["height"] < main["y"]
    reader.choose(PICTURE)
    reader.until(lambda: "does not answer" in reader.text("#try-error"))

    reader.block()
    reader.until_ready()
    check_answer(reader, PICTURE)
    assert not reader.find("#try-error").is_displayed()


def test_a_calibration_is_watched_on_when_the_server_is_found_again(reader: Reader) -> None:
    reader.find("#start").click()
    reader.until(lambda: reader.find("#job-progress").is_displayed())

    reader.block("*/metrics", "*/profile/jobs/*")
    reader.until(lambda: reader.text("#status") == "Not connected")
    reader.block()
    reader.until_ready()
    reader.site.gate.set()

    reader.until(lambda: reader.text("#job-state").startswith("Done"))


def test_a_server_that_began_anew_is_shown_as_it_is(browser: Any, profiled: Settings) -> None:
    with serving(profiled) as site:
        reader = Reader(browser, site).until_ready()
        reader.find("#start").click()
        reader.until(lambda: reader.find("#job-progress").is_displayed())
    reader.until(lambda: reader.text("#status") == "Not connected")

    port = int(site.address.rpartition(":")[2])
    with serving(profiled, port):
        reader.until_ready()
        reader.until(lambda: "there is no calibration" in reader.text("#job-error"))
        assert reader.text("#job-state") == ""
    reader.until(lambda: reader.text("#status") == "Not connected")

    renamed = replace(artifact.load(profiled.artifact).manifest, name="another")
    other = profiled.artifact.parent / "another.maestro"
    artifact.save(other, renamed, tiny_contents())
    with serving(profiled.model_copy(update={"artifact": other}), port) as again:
        again.gate.set()
        reader.until(lambda: reader.text("#model") == "another")
        reader.until_ready()


def test_what_shows_amounts_is_seen_in_the_readers_own_colours(reader: Reader) -> None:
    own = {"features": [{"name": "forced-colors", "value": "active"}]}
    reader.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", own)
    reader.choose(PICTURE)
    reader.until(lambda: reader.find("#answer").is_displayed())

    background = "getComputedStyle(document.querySelector('{}'), '{}').backgroundColor"
    for shown, around in ((".spent .compute", ".spent"), ("progress", "#waiting")):
        colours = (background.format(part, "") for part in (shown, around))
        assert reader.evaluate(f"return {' !== '.join(colours)}"), shown
    share = background.format(".bars li", "::before")
    assert reader.evaluate(f"return {share} !== {background.format('.try', '')}")
    reader.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize(("accuracy", "step"), [(0.91, 0.0005), (1.0, 0.0), (0.2, 0.2)])
def test_no_two_accuracies_of_the_axis_are_written_alike(
    browser: Any, settings: Settings, accuracy: float, step: float
) -> None:
    manifest = tiny_manifest()
    points = tuple(
        replace(point, score=Score(accuracy + step * i, 0.0, 1.0))
        for i, point in enumerate(manifest.points)
    )
    path = settings.artifact.parent / "close.maestro"
    artifact.save(path, replace(manifest, points=points), tiny_contents())
    spy = """
        const write = CanvasRenderingContext2D.prototype.fillText;
        window.written = {};
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            (window.written[text] ??= []).push(y);
            return write.call(this, text, x, y);
        };
    """
    browser.execute_cdp_cmd("Page.enable", {})
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": spy})
    with serving(settings.model_copy(update={"artifact": path})) as site:
        site.gate.set()
        reader = Reader(browser, site).until_ready()
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)

        reader.evaluate("window.written = {}")
        reader.move(Keys.END)
        written = reader.evaluate("return window.written")

    heights = {text: set(y) for text, y in written.items() if text.endswith(" %")}
    assert len(heights) > 1
    assert all(len(y) == 1 for y in heights.values()), heights
    assert max(float(text.removesuffix(" %")) for text in heights) <= 100


def test_figures_begin_anew_with_the_server(reader: Reader) -> None:
    reader.browser.set_script_timeout(WAIT_S)
    anew = reader.browser.execute_async_script("""
        const tell = arguments[0];
        import("/static/metrics.js").then(({isAnew, snapshot}) => {
            const seen = (n) => snapshot(`maestro_requests_total{outcome="invalid"} ${n}`, n);
            tell([isAnew(seen(1), seen(2)), isAnew(seen(2), seen(1))]);
        });
    """)

    assert anew == [False, True]


def test_a_phone_does_not_scroll_sideways(browser: Any, site: Site) -> None:
    reader = Reader(browser, site, PHONE_PX).until_ready()
    assert not reader.scrolls_sideways()

    reader.choose(PICTURE)
    reader.find("summary").click()
    reader.until(lambda: reader.find("#answer").is_displayed())
    assert not reader.scrolls_sideways()


def test_a_share_stays_on_one_line_beside_a_long_label(browser: Any, settings: Settings) -> None:
    labels = tuple(f"{i} of a kind with a long name, or another long name" for i in range(10))
    path = settings.artifact.parent / "wordy.maestro"
    artifact.save(path, replace(tiny_manifest(), labels=labels), tiny_contents())
    with serving(settings.model_copy(update={"artifact": path})) as site:
        site.gate.set()
        reader = Reader(browser, site, PHONE_PX).until_ready()
        reader.choose(PICTURE)
        reader.until(lambda: reader.find("#answer").is_displayed())

        lines = reader.evaluate("""
            const share = document.createRange();
            share.selectNodeContents(document.querySelector("#top li span:last-child"));
            return share.getClientRects().length;
        """)
        assert lines == 1
        assert not reader.scrolls_sideways()


def test_everything_to_work_with_has_a_name(reader: Reader) -> None:
    controls = reader.browser.find_elements(
        By.CSS_SELECTOR, "input, button, a, summary, progress, img, [role]"
    )

    nameless = [
        control.get_attribute("outerHTML")
        for control in controls
        if control.is_displayed() and control.aria_role not in ("status", "alert")
        if not control.accessible_name
    ]
    assert nameless == []


def test_a_target_is_said_once_by_the_slider_itself(reader: Reader) -> None:
    target_ms, _ = reader.move(Keys.PAGE_UP)
    slider = reader.find("#target")

    assert slider.accessible_name.strip() == "Target"
    said = str(slider.get_attribute("aria-valuetext")).removesuffix(" milliseconds")
    assert float(said) == target_ms


def test_tab_reaches_every_control_in_the_order_of_the_page(reader: Reader) -> None:
    wanted = ["target", "", "file", "", "", "", "", "start"]  # between: summary, examples, radios
    reader.browser.execute_script("document.getElementById('main').focus()")
    reached = []
    for _ in wanted:
        webdriver.ActionChains(reader.browser).send_keys(Keys.TAB).perform()
        reached.append(reader.browser.switch_to.active_element.get_attribute("id"))

    assert reached == wanted


def test_the_calls_are_described_without_another_host(reader: Reader) -> None:
    reader.browser.get(f"{reader.site.address}/docs")

    reader.until(lambda: "/explain" in reader.text("#calls"))
    assert reader.browser.get_log("browser") == []


def test_the_console_stays_empty(reader: Reader) -> None:
    reader.find("#examples button").click()
    reader.until(lambda: reader.find("#answer").is_displayed())
    reader.move(Keys.END)

    assert reader.browser.get_log("browser") == []
