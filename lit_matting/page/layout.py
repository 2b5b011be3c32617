"""The page: where things stand, and what happens when one of them is used.

Every answer goes through :class:`~lit_matting.page.desk.Desk`; what it has to say stands in one line above the result,
which screen readers announce.
"""

from __future__ import annotations

import html
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from lit_matting.cutting import slug
from lit_matting.page.desk import Desk, Sorry, verdict
from lit_matting.page.views import grounding_overlay, small_cutout, small_photo, trimap_overlay
from lit_matting.results import MattingResult

TITLE = "Cut one thing out of a photo"
EMPTY = "Choose a photo, type what to cut out, and press the button."
REMEMBERED = 8
"""Phrases that stay within reach."""

# below each other, on a phone, the result is out of sight
_SHOW_RESULT = (
    "() => document.getElementById('said').scrollIntoView("
    "{behavior: 'smooth', block: window.innerWidth < 700 ? 'start' : 'nearest'})"
)
BACKGROUNDS = [("Transparent", "transparent"), ("Colour", "colour"), ("Picture", "picture")]

STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True)
class Example:
    """A picture to try the page with."""

    picture: Path
    phrase: str


def build(desk: Desk, examples: Sequence[Example], folder: Path, footnote: str) -> gr.Blocks:
    """Return the page.

    Args:
        desk: Does the work.
        examples: Pictures to try it with.
        folder: Gradio's own, where the pictures shown and the downloads are written; it deletes them after a day.
        footnote: The last line.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        result = gr.State(None, time_to_live=3600)
        phrases = gr.State([])
        gr.HTML(
            f"<h1>{TITLE}</h1><p>Drop a photo, say in words what you want, take the cut-out with you.</p>",
            elem_id="head",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                photo = _picture_field("Photo", "photo", 320)
                phrase = gr.Textbox(
                    label="What to cut out", placeholder="the red umbrella", max_length=200, elem_id="phrase", lines=1
                )
                go = gr.Button("Cut out", variant="primary", elem_id="go")
                earlier = gr.Dataset(
                    label="Phrases so far", components=[gr.Textbox(visible=False)], samples=[], type="index",
                    visible=False, elem_id="earlier",
                )  # fmt: skip
                tried = gr.Dataset(
                    label="Or try one of these",
                    components=[gr.Image(visible=False, type="filepath"), gr.Textbox(visible=False)],
                    headers=["Photo", "What to cut out"],
                    samples=[[str(example.picture), example.phrase] for example in examples],
                    type="index",
                    visible=bool(examples),
                    elem_id="examples",
                )
            with gr.Column(scale=7, min_width=320, elem_id="answer"):
                said = gr.HTML(_note("plain", EMPTY), elem_id="said")
                nothing_yet = gr.HTML('<div id="nothing-yet">Your cut-out will appear here.</div>')
                with gr.Column(visible=False) as shown:
                    with gr.Tabs():
                        with gr.Tab("Cut-out"):
                            slider = gr.ImageSlider(
                                label="Photo | cut-out: drag the line", type="filepath", interactive=False,
                                slider_position=50, max_height=520, buttons=["fullscreen"], elem_id="slider",
                            )  # fmt: skip
                        with gr.Tab("Trimap"):
                            trimap = _view("trimap")
                            gr.HTML(
                                '<div class="legend"><b style="background:#1a73f2"></b>the thing'
                                '<b style="background:#ff9e00"></b>soft border<b style="background:#777"></b>'
                                "background</div>"
                            )
                        with gr.Tab("Where it looked"):
                            grounding = _view("grounding")
                            gr.HTML(
                                '<div class="legend">The brighter, the surer that the phrase means this place.</div>'
                            )
                    with gr.Row():
                        kind = gr.Radio(
                            BACKGROUNDS, value="transparent", label="Background", scale=3, elem_id="background"
                        )
                        colour = gr.ColorPicker(
                            value="#ffffff", label="Colour", visible=False, scale=1, min_width=120, elem_id="colour"
                        )
                    with gr.Column(visible=False) as picture_place:
                        picture = _picture_field("Background picture", "background-picture", 200)
                    with gr.Row():
                        save = gr.DownloadButton("Download PNG", variant="primary", interactive=False, elem_id="save")
                        save_on = gr.DownloadButton("Download with background", visible=False, elem_id="save-on")
        gr.HTML(f'<div class="legend">{html.escape(footnote)}</div>')

        asked = [photo, phrase, kind, colour, picture, phrases]
        answered = [
            said, go, nothing_yet, shown, slider, trimap, grounding, save, save_on, result, phrases, earlier,
        ]  # fmt: skip

        def begin(words: str) -> dict[Any, Any]:
            return {
                said: _note("working", f"Cutting out “{words.strip()}” …" if words.strip() else "One moment …"),
                go: gr.update(value="Cutting out …", interactive=False),
                save: gr.update(interactive=False),
            }

        def cut(
            path: str | None, words: str, kind: str, colour: str, picture: str | None, phrases: list[str]
        ) -> dict[Any, Any]:
            ready = {go: gr.update(value="Cut out", interactive=True)}
            try:
                made = desk.cut(path, words)
                background = desk.background(kind, colour, picture)
            except Sorry as sorry:
                return {**ready, said: _note("error", str(sorry)), save: gr.update(interactive=True)}
            phrases = [made.phrase, *(old for old in phrases if old != made.phrase)][:REMEMBERED]
            name = f"{Path(path or 'photo').stem}.{slug(made.phrase)}"
            photo_shown = small_photo(made)
            return {
                **ready,
                said: _note(*verdict(made)),
                nothing_yet: gr.update(visible=False),
                shown: gr.update(visible=True),
                slider: (_shown(photo_shown, folder), _shown(small_cutout(made.cutout, background), folder)),
                trimap: _shown(trimap_overlay(photo_shown, made.trimap_lr), folder),
                grounding: _shown(grounding_overlay(photo_shown, made.grounding_lr), folder),
                save: gr.update(value=_written(made, None, name, folder), interactive=True),
                save_on: _save_on(made, background, name, folder),
                result: (made, name),
                phrases_state: phrases,
                earlier: gr.update(samples=[[old] for old in phrases], visible=len(phrases) > 1),
            }

        phrases_state = phrases
        cutting = {
            "fn": cut, "inputs": asked, "outputs": answered, "show_progress": "full", "show_progress_on": [slider],
            "api_visibility": "private", "concurrency_id": "network", "concurrency_limit": 1,
        }  # fmt: skip
        # at once, before it is this one's turn at the network
        beginning = {
            "fn": begin, "inputs": phrase, "outputs": [said, go, save], "queue": False, "show_progress": "hidden",
            "api_visibility": "private",
        }  # fmt: skip
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        tried_now = tried.click(
            lambda index: (str(examples[index].picture), examples[index].phrase), tried, [photo, phrase], **quiet
        )
        again = earlier.click(lambda index, old: old[index], [earlier, phrases], phrase, **quiet)
        for start in (
            gr.on([go.click, phrase.submit], **beginning),
            tried_now.then(**beginning),
            again.then(**beginning),
        ):
            start.then(**cutting).then(None, js=_SHOW_RESULT, api_visibility="private")
        gr.on(
            [go.click, phrase.submit, tried.click, earlier.click], None, js=_SHOW_RESULT, api_visibility="private"
        )  # fmt: skip

        def looked(path: str | None) -> dict[Any, Any]:
            blank = {
                said: _note("plain", EMPTY),
                nothing_yet: gr.update(visible=True),
                shown: gr.update(visible=False),
                save: gr.update(value=None, interactive=False),
                result: None,
            }
            if path is None:
                return blank
            try:
                height, width = desk.look(path).photo.size
            except Sorry as sorry:
                return {**blank, said: _note("error", str(sorry)), photo: None}  # the browser cannot show it either
            return {**blank, said: _note("plain", f"{width} × {height} pixels. Now type what to cut out."), photo: path}

        photo.upload(
            lambda: _note("working", "Looking at the photo …"), None, said, queue=False, **quiet
        ).then(
            looked, photo, [said, nothing_yet, shown, save, result, photo], show_progress="minimal",
            show_progress_on=[photo], api_visibility="private", concurrency_id="network", concurrency_limit=1,
        )  # fmt: skip
        photo.clear(lambda: looked(None), None, [said, nothing_yet, shown, save, result], **quiet)

        def laid(
            chosen: tuple[MattingResult, str] | None, kind: str, colour: str, picture: str | None
        ) -> dict[Any, Any]:
            fields = {
                colour_field: gr.update(visible=kind == "colour"),
                picture_place: gr.update(visible=kind == "picture"),
            }
            if chosen is None:
                return fields
            made, name = chosen
            try:
                background = desk.background(kind, colour, picture)
            except Sorry as sorry:
                return {**fields, said: _note("error", str(sorry))}
            return {
                **fields,
                slider: (_shown(small_photo(made), folder), _shown(small_cutout(made.cutout, background), folder)),
                save_on: _save_on(made, background, name, folder),
                said: _note(*verdict(made)),
            }

        colour_field = colour
        gr.on(
            [kind.input, colour.input, picture.upload, picture.clear], laid, [result, kind, colour, picture],
            [colour, picture_place, slider, save_on, said], show_progress_on=[slider], trigger_mode="always_last",
            api_visibility="private",
        )  # fmt: skip
    return page


def _picture_field(label: str, name: str, height: int) -> gr.Image:
    """Return a field for a picture. Give it values only: an update would make Gradio build it anew, as it was."""
    field = gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=height, elem_id=name,
        buttons=[],
    )  # fmt: skip
    # the file as it was uploaded, orientation, profile and 16 bits included; Gradio would open it here, and answer a
    # damaged one with the server's path
    field.preprocess = lambda payload: payload.path if payload is not None else None
    return field


def _view(name: str) -> gr.Image:
    return gr.Image(type="filepath", interactive=False, show_label=False, buttons=["fullscreen"], elem_id=name)


def _note(kind: str, text: str) -> str:
    return f'<div class="note {kind}" role="status" aria-live="polite">{html.escape(text)}</div>'


def _shown(picture: Image.Image, folder: Path) -> str:
    path = folder / f"{uuid.uuid4().hex}.webp"
    picture.save(path, quality=90)
    return str(path)


def _written(result: MattingResult, background: Any, name: str, folder: Path) -> str:
    """Write a download, and return its path; the name is the one the browser saves it by."""
    path = folder / uuid.uuid4().hex / f"{name}.png"
    result.save(path, background)
    return str(path)


def _save_on(result: MattingResult, background: Any, name: str, folder: Path) -> Any:
    if background is None:
        return gr.update(visible=False)
    return gr.update(value=_written(result, background, f"{name}.on-background", folder), visible=True)
