"""The page as a person uses it: the real command, a real browser, a real file; and nothing leaves this machine."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_matting.checkpoints import store_threshold
from lit_matting.page.views import small_cutout
from lit_matting.pipeline import MattingPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tools are found from the repository's root

from tools.page_screenshots import BOTH_SHOWN, chromium, chromium_path, running_page

pytest.importorskip("gradio", reason="the page needs the `demo` extra")
PlaywrightTimeout = pytest.importorskip(
    "playwright.sync_api", reason="driving a browser needs the `dev` extra"
).TimeoutError
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium_path() is None, reason="there is no Chromium here (`apt-get install chromium`)"),
]

WAIT_MS = 60_000
SAID_IN_SIGHT = """() => {
    const top = document.getElementById("said").getBoundingClientRect().y;
    return -5 <= top && top < 400;
}"""
BLUE, GREEN, YELLOW, RED = (238, 242, 255), (231, 246, 236), (255, 244, 222), (253, 234, 234)
"""Backgrounds of what the page says: working, found, not found, error."""


class Site:
    """The page, and what was seen of it."""

    def __init__(self, address: str, process: Any, matting: MattingPipeline, temporary: Path) -> None:
        self.address = address
        self.process = process
        self.matting = matting
        self.temporary = temporary
        self.requests: list[str] = []
        self.texts: dict[str, str] = {}


@pytest.fixture(scope="module")
def site(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The running command; its confidence is calibrated so that one of two phrases is found and the other is not."""
    folder = tmp_path_factory.mktemp("page")
    own = folder / "calibrated.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    # an untrained network is sure of nothing, and then the page says so instead of found or missing
    (name,) = [name for name in content["state_dict"] if re.fullmatch(r"network.trimap_head.layers.\d+.bias", name)][
        -1:
    ]
    content["state_dict"][name] += 2
    torch.save(content, own)
    image = photograph(600, 800)
    matting = MattingPipeline.from_checkpoint(own, device="cpu", precision="fp32")
    low, high = sorted(matting(image, phrase).confidence for phrase in ("the dog", "a red umbrella"))
    assert high - low > 1e-3
    store_threshold(own, (low + high) / 2)
    matting.threshold = (low + high) / 2
    assert all(matting(image, phrase).alpha.max() >= 0.5 for phrase in ("the dog", "a red umbrella"))
    temporary = folder / "temporary"
    temporary.mkdir()
    options = ("--device", "cpu", "--precision", "fp32", "--max-megabytes", "1", "--max-megapixels", "0.6")
    environment = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with running_page(own, *options, environment=environment) as (address, process):
        yield Site(address, process, matting, temporary)
    assert not list(temporary.glob("lit_matting-*")), "what was uploaded is still there"
    assert process.returncode == 0


