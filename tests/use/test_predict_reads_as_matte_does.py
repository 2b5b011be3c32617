"""`predict` and `matte` make the same matte of the same file, whatever kind of picture it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from data_modules import FolderSource
from lit_matting.cli import main
from lit_matting.module import LitMatting
from lit_matting.pipeline import MattingPipeline


def write_every_kind(folder: Path, colour: np.ndarray) -> None:
    """Write a photograph as the kinds of files that a plain decoder reads otherwise."""
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.fromarray(colour)
    opacity = np.full(colour.shape[:2], 255, np.uint8)
    opacity[:, :20], opacity[:, 20:30] = 0, 77
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    image.save(folder / "plain.png")
    image.save(folder / "turned.jpg", exif=turned)
    image.convert("CMYK").save(folder / "print.jpg")
    image.convert("L").save(folder / "grey.jpg", icc_profile=profile.tobytes())
    image.convert("LAB").save(folder / "lab.tif")
    image.quantize(32).save(folder / "palette.png", transparency=3)
    Image.fromarray(np.dstack([colour, opacity])).save(folder / "transparent.png")
    deep = colour[..., ::-1].astype(np.uint16) * 257 - (colour[..., ::-1] > 0)
    (folder / "deep.png").write_bytes(cv2.imencode(".png", deep)[1].tobytes())
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.from_pillow(image).save(folder / "phone.heic")


def test_every_kind_of_file_has_the_same_matte(
    checkpoint: Path, matting: MattingPipeline, picture: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    write_every_kind(tmp_path, picture(40, 60))
    module = LitMatting.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    seen = {}
    for batch in FolderSource(str(tmp_path), "glass").loader():
        expected = matting(tmp_path / batch.keys[0], "glass").alpha
        found = module.predict_step(batch, 0).alpha[0, 0].detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=batch.keys[0])
        seen[batch.keys[0]] = found
    assert seen.keys() == {item.name for item in tmp_path.iterdir()}
    assert seen["turned.jpg"].shape == (60, 40)
    assert not seen["transparent.png"][:, :20].any()
    assert 0 < seen["transparent.png"][:, 20:30].max() <= 77 / 255


@pytest.mark.slow
def test_mattes_of_real_photographs_have_exactly_their_size(
    checkpoint: Path, matting: MattingPipeline, shared_data: Path, tmp_path: Path
) -> None:
    photographs = sorted((shared_data / "real_alpha").glob("*.jpg"))[::12]
    table = tmp_path / "photographs.csv"
    table.write_text("image,phrase\n" + "".join(f"{path},the foreground\n" for path in photographs))
    words = ["--alpha-only", "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main(["matte", *map(str, photographs), "the foreground", *words]) == 0
    sizes = {path.stem: Image.open(path).size for path in photographs}
    written = {path.name.partition(".")[0]: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert written == sizes
    assert len(set(sizes.values())) > 1

    module = LitMatting.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    for path, batch in zip(photographs, FolderSource(str(table)).loader()):
        found = module.predict_step(batch, 0).alpha[0, 0].detach().numpy()
        assert found.shape[::-1] == sizes[path.stem]
        np.testing.assert_allclose(found, matting(path, "the foreground").alpha, atol=1e-6)
