"""Keeps the server's folders out of what the page sends.

Gradio names every file by its absolute path: in the addresses of pictures, in the answers to uploads and in the
requests that refer to them. Between Gradio and the browser one stands in for the other, in both directions.
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

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class HiddenFolder:
    """ASGI middleware that puts :data:`ALIAS` in the place of a folder's path.

    Args:
        app: The application behind it.
        folder: Absolute path of the folder.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], folder: str) -> None:
        self.app = app
        self.folder = folder

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
        kind = dict(scope["headers"]).get(b"content-type", b"")
        scope = {**scope, "path": self.inwards(scope["path"].encode()).decode()}
        # uploads go by piece by piece; everything else Gradio may read as JSON, whatever it calls itself
        if scope["method"] == "POST" and not kind.startswith(b"multipart/"):
            body = self.inwards(await _whole_body(receive))
            if _names_an_address(body):
                await _refuse(send, 400)
                return
            scope["headers"] = _with_length(scope["headers"], len(body))
            receive = _given(body, receive)
        await self.app(scope, receive, _Answer(self, send))


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


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


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
