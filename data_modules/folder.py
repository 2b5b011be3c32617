"""Photographs and phrases to make mattes for: a folder, a glob, or a table."""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Dataset

from data_modules.stream import received, whole_batches
from lit_matting.checks import InputError, check_prompt
from lit_matting.pictures import PHOTO_SUFFIXES, not_made_here, photographs_in, read_photo
from lit_matting.records import MattingBatch


class FolderSource:
    """Photographs to make mattes for, each at its own size and read as :class:`lit_matting.MattingPipeline` reads it.

    Args:
        images: A folder (searched with its subfolders; not for what is hidden or was written here), a glob, one image,
            or a CSV table with a line `image,phrase` for every matte; relative paths in a table are relative to the
            table's folder.
        phrases: What to cut out of every image; several phrases give several mattes per image. Not with a table.
        name: What the batches call this data set.
    """

    def __init__(self, images: str, phrases: str | list[str] | None = None, name: str = "folder") -> None:
        self.images = images
        self.phrases = [phrases] if isinstance(phrases, str) else list(phrases or [])
        self.name = name

    def questions(self) -> list[tuple[str, str, str]]:
        """Return ``(path, name relative to the folder, phrase)`` of every matte to make; what is asked twice once.

        Raises:
            InputError: If there are no images, no phrases, a line of the table is not `image,phrase`, or two of its
                images would have one name.
        """
        if self.images.lower().endswith(".csv"):
            if self.phrases:
                raise InputError(
                    f"`predict.phrases` is set, but the table '{self.images}' has its own phrases; drop one."
                )
            return list(dict.fromkeys(_read_table(self.images)))
        phrases = list(dict.fromkeys(check_prompt(phrase, "predict.phrases") for phrase in self.phrases))
        if not phrases:
            raise InputError("`predict.phrases` is empty; say what to cut out, for example 'the red umbrella'.")
        if os.path.isdir(self.images):
            root = self.images
            found = photographs_in(Path(root))
        else:
            found = [Path(path) for path in sorted(glob.glob(self.images, recursive=True))]
            root = os.path.commonpath([path.parent for path in found]) if found else ""
            found = [path for path in found if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file()]
            if glob.has_magic(self.images):
                found = not_made_here(found, self.images)
        paths = [str(path) for path in found]
        if not paths:
            raise InputError(f"no images at '{self.images}'; give a folder, a glob or a CSV table.")
        return [
            (path, Path(os.path.relpath(path, root or ".")).as_posix(), phrase) for path in paths for phrase in phrases
        ]

    def loader(self, rank: int = 0, world_size: int = 1, workers: int = 0, prefetch: int = 2) -> FolderLoader:
        """Return the loader of one process's share; every matte is made once over all processes."""
        return FolderLoader(self.name, self.questions()[rank::world_size], workers, prefetch)


class FolderLoader:
    """Hands out one image and one phrase at a time; the key of a batch is the image's path inside the folder."""

    def __init__(self, name: str, questions: list[tuple[str, str, str]], workers: int = 0, prefetch: int = 2) -> None:
        self.questions = questions
        self.loader = whole_batches(_Photographs(name, questions), workers, prefetch)

    def __iter__(self) -> Iterator[MattingBatch]:
        yield from received(self.loader)

    def __len__(self) -> int:
        return len(self.questions)


class _Photographs(Dataset[MattingBatch]):
    def __init__(self, name: str, questions: list[tuple[str, str, str]]) -> None:
        self.name, self.questions = name, questions

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> MattingBatch:
        path, key, phrase = self.questions[number]
        photo = read_photo(path)
        height, width = photo.size
        return MattingBatch(
            image=torch.from_numpy(photo.as_float()).permute(2, 0, 1)[None].contiguous(),
            target=torch.zeros(1, 1, height, width),
            has_alpha=torch.tensor([False]),
            prompts=(phrase,),
            prompt_kinds=("",),
            keys=(key,),
            instance=torch.tensor([0]),
            categories=("",),
            dataset=self.name,
            opacity=None if photo.opacity is None else torch.from_numpy(photo.opacity)[None, None],
        )


def _read_table(path: str) -> list[tuple[str, str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"table '{path}' cannot be read: {error}.") from error
    if rows and [cell.strip().lower() for cell in rows[0]] == ["image", "phrase"]:
        rows = rows[1:]
    if not rows:
        raise InputError(f"table '{path}' has no lines; each must be: image,phrase.")
    questions = []
    places: dict[str, str] = {}
    for line, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise InputError(f"table '{path}', entry {line}: expected image,phrase, got {len(row)} fields: {row}.")
        image, phrase = row[0].strip(), check_prompt(row[1], f"phrase of entry {line} in '{path}'")
        full = os.path.join(os.path.dirname(path), image)
        if not os.path.isfile(full):
            raise InputError(f"table '{path}', entry {line}: image '{full}' does not exist.")
        # a name that stays inside any folder
        key = "/".join(part for part in Path(image).parts if part not in (Path(image).anchor, ".."))
        first = places.setdefault(key, full)
        if not os.path.samefile(first, full):
            raise InputError(
                f"table '{path}', entry {line}: '{full}' and '{first}' would both be called '{key}'; put them into two"
                " tables, or rename one."
            )
        questions.append((first, key, phrase))
    return questions
