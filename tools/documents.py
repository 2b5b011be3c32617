"""Tables that tools write into documents, between the lines ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lit_matting.checks import InputError
from lit_matting.files import write_whole


def around_markers(document: Path, name: str) -> tuple[str, str]:
    """Return what stands before and after the contents of a document's markers, the markers included.

    Raises:
        InputError: If the document does not have both markers once, in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = document.read_text(encoding="utf-8") if document.is_file() else ""
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(end) < whole.index(begin):
        raise InputError(f"'{document}' needs the lines {begin} and, below it, {end}, once each.")
    head, rest = whole.split(begin)
    return head + begin, end + rest.split(end)[1]


def document_with(name: str) -> Callable[[str], Path]:
    """Return a type for argparse: a document with these markers, so that a long run does not fail at its end."""

    def document(value: str) -> Path:
        try:
            around_markers(Path(value), name)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return Path(value)

    return document


def write_between_markers(text: str, name: str, document: Path) -> None:
    """Put text between a document's markers, in the place of what stood there; nothing else of it changes.

    Raises:
        InputError: If the document does not have the markers.
    """
    head, tail = around_markers(document, name)
    write_whole(f"{head}\n{text}\n{tail}".encode(), document)
