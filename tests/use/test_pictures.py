"""Every kind of picture file becomes the same upright sRGB, and what is written reads back."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lit_matting.checks import InputError
from lit_matting.files import write_whole
from lit_matting.picture_files import encode_picture
from lit_matting.pictures import background_colours, colour_values, read_photo

RAMP = np.stack(
    [np.tile(np.arange(0, 240, 12, dtype=np.uint8), (12, 1)), np.full((12, 20), 40, np.uint8), np.full((12, 20), 200)],
    -1,
).astype(np.uint8)
RAMP[:4, :5] = 255  # a corner that shows how the picture is turned


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


# what EXIF says: where row 0 and column 0 of the stored picture lie in the scene
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_a_turned_photograph_is_read_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](RAMP)))
    options = {"lossless": True} if suffix == ".webp" else {}
    path = saved(tmp_path / f"a{suffix}", stored, exif=exif, **options)
    assert np.array_equal(read_photo(path).colour, RAMP)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_16_bit_photograph_is_read_upright_with_all_its_bits(tmp_path: Path, orientation: int) -> None:
    deep = RAMP.astype(np.uint16) * 257 - (RAMP > 0)
    stored = np.ascontiguousarray(STORED[orientation](deep))
    data = cv2.imencode(".png", stored[..., ::-1])[1].tobytes()
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HH", orientation, 0) + b"\0\0\0\0"
    # a chunk of its own, before the first data chunk
    import zlib

    chunk = struct.pack(">I", len(tiff)) + b"eXIf" + tiff + struct.pack(">I", zlib.crc32(b"eXIf" + tiff))
    place = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
    colour = read_photo(tmp_path / "a.png").colour
    assert colour.dtype == np.uint16
    assert np.array_equal(colour, deep)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_16_bit_tiff_is_read_upright(tmp_path: Path, orientation: int) -> None:
    deep = np.ascontiguousarray(STORED[orientation](RAMP)).astype(np.uint16) * 257
    height, width = deep.shape[:2]
    # the smallest TIFF there is: one strip, uncompressed, 16 bits for each of three channels
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 158), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 164), (274, 3, 1, orientation), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, deep.nbytes)]
    tags += [(284, 3, 1, 1), (339, 3, 1, 1)]
    body = b"".join(
        struct.pack("<HHIHxx" if kind == 3 and count == 1 else "<HHII", *tag)
        for tag in tags
        for kind, count in [tag[1:3]]
    )
    header = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + body + b"\0\0\0\0"
    assert len(header) == 158
    (tmp_path / "a.tif").write_bytes(header + struct.pack("<3H", 16, 16, 16) + deep.astype("<u2").tobytes())
    colour = read_photo(tmp_path / "a.tif").colour
    assert colour.dtype == np.uint16
    assert np.array_equal(colour, RAMP.astype(np.uint16) * 257)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = RAMP[..., 0]
    colour = read_photo(saved(tmp_path / "a.png", Image.fromarray(grey))).colour
    assert colour.dtype == np.uint8
    assert all(np.array_equal(colour[..., channel], grey) for channel in range(3))


def test_16_bit_grey_keeps_its_bits(tmp_path: Path) -> None:
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16) + 3
    colour = read_photo(saved(tmp_path / "a.png", Image.fromarray(grey))).colour
    assert colour.dtype == np.uint16
    assert np.array_equal(colour[..., 1], grey)


def test_one_bit_and_bilevel_pictures_are_black_and_white(tmp_path: Path) -> None:
    bits = RAMP[..., 0] > 100
    colour = read_photo(saved(tmp_path / "a.png", Image.fromarray(bits))).colour
    assert np.array_equal(colour[..., 2], bits * np.uint8(255))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 4), (0, 255, 255, 0))  # magenta and yellow ink: red
    for name, options in {"a.tif": {}, "a.jpg": {"quality": 100}}.items():
        colour = read_photo(saved(tmp_path / name, image, **options)).colour
        assert np.abs(colour.astype(int) - [255, 0, 0]).max() <= 3, name


def test_palette_with_transparency_gives_colours_and_opacity(tmp_path: Path) -> None:
    image = Image.new("P", (6, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (3, 0, 6, 4))
    photo = read_photo(saved(tmp_path / "a.png", image, transparency=0))
    assert photo.opacity is not None
    assert np.array_equal(photo.opacity, np.tile(np.float32([0, 0, 0, 1, 1, 1]), (4, 1)))
    assert (photo.colour[:, :3] == 255).all(), "what is invisible lies on white"
    assert (photo.colour[:, 3:] == [0, 0, 255]).all()


def test_an_alpha_channel_is_laid_on_white_and_kept(tmp_path: Path) -> None:
    rgba = np.dstack([RAMP, np.full((12, 20), 51, np.uint8)])
    photo = read_photo(saved(tmp_path / "a.png", Image.fromarray(rgba)))
    assert np.allclose(photo.opacity, 0.2)
    assert np.abs(photo.colour - (0.2 * RAMP + 0.8 * 255)).max() <= 0.5


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path) -> None:
    rgba = np.dstack([RAMP, np.full((12, 20), 255, np.uint8)])
    photo = read_photo(saved(tmp_path / "a.webp", Image.fromarray(rgba), lossless=True))
    assert photo.opacity is None
    assert np.array_equal(photo.colour, RAMP)


def icc_profile(space: bytes, name: str, colours: dict[bytes, bytes]) -> bytes:
    """An ICC profile for a screen, with these tags beside those that every one has."""
    text = name.encode()
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        **colours,
    }
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data
    header = bytearray(128)
    header[8:12], header[12:16], header[16:20], header[20:24] = b"\2\x10\0\0", b"mntr", space, b"XYZ "
    header[36:40], header[68:80] = b"acsp", xyz(0.9642, 1.0, 0.8249)[8:]
    header[0:4] = struct.pack(">I", start + len(body))
    return bytes(header) + struct.pack(">I", len(tags)) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


LINEAR = b"curv" + bytes(4) + struct.pack(">I", 0)  # no entries: the identity


def rgb_profile(curve: bytes, name: str) -> bytes:
    """A profile with sRGB's primaries (adapted to D50, as profiles are) and one curve for all three."""
    primaries = {
        b"rXYZ": xyz(0.43607, 0.22249, 0.01392),
        b"gXYZ": xyz(0.38515, 0.71687, 0.09708),
        b"bXYZ": xyz(0.14307, 0.06061, 0.71410),
    }
    return icc_profile(b"RGB ", name, {**primaries, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)})


