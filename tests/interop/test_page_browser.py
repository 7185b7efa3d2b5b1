"""The page in Chromium, operated by mouse and by keyboard. `make browser` runs this.

Screenshots go to the folder that the variable SCREENSHOTS names, else to the test's own.
"""

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sidelight
import sidelight_server
from PIL import Image
from sidelight_server import ModelSpec

from support.models import LABELS, small_cnn

pytestmark = [
    pytest.mark.requires("chromium"),
    pytest.mark.slow,
    pytest.mark.timeout(240, method="thread"),  # an exception out of a signal would leave Playwright's loop waiting
]

PATIENCE_MS = 30_000
SIZES = ((1440, 900), (1024, 768), (390, 844))
THEMES = ("light", "dark")
SIZE = 96  # pixels: large enough that thousands of rows take seconds
SLOW = "smoothgrad(samples=9000)"  # long enough to be watched, and to be cancelled


def picture(seed: int, height: int = 60, width: int = 90) -> bytes:
    """A picture of soft blobs: unlike noise, its parts differ."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


class Server:
    """A Sidelight server that can be stopped and started again at one address."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder}/socket"
        self._running: sidelight_server.EmbeddedServer | None = None

    def start(self) -> None:
        spec = ModelSpec(small_cnn(size=SIZE), input_size=(3, SIZE, SIZE), class_names=LABELS, name="small")
        self._running = sidelight_server.serve(spec, listen=(self.address,))

    def stop(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None


@contextlib.contextmanager
def serving_page(*arguments: str) -> Iterator[str]:
    """Run `sidelight page` as a person does, and yield its URL."""
    command = [str(Path(sys.executable).with_name("sidelight")), "page", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(picture(seed))
    return folder


@pytest.fixture(scope="module")
def url(server: Server, folder: Path) -> Iterator[str]:
    with serving_page(str(folder), "--address", server.address) as url:
        yield url


@pytest.fixture(scope="module")
def empty_url(server: Server) -> Iterator[str]:
    with serving_page("--address", server.address) as url:
        yield url


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, errors = context.new_page(), []
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: "Content Security Policy" in message.text and errors.append(message.text))
    yield page
    context.close()
    assert errors == []


def opened(page: Any, url: str, **fragment: str) -> Any:
    """Open a view, and wait until its first map is final."""
    page.goto(url + "#" + "&".join(f"{name}={value}" for name, value in fragment.items()))
    page.locator("#classes .chosen").wait_for()
    return page


def pixels(page: Any, pane: int = 0) -> Any:
    """Return what a pane draws, as a digest of its canvas."""
    return page.evaluate("n => document.querySelectorAll('.box canvas')[n].toDataURL()", pane)


def described(page: Any) -> dict[str, Any]:
    """Return the text that is shown: bits of a map may differ where the server is not reproducible."""
    return {
        "maps": page.locator(".box canvas").evaluate_all("all => all.map(each => each.ariaLabel)"),
        "methods": page.locator(".pane-title").all_inner_texts(),
        "picture": page.locator("#thumbnails [aria-current] .name").all_inner_texts(),
        "class": page.locator("#classes [aria-pressed=true].class").all_inner_texts(),
        "drawing": [page.input_value(f"#{name}") for name in ("style", "colormap", "opacity", "top", "scale")],
    }


def until(page: Any, expression: str, argument: Any = None) -> None:
    """Wait until an expression is true. Playwright's own way evaluates text in the page, which its policy forbids."""
    end_s = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(expression, argument):
        assert time.monotonic() < end_s, expression
        page.wait_for_timeout(20)


def until_final(page: Any) -> None:
    until(page, "[...document.querySelectorAll('.pane')].every(pane => pane.getAttribute('aria-busy') === 'false')")


def files(*named: tuple[str, bytes]) -> list[dict[str, Any]]:
    return [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in named]


def test_pictures_are_added_and_explained(page: Any, empty_url: str, server: Server) -> None:
    page.goto(empty_url)
    page.get_by_text("Drop pictures here").wait_for()
    page.locator("#files").set_input_files(files(*((f"{n}.png", picture(n)) for n in range(10, 14))))
    page.locator("#classes .chosen").wait_for()
    until(page, "document.querySelectorAll('#thumbnails .number:not(:empty)').length === 4")
    assert page.locator("#empty").is_hidden()
    with sidelight.connect(server.address) as client:
        expected = [client.attribute(picture(n)).predictions[0].label for n in range(10, 14)]
    names = page.locator("#thumbnails .words > .name").all_inner_texts()
    shown = dict(zip(names, page.locator("#thumbnails .words > .class").all_inner_texts(), strict=True))
    assert [shown[f"{n}.png"] for n in range(10, 14)] == expected


def test_dropped_files_are_added(page: Any, empty_url: str) -> None:
    page.goto(empty_url)
    page.locator("#server.good").wait_for()
    before = page.locator("#thumbnails li").count()
    page.evaluate(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            for (const kind of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true }));
        }""",
        list(picture(20)),
    )
    until(page, "n => document.querySelectorAll('#thumbnails li').length === n + 1", before)
    page.locator("[aria-current] .words > .name", has_text="dropped.png").wait_for()


def test_another_class_and_a_contrast_have_maps_of_their_own(page: Any, url: str) -> None:
    opened(page, url)
    until_final(page)
    first = pixels(page)
    page.locator("#classes .class").nth(1).click()
    until_final(page)
    until(page, "before => document.querySelector('.box canvas').toDataURL() !== before", first)
    second = pixels(page)
    assert page.locator("#classes .class").nth(1).get_attribute("aria-pressed") == "true"
    page.locator("#classes .versus").nth(2).click()
    until(page, "before => document.querySelector('.box canvas').toDataURL() !== before", second)
    assert "rather than" in page.locator("#contrast").inner_text()
    page.fill("#class-name", "ibis")
    page.keyboard.press("Enter")
    until_final(page)
    page.get_by_role("img", name="Map of ibis by Gradient").wait_for()


def test_a_method_has_its_controls_and_a_wrong_value_its_message(page: Any, url: str) -> None:
    opened(page, url)
    page.select_option("#method-name", "integrated_gradients")
    page.fill("#option-steps", "7")
    page.get_by_text("9 rows").wait_for()
    page.fill("#option-steps", "-1")
    beside = page.locator('[data-for="method.steps"]')
    beside.filter(has_text="got -1").wait_for()
    assert page.locator("#option-steps").get_attribute("aria-invalid") is not None
    assert page.locator(".box canvas").is_visible()  # the last good map stays
    page.fill("#option-steps", "5")
    beside.wait_for(state="hidden")
    page.select_option("#method-name", "grad_cam")
    until_final(page)
    page.select_option("#option-layer", "0")
    page.locator(".pane-title", has_text="layer 0").wait_for()


def test_methods_stand_side_by_side_on_one_scale(page: Any, url: str) -> None:
    opened(page, url)
    page.get_by_role("button", name="Compare with another method").click()
    page.select_option("#method-name", "occlusion")
    page.fill("#option-window", "8")
    until_final(page)
    until(page, "document.querySelectorAll('.ends').length === 2")
    own = page.locator(".ends").all_inner_texts()
    page.select_option("#scale", "shared")
    shared = [float(text.split()[-1]) for text in page.locator(".ends").all_inner_texts()]
    assert shared[0] == shared[1] == max(float(text.split()[-1]) for text in own)


def test_maps_improve_and_can_be_cancelled(page: Any, url: str, server: Server) -> None:
    opened(page, url, map=SLOW)
    status = page.locator(".pane-status")
    status.filter(has_text=re.compile(r"improving · \d+ rows · error")).wait_for()
    rows = int(re.search(r"(\d+) rows", status.inner_text())[1])
    until(page, "n => parseInt(/(\\d+) rows/.exec(document.querySelector('.pane-status').textContent)[1]) > n", rows)
    with sidelight.connect(server.address) as client:
        before = client.info().cancellations.count
        page.get_by_role("button", name="Cancel").click()
        status.filter(has_text="cancelled").wait_for()
        end_s = time.monotonic() + PATIENCE_MS / 1000
        while client.info().cancellations.count == before:  # on the server, too
            assert time.monotonic() < end_s
            page.wait_for_timeout(20)
    page.select_option("#method-name", "gradient")
    until_final(page)
    assert page.locator(".pane .problem").is_hidden()


def test_a_server_that_goes_away_and_comes_back(page: Any, url: str, server: Server) -> None:
    opened(page, url)
    until_final(page)
    before = pixels(page)
    server.stop()
    try:
        page.locator("#server.away").wait_for()
        assert pixels(page) == before
        page.locator("#classes .class").nth(1).click()
        page.locator(".pane[aria-busy=true]").wait_for()
    finally:
        server.start()
    page.locator("#server.good").wait_for()
    until_final(page)
    until(page, "before => document.querySelector('.box canvas').toDataURL() !== before", before)
    assert page.locator("#thumbnails li").count() == 3


def test_a_bad_file_fails_alone_and_nothing_is_lost(page: Any, empty_url: str) -> None:
    page.goto(empty_url)
    page.locator("#server.good").wait_for()
    before = page.locator("#thumbnails li").count()
    page.locator("#files").set_input_files(files(("good.png", picture(30)), ("bad.png", b"no picture at all")))
    until(page, "n => document.querySelectorAll('#thumbnails li').length === n + 2", before)
    failed = page.locator("#thumbnails button.failed")
    failed.filter(has_text="bad.png").wait_for()
    failed.click()
    problem = page.locator(".pane .problem")
    problem.filter(has_text="image file").wait_for()
    assert problem.inner_text() == failed.locator(".words > .class").inner_text()
    page.locator("#thumbnails button", has_text="good.png").click()
    until_final(page)
    assert problem.is_hidden()


def test_a_link_opens_the_same_view(page: Any, url: str) -> None:
    opened(page, url)
    page.locator("#thumbnails button").nth(2).click()
    until_final(page)
    page.locator("#classes .class").nth(3).click()
    page.select_option("#method-name", "grad_cam")
    page.get_by_role("button", name="Compare with another method").click()
    page.select_option("#style", "contours")
    page.fill("#top", "20")
    until_final(page)
    page.get_by_role("button", name="Copy link").click()
    link = page.evaluate("navigator.clipboard.readText()")
    shown = described(page)
    page.goto("about:blank")
    page.goto(link)
    until(page, "document.querySelectorAll('.ends').length === 2")
    page.locator("#classes .chosen").wait_for()
    until_final(page)
    assert described(page) == shown


def test_downloads_are_what_is_shown(page: Any, url: str, folder: Path, server: Server, tmp_path: Path) -> None:
    opened(page, url)
    for title in ("PNG", "answer.json", "maps.npy"):
        with page.expect_download() as download:
            page.get_by_role("button", name=title, exact=True).click()
        assert re.fullmatch(r"0-gradient\.(png|json|npy)", download.value.suggested_filename)
        download.value.save_as(tmp_path / title)
    with Image.open(tmp_path / "PNG") as drawn:
        assert drawn.size == (90, 60)
    with sidelight.connect(server.address) as client:
        assert sidelight.replay(client, tmp_path, [folder / "0.png"]).kept


def test_holding_shows_the_bare_picture(page: Any, url: str) -> None:
    opened(page, url)
    box = page.locator("#compare").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    assert page.locator(".box").is_hidden()
    page.mouse.up()
    assert page.locator(".box").is_visible()
    page.locator(".frame").focus()
    page.keyboard.down("c")
    assert page.locator(".box").is_hidden()
    page.keyboard.up("c")
    assert page.locator(".box").is_visible()


def test_the_page_can_be_operated_by_keyboard(page: Any, url: str) -> None:
    opened(page, url)

    def tab_to(selector: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        pytest.fail(f"Tab never reaches {selector}")

    tab_to("#thumbnails button")
    page.keyboard.press("ArrowDown")
    page.locator("#thumbnails li:nth-child(2) [aria-current]").wait_for()
    until_final(page)
    tab_to(".frame")
    page.keyboard.press("+")
    assert page.evaluate("document.querySelector('.layers').style.transform") != ""
    tab_to("#style")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.value") == "even"
    page.locator("#classes .chosen").wait_for()
    tab_to("#classes li:not(.chosen) .class")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.getAttribute('aria-pressed') === 'true'")  # focus is kept
    tab_to("#method-name")
    page.keyboard.type("Occl")
    page.get_by_role("img", name="by Occlusion").wait_for()


@pytest.mark.parametrize("theme", THEMES)
def test_the_accessibility_checker_finds_no_violation(page: Any, url: str, theme: str) -> None:
    """axe-core, with the rules of WCAG 2.2 AA, contrast among them."""
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=theme)
    opened(page, url, map="gradient")
    page.get_by_role("button", name="Compare with another method").click()
    page.fill("#option-samples", "-1")
    page.locator(".pane .problem:not([hidden])").wait_for()
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    found = Axe().run(page, options=rules).response["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []


def test_the_page_fits_every_size(page: Any, url: str, tmp_path: Path) -> None:
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    shots.mkdir(exist_ok=True)
    for width, height in SIZES:
        for theme in THEMES:
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=theme)
            opened(page, url, map="gradient(signed=True)&map=grad_cam", channels="sum")
            page.reload()
            page.locator("#classes .chosen").wait_for()
            until_final(page)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.screenshot(path=shots / f"page-{width}-{theme}.png", full_page=width < 500)
    assert len(list(shots.glob("page-*.png"))) == len(SIZES) * len(THEMES)


def test_the_command_starts_soon(server: Server) -> None:
    """In CPU time, because other processes may have the cores: half of it is the command line's own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with serving_page("--address", server.address):
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
