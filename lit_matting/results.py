"""What one phrase found in one photograph: the matte, the cut-out, and how sure the network is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_matting.files import write_whole
from lit_matting.networks.matting_network import enlarge
from lit_matting.picture_files import encode_picture
from lit_matting.pictures import Photo, as_float, as_integers, background_colours
from lit_matting.targets import OPAQUE

_MARGIN = 16
"""Pixels around the matte whose foreground colours are estimated too: what resizing a cut-out mixes in."""


@dataclass(frozen=True, eq=False)
class MattingResult:
    """One phrase's matte of one photograph. The costly fields are computed when first asked for."""

    alpha: np.ndarray = field(repr=False)
    """(H, W) float32 in [0, 1], at exactly the photograph's (upright) size."""
    phrase: str
    """The phrase, without surrounding blanks."""
    confidence: float
    """In [0, 1]: is the phrase's thing there at all? See :func:`lit_matting.confidence.confidence_of`."""
    threshold: float | None
    """The calibrated confidence below which the thing is not there; None: not calibrated."""
    photo: Photo = field(repr=False)
    """The photograph, as upright sRGB."""
    trimap_lr: np.ndarray = field(repr=False)
    """(h, w) float32 in [0, 1]: the semantic trimap on the network's grid."""
    grounding_lr: np.ndarray = field(repr=False)
    """(h, w) float32 in [0, 1]: the grounding map on the network's grid."""
    clean_colours: bool = True
    """Whether :attr:`foreground` is estimated; otherwise it is the photograph's own colours."""

    @property
    def found(self) -> bool | None:
        """Whether the phrase's thing is in the photograph; None: the model's confidence was not calibrated."""
        return None if self.threshold is None else self.confidence >= self.threshold

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return self.photo.size

    @property
    def trimap(self) -> np.ndarray:
        """(H, W) float32 in [0, 1]: the soft semantic trimap; 0 background, 0.5 transition, 1 foreground."""
        return _enlarged(self.trimap_lr, self.size)

    @property
    def grounding(self) -> np.ndarray:
        """(H, W) float32 in [0, 1]: where the phrase's thing is, as a heat map."""
        return _enlarged(self.grounding_lr, self.size)

    @cached_property
    def foreground(self) -> np.ndarray:
        """(H, W, 3) float32 sRGB in [0, 1]: the thing's own colours, without the background that shone through.

        Estimated by multilevel foreground estimation (Germer et al. 2020). Where the matte is opaque these are the
        photograph's own values; away from it, where nothing is to be seen, they are 0.
        """
        if not self.clean_colours:
            return self.photo.as_float()
        return estimate_foreground(self.photo.colour, self.alpha)

    @property
    def rgba(self) -> np.ndarray:
        """(H, W, 4) float32 in [0, 1]: :attr:`foreground` with straight :attr:`alpha`."""
        return np.concatenate([self.foreground, self.alpha[..., None]], -1)

    @property
    def cutout(self) -> Image.Image:
        """The cut-out as an RGBA image, 8 bits a channel, straight alpha."""
        return Image.fromarray(as_integers(self.rgba))

    def composite(self, background: Any) -> Image.Image:
        """Return the thing on another background, as an RGB image: ``alpha F + (1 - alpha) B``.

        Args:
            background: A colour (a name, `#rrggbb`, or three numbers from 0 to 255), or an image (path, PIL image,
                array or tensor), which is scaled to cover the photograph's size and cut at its centre.

        Raises:
            InputError: If it is neither.
        """
        return Image.fromarray(as_integers(self._over(background)))

    def _over(self, background: Any) -> np.ndarray:
        alpha = self.alpha[..., None]
        return alpha * self.foreground + (1 - alpha) * background_colours(background, self.size)

    def encode(self, suffix: str, background: Any = None, alpha_only: bool = False, bits: int = 8) -> bytes:
        """Return the bytes of a picture file; the arguments are those of :meth:`save`."""
        if alpha_only:
            values = self.alpha
        else:
            values = self.rgba if background is None else self._over(background)
        return encode_picture(values, suffix, bits)

    def save(
        self, path: str | os.PathLike[str], background: Any = None, alpha_only: bool = False, bits: int = 8
    ) -> None:
        """Write the cut-out; the file appears only when it is whole.

        Args:
            path: Ends in .png, .webp, .tif, or, with a background or ``alpha_only``, in .jpg.
            background: Put the thing on this (see :meth:`composite`); None: transparent.
            alpha_only: Write the matte as a grey picture instead.
            bits: A channel; 16 for PNG and TIFF.

        Raises:
            InputError: If the format cannot hold it, or the background is no background.
        """
        path = Path(path)
        write_whole(self.encode(path.suffix, background, alpha_only, bits), path)


def estimate_foreground(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return the foreground colours (H, W, 3), float32 in [0, 1], of an image (H, W, 3) and its matte (H, W).

    Only the matte's surroundings are worked on; beyond them the result is 0.
    """
    result = np.zeros((*alpha.shape, 3), np.float32)
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if not len(rows):
        return result
    box = (
        slice(max(0, rows[0] - _MARGIN), rows[-1] + 1 + _MARGIN),
        slice(max(0, columns[0] - _MARGIN), columns[-1] + 1 + _MARGIN),
    )
    image, matte = as_float(colour[box]), np.ascontiguousarray(alpha[box])
    if max(matte.shape) == 1:  # the estimator halves the sides down to 1 and needs a step to do so
        result[box] = image
        return result
    result[box] = np.where((matte >= OPAQUE)[..., None], image, _multilevel_estimate(image, matte))
    return result


def _multilevel_estimate(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    torch_threads = torch.get_num_threads()
    # compiled code that takes a second to load: only who cuts out waits for it
    import numba
    from pymatting.foreground.estimate_foreground_ml import estimate_foreground_ml

    numba_threads = numba.get_num_threads()
    # only its copying is parallel; on a busy machine waiting for the other threads took a thousand times the work
    numba.set_num_threads(1)
    try:
        return estimate_foreground_ml(image, alpha)
    finally:
        numba.set_num_threads(numba_threads)
        # starting its threads, numba sets their number in the OpenMP library, which PyTorch shares
        torch.set_num_threads(torch_threads)


def _enlarged(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return enlarge(torch.from_numpy(maps)[None, None], size)[0, 0].numpy()
