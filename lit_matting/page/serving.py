"""``python -m lit_matting demo``: the page in the browser, from the shell.

Gradio and torch are not imported before it is certain that there is something to show.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lit_matting.checks import InputError
from lit_matting.cutting import CommandParser, add_model_arguments, load_pipeline

log = logging.getLogger(__name__)

PROG = "python -m lit_matting demo"
DESCRIPTION = "Open a page in the browser that cuts what a phrase names out of a photo."
FIRST_PORT = 7860
PORTS = 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SESSIONS = 8
"""Browser tabs whose latest result is kept in memory."""

FILES = "files"
"""Below the page's folder, what Gradio deletes after a day: uploads, results, downloads."""

Scenes = Callable[[], Iterable[tuple[np.ndarray, str]]]


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    result = CommandParser(prog=PROG, description=DESCRIPTION)
    add_model_arguments(result)
    result.add_argument("--port", type=int, help=f"where to listen (default: the first free one from {FIRST_PORT})")
    result.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in, without a password (default: %(default)s)",
    )
    result.add_argument("--open", action="store_true", help="open the browser")
    result.add_argument("--max-megabytes", type=float, default=50, help="of an uploaded file (default: %(default)g)")
    result.add_argument("--max-megapixels", type=float, default=50, help="of a photo (default: %(default)g)")
    return result


def run(arguments: Sequence[str], scenes: Scenes) -> int:
    """Serve the page until it is stopped, and return the exit status.

    Args:
        arguments: Of the command line.
        scenes: Gives pictures (H, W, 3) uint8 with a phrase each, to try the page with.

    Raises:
        InputError: If the command cannot be meant as it was typed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `cutting`
    options = parser().parse_args(list(arguments))
    for name in ("max_megabytes", "max_megapixels"):
        if not getattr(options, name) > 0:
            raise InputError(f"`--{name.replace('_', '-')}` must be more than 0, got {getattr(options, name):g}.")
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs Gradio: pip install -c constraints.txt -e '.[demo]'")
    port = free_port(options.host, options.port)
    matting = load_pipeline(options)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    # a folder of its own: uploads go with it when the page is closed
    with tempfile.TemporaryDirectory(prefix="lit_matting-") as folder:
        _keep_to_itself(Path(folder))
        _serve(options, matting, port, Path(folder), scenes, stop)
    return 0


def _keep_to_itself(folder: Path) -> None:
    """Set what Gradio reads when it is imported: it calls nobody, and keeps its files below this folder."""
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        HF_HUB_DISABLE_TELEMETRY="1",
        GRADIO_TEMP_DIR=str(folder / FILES),
        GRADIO_EXAMPLES_CACHE=str(folder / FILES),
    )
    # Gradio asks itself whether it is up, which must not go through a proxy
    exempt = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "", *LOOPBACK]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, exempt))


def _serve(
    options: argparse.Namespace, matting: object, port: int, folder: Path, scenes: Scenes, stop: threading.Event
) -> None:
    import gradio as gr
    from starlette.middleware import Middleware

    from lit_matting.page.desk import Desk
    from lit_matting.page.layout import STYLE, Example, build
    from lit_matting.page.paths import HiddenFolder

    (folder / FILES).mkdir()
    examples = []
    for number, (picture, phrase) in enumerate(scenes()):
        path = folder / f"scene-{number + 1}.png"
        Image.fromarray(picture).save(path)
        examples.append(Example(path, phrase))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asking itself whether it is up
    private = options.host in LOOPBACK
    footnote = (
        "Photos stay on this computer; they are deleted when the program is stopped."
        if private
        else "Photos go to the computer that runs this page; they are deleted when the program is stopped."
    )
    file_bytes = int(options.max_megabytes * 1e6)
    page = build(Desk(matting, options.max_megapixels), examples, folder / FILES, footnote)
    page.queue(max_size=32)
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    page.launch(
        server_name=_in_address(options.host),
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=options.open,
        show_error=False,
        max_file_size=file_bytes,
        state_session_capacity=SESSIONS,
        app_kwargs={
            "middleware": [Middleware(HiddenFolder, folder=str(folder), file_bytes=file_bytes)],
            "docs_url": None,
            "redoc_url": None,
        },
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="indigo", font=fonts, font_mono=["ui-monospace", "monospace"]),
        css_paths=STYLE,
    )
    if not private:
        log.warning("whoever reaches this machine can use the page: there is no password.")
    print(f"Open {address(options.host, port)} in a browser; Ctrl+C stops.", flush=True)
    stop.wait()
    page.close(verbose=False)


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def address(host: str, port: int) -> str:
    """Return what to type into a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{_in_address(host)}:{port}"


def free_port(host: str, port: int | None) -> int:
    """Return ``port``, or the first free one from :data:`FIRST_PORT`.

    Raises:
        InputError: If it is taken, or the machine has no such address.
    """
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        if not 0 < candidate < 65536:
            raise InputError(f"`--port` must be from 1 to 65535, got {candidate}.")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
            return candidate
        except OSError as error:
            if error.errno == errno.EACCES:
                raise InputError(f"`--port {candidate}` is not allowed for you; take one above 1023.") from error
            if error.errno != errno.EADDRINUSE:
                raise InputError(f"`--host {host}` is no address of this machine.") from error
    if port is None:
        raise InputError(f"all ports from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are taken; choose one by --port.")
    raise InputError(f"`--port {port}` is taken; choose another, or leave it out for the first free one.")