def linear_light_profile(name: str = "linear light") -> bytes:
    return rgb_profile(LINEAR, name)


def srgb_of_linear(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("called", ["linear light", "GIMP built-in Linear sRGB", "Not sRGB IEC61966-2.1"])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_a_colour_profile_is_obeyed_whatever_it_is_called(tmp_path: Path, name: str, called: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path / name, Image.fromarray(RAMP), icc_profile=linear_light_profile(called), **options)
    expected = 255 * srgb_of_linear(RAMP / 255)
    assert np.abs(read_photo(path).colour - expected).max() <= 1.5


def test_a_profile_of_srgb_changes_nothing_whatever_it_is_called(tmp_path: Path) -> None:
    light = np.linspace(0, 1, 1024)
    light = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    curve = b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *np.rint(light * 65535).astype(int))
    for profile in (rgb_profile(curve, "camera"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        for number, picture in enumerate([RAMP, RAMP[..., 0]]):
            path = saved(tmp_path / f"{number}.png", Image.fromarray(picture), icc_profile=profile)
            expected = np.broadcast_to(picture.reshape(12, 20, -1), RAMP.shape)
            assert np.array_equal(read_photo(path).colour, expected)


def test_a_grey_profile_is_obeyed_by_grey_pictures_and_ignored_by_others(tmp_path: Path) -> None:
    profile = icc_profile(b"GRAY", "grey linear light", {b"kTRC": LINEAR})
    grey = RAMP[..., 0]
    expected = np.repeat(255 * srgb_of_linear(grey / 255)[..., None], 3, -1)
    with_alpha = Image.fromarray(np.dstack([grey, np.full_like(grey, 255)]), "LA")
    for picture in (Image.fromarray(grey), with_alpha):
        path = saved(tmp_path / "grey.tif", picture, icc_profile=profile)
        assert np.abs(read_photo(path).colour - expected).max() <= 1.5
    path = saved(tmp_path / "colours.tif", Image.fromarray(RAMP), icc_profile=profile)
    assert np.array_equal(read_photo(path).colour, RAMP)


def test_a_colour_profile_is_obeyed_beside_an_alpha_channel_and_in_16_bits(tmp_path: Path) -> None:
    expected = 255 * srgb_of_linear(RAMP / 255)
    rgba = Image.fromarray(np.dstack([RAMP, np.full((12, 20), 102, np.uint8)]))
    photo = read_photo(saved(tmp_path / "a.png", rgba, icc_profile=linear_light_profile()))
    assert np.abs(photo.colour - (0.4 * expected + 0.6 * 255)).max() <= 1.5
    deep = cv2.imencode(".png", RAMP[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    import zlib

    packed = b"p\0\0" + zlib.compress(linear_light_profile())
    chunk = struct.pack(">I", len(packed)) + b"iCCP" + packed + struct.pack(">I", zlib.crc32(b"iCCP" + packed))
    place = deep.index(b"IDAT") - 4
    (tmp_path / "deep.png").write_bytes(deep[:place] + chunk + deep[place:])
    assert np.abs(255 * read_photo(tmp_path / "deep.png").as_float() - expected).max() <= 1.5


def test_a_damaged_profile_is_ignored(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(RAMP), icc_profile=linear_light_profile()[:200])
    assert np.array_equal(read_photo(path).colour, RAMP)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp", "a.bmp"])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / name, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"{name}'"):
        read_photo(path)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(InputError, match=r"empty.jpg' is empty\.$"):
        read_photo(tmp_path / "empty.jpg")
    with pytest.raises(InputError, match=r"text.jpg' is not an image of a known format\.$"):
        read_photo(tmp_path / "text.jpg")
    with pytest.raises(InputError, match="there is no image"):
        read_photo(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="is a folder"):
        read_photo(tmp_path)


def test_heic_without_its_plug_in_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"....ftypheic")
    with pytest.raises(InputError, match="pip install pillow-heif"):
        read_photo(tmp_path / "a.heic")


def test_heic_is_read_where_the_plug_in_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs the extra `heic`")
    heif.register_heif_opener()
    halves = np.zeros((48, 64, 3), np.uint8)
    halves[:24], halves[24:] = [200, 30, 40], [20, 60, 220]
    path = saved(tmp_path / "a.HEIC", Image.fromarray(halves), format="HEIF", quality=95)
    colour = read_photo(path).colour.astype(int)
    assert colour.shape == (48, 64, 3)
    assert np.abs(colour[4:20] - [200, 30, 40]).max() <= 6
    assert np.abs(colour[28:44] - [20, 60, 220]).max() <= 6


def test_arrays_and_tensors_of_every_kind_mean_the_same() -> None:
    floats = (RAMP / 255).astype(np.float32)
    for source in (
        floats,
        floats.astype(np.float64),
        torch.from_numpy(floats).permute(2, 0, 1),
        torch.from_numpy(floats).permute(2, 0, 1)[None],
        torch.from_numpy(RAMP).permute(2, 0, 1),
        RAMP.astype(np.uint16) * 257,
        Image.fromarray(RAMP),
    ):
        assert np.abs(read_photo(source).as_float() - floats).max() < 1e-6
    assert np.array_equal(read_photo(RAMP[..., 0]).colour, np.repeat(RAMP[..., :1], 3, -1))


def test_a_photo_does_not_change_with_the_array_it_came_from() -> None:
    array = RAMP.copy()
    photo = read_photo(array)
    array[:] = 0
    assert np.array_equal(photo.colour, RAMP)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((3, 8, 9), np.uint8), "move the channels last"),
        (np.zeros((8, 9, 5), np.uint8), r"must be \(H, W, 3\)"),
        (np.zeros((0, 9, 3), np.uint8), "no pixels"),
        (np.full((8, 9, 3), 200.0), r"got values from 200 to 200 \(8-bit values need a division by 255\)"),
        (np.full((8, 9, 3), np.nan), r"must lie in \[0, 1\]"),
        (np.zeros((8, 9, 3), np.int64), "must be uint8, uint16 or floating point, got int64"),
        (torch.zeros(2, 3, 8, 9), "for several images give a list"),
        (17, "got int"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_the_reason(source: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_photo(source)


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("suffix", "bits"), [(".png", 8), (".png", 16), (".tif", 8), (".tiff", 16), (".webp", 8)])
def test_what_is_written_reads_back_to_the_last_bit(channels: int, suffix: str, bits: int) -> None:
    level = 2**bits - 1
    values = np.random.default_rng(0).integers(0, level + 1, (9, 7, channels)) / level
    data = encode_picture(values[..., 0] if channels == 1 else values, suffix, bits)
    if bits == 16:  # which PIL reads with 8
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        array = array[..., [2, 1, 0, 3][:channels]] if channels > 1 else array
        assert array.dtype == np.uint16
    else:
        array = np.asarray(Image.open(io.BytesIO(data)))
    if channels == 1 and array.ndim == 3:  # WebP knows no grey
        array = array[..., 0]
    assert np.array_equal(array.reshape(values.shape), np.rint(values * level))


def test_the_fourth_channel_of_a_tiff_is_marked_as_straight_alpha() -> None:
    for bits in (8, 16):
        image = Image.open(io.BytesIO(encode_picture(np.full((5, 3, 4), 0.25), ".tif", bits)))
        assert image.tag_v2[338] == (2,)
        assert image.mode == "RGBA"
        assert np.asarray(image)[2, 1].tolist() == [64] * 4


def test_formats_that_cannot_hold_it_say_so() -> None:
    rgba = np.ones((4, 4, 4), np.float32)
    with pytest.raises(InputError, match=r"\.jpg has no transparency"):
        encode_picture(rgba, ".jpg")
    with pytest.raises(InputError, match=r"16 bits need \.png"):
        encode_picture(rgba, ".webp", 16)
    with pytest.raises(InputError, match=r"not as '\.gif'"):
        encode_picture(rgba, ".gif")
    with pytest.raises(InputError, match=r"17000 x 4 cannot be written as \.webp"):
        encode_picture(np.ones((4, 17000, 4), np.float32), ".webp")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    def full(self: Path, data: bytes) -> None:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(b"new content", target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_backgrounds_cover_and_are_cut_at_their_centre(tmp_path: Path) -> None:
    assert colour_values("white") == (1, 1, 1)
    assert np.allclose(background_colours("#336699", (3, 4)), [0.2, 0.4, 0.6])
    stripes = np.zeros((10, 40, 3), np.uint8)
    stripes[:, 15:25] = 255
    image = saved(tmp_path / "b.png", Image.fromarray(stripes))
    result = background_colours(str(image), (20, 20))
    assert result.shape == (20, 20, 3)
    assert result[:, 3:17].min() > 0.9, "the middle of the image, twice as large"
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "PNG")
    assert np.array_equal(result, background_colours(Image.open(buffer), (20, 20)))
    with pytest.raises(InputError, match="'chartroose' is no colour"):
        background_colours("chartroose", (1, 1))
    with pytest.raises(InputError, match=r"there is no background image 'none\.png'"):
        background_colours("none.png", (1, 1))
