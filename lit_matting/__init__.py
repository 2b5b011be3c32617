"""Text-driven image matting: a photo and a phrase in, the alpha matte of exactly that thing out.

>>> from lit_matting import MattingPipeline
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_matting.version import VERSION as __version__

if TYPE_CHECKING:
    from lit_matting.pipeline import MattingPipeline, MattingResult

__all__ = ["MattingPipeline", "MattingResult", "__version__"]


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import: only who uses them waits for them
    if name in ("MattingPipeline", "MattingResult"):
        from lit_matting import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
