"""Keeps the server's folders out of what the page sends, and what is too large out of the server.

Gradio names every file by its absolute path: in the addresses of pictures, in the answers to uploads and in the
requests that refer to them. Between Gradio and the browser one stands in for the other, in both directions. Gradio
limits the files of an upload, and nothing else that is sent to it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

ALIAS = "/lit-matting-files"
"""What the browser sees in the place of the folder with uploads and results."""
_TEXTS = ("application/json", "text/html", "text/plain", "text/event-stream")
_CLOSED = ("/gradio_api/file=http", "/gradio_api/file/http", "/gradio_api/proxy=", "/monitoring")
"""What Gradio offers beyond this page: fetching addresses for a visitor, and statistics about the visitors."""
TEXT_BYTES = 1_000_000
"""Of a request that uploads no file; the page's own have a thousandth of it."""
_UPLOAD = "/gradio_api/upload"
"""The one place where files are taken."""
_ENVELOPE_BYTES = 65_536
"""What may stand around an uploaded file."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class HiddenFolder:
    """ASGI middleware that puts :data:`ALIAS` in the place of a folder's path, and answers large requests with 413.

    Args:
        app: The application behind it.
        folder: Absolute path of the folder.
        file_bytes: Of an uploaded file at most; everything else that is sent may have :data:`TEXT_BYTES`.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], folder: str, file_bytes: int) -> None:
        self.app = app
        self.folder = folder
        self.file_bytes = file_bytes

    def inwards(self, text: bytes) -> bytes:
        """Return what the browser sent as Gradio must read it."""
        return text.replace(ALIAS.encode(), self.folder.encode())

    def outwards(self, text: bytes) -> bytes:
        """Return what Gradio answers as the browser may read it."""
        return text.replace(self.folder.encode(), ALIAS.encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith(_CLOSED):
            await _refuse(send, 404)
            return
        if sum(name.lower() == b"content-type" for name, _ in scope["headers"]) > 1:
            await _refuse(send, 400)  # Gradio goes by one of them; what is checked here must be what it reads
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        # what calls itself multipart elsewhere is no file, and is read like everything else
        upload = scope["path"] == _UPLOAD and headers.get(b"content-type", b"").startswith(b"multipart/form-data")
        limited = _Limited(receive, send, self.file_bytes if upload else TEXT_BYTES, _ENVELOPE_BYTES if upload else 0)
        if limited.exceeds(int(headers.get(b"content-length") or 0)):
            await limited.refuse()
            return
        scope = {**scope, "path": self.inwards(scope["path"].encode()).decode()}
        receive, send = limited.receive, limited.send
        # uploads go by piece by piece; everything else Gradio may read as JSON, whatever it calls itself
        if scope["method"] == "POST" and not upload:
            body = self.inwards(await _whole_body(receive))
            if limited.refused:
                return
            if _names_an_address(body):
                await _refuse(send, 400)
                return
            scope["headers"] = _with_length(scope["headers"], len(body))
            receive = _given(body, receive)
        try:
            await self.app(scope, receive, _Answer(self, send))
        except Exception:
            if not limited.refused:  # else the application complains that the browser went away
                raise


class _Limited:
    """A request of which only so much is read: beyond it the answer is 413, and for the application the browser left.

    Args:
        receive: The server's.
        send: The server's.
        limit: Bytes, as the answer says it.
        spare: Bytes beyond the limit that are let through.
    """

    def __init__(self, receive: Receive, send: Send, limit: int, spare: int) -> None:
        self._receive, self._send = receive, send
        self.limit, self.spare = limit, spare
        self.refused = False
        self._read = 0
        self._started = False

    def exceeds(self, size: int) -> bool:
        return size > self.limit + self.spare

    async def refuse(self) -> None:
        self.refused = True
        if not self._started:
            await _refuse(self._send, 413, f"That is larger than the maximum of {self.limit / 1e6:g} MB.")

    async def receive(self) -> Message:
        message = {"type": "http.disconnect"} if self.refused else await self._receive()
        self._read += len(message.get("body", b""))
        if self.exceeds(self._read) and not self.refused:
            await self.refuse()
        return {"type": "http.disconnect"} if self.refused else message

    async def send(self, message: Message) -> None:
        if not self.refused:
            self._started = True
            await self._send(message)


class _Answer:
    """Sends an answer on, with the folder's path replaced in texts."""

    def __init__(self, middleware: HiddenFolder, send: Send) -> None:
        self.middleware = middleware
        self.send = send
        self.start: Message | None = None
        self.parts: list[bytes] = []
        self.kind = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self.kind = headers.get(b"content-type", b"")
            if not self.kind.startswith(tuple(text.encode() for text in _TEXTS)) or b"content-encoding" in headers:
                self.kind = b""
            if not self.kind or self.kind.startswith(b"text/event-stream"):
                await self.send(message)
            else:
                self.start = message  # its length is known at the end
        elif message["type"] != "http.response.body" or not self.kind:
            await self.send(message)
        elif self.start is None:  # events: each is sent whole, and none may wait
            await self.send({**message, "body": self.middleware.outwards(message.get("body", b""))})
        else:
            self.parts.append(message.get("body", b""))
            if not message.get("more_body"):
                body = self.middleware.outwards(b"".join(self.parts))
                await self.send({**self.start, "headers": _with_length(self.start["headers"], len(body))})
                await self.send({"type": "http.response.body", "body": body})


async def _refuse(send: Send, status: int, text: str = "") -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text.encode())).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _names_an_address(body: bytes) -> bool:
    """Whether a request gives the address of another server as a file's path, which Gradio would fetch it from."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # Gradio reads it with the same function and refuses it
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.lower().startswith(("http:", "https:")):
                return True
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return False


async def _whole_body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts)


def _given(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives this body first."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return waiting.pop() if waiting else await receive()

    return give


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]
