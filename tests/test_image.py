"""Pictures in, tensors out, and the way back from a map to the picture."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from onnxcam.card import Preprocess
from onnxcam.errors import OnnxcamError
from onnxcam.image import Viewport, open_image, prepare, to_rgb

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def scene(width, height, seed=0):
    """A picture with edges, ramps and noise."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    ramps = np.stack([x * 255 / width, y * 255 / height, 128 + 127 * np.sin(x * y / 700)], axis=-1)
    blocks = np.kron(rng.integers(0, 80, (-(-height // 9), -(-width // 9), 3)), np.ones((9, 9, 1)))
    return Image.fromarray(np.clip(ramps + blocks[:height, :width] - 40, 0, 255).astype(np.uint8))


def write(path, image, form, **options):
    image.save(path, form, **options)
    return path


def pixels(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# What a file holds, and the RGB that must come of it.

GREY16 = np.array([[0, 128, 257, 25700], [32768, 40000, 65406, 65535]], np.uint16)
GREY16_AS_8 = np.array([[0, 0, 1, 100], [128, 156, 254, 255]])  # round(v / 257)


def is_grey(values, expected):
    np.testing.assert_array_equal(values, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, form):
    is_grey(pixels(write(tmp_path / "x", Image.fromarray(GREY16), form)), GREY16_AS_8)


def test_big_endian_16_bit_grey_is_scaled(tmp_path):
    image = Image.frombytes("I;16B", (4, 2), GREY16.astype(">u2").tobytes())
    is_grey(pixels(write(tmp_path / "x", image, "TIFF")), GREY16_AS_8)


def test_mode_i_is_read_as_16_bit(tmp_path):
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 4 2 65535\n" + GREY16.astype(">u2").tobytes())
    assert (
        Image.open(io.BytesIO(path.read_bytes())).mode == "I"
    )  # the mode of all 16-bit PNG before Pillow 11
    is_grey(pixels(path), GREY16_AS_8)


def png(path, width, height, color_type, raw, **chunks):
    """Write a 16-bit PNG, which no Pillow writes in all the kinds that it reads."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.frombuffer(np.asarray(raw, ">u2").tobytes(), np.uint8).reshape(height, -1)
    filtered = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # each row starts with its filter, 0
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    body += b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    body += chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_transparent_value_of_16_bit_grey_png_is_white(tmp_path):
    expected = GREY16_AS_8.copy()
    expected[0, 3] = 255
    is_grey(pixels(png(tmp_path / "x", 4, 2, 0, GREY16, tRNS=struct.pack(">H", 25700))), expected)


def test_16_bit_rgb_png_keeps_its_high_bytes(tmp_path):
    raw = [[0, 0x1234, 0xFFFF, 0x8000, 0x00FF, 0x7F80]]
    assert pixels(png(tmp_path / "x", 2, 1, 2, raw)).tolist() == [[[0, 0x12, 0xFF], [0x80, 0, 0x7F]]]


def test_16_bit_grey_png_with_alpha_is_laid_over_white(tmp_path):
    values = pixels(png(tmp_path / "x", 2, 1, 4, [[0x6400, 0xFFFF, 0x6400, 0x3333]]))
    is_grey(values, np.array([[100, 224]]))


@pytest.mark.parametrize("full", [1, 255, 65535])
def test_float_tiff_is_read_by_its_range(tmp_path, full):
    values = np.array([[0, 0.1, 0.5, 1]], np.float32) * np.float32(full)
    is_grey(pixels(write(tmp_path / "x", Image.fromarray(values), "TIFF")), np.array([[0, 26, 128, 255]]))


@pytest.mark.parametrize(
    ("values", "run"),
    [
        (np.array([[-1, 0.5]], np.float32), "from -1 to 0.5"),
        (np.array([[0, 1e6]], np.float32), r"from 0 to 1e\+06"),
        (np.array([[0, np.nan]], np.float32), "from nan to nan"),
        (np.array([[-5, 70000]], np.int32), "from -5 to 70000"),
    ],
)
def test_grey_values_outside_every_range_are_refused(tmp_path, values, run):
    path = write(tmp_path / "x.tif", Image.fromarray(values), "TIFF")
    with pytest.raises(OnnxcamError, match=rf"x\.tif: its grey values run {run}; values of 0 to 65535"):
        open_image(path)


def test_one_bit(tmp_path):
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    is_grey(pixels(write(tmp_path / "x", bits, "PNG")), np.array([[0, 255], [255, 0]]))


def test_8_bit_grey(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    is_grey(pixels(write(tmp_path / "x", Image.fromarray(grey), "PNG")), grey)


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(write(tmp_path / "x", image, "PNG")).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_cmyk_jpeg_and_tiff(tmp_path):
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for form in "JPEG", "TIFF":
        values = pixels(write(tmp_path / form, image, form))
        np.testing.assert_allclose(values, np.broadcast_to([0, 255, 255], values.shape), atol=3)


def test_lab_tiff(tmp_path):
    image = Image.new("LAB", (2, 2), (255, 128, 128))
    assert pixels(write(tmp_path / "x", image, "TIFF")).min() >= 250


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (2, 2), (100, 0, 200, 51)),
        Image.new("LA", (2, 2), (100, 51)),
        Image.merge("LA", Image.new("LA", (2, 2), (100, 51)).split()).convert("La"),
        Image.new("RGBA", (2, 2), (100, 0, 200, 51)).convert("RGBa"),
    ],
    ids=lambda image: image.mode,
)
def test_alpha_is_laid_over_white(image):
    # 51 / 255 = 0.2 of the colour and 0.8 of white: 0.2 * 100 + 204 = 224
    values = np.asarray(to_rgb(image)).astype(int)
    expected = [224, 224, 224] if image.mode.lower() == "la" else [224, 204, 244]
    np.testing.assert_allclose(values, np.broadcast_to(expected, (2, 2, 3)), atol=1)


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    path = write(tmp_path / "x", image, "PNG", transparency=0)
    assert pixels(path).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_transparent_rgb_colour_is_white(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    path = write(tmp_path / "x", image, "PNG", transparency=(1, 2, 3))
    assert pixels(path).tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(tmp_path, form):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    path = write(tmp_path / "x", frames[0], form, save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(path), np.broadcast_to([255, 0, 0], (4, 4, 3)))


# EXIF: what each orientation means, in numpy, of the stored rows and columns.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    image = scene(31, 17)
    stored = np.asarray(Image.open(write(tmp_path / "plain", image, form, **options)).convert("RGB"))
    turned = pixels(write(tmp_path / "turned", image, form, exif=exif, **options))
    np.testing.assert_array_equal(turned, UPRIGHT[orientation](stored))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_exif_orientation_of_16_bit_grey(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / "x", Image.fromarray(GREY16), form, exif=exif)
    is_grey(pixels(path), UPRIGHT[orientation](GREY16_AS_8))


def test_exif_that_pillow_cannot_write_again_is_no_obstacle(tmp_path):
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0")  # text, where a fraction belongs
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + b"\0\0\0\0"
    path = write(tmp_path / "x", scene(31, 17), "JPEG", exif=exif)
    with pytest.raises(TypeError), Image.open(path) as image:
        ImageOps.exif_transpose(image)
    assert open_image(path).size == (17, 31)


# What cannot be opened.


def refusal(path):
    with pytest.raises(OnnxcamError) as caught:
        open_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message.replace(str(path), "PATH")


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "cat.jpg") == "cannot read PATH: No such file or directory"


def test_directory(tmp_path):
    assert refusal(tmp_path).startswith("cannot read PATH: ")


def test_nul_in_path():
    assert refusal("a\0b") == "cannot read PATH: embedded null byte"


def test_permission_denied(tmp_path, monkeypatch):
    def read_bytes(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert refusal(tmp_path / "cat.jpg") == "cannot read PATH: Permission denied"


def test_empty_file(tmp_path):
    path = tmp_path / "cat.jpg"
    path.touch()
    assert refusal(path) == "PATH is empty: it has 0 bytes"


def test_not_a_picture(tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_text("Dear cat,\n")
    assert refusal(path) == "PATH is not a picture that Pillow can read, or its start is damaged"


def test_decompression_bomb_is_refused_and_a_large_picture_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_image(write(tmp_path / "large", Image.new("RGB", (10, 20)), "PNG")).size == (10, 20)
    assert not caught
    message = refusal(write(tmp_path / "bomb", Image.new("RGB", (11, 20)), "PNG"))
    assert message.startswith("PATH is too large to open: Image size (220 pixels) exceeds limit of 200")


def test_decoding_errors_of_any_kind_become_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "x", Image.new("RGB", (2, 2)), "PNG")
    for error in (SyntaxError("a\nb"), MemoryError()):

        def load(self, error=error):
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        reason = " ".join(str(error).split()) or type(error).__name__
        assert refusal(path) == f"PATH is damaged, cut short or not supported by Pillow: {reason}"


FORMS = {
    "JPEG": {},
    "progressive": {"form": "JPEG", "progressive": True},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "deflate": {"form": "TIFF", "compression": "tiff_adobe_deflate"},
}


def encoded(name):
    options = {"form": name, **FORMS[name]}
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    scene(48, 40).save(buffer, options.pop("form"), exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", FORMS)
def test_truncated_file_is_refused(tmp_path, name):
    data = encoded(name)
    path = tmp_path / "x"
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        path.write_bytes(data[: int(len(data) * share)])
        refusal(path)


@pytest.mark.parametrize("name", FORMS)
def test_random_damage_raises_nothing_else(tmp_path, name, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # a damaged size must not take gigabytes here
    data, path = encoded(name), tmp_path / "x"
    rng = np.random.default_rng(sum(name.encode()))
    refused = 0
    for _ in range(250):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.2 else data)
        reach = len(damaged) if rng.random() < 0.5 else min(200, len(damaged))  # headers matter most
        for at in rng.integers(0, reach, rng.integers(1, 9)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except OnnxcamError as error:
            refused += 1
            assert str(path) in str(error)
            assert "\n" not in str(error)
    assert refused > 25


# prepare


def torchvision_like(image, edge, height, width, filter_):
    """Resize(edge), CenterCrop((height, width)) and ToTensor, as torchvision computes them."""
    w, h = image.size
    size = (edge, int(edge * h / w)) if w <= h else (int(edge * w / h), edge)
    image = image.resize(size, filter_)
    top, left = round((size[1] - height) / 2.0), round((size[0] - width) / 2.0)
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)


@pytest.mark.parametrize(("width", "height"), [(451, 300), (300, 451), (97, 64), (640, 640), (33, 500)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("resize", "edge"), [("crop:256", 256), ("crop", 224), ("crop:231", 231)])
def test_prepare_is_torchvisions_resize_and_centre_crop(width, height, interpolation, resize, edge):
    image = scene(width, height)
    rule = Preprocess(
        "x", "NCHW", 224, 224, "RGB", 1 / 255, resize=resize, interpolation=interpolation, **IMAGENET
    )
    x, _ = prepare(image, rule)
    expected = torchvision_like(image, edge, 224, 224, Image.Resampling[interpolation.upper()])
    mean, std = (np.array(IMAGENET[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    assert x.dtype == np.float32
    assert x.shape == (1, 3, 224, 224)
    assert x.flags.c_contiguous
    np.testing.assert_allclose(x[0], (expected - mean) / std, rtol=0, atol=1e-6)


def test_prepare_stretch_layout_and_orders():
    image = scene(60, 40)
    facts = {"scale": 1.0, "mean": (1.0, 2.0, 3.0), "std": (2.0, 4.0, 8.0), "resize": "stretch"}
    rgb, view = prepare(image, Preprocess("x", "NHWC", 10, 20, "RGB", **facts))
    small = np.asarray(image.resize((20, 10), Image.Resampling.BILINEAR)).astype(np.float32)
    assert rgb.shape == (1, 10, 20, 3)
    np.testing.assert_array_equal(rgb[0], (small - [1, 2, 3]) / [2, 4, 8])
    assert view == Viewport(0, 0, 60, 40, 60, 40)
    bgr, _ = prepare(image, Preprocess("x", "NCHW", 10, 20, "BGR", **facts))
    assert bgr.shape == (1, 3, 10, 20)
    np.testing.assert_array_equal(bgr[0].transpose(1, 2, 0), (small[:, :, ::-1] - [1, 2, 3]) / [2, 4, 8])


@pytest.mark.parametrize(("layout", "shape"), [("NCHW", (1, 1, 10, 20)), ("NHWC", (1, 10, 20, 1))])
def test_prepare_grey(layout, shape):
    image = Image.new("RGB", (60, 40), (100, 50, 200))
    rule = Preprocess("x", layout, 10, 20, "GRAY", 1.0, (0.0,), (2.0,), "stretch")
    x, _ = prepare(image, rule)
    assert x.shape == shape
    assert set(x.ravel()) == {41.0}  # (299 * 100 + 587 * 50 + 114 * 200) / 1000 = 82.05


def test_prepare_by_hand():
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    rule = Preprocess("x", "NCHW", 2, 2, "RGB", 1 / 255, (0.5,), (0.25,), "crop")
    np.testing.assert_allclose(prepare(image, rule)[0][0, :, 1, 1], [2, -2, -1.2], rtol=1e-7)


def test_prepare_converts_other_modes():
    grey16 = Image.fromarray(np.full((4, 4), 25700, np.uint16))
    rule = Preprocess("x", "NCHW", 2, 2, "RGB", 1.0, (0.0,), (1.0,), "stretch")
    assert set(prepare(grey16, rule)[0].ravel()) == {100.0}


def test_viewport_of_a_crop_by_hand():
    # 400 x 200, shorter edge to 100: 200 x 100; crop 80 x 60 from (60, 20); twice that in the original
    rule = Preprocess("x", "NCHW", 60, 80, "RGB", 1.0, (0.0,), (1.0,), "crop:100")
    assert prepare(scene(400, 200), rule)[1] == Viewport(120, 40, 280, 160, 400, 200)


def test_long_edge_is_cut_to_a_whole_number_as_torchvision_does():
    # 451 x 300, shorter edge to 256: int(256 * 451 / 300) = 384, not 385
    rule = Preprocess("x", "NCHW", 224, 224, "RGB", 1.0, (0.0,), (1.0,), "crop:256")
    view = prepare(scene(451, 300), rule)[1]
    assert view.left == pytest.approx(80 * 451 / 384)
    assert view.right == pytest.approx(304 * 451 / 384)
    assert (view.top, view.bottom) == (16 * 300 / 256, 240 * 300 / 256)


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000), (1, 2)])
@pytest.mark.parametrize("resize", ["stretch", "crop", "crop:256"])
def test_prepare_odd_sizes(size, resize):
    rule = Preprocess("x", "NCHW", 224, 224, "RGB", 1.0, (0.0,), (1.0,), resize)
    x, view = prepare(scene(*size), rule)
    assert x.shape == (1, 3, 224, 224)
    heat, seen = view.to_picture(np.ones((7, 7), np.float32))
    assert heat.shape == seen.shape == size[::-1]
    assert seen.any()
    np.testing.assert_allclose(heat, seen, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_sliver_is_cropped_without_resizing_all_of_it(monkeypatch, interpolation):
    image = scene(7, 900)
    rule = Preprocess("x", "NCHW", 64, 64, "RGB", 1.0, (0.0,), (1.0,), "crop:70", interpolation)
    whole, view = prepare(image, rule)
    monkeypatch.setattr("onnxcam.image._TWO_STEP_PIXELS", 0)
    part, same = prepare(image, rule)
    assert view == same
    difference = np.abs(whole - part)
    assert difference.max() <= (1 if interpolation in ("nearest", "bilinear") else 8)
    assert (difference > 1).mean() < 0.02  # where Pillow, in another order, clips what bicubic overshoots


def test_missing_facts_are_named_with_their_options():
    with pytest.raises(OnnxcamError) as caught:
        prepare(scene(8, 8), Preprocess("x"))
    assert str(caught.value) == (
        "the model does not say how a picture becomes its input: height, width, color, scale, mean, std, "
        "resize unknown; give --size, --color, --scale, --mean, --std, --resize"
    )
    with pytest.raises(OnnxcamError, match=r"input: mean unknown; give --mean$"):
        prepare(scene(8, 8), Preprocess("x", "NCHW", 8, 8, "RGB", 1.0, None, (1.0,), "crop"))


# Viewport


def test_to_picture_by_hand():
    heat, seen = Viewport(0, 0, 4, 1, 4, 1).to_picture(np.array([[0, 1]], np.float32))
    np.testing.assert_allclose(
        heat, [[0, 0.25, 0.75, 1]]
    )  # cell centres are at 1 and 3, pixel centres at 0.5 ...
    assert seen.all()
    assert heat.dtype == np.float32
    assert seen.dtype == np.bool_


def test_to_picture_keeps_a_linear_ramp_to_a_fraction_of_a_pixel():
    view = Viewport(93.25, 18.75, 357.5, 281.25, 451, 300)
    row, column = np.mgrid[:7, :9].astype(np.float32)
    x, y = (column + 0.5) / 9 * 264.25 + 93.25, (row + 0.5) / 7 * 262.5 + 18.75  # of the cells' centres
    heat, seen = view.to_picture((2 * x - 3 * y).astype(np.float32))
    pixel_y, pixel_x = np.mgrid[:300, :451] + 0.5
    inside = (pixel_x >= x.min()) & (pixel_x <= x.max()) & (pixel_y >= y.min()) & (pixel_y <= y.max())
    np.testing.assert_allclose(heat[inside], (2 * pixel_x - 3 * pixel_y)[inside], atol=2e-3)
    assert inside.sum() > 40_000
    # beyond the outermost centres their values continue, outside the viewport there is nothing
    assert heat[19, 94] == heat[20, 100] == pytest.approx(2 * x.min() - 3 * y.min(), abs=2e-3)
    assert seen[18:282, 93:358].all()
    assert seen.sum() == 264 * 265
    assert not heat[~seen].any()


def test_to_picture_is_pillows_bilinear_resize_where_all_is_seen():
    heat = np.random.default_rng(0).random((14, 14)).astype(np.float32)
    for size in (300, 200), (14, 14), (9, 5), (3, 40):
        ours, _ = Viewport(0, 0, *size, *size).to_picture(heat)
        theirs = Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-6)


def test_to_picture_marks_a_pixel_seen_in_part():
    _, seen = Viewport(1.5, 0, 3.0000000001, 1, 5, 1).to_picture(np.ones((1, 1), np.float32))
    assert seen.tolist() == [[False, True, True, False, False]]


def test_scaled_viewport_by_hand():
    assert Viewport(10, 20, 30, 60, 100, 80).scaled(50, 20) == Viewport(5, 5, 15, 15, 50, 20)


def test_to_pixel_by_hand():
    view = Viewport(120, 40, 280, 160, 400, 200)
    assert view.to_pixel(0, 0, (6, 8)) == (130, 50)
    assert view.to_pixel(5, 7, (6, 8)) == (270, 150)
    assert view.to_pixel(2.5, 3.5, (6, 8)) == (200, 100)


def test_to_pixel_points_at_the_peak_that_to_picture_draws():
    view = Viewport(93.25, 18.75, 357.5, 281.25, 451, 300)
    heat = np.zeros((7, 9), np.float32)
    heat[2, 6] = 1
    row, column = np.unravel_index(view.to_picture(heat)[0].argmax(), (300, 451))
    x, y = view.to_pixel(2, 6, heat.shape)
    assert abs(x - (column + 0.5)) <= 0.5
    assert abs(y - (row + 0.5)) <= 0.5


def test_what_the_model_saw_comes_back_to_where_it_was():
    """A white square in the photo, the input itself as the map: the map lies on the square again."""
    photo = np.zeros((300, 451, 3), np.uint8)
    photo[120:180, 150:230] = 255
    rule = Preprocess("x", "NCHW", 224, 224, "RGB", 1 / 255, (0.0,), (1.0,), "crop:256")
    x, view = prepare(Image.fromarray(photo), rule)
    heat, _ = view.to_picture(x[0, 0])
    weight = heat / heat.sum()
    rows, columns = np.mgrid[:300, :451] + 0.5
    assert (weight * rows).sum() == pytest.approx(150, abs=0.02)
    assert (weight * columns).sum() == pytest.approx(190, abs=0.02)


def test_paths_may_be_strings(tmp_path):
    path = write(tmp_path / "x", Image.new("RGB", (2, 2)), "PNG")
    assert open_image(str(path)).size == open_image(os.fspath(path)).size == (2, 2)
