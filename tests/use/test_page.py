"""The page without a browser: what it shows, what it says, and what it hides."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_matting.cli import main
from lit_matting.page.desk import Desk, Sorry, verdict
from lit_matting.page.paths import ALIAS, HiddenFolder
from lit_matting.page.serving import address, free_port
from lit_matting.page.views import (
    FOREGROUND,
    TRANSITION,
    checkerboard,
    grounding_overlay,
    shown_size,
    small_cutout,
    trimap_overlay,
)
from lit_matting.pictures import Photo
from lit_matting.pipeline import MattingPipeline
from lit_matting.results import MattingResult

# --- what it shows ----------------------------------------------------------------------------------------------------


def test_cut_out_on_the_board_obeys_the_matting_equation() -> None:
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (40, 50, 4), np.uint8)
    shown = np.asarray(small_cutout(Image.fromarray(rgba))).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * checkerboard((40, 50))
    assert np.abs(shown - expected).max() <= 1


def test_invisible_colours_of_a_large_cut_out_do_not_bleed_into_its_edge() -> None:
    rgba = np.zeros((2800, 2800, 4), np.uint8)
    rgba[:, :1401] = (255, 0, 0, 255)  # 1401: the edge falls inside a pixel of what is shown
    rgba[:, 1401:, 1] = 255  # green, and nowhere to be seen
    shown = np.asarray(small_cutout(Image.fromarray(rgba), (0, 0, 0)))
    assert shown.shape == (1400, 1400, 3)
    assert shown[..., 0].max() == 255
    assert shown[..., 1].max() <= 1


def test_trimap_is_blue_inside_orange_between_and_grey_outside() -> None:
    photo = Image.new("RGB", (3, 1), (200, 100, 50))
    inside, between, outside = np.asarray(trimap_overlay(photo, np.array([[1.0, 0.5, 0.0]])))[0] / 255
    assert inside == pytest.approx(0.45 * np.array([200, 100, 50]) / 255 + 0.55 * np.array(FOREGROUND), abs=0.01)
    grey = 0.55 * (350 / 3 / 255) + 0.1
    half = 0.5 * np.array([200, 100, 50]) / 255 + 0.5 * grey
    assert between == pytest.approx(0.45 * half + 0.55 * np.array(TRANSITION), abs=0.01)
    assert outside == pytest.approx([grey] * 3, abs=0.01)


def test_grounding_is_brighter_where_it_is_surer() -> None:
    photo = Image.new("RGB", (5, 1), (128, 128, 128))
    light = np.asarray(grounding_overlay(photo, np.linspace(0, 1, 5)[None]).convert("L"))[0]
    assert (np.diff(light.astype(int)) > 5).all()


def test_nothing_is_enlarged_and_no_side_vanishes() -> None:
    assert shown_size((1, 9000)) == (1, 1400)
    assert shown_size((20, 10)) == (20, 10)


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(matting: MattingPipeline) -> Desk:
    return Desk(matting, max_megapixels=0.02)


@pytest.fixture
def photo(tmp_path: Path, photograph: np.ndarray) -> str:
    path = tmp_path / "holiday.png"
    Image.fromarray(photograph).save(path)
    return str(path)


def test_desk_cuts_what_the_pipeline_cuts(desk: Desk, matting: MattingPipeline, photo: str) -> None:
    made = desk.cut(photo, "  the red thing ")
    assert made.phrase == "the red thing"
    np.testing.assert_array_equal(made.alpha, matting(photo, "the red thing").alpha)


def test_photo_is_looked_at_once_and_only_a_few_are_kept(
    desk: Desk, photo: str, picture: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    first = desk.look(photo)
    assert desk.look(photo) is first
    for seed in range(4):
        path = tmp_path / f"{seed}.png"
        Image.fromarray(picture(20, 30, seed)).save(path)
        desk.look(str(path))
    assert desk.look(photo) is not first


def sorry(work: Callable[[], Any]) -> str:
    with pytest.raises(Sorry) as caught:
        work()
    return str(caught.value)


def test_every_mistake_is_said_in_words_and_without_the_servers_folders(
    desk: Desk, photo: str, tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.jpg").write_text("just words")
    (tmp_path / "empty.png").touch()
    whole = Path(photo).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(picture(150, 200)).save(tmp_path / "large.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    said = {
        name: sorry(lambda: desk.cut(str(tmp_path / name), "the dog"))  # noqa: B023 (called at once)
        for name in ("notes.jpg", "empty.png", "half.png", "large.png", "bomb.png")
    }
    works = " JPEG, PNG, WebP and TIFF photos work."
    assert said["notes.jpg"] == "That file cannot be used: “notes.jpg” is not an image of a known format." + works
    assert said["empty.png"] == "That file cannot be used: “empty.png” is empty." + works
    assert said["half.png"].startswith("That file cannot be used: “half.png” cannot be read: ")
    limit = "up to 0.02 megapixels are fine. Make it smaller and try again."
    assert said["large.png"] == f"That picture has 200 × 150 pixels (0.03 megapixels); {limit}"
    assert said["bomb.png"] == f"That picture has too many pixels; {limit}"
    said["none"] = sorry(lambda: desk.cut(None, "the dog"))
    said["words"] = sorry(lambda: desk.cut(photo, " ?! "))
    said["colour"] = sorry(lambda: desk.background("colour", photo, None))
    assert said["none"].startswith("First choose a photo")
    assert said["words"] == "Type what to cut out, for example “the red umbrella”."
    assert said["colour"].startswith("That is no colour")

    def fails(*_: Any) -> None:
        raise RuntimeError(f"broken in {tmp_path}")

    monkeypatch.setattr(desk, "matting", fails)
    desk._encoded[photo] = None  # type: ignore[assignment]
    said["bug"] = sorry(lambda: desk.cut(photo, "the dog"))
    assert said["bug"].startswith("Something went wrong here")
    assert not any(str(tmp_path) in text or "/" in text for text in said.values()), said


def test_heic_with_too_many_pixels_is_refused_before_it_is_decoded(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs the extra `heic`")
    path = str(tmp_path / "phone.heic")
    heif.from_pillow(Image.new("RGB", (200, 150))).save(path)
    # the first HEIC of a process: nobody has told PIL of the plug-in
    monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    monkeypatch.setattr("lit_matting.page.desk.read_photo", pytest.fail)
    for work in (lambda: desk.cut(path, "the dog"), lambda: desk.background("picture", "", path)):
        assert sorry(work).startswith("That picture has 200 × 150 pixels (0.03 megapixels); up to 0.02")


def test_what_a_header_did_not_tell_is_found_before_the_network_runs(
    desk: Desk, photo: str, monkeypatch: pytest.MonkeyPatch, picture: Callable[..., np.ndarray]
) -> None:
    monkeypatch.setattr("lit_matting.page.desk.read_photo", lambda path: Photo(picture(150, 200)))
    monkeypatch.setattr(desk, "matting", None)  # whatever is asked of it fails
    assert sorry(lambda: desk.cut(photo, "the dog")).startswith("That picture has 200 × 150 pixels")


@pytest.mark.parametrize(
    ("text", "values"),
    [("#ff8000", (255, 128, 0)), ("rgba(254.6, 128.2, 0, 1)", (255, 128, 0)), ("rgb(1,2,3)", (1, 2, 3))],
)
def test_colour_field_is_understood_as_each_browser_says_it(desk: Desk, text: str, values: tuple[int, ...]) -> None:
    assert desk.background("colour", text, None) == values


def test_background_without_its_picture_stays_transparent(desk: Desk, photo: str, photograph: np.ndarray) -> None:
    assert desk.background("picture", "#ffffff", None) is None
    assert desk.background("transparent", "#ffffff", photo) is None
    np.testing.assert_array_equal(desk.background("picture", "#ffffff", photo), photograph)


def test_verdict_tells_found_from_missing_and_from_nothing(matting: MattingPipeline, photo: str) -> None:
    made = matting(photo, "the dog")

    def judged(alpha: float, threshold: float | None) -> tuple[str, str]:
        fields = {**vars(made), "alpha": np.full((4, 4), alpha, np.float32), "threshold": threshold, "confidence": 0.4}
        return verdict(MattingResult(**{name: fields[name] for name in MattingResult.__dataclass_fields__}))

    assert judged(0.6, None) == ("found", "Cut out: “the dog”, 60 % of the photo.")
    assert judged(0.6, 0.3) == ("found", "Cut out: “the dog”, 60 % of the photo. Confidence 0.40.")
    kind, text = judged(0.6, 0.5)
    assert kind == "missing"
    assert text.startswith("“the dog” does not seem to be in this photo (confidence 0.400; from 0.500 on")
    assert text.endswith(" Shown is the best guess.")
    assert judged(0.3, None)[0] == judged(0.3, 0.3)[0] == "nothing"
    kind, text = judged(0.3, 0.5)  # both are true, and this says more
    assert kind == "missing"
    assert text.endswith("from 0.500 on it counts as found).")


# --- what it hides ----------------------------------------------------------------------------------------------------


def exchange(
    path: str, sent: bytes, kind: str, parts: list[bytes], *sent_as: bytes
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What an application behind the middleware saw of a request, and what the browser got of its answer.

    ``sent_as`` is the content type, or several headers of that name.
    """
    saw: dict[str, Any] = {}

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        saw.update(path=scope["path"], headers=dict(scope["headers"]), body=(await receive())["body"])
        length = str(sum(len(part) for part in parts)).encode()
        headers = [(b"content-type", kind.encode()), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number + 1 < len(parts)})

    got: list[dict[str, Any]] = []
    halves = [sent[: len(sent) // 2], sent[len(sent) // 2 :]]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": halves.pop(0), "more_body": bool(halves)}

    async def send(message: dict[str, Any]) -> None:
        got.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [
            *((b"content-type", kind) for kind in sent_as or [b"application/json"]),
            (b"content-length", str(len(sent)).encode()),
        ],
    }
    asyncio.run(HiddenFolder(application, "/tmp/secret-1", 2_000_000)(scope, receive, send))
    return saw, got


def test_folder_has_an_alias_in_both_directions() -> None:
    saw, got = exchange(
        f"/file={ALIAS}/a.png",
        f'{{"path": "{ALIAS}/a.png"}}'.encode(),
        "application/json",
        [b'"/tmp/sec', b'ret-1/b.png"'],
    )
    assert saw["path"] == "/file=/tmp/secret-1/a.png"
    assert saw["body"] == b'{"path": "/tmp/secret-1/a.png"}'
    assert saw["headers"][b"content-length"] == str(len(saw["body"])).encode()
    assert [message.get("body") for message in got] == [None, f'"{ALIAS}/b.png"'.encode()]
    assert dict(got[0]["headers"])[b"content-length"] == str(len(got[1]["body"])).encode()


def test_events_are_sent_on_one_by_one_and_pictures_untouched() -> None:
    events = [b"data: /tmp/secret-1/a\n\n", b"data: 2\n\n"]
    _, got = exchange("/", b"", "text/event-stream; charset=utf-8", events)
    assert [message["body"] for message in got[1:]] == [f"data: {ALIAS}/a\n\n".encode(), b"data: 2\n\n"]
    _, got = exchange("/", b"", "image/png", [b"\x89/tmp/secret-1"])
    assert got[1]["body"] == b"\x89/tmp/secret-1"


@pytest.mark.parametrize("place", ["file=", "file/"])
def test_page_fetches_no_addresses_for_its_visitors(place: str) -> None:
    saw, got = exchange(f"/gradio_api/{place}http://example.com/x.png", b"", "text/plain", [b"fetched"])
    assert saw == {}
    assert got[0]["status"] == 404


@pytest.mark.parametrize(
    "sent_as",
    [b"application/json", b"application/x+json", b"", b"text/plain", b"multipart/form-data; boundary=x"],
)
def test_forged_file_with_an_address_for_its_path_is_refused(sent_as: bytes) -> None:
    # \\u0068 is an h; the address a browser sends beside the path is never fetched
    forged = b'{"data": [[{"path": "\\u0068ttps://example.com/x.png", "meta": {"_type": "gradio.FileData"}}]]}'
    saw, got = exchange("/gradio_api/queue/join", forged, "application/json", [b"{}"], sent_as)
    assert saw == {}
    assert got[0]["status"] == 400
    honest = b'{"data": [{"path": "/a.png", "url": "http://127.0.0.1:7860/a.png"}, "http://in.a/phrase"]}'
    saw, got = exchange("/gradio_api/queue/join", honest, "application/json", [b"{}"], sent_as)
    assert saw["body"] == honest
    assert got[0]["status"] == 200


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/upload"])
def test_request_that_names_two_kinds_of_content_is_refused(path: str) -> None:
    # which of them counts is for every reader to decide: a guard that goes by one can be passed by the other
    forged = b'{"data": [{"path": "http://169.254.169.254/latest"}]}'
    kinds = [b"application/json", b"multipart/form-data; boundary=x"]
    for sent_as in (kinds, kinds[::-1]):
        saw, got = exchange(path, forged, "application/json", [b"{}"], *sent_as)
        assert saw == {}
        assert got[0]["status"] == 400


def sent_in_pieces(
    size: int, sent_as: bytes, declared: bool, method: str, path: str
) -> tuple[int, list[dict[str, Any]], int]:
    """How much of a body the application read, what the browser got, and how much of the body the server took."""
    read = 0
    left = [min(100_000, size - start) for start in range(0, size, 100_000)]

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        nonlocal read
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the browser has gone")
            read += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    got: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(left.pop(0)), "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        got.append(message)

    headers = [(b"content-type", sent_as)]
    headers += [(b"content-length", str(size).encode())] if declared else [(b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(HiddenFolder(application, "/tmp/secret-1", 2_000_000)(scope, receive, send))
    return read, got, size - sum(left)


@pytest.mark.parametrize(
    ("sent_as", "path", "limit"),
    [
        (b"application/json", "queue/join", 1),
        (b"", "queue/join", 1),
        (b"multipart/form-data; boundary=x", "queue/join", 1),  # no file is taken there
        (b"multipart/form-data; boundary=x", "upload", 2),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_no_request_may_be_larger_than_its_limit(sent_as: bytes, path: str, limit: int, method: str) -> None:
    path = f"/gradio_api/{path}"
    fits = limit * 1_000_000
    for declared in (True, False):
        read, got, _ = sent_in_pieces(fits, sent_as, declared, method, path)
        assert (read, got[0]["status"]) == (fits, 200)
        read, got, taken = sent_in_pieces(fits + 100_000, sent_as, declared, method, path)
        assert [message.get("status") for message in got] == [413, None], "one answer"
        assert got[1]["body"] == f"That is larger than the maximum of {limit} MB.".encode()
        # what says its size is not read at all, and the rest not to its end
        assert read <= taken <= (0 if declared else fits + 100_000)
    read, _, taken = sent_in_pieces(100_000_000, sent_as, False, method, path)
    assert taken <= fits + 100_000


# --- the command ------------------------------------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["demo", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said.strip().removeprefix("python -m lit_matting demo: error: ")


def test_mistakes_are_one_sentence(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    given = ["--checkpoint", str(checkpoint)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expected = f"`--port {port}` is taken; choose another, or leave it out for the first free one."
        assert complaint(capsys, *given, "--port", str(port)) == expected
    assert complaint(capsys, "--checkpoint", "gone.ckpt") == "there is no checkpoint 'gone.ckpt'."
    assert complaint(capsys, *given, "--port", "70000") == "`--port` must be from 1 to 65535, got 70000."
    assert complaint(capsys, *given, "--host", "192.0.2.1") == "`--host 192.0.2.1` is no address of this machine."
    assert complaint(capsys, *given, "--max-megapixels", "0") == "`--max-megapixels` must be more than 0, got 0."
    assert "unrecognized arguments: --prot 1" in complaint(capsys, *given, "--prot", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert complaint(capsys, *given) == "the page needs Gradio: pip install -c constraints.txt -e '.[demo]'"


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--checkpoint", "--port", "--host", "--max-megapixels", "--device"))


def test_address_of_a_host_is_one_that_a_browser_takes() -> None:
    assert address("127.0.0.1", 7860) == "http://127.0.0.1:7860"
    assert address("::1", 7860) == "http://[::1]:7860"
    # every address of the machine is no address to go to
    assert address("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert address("::", 80) == "http://[::1]:80"


def test_a_free_port_is_taken_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("lit_matting.page.serving.FIRST_PORT", port)
        assert port < free_port("127.0.0.1", None) < port + 20
