"""Photograph the page in the browser, for the documentation; also what its test drives the browser with.

    python tools/page_screenshots.py --checkpoint outputs/demo/last.ckpt   # writes docs/page.png, docs/page_phone.png

Needs the `dev` extra and Chromium (`apt-get install chromium`). Only generated scenes are shown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
BOTH_SHOWN = (
    "() => { const shown = [...document.querySelectorAll('#slider img')];"
    " return shown.length == 2 && shown.every(image => image.complete && image.naturalWidth > 0 && image.width > 0) }"
)
"""Is true once the slider's two pictures are there."""
START_S = 180
WAIT_MS = 90_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/page_screenshots.py", description="Photograph the page.")
    parser.add_argument("--checkpoint", default="outputs/demo/last.ckpt", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where to write (default: docs)")
    parser.add_argument("--example", type=int, default=1, help="which of the page's examples, from 1 (default 1)")
    options = parser.parse_args(arguments)
    with running_page(options.checkpoint) as (address, _), chromium() as browser:
        for name, size in (("page", (1280, 800)), ("page_phone", (390, 844))):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.goto(address)
            page.locator("#examples tbody tr").nth(options.example - 1).click()
            page.wait_for_selector(".note.found, .note.missing, .note.nothing", timeout=WAIT_MS)
            page.wait_for_function(BOTH_SHOWN, timeout=WAIT_MS)
            page.wait_for_timeout(1500)  # for Gradio's fading in
            page.screenshot(path=options.folder / f"{name}.png", full_page=name == "page")
            page.close()
            print(options.folder / f"{name}.png")
    return 0


@contextmanager
def running_page(
    checkpoint: str | Path, *options: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the real command while the block lasts; gives the page's address and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_matting", "demo", "--checkpoint", str(checkpoint), "--port", str(port), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )
    late = threading.Timer(START_S, process.kill)
    late.start()
    try:
        said = []
        for line in process.stdout or ():
            said.append(line)
            if line.startswith("Open http"):
                break
        else:
            raise RuntimeError(f"the page did not start:\n{''.join(said)}")
        late.cancel()
        # read on, or a chatty server would wait for a reader
        threading.Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()
        yield f"http://127.0.0.1:{port}", process
    finally:
        late.cancel()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def chromium_path() -> str | None:
    """Return where Chromium is, or None."""
    return next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """Give a headless browser while the block lasts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    sys.exit(main())