@pytest.fixture(scope="module")
def browser(site: Site) -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(site: Site, browser: Any) -> Iterator[Any]:
    """A fresh tab of the page, whose requests are remembered."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    answers: list[Any] = []
    context.on("request", lambda request: site.requests.append(request.url))
    context.on("response", lambda answer: answers.append(answer))
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    tab.goto(site.address)
    tab.wait_for_selector("#examples img")
    yield tab
    site.texts[f"page {len(site.texts)}"] = tab.content()
    for answer in answers:
        if "json" in answer.headers.get("content-type", "") or answer.url.rstrip("/") == site.address:
            site.texts[answer.url] = answer.text()
    context.close()


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth colours, so that its PNG is small."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 90 + y / 70), np.cos(x / 60 - y / 110), np.sin((x + y) / 80)]
    return np.rint(127 + 100 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "holiday at the sea.png"
    Image.fromarray(photograph(600, 800)).save(path)
    return path


def upload(page: Any, path: Path, place: str = "#photo") -> None:
    page.set_input_files(f"{place} input[type=file]", str(path))


def says(page: Any, kind: str) -> str:
    """What the page says once it says something of this kind."""
    page.wait_for_selector(f"#said .note.{kind}")
    return page.inner_text("#said .note").strip()


def colour_of(page: Any, shot: Path) -> tuple[int, int, int]:
    """The colour behind what the page says; the whole window is photographed beside it, for human eyes."""
    page.screenshot(path=shot)
    image = Image.open(io.BytesIO(page.locator("#said .note").screenshot())).convert("RGB")
    return image.getpixel((image.width - 12, image.height // 2))  # right of the text, inside the rounded corner


def ask(page: Any, phrase: str) -> None:
    page.fill("#phrase textarea, #phrase input", phrase)
    page.click("#go")


def ask_and_hold(site: Site, page: Any, phrase: str) -> None:
    """Ask, and stop the server while it is at work: a network this small may be done before one has looked."""
    for _ in range(10):
        ask(page, phrase)
        try:
            page.wait_for_selector("#said .note.working", timeout=3000)
        except PlaywrightTimeout:
            page.wait_for_selector("#go:not([disabled])")
            continue
        site.process.send_signal(signal.SIGSTOP)
        page.wait_for_timeout(300)  # what the server had sent before arrives
        if page.is_visible("#said .note.working"):
            return
        site.process.send_signal(signal.SIGCONT)
        page.wait_for_selector("#go:not([disabled])")
    pytest.fail("the page never said that it was at work")


def downloaded(page: Any, button: str, folder: Path) -> tuple[Image.Image, str]:
    with page.expect_download() as waiting:
        page.click(button)
    path = folder / "downloaded.png"
    waiting.value.save_as(path)
    return Image.open(io.BytesIO(path.read_bytes())), waiting.value.suggested_filename


def test_a_photo_and_a_phrase_become_the_pipelines_own_cut_out(
    site: Site, page: Any, photo: Path, tmp_path: Path
) -> None:
    assert says(page, "plain") == "Choose a photo, type what to cut out, and press the button."
    assert colour_of(page, tmp_path / "empty.png") == BLUE
    assert page.is_visible("text=Your cut-out will appear here.")
    assert not page.is_visible("#save")
    assert page.locator("#examples tbody tr").count() == 4

    upload(page, photo)
    page.wait_for_selector("text=800 × 600 pixels. Now type what to cut out.")
    made = {phrase: site.matting(photo, phrase) for phrase in ("the dog", "a red umbrella")}
    for phrase, result in sorted(made.items(), key=lambda item: not item[1].found):
        ask_and_hold(site, page, phrase)
        try:
            page.wait_for_function("document.querySelector('#said').getBoundingClientRect().top > -1")  # scrolled to
            assert says(page, "working") == f"Cutting out “{phrase}” …"
            assert page.inner_text("#go") == "Cutting out …"
            assert page.is_disabled("#go")
            assert colour_of(page, tmp_path / "working.png") == BLUE
        finally:
            site.process.send_signal(signal.SIGCONT)
        text = says(page, "found" if result.found else "missing")
        assert f"“{phrase}”" in text
        assert ("does not seem to be in this photo" in text) != result.found
        page.wait_for_function(BOTH_SHOWN)
        page.wait_for_selector("#save:not([disabled])")
        page.wait_for_timeout(1000)  # Gradio fades results in
        assert colour_of(page, tmp_path / "done.png") == (GREEN if result.found else YELLOW)
        _slider_shows(page, Image.open(photo), small_cutout(result.cutout))

        cutout, name = downloaded(page, "#save", tmp_path)
        assert name == f"holiday at the sea.{phrase.replace(' ', '-')}.png"
        assert cutout.mode == "RGBA"
        assert cutout.size == (800, 600)
        expected = np.asarray(result.cutout).astype(int)
        assert 0 < expected[..., 3].mean() < 255
        assert np.abs(np.asarray(cutout).astype(int) - expected).max() <= 1

    chips = page.locator("#earlier button")
    assert chips.all_inner_texts() == [phrase for phrase, _ in sorted(made.items(), key=lambda item: item[1].found)]
    chips.nth(1).click()
    page.wait_for_selector("#said .note.found")
    assert page.input_value("#phrase textarea, #phrase input") == next(p for p, r in made.items() if r.found)


def _slider_shows(page: Any, before: Image.Image, after: Image.Image) -> None:
    """The left half of the slider is the one picture, the right half the other."""
    shot = Image.open(io.BytesIO(page.locator("#slider img").first.screenshot())).convert("RGB")
    seen = np.asarray(shot.resize((200, 150), Image.Resampling.BOX)).astype(float)
    pictures = [
        np.asarray(picture.convert("RGB").resize((200, 150), Image.Resampling.BOX)).astype(float)
        for picture in (before, after)
    ]
    for side, columns in enumerate((slice(10, 85), slice(115, 190))):
        # without the label and the buttons in the corners; the browser resizes in another way
        right, wrong = (np.abs(seen - picture)[25:, columns].mean() for picture in (pictures[side], pictures[1 - side]))
        assert right < 10, f"{'right' if side else 'left'} half: {right:.1f}"
        assert right < wrong / 4


def test_backgrounds_are_laid_behind_what_was_cut_out(site: Site, page: Any, photo: Path, tmp_path: Path) -> None:
    upload(page, photo)
    page.wait_for_selector("text=Now type")
    ask(page, "the dog")
    page.wait_for_selector("#save:not([disabled])")
    result = site.matting(photo, "the dog")
    page.click("#background label:has-text('Colour')")
    page.wait_for_selector("#save-on")
    on_white, name = downloaded(page, "#save-on", tmp_path)
    assert name == "holiday at the sea.the-dog.on-background.png"
    assert on_white.mode == "RGB"
    expected = np.asarray(result.composite("white")).astype(int)
    assert np.abs(np.asarray(on_white).astype(int) - expected).max() <= 1

    Image.fromarray(photograph(100, 300)[:, ::-1]).save(tmp_path / "sky.png")
    page.click("#background label:has-text('Picture')")
    upload(page, tmp_path / "sky.png", "#background-picture")
    expected = np.asarray(result.composite(tmp_path / "sky.png")).astype(int)
    for _ in range(20):
        page.wait_for_timeout(500)
        if page.is_visible("#save-on"):
            laid, _ = downloaded(page, "#save-on", tmp_path)
            if np.abs(np.asarray(laid).astype(int) - expected).max() <= 1:
                break
    else:
        pytest.fail("the picture never came behind the cut-out")
    for tab, field in (("Trimap", "#trimap"), ("Where it looked", "#grounding")):
        page.click(f"button[role=tab]:has-text('{tab}')")
        page.wait_for_selector(f"{field} img")


def test_bad_files_get_one_clear_message(site: Site, page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("just words")
    Image.fromarray(photograph(800, 800)).save(tmp_path / "large.jpg")
    expected = {
        "notes.jpg": "That file cannot be used: “notes.jpg” is not an image of a known format."
        " JPEG, PNG, WebP and TIFF photos work.",
        "large.jpg": "That picture has 800 × 800 pixels (0.64 megapixels); up to 0.6 megapixels are fine."
        " Make it smaller and try again.",
    }
    for name, text in expected.items():
        upload(page, tmp_path / name)
        page.wait_for_selector(f"#said .note.error:has-text('{name.partition('.')[0] if name[0] == 'n' else '800 ×'}')")
        assert says(page, "error") == text
        assert colour_of(page, tmp_path / "error.png") == RED
        assert page.is_visible("text=Drop Image Here"), "the field still holds the bad file"
        assert page.locator(".toast-body").count() == 0, "a second message"
    ask(page, "the dog")
    page.wait_for_selector("text=First choose a photo")
    assert page.inner_text("#go") == "Cut out"
    assert page.is_enabled("#go")

    (tmp_path / "heavy.png").write_bytes(np.random.default_rng(0).bytes(1_200_000))
    upload(page, tmp_path / "heavy.png")
    page.wait_for_selector(".toast-body")
    assert "maximum" in page.inner_text(".toast-body").lower()


def test_example_is_cut_out_by_one_click_and_the_page_fits_a_phone(site: Site, page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#examples tbody tr").nth(1).click()
    page.wait_for_selector("#said .note.found, #said .note.missing, #said .note.nothing")
    assert "“the glass one”" in page.inner_text("#said")
    page.wait_for_function(BOTH_SHOWN)
    # scrolled to, and smoothly: on a busy machine that takes a while
    try:
        page.wait_for_function(SAID_IN_SIGHT)
    finally:
        page.screenshot(path=tmp_path / "phone.png")
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def answer(address: str, body: Any = None) -> tuple[int, str]:
    request = urllib.request.Request(address, None if body is None else json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_server_gives_away_neither_its_files_nor_its_folders(site: Site) -> None:
    api = f"{site.address}/gradio_api"
    texts = []
    for path in ("/etc/passwd", str(site.temporary), "https://example.com/x.png", "../../etc/passwd"):
        status, text = answer(f"{api}/file={path}")
        assert status in (403, 404), path
        assert "root:" not in text
        texts.append(text.replace(str(site.temporary), "") if path == str(site.temporary) else text)
    info = json.loads(answer(f"{api}/info")[1])
    assert info["named_endpoints"] == {}, "the page's functions are an interface of their own"
    config = answer(f"{site.address}/config")[1]
    cutting = next(item["id"] for item in json.loads(config)["dependencies"] if len(item["inputs"]) == 6)
    stolen = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [stolen, "the dog", "transparent", "#fff", None, None], "fn_index": cutting, "session_hash": "a"}
    status, text = answer(f"{api}/queue/join", body)
    texts.append(text)
    status, events = answer(f"{api}/queue/data?session_hash=a")
    assert '"success":false' in events.replace(" ", "")
    for text in (*texts, config, events, *site.texts.values()):
        for folder in (str(site.temporary), str(Path.cwd()), "site-packages", str(Path.home()) + "/"):
            assert folder not in text, (
                f"{folder} in {text[max(0, text.index(folder) - 80) : text.index(folder) + 80]!r}"
            )


def test_server_refuses_a_large_request_before_it_has_been_sent(site: Site) -> None:
    connection = http.client.HTTPConnection(site.address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "1000001")
    connection.endheaders()
    with connection.getresponse() as response:
        assert (response.status, response.read()) == (413, b"That is larger than the maximum of 1 MB.")
    connection.close()


def test_nothing_left_this_machine(site: Site) -> None:
    assert len(site.requests) > 20, "the tests above were not run with this one"
    allowed = (site.address, "data:", "blob:")
    assert [url for url in site.requests if not url.startswith(allowed)] == []
    assert os.path.isdir(site.temporary)
