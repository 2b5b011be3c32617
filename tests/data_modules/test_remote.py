"""Shards behind a server that fails now and then, cuts transfers short, and is slow."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_modules import BenchmarkSource, InterleavedDataModule, ShardSource
from data_modules.remote import RemoteShards
from data_modules.shards import ShardIndex
from lit_matting.checks import InputError

Pictures = Callable[..., Path]


class Server(ThreadingHTTPServer):
    """Serves a folder; `plan` says what happens to the n-th request of a path before it is served well."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.plan: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        plan = self.server.plan.get(name, [])
        fault = plan.pop(0) if plan else ""
        path = self.server.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        data, first = path.read_bytes(), 0
        if fault == "wrong":
            data = data[:700] + b"?" + data[701:]
        asked = self.headers.get("Range")
        if asked:
            self.server.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(data):
                self.send_error(416)
                return
        if fault == "no http":
            self.wfile.write(b"SSH-2.0-other\r\n")
            return
        if fault.startswith("chunked"):
            self._send_in_chunks(data[first:], whole=fault == "chunked whole", partial=bool(asked))
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if fault == "slow":
            for start in range(first, len(data), 4000):
                self.wfile.write(data[start : min(start + 4000, len(data))])
                time.sleep(0.01)
        elif fault == "cut":
            self.wfile.write(data[first : (first + len(data)) // 2])
        elif fault == "silent":
            time.sleep(1.5)
        else:
            self.wfile.write(data[first:])

    def _send_in_chunks(self, data: bytes, whole: bool, partial: bool) -> None:
        """A transfer that states no length, and breaks off: in the middle, or after all bytes but before the end."""
        self.protocol_version = "HTTP/1.1"
        self.send_response(206 if partial else 200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        half = data if whole else data[: len(data) // 2]
        self.wfile.write(f"{len(half):x}\r\n".encode() + half + b"\r\n" + (b"" if whole else b"9999\r\nxx"))
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> RemoteShards:
    return RemoteShards(str(tmp_path / "cache"), retries=4, first_wait_s=0.01)


def _load(url: str, cache: RemoteShards) -> ShardIndex:
    return ShardIndex.load(url, open_url=cache.read, locate=cache.locate)


@pytest.mark.parametrize("name", ["a.index.json", "a-{000000..000002}.tar"])
def test_samples_are_the_same_through_a_server_that_fails(
    server: Server, cache: RemoteShards, pictures: Pictures, name: str
) -> None:
    local = ShardIndex.load(pictures("a", 12))
    server.plan = {
        "a/a.index.json": ["503", "cut"],
        "a/a-000000.tar": ["500", "cut", "cut"],
        "a/a-000001.tar": ["slow"],
        "a/a-000002.tar": ["wrong"],
    }
    remote = _load(f"{server.url}/a/{name}", cache)
    assert [sample.key for sample in remote] == [sample.key for sample in local]
    for number in range(12):
        assert {k: bytes(v) for k, v in remote.read(number).members.items()} == {
            k: bytes(v) for k, v in local.read(number).members.items()
        }
    assert not any(server.plan.values())


def test_broken_transfer_is_taken_up_where_it_stopped(server: Server, cache: RemoteShards, pictures: Pictures) -> None:
    path = pictures("a", 4)
    size = (path.parent / "a-000000.tar").stat().st_size
    server.plan = {"a/a-000000.tar": ["cut"]}
    _load(f"{server.url}/a/a.index.json", cache).read(0)
    assert server.ranges == [f"bytes={size // 2}-"]


@pytest.mark.parametrize("fault", ["chunked", "chunked whole", "no http"])
def test_broken_chunks_and_answers_that_are_not_http_are_tried_again(
    server: Server, cache: RemoteShards, pictures: Pictures, fault: str
) -> None:
    local = ShardIndex.load(pictures("a", 4))
    server.plan = {"a/a-000000.tar": [fault], "a/a.index.json": [fault]}
    remote = _load(f"{server.url}/a/a.index.json", cache)
    assert bytes(remote.read(3).member("png")) == bytes(local.read(3).member("png"))
    assert server.requests["a/a-000000.tar"] >= 2
    assert server.requests["a/a.index.json"] >= 2


def test_pauses_between_tries_grow(
    server: Server, cache: RemoteShards, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("data_modules.remote.time.sleep", pauses.append)
    pictures("a", 2)
    server.plan = {"a/a-000000.tar": ["500", "502", "503", "429"]}
    _load(f"{server.url}/a/a.index.json", cache).read(0)
    assert pauses == [0.01, 0.02, 0.04, 0.08]


def test_shards_are_fetched_once_and_only_when_needed(server: Server, cache: RemoteShards, pictures: Pictures) -> None:
    pictures("a", 12)
    for _ in range(2):
        _load(f"{server.url}/a/a.index.json", cache).read(7)
    assert server.requests == {"a/a.index.json": 2, "a/a-000001.tar": 1}


def test_processes_that_want_one_shard_together_fetch_it_once(
    server: Server, cache: RemoteShards, pictures: Pictures
) -> None:
    pictures("a", 5)
    server.plan = {"a/a-000000.tar": ["slow"]}
    index = _load(f"{server.url}/a/a.index.json", cache)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(partial(cache.locate, index.paths[0]), [index.shards[0]] * 4))
    assert len(paths) == 1
    assert server.requests["a/a-000000.tar"] == 1


def test_cache_keeps_below_its_size_and_fetches_again(server: Server, cache: RemoteShards, pictures: Pictures) -> None:
    pictures("a", 12)
    index = _load(f"{server.url}/a/a.index.json", cache)
    cache.max_bytes = int(1.5 * index.shards[0].bytes)
    for number in (0, 5, 10, 0, 5):
        index.read(number)
    kept = list(cache.folder.glob("*.tar"))
    assert sum(path.stat().st_size for path in kept) <= cache.max_bytes
    # an open file is read on although its name is gone
    assert server.requests["a/a-000000.tar"] == 1
    index.close()
    assert index.read(0).key == "000000"
    assert server.requests["a/a-000000.tar"] == 2


def test_missing_shard_is_not_tried_again(server: Server, cache: RemoteShards, pictures: Pictures) -> None:
    path = pictures("a", 2)
    (path.parent / "a-000000.tar").unlink()
    index = _load(f"{server.url}/a/a.index.json", cache)
    with pytest.raises(
        InputError, match=r"a-000000.tar' cannot be fetched \(the server answers 404 Not Found; 1 tries\)"
    ):
        index.read(0)


def test_server_that_never_recovers_ends_with_an_error(server: Server, cache: RemoteShards, pictures: Pictures) -> None:
    pictures("a", 2)
    server.plan = {"a/a-000000.tar": ["503"] * 99}
    index = _load(f"{server.url}/a/a.index.json", cache)
    with pytest.raises(InputError, match="503 Service Unavailable; 5 tries"):
        index.read(0)
    server.plan = {"a/a-000000.tar": ["wrong"] * 99}
    with pytest.raises(InputError, match="its checksum is not the index's"):
        index.read(0)


def test_silent_server_is_given_up_and_tried_again(
    server: Server, cache: RemoteShards, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_modules.remote._TIMEOUT_S", 0.3)
    pictures("a", 2)
    server.plan = {"a/a-000000.tar": ["silent"]}
    assert _load(f"{server.url}/a/a.index.json", cache).read(0).key == "000000"


def test_other_urls_go_through_webdataset(cache: RemoteShards, pictures: Pictures) -> None:
    path = pictures("a", 3)
    index = _load(f"pipe:cat {path}", cache)
    assert [sample.key for sample in index] == ["000000", "000001", "000002"]


def test_stream_and_benchmark_are_the_same_from_a_server(server: Server, pictures: Pictures, tmp_path: Path) -> None:
    path = pictures("a", 23)
    captions = [{"key": "000007", "instance": name, "text": "the caption"} for name in ("i0", "i1")]
    path.with_name("a.captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    found = []
    for shards in (str(path), f"{server.url}/a/a.index.json"):
        server.plan = {f"a/a-00000{number}.tar": ["503", "cut"] for number in range(5)}
        captioned = shards.replace(".index.json", ".captions.jsonl")
        module = InterleavedDataModule(
            {"a": ShardSource(shards, batch_size=5, mix_shards=2, captions=captioned, kind_weights={"caption": 1e9})},
            val={"v": BenchmarkSource(shards)},
            image_size=24,
            epoch_iterations=6,
            cache_dir=str(tmp_path / "cache"),
        )
        module.remote.first_wait_s = 0.01
        module.setup("fit")
        batches = list(module.train_dataloader()) + list(module.val_dataloader()[0])
        found.append([(hashlib.sha1(batch.image.numpy().tobytes()).hexdigest(), batch.prompts) for batch in batches])
    assert found[0] == found[1]
    assert "the caption" in str(found[0])
