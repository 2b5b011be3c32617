"""From a listing to shards: in parallel, atomic, restartable, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from data_modules.shards import InstanceEntry, ShardFile, ShardInfo, sample_members, write_index
from lit_matting.checks import InputError
from lit_matting.files import write_whole
from tools.releases.pixels import (
    BadFile,
    png_size,
    read_background,
    read_foreground,
    read_image,
    read_matte,
    read_shapes,
)
from tools.releases.source import Listing, Source
from tools.workers import end_with_parent

# so many problems beyond the allowed ones are shown before the run gives up
_SHOWN = 20


@dataclass(frozen=True)
class Packing:
    """How shards are built."""

    root: str
    output: str
    prefix: str
    tool: str
    max_samples: int
    max_bytes: int
    skip_bad: int
    mask_channel: str
    tolerance: int
    with_foreground: bool
    with_background: bool


@dataclass
class _Done:
    """What building one shard gave."""

    number: int
    shard: dict[str, Any] | None
    """Its index entry, or None if it was not written."""
    problems: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


@dataclass
class Packed:
    """What packing a listing gave."""

    index: Path
    samples: int
    instances: int
    shards: int
    reused: int
    problems: list[str]
    notes: dict[str, int]


class TooManyProblems(InputError):
    """More bad files than were allowed; ``problems`` has one line for each."""

    def __init__(self, problems: list[str], allowed: int) -> None:
        self.problems = problems
        more = f"; put them right, or allow them with --skip-bad {len(problems)}"
        super().__init__(f"{len(problems)} images cannot be used ({allowed} allowed){more}.")


def read_sample(
    source: Source, root: Path, how: Packing, dataset: str, split: str
) -> tuple[list[tuple[str, bytes]], list[str]]:
    """The members of one sample, and notes on what was put right.

    Raises:
        BadFile, InputError: If a file is missing, damaged, or does not fit; the message names it.
    """

    def matte_size(shown: tuple[int, int]) -> tuple[int, int] | None:
        files = [target.file for target in source.targets if target.file]
        if files:
            return png_size(root, files[0])
        stated = source.extra.get("annotated_size")
        return tuple(stated) if stated else None

    image = read_image(root, source.image, matte_size)
    size = (image.width, image.height)
    notes = list(image.notes)
    entries = []
    for target in source.targets:
        matte: bytes | np.ndarray
        if target.file is not None:
            matte, found = read_matte(root, target.file, target.kind, size, how.mask_channel, how.tolerance)
            notes += found
        else:
            matte = read_shapes(target.shapes, size, f"{source.image}, instance {target.id}")
        foreground: bytes | np.ndarray | None = None
        if target.foreground is not None and how.with_foreground:
            foreground, found = read_foreground(root, target.foreground, size)
            notes += found
        origin = {"file": target.file} if target.file is not None else {}
        entries.append(
            InstanceEntry(
                id=target.id,
                target=matte,
                kind=target.kind,  # type: ignore[arg-type]
                phrases=target.phrases,
                category=target.category,
                foreground=foreground,
                extra={**origin, **target.extra},
            )
        )
    extra: dict[str, Any] = {
        "source": {
            "dataset": dataset,
            "split": split,
            "file": source.image,
            "sha1": hashlib.sha1((root / source.image).read_bytes()).hexdigest(),
        },
        **source.extra,
    }
    if notes:
        extra["notes"] = sorted(set(notes))
    background = read_background(root, source.background) if source.background and how.with_background else None
    return sample_members(source.key, image.data, image.extension, entries, extra, background), sorted(set(notes))


_finished_images: Any = None


def _start_worker(counter: Any) -> None:
    global _finished_images
    _finished_images = counter
    end_with_parent()
    cv2.setNumThreads(1)


def _build(number: int, sources: list[Source], how: Packing, dataset: str, split: str) -> _Done:
    """Build one shard; it is kept only if every sample is good or bad ones may be skipped."""
    done = _Done(number, None)
    notes: Counter[str] = Counter()
    shard = ShardFile(Path(how.output) / f"{how.prefix}-{number:06d}.tar")
    try:
        for source in sources:
            try:
                members, found = read_sample(source, Path(how.root), how, dataset, split)
                shard.write(members, len(source.targets))
                notes.update(found)
            except (BadFile, InputError) as error:
                done.problems.append(f"{source.key}: {error}")
            if _finished_images is not None:
                with _finished_images.get_lock():
                    _finished_images.value += 1
        if shard.samples and (not done.problems or how.skip_bad):
            done.shard = shard.close().to_json()
        done.notes = dict(notes)
        return done
    finally:
        if done.shard is None:
            shard.discard()


def _estimated_bytes(source: Source, root: Path, how: Packing) -> int:
    """About how many bytes a sample takes, by file sizes alone: shards are planned before pixels are read."""
    names = [source.image]
    for target in source.targets:
        names += [target.file or "", (target.foreground or "") if how.with_foreground else ""]
    names.append((source.background or "") if how.with_background else "")
    total = 0
    for name in filter(None, names):
        try:
            total += os.stat(root / name).st_size
        except OSError:
            continue
    # a tar member is padded to 512 and has a header of 512; a polygon's PNG is a few KB
    return total + 1024 * (2 + len(source.targets)) + sum(6000 for target in source.targets if target.file is None)


def plan_shards(sources: list[Source], root: Path, how: Packing) -> tuple[list[list[Source]], str]:
    """The sources of every shard, and a fingerprint of all that decides their bytes."""
    keys = Counter(source.key for source in sources)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise InputError(
            f"{len(twice)} images would share a sample key, the first is {twice[0]!r}; rename one of its files."
        )
    groups: list[list[Source]] = []
    total = 0
    digest = hashlib.sha256(json.dumps([how.tool, asdict(how) | {"root": "", "output": "", "skip_bad": 0}]).encode())
    for source in sorted(sources, key=lambda item: item.key):
        size = _estimated_bytes(source, root, how)
        if not groups or len(groups[-1]) >= how.max_samples or total + size > how.max_bytes:
            groups.append([])
            total = 0
        groups[-1].append(source)
        total += size
        digest.update(json.dumps([asdict(source), size], sort_keys=True, default=str).encode())
    return groups, digest.hexdigest()


def pack(listing: Listing, how: Packing, workers: int, overwrite: bool = False) -> Packed:
    """Write the shards and index of a listing, taking up an earlier run where it stopped.

    Raises:
        InputError: If there is nothing to pack or the output holds something else.
        TooManyProblems: If more images than ``how.skip_bad`` cannot be used; good shards stay for the next run.
    """
    root, output = Path(how.root), Path(how.output)
    if not listing.sources:
        raise InputError(f"{listing.dataset}/{listing.split}: no images were found in {how.root!r}.")
    groups, plan = plan_shards(listing.sources, root, how)
    index, progress = output / f"{how.prefix}.index.json", output / f".{how.prefix}.progress"
    done = _taken_up(index, progress, output, how.prefix, plan, overwrite)
    if done is None:  # finished before
        stated = json.loads(index.read_text(encoding="utf-8"))
        count = len(stated["shards"])
        return Packed(index, stated["samples"], stated["instances"], count, count, stated["skipped"], stated["notes"])
    reused = len(done)
    progress.mkdir(parents=True, exist_ok=True)
    _write_json(progress / "plan.json", {"plan": plan})
    waiting = [number for number in range(len(groups)) if number not in done]
    finished = sum(len(groups[number]) for number in done)
    what = f"{listing.dataset} {listing.split}"
    bar = tqdm(total=len(listing.sources), initial=finished, desc=what, unit="image", disable=None)
    problems: list[str] = []
    with bar:
        for item in _run(groups, waiting, how, listing, workers, bar, finished):
            problems += item.problems
            if item.shard is not None:
                done[item.number] = item
                _write_json(progress / f"{item.number:06d}.json", asdict(item))
            if len(problems) > how.skip_bad + _SHOWN:
                break
    if len(problems) > how.skip_bad:
        raise TooManyProblems(sorted(problems), how.skip_bad)
    notes: Counter[str] = Counter()
    for item in done.values():
        notes.update(item.notes)
    shards = [_info(done[number].shard) for number in sorted(done)]
    extra = {**listing.index_extra, "notes": dict(sorted(notes.items())), "skipped": sorted(problems), "plan": plan}
    write_index(output, how.prefix, listing.dataset, listing.split, how.tool, shards, extra)
    shutil.rmtree(progress)
    samples, instances = sum(shard.samples for shard in shards), sum(shard.instances for shard in shards)
    return Packed(index, samples, instances, len(shards), reused, sorted(problems), dict(sorted(notes.items())))


def _run(
    groups: list[list[Source]],
    waiting: list[int],
    how: Packing,
    listing: Listing,
    workers: int,
    bar: tqdm,
    finished: int,
) -> Iterator[_Done]:
    """Yield shards as they get ready; closing the generator leaves no process behind."""
    jobs = [(number, groups[number], how, listing.dataset, listing.split) for number in waiting]
    if workers <= 1 or len(jobs) <= 1:
        cv2.setNumThreads(1)
        for job in jobs:
            yield _build(*job)
            bar.update(len(job[1]))
        return
    # spawned: OpenCV and OpenMP code may have run in this process, and their threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(counter,)) as pool:
        pending: set[Future[_Done]] = {pool.submit(_build, *job) for job in jobs}
        try:
            while pending:
                ready, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(finished + counter.value - bar.n)
                for future in ready:
                    yield future.result()
        except BrokenExecutor:
            raise InputError(
                "a worker process was killed, by the system where memory ran out; run it again, with fewer --workers."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _taken_up(
    index: Path, progress: Path, output: Path, prefix: str, plan: str, overwrite: bool
) -> dict[int, _Done] | None:
    """The good shards of an earlier, unfinished run of the same plan; None if that run was finished."""
    old = sorted(output.glob(f"{prefix}-[0-9]*.tar"))
    if overwrite:
        index.unlink(missing_ok=True)
        shutil.rmtree(progress, ignore_errors=True)
    elif index.is_file():
        if json.loads(index.read_text(encoding="utf-8")).get("plan") == plan:
            return None
        raise InputError(f"{str(index)!r} was made from other files or options; pass --overwrite or another output.")
    stated = progress / "plan.json"
    done: dict[int, _Done] = {}
    if stated.is_file():
        if json.loads(stated.read_text(encoding="utf-8")).get("plan") != plan:
            raise InputError(
                f"{str(output)!r} holds an unfinished run over other files or options; pass --overwrite or another"
                " output."
            )
        for path in sorted(progress.glob("[0-9]*.json")):
            item = _Done(**json.loads(path.read_text(encoding="utf-8")))
            shard = output / (item.shard or {"file": "none"})["file"]
            # a shard with skipped samples is built again: its files may have been put right since
            if shard.is_file() and item.shard and shard.stat().st_size == item.shard["bytes"] and not item.problems:
                done[item.number] = item
    elif old and not overwrite:
        raise InputError(f"{str(output)!r} already holds {old[0].name}; pass --overwrite or another output.")
    kept = {(item.shard or {})["file"] for item in done.values()}
    for path in [*old, *output.glob(f".{prefix}-[0-9]*.partial")]:
        if path.name not in kept:
            path.unlink()
    return done


def _info(entry: dict[str, Any] | None) -> ShardInfo:
    assert entry is not None
    return ShardInfo(**{**entry, "offsets": np.asarray(entry["offsets"], dtype=np.int64)})


def _write_json(path: Path, value: Any) -> None:
    write_whole(json.dumps(value).encode(), path)
