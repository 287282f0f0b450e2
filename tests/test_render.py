"""Colours, overlays, panels and PNG files."""

import itertools
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw

from onnxcam.errors import OnnxcamError
from onnxcam.render import Column, Row, colorize, comparison, grid, overlay, panel, save_png


def oklab(srgb):
    """OKLab of uint8 sRGB, by the forward matrices; the module has the inverse ones."""
    c = srgb / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_cone = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_cone.T) @ to_lab.T


LEVELS = np.linspace(0, 1, 256, dtype=np.float32)


def test_colors_run_from_dark_blue_over_green_and_yellow_to_red():
    blue, green, yellow, red = colorize(np.array([0, 0.52, 0.66, 1], np.float32)).astype(int)
    assert blue[2] > 100 > 50 > max(blue[0], blue[1])
    assert green[1] > 200 > 150 > max(green[0], green[2])
    assert min(yellow[0], yellow[1]) > 200 > 100 > yellow[2]
    assert red[0] > 220 > 60 > max(red[1], red[2])


def test_color_steps_are_even_and_lightness_has_one_peak():
    lab = oklab(colorize(LEVELS).astype(float))
    steps = np.linalg.norm(np.diff(lab[::8], axis=0), axis=1)
    assert steps.max() < 1.15 * steps.min()
    slope = np.sign(np.diff(lab[::8, 0]))
    assert (np.diff(slope) != 0).sum() == 1  # lighter up to the yellow, darker from there to the red


def test_colors_of_values_that_are_no_heat():
    values = np.array([[np.nan, np.inf], [-np.inf, -3], [2, 1]], np.float32)
    blue, red = colorize(np.array([0, 1], np.float32))
    colors = colorize(values)
    assert colors.shape == (3, 2, 3)
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(colors, [[blue, blue], [blue, blue], [red, red]])


def test_colorize_returns_an_array_of_its_own():
    colorize(LEVELS)[:] = 0
    assert colorize(LEVELS).any()


def test_signed_colors_are_blue_below_zero_and_red_above():
    against, weak, faint, for_ = colorize(np.array([-1, -0.02, 0.02, 1], np.float32), signed=True).astype(int)
    for blue in (against, weak):
        assert blue[2] > 1.3 * max(blue[0], blue[1])
    for red in (for_, faint):
        assert red[0] > 1.5 * max(red[1], red[2])
    assert weak.sum() > against.sum()
    assert faint.sum() > for_.sum()
    middle = colorize(np.array([np.nan, np.inf, 0], np.float32), signed=True)
    assert (middle == middle[0]).all()
    np.testing.assert_array_equal(colorize(np.array([-9, 9], np.float32), signed=True), [against, for_])


# overlay


SIGNED = np.linspace(-1, 1, 255, dtype=np.float32)


def on_grey(heat, **options):
    grey = Image.new("RGB", (heat.size, 1), (128, 128, 128))
    return np.asarray(overlay(grey, heat[None], evidence="both", **options))[0].astype(float)


def test_signed_overlay_is_even_from_zero_and_as_strong_on_either_side():
    lab = oklab(on_grey(SIGNED))
    from_zero = np.linalg.norm(lab - lab[127], axis=1)
    assert from_zero[127] == 0
    for side in (from_zero[127::-1], from_zero[127:]):
        assert (np.diff(side[::8]) > 0).all()
        # A tenth of the strongest is seen: a difference of 0.02 is about the least that is.
        assert side[13] > 0.02
    assert from_zero[0] == pytest.approx(from_zero[-1], rel=0.25)
    lightness = lab[:, 0]
    np.testing.assert_allclose(lightness, lightness[::-1], atol=0.03)


def test_signed_overlay_leaves_a_grey_photo_where_the_map_is_zero():
    image = photo()
    grey = np.asarray(image.convert("L")).astype(int)
    made = np.asarray(overlay(image, np.zeros((30, 40), np.float32), evidence="against")).astype(int)
    assert np.abs(made - grey[..., None]).max() <= 1
    np.testing.assert_array_equal(
        overlay(image, np.ones((30, 40), np.float32), opacity=0, evidence="both"), image
    )


def test_evidence_for_is_drawn_as_any_map_and_the_counterfactual_as_below_zero():
    heat = np.mgrid[:30, :40][1].astype(np.float32) / 39
    np.testing.assert_array_equal(overlay(photo(), heat, evidence="for"), overlay(photo(), heat))
    np.testing.assert_array_equal(
        overlay(photo(), heat, evidence="counterfactual"), overlay(photo(), -heat, evidence="against")
    )


def photo(width=40, height=30):
    ramp = np.mgrid[:height, :width].sum(axis=0) * 255 // (width + height)
    return Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1).astype(np.uint8))


def test_overlay_by_hand():
    heat = np.zeros((1, 2), np.float32)
    heat[0, 1] = 1
    cool, hot = np.asarray(overlay(Image.new("RGB", (2, 1), (200, 200, 200)), heat, opacity=0.5))[0].astype(
        int
    )
    blue, red = colorize(np.array([0, 1], np.float32)).astype(int)
    np.testing.assert_allclose(cool, 0.8 * 200 + 0.2 * blue, atol=1)  # 0.5 * 0.4 of the colour
    np.testing.assert_allclose(hot, 0.5 * 200 + 0.5 * red, atol=1)


def test_overlay_mutes_the_colours_of_the_photo():
    made = overlay(Image.new("RGB", (1, 1), (200, 0, 0)), np.zeros((1, 1), np.float32), opacity=0.5)
    blue = colorize(np.zeros(1, np.float32)).astype(int)[0]
    muted = np.array([130, 30, 30])  # half way to its grey, 0.299 * 200 = 60
    np.testing.assert_allclose(np.asarray(made)[0, 0], 0.8 * muted + 0.2 * blue, atol=1)


@pytest.mark.parametrize("size", [(40, 30), (1, 1), (3000, 20), (20, 3000)])
def test_overlay_has_the_photos_size(size):
    made = overlay(photo(*size), np.full(size[::-1], 0.5, np.float32))
    assert made.size == size
    assert made.mode == "RGB"


def test_overlay_of_no_opacity_is_the_photo():
    image = photo()
    np.testing.assert_array_equal(overlay(image, np.ones((30, 40), np.float32), opacity=0), image)


def test_overlay_of_full_opacity_is_the_map_where_it_is_hot():
    made = np.asarray(overlay(photo(), np.ones((30, 40), np.float32), opacity=1))
    np.testing.assert_array_equal(made, colorize(np.ones((30, 40), np.float32)))


def test_overlay_takes_values_that_are_not_finite_as_cold():
    bad = np.full((30, 40), np.nan, np.float32)
    np.testing.assert_array_equal(overlay(photo(), bad), overlay(photo(), np.zeros_like(bad)))


def test_overlay_is_grey_and_pale_where_the_model_did_not_look():
    heat = np.full((30, 40), 0.7, np.float32)
    mask = np.zeros((30, 40), bool)
    mask[:, 10:30] = True
    made = np.asarray(overlay(photo(), heat, mask)).astype(int)
    np.testing.assert_array_equal(made[mask], np.asarray(overlay(photo(), heat))[mask])
    unseen = made[~mask]
    assert (unseen == unseen[:, :1]).all()
    grey = np.asarray(photo().convert("L"))[~mask]
    np.testing.assert_allclose(unseen[:, 0], 0.55 * grey + 0.45 * 255, atol=1)


def test_overlay_leaves_its_arguments_alone():
    image, heat = photo(), np.full((30, 40), 2, np.float32)
    before = image.tobytes()
    overlay(image, heat)
    assert image.tobytes() == before
    assert (heat == 2).all()


def test_overlay_takes_a_grey_photo():
    assert overlay(photo().convert("L"), np.zeros((30, 40), np.float32)).mode == "RGB"


def test_overlay_refuses_what_does_not_fit():
    with pytest.raises(OnnxcamError, match=r"heat map has shape \(7, 7\); the photo needs \(30, 40\)"):
        overlay(photo(), np.zeros((7, 7), np.float32))
    with pytest.raises(OnnxcamError, match=r"mask has shape \(40, 30\); the photo needs \(30, 40\)"):
        overlay(photo(), np.zeros((30, 40), np.float32), np.ones((40, 30), bool))
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(OnnxcamError, match=r"opacity is .*; it must be between 0 and 1"):
            overlay(photo(), np.zeros((30, 40), np.float32), opacity=opacity)


# panel


@pytest.fixture
def words(monkeypatch):
    """Every text that is drawn, with the place and the size of its letters."""
    drawn = []
    text = ImageDraw.ImageDraw.text

    def record(self, xy, words, fill, font):
        drawn.append((words, xy, xy[0] + font.getlength(words)))
        text(self, xy, words, fill, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def test_panel_shows_photo_maps_labels_scores_notes_and_a_bar(words):
    image = Image.new("RGB", (420, 280), (10, 200, 30))
    columns = [
        Column(Image.new("RGB", (420, 280), (200, 10, 30)), "tabby", 0.8731, ""),
        Column(Image.new("RGB", (420, 280), (30, 10, 200)), "lynx", None, "flat map"),
    ]
    made = panel(image, columns, title="squeezenet · gradcam")
    assert made.mode == "RGB"
    shown = [word for word, _, _ in words]
    assert shown == ["squeezenet · gradcam", "tabby", "87.3 %", "lynx", "flat map", "low", "high"]
    pixels = np.asarray(made)
    assert (pixels[0] == 255).all()
    for color in (10, 200, 30), (200, 10, 30), (30, 10, 200):
        assert (pixels == color).all(axis=-1).sum() == 420 * 280
    red = colorize(np.ones(1, np.float32))[0]
    assert (pixels == red).all(axis=-1).any()


@pytest.mark.parametrize(
    ("evidence", "ends", "colors"),
    [
        (None, ["low", "high"], "blue red"),
        ("for", ["low", "high"], "blue red"),
        ("both", ["against", "for"], "blue red"),
        ("against", ["against", "nothing"], "blue white"),
        ("counterfactual", ["against", "nothing"], "blue white"),
    ],
)
def test_color_bar_names_what_the_colors_mean(words, evidence, ends, colors):
    made = np.asarray(panel(Image.new("RGB", (420, 280), "white"), [], evidence=evidence)).astype(int)
    assert [word for word, _, _ in words] == ends
    (_, (x, y), end), (_, (last, _), _) = words
    bar = made[round(y) + 10, round(end) + 12 : round(last) - 12]
    names = {
        "blue": lambda c: c[2] > 1.5 * c[0],
        "red": lambda c: c[0] > 2 * c[2],
        "white": lambda c: c.min() > 240,
    }
    for color, name in zip(bar[[0, -1]], colors.split(), strict=True):
        assert names[name](color), (name, color)
    assert x < end < last


@pytest.mark.parametrize(
    ("score", "words_for_it"),
    [
        (0.0, "0.0 %"),
        (0.0001, "< 0.1 %"),
        (0.0005, "0.1 %"),
        (0.5, "50.0 %"),
        (0.9994, "99.9 %"),
        (0.99999, "> 99.9 %"),
        (1.0, "100.0 %"),
    ],
)
def test_scores_are_never_rounded_to_none_or_to_certainty(words, score, words_for_it):
    panel(photo(), [Column(photo(), "a", score)])
    assert words_for_it in [word for word, _, _ in words]


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((1, 1), (2, 2)),
        ((100, 100), (200, 200)),
        ((451, 300), (420, 279)),
        ((3000, 4000), (360, 480)),
        ((3000, 20), (420, 3)),
        ((20, 3000), (3, 480)),
        ((30_000, 1), (420, 1)),
    ],
)
def test_panel_scales_the_photo(size, shown):
    color = (10, 200, 30)
    made = np.asarray(panel(Image.new("RGB", size, color), []))
    assert (made == color).all(axis=-1).sum() == shown[0] * shown[1]


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000), (451, 300)])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_panel_keeps_every_text_on_the_sheet_and_in_its_column(words, size, count):
    label = "a very long label that goes on and on, up to a_word_that_is_wider_than_any_column_could_ever_be"
    columns = [
        Column(Image.new("RGB", size), label, 0.5, "the map is flat: " + "no class moves it " * 9)
    ] * count
    made = panel(Image.new("RGB", size), columns, title="title " * 60)
    assert made.width <= 4 * 420 + 3 * 24 + 2 * 32
    for word, (x, y), right in words:
        assert 32 <= x <= right <= made.width - 32
        assert 0 < y < made.height - 40
        if word != words[0][0]:
            assert right <= x + 420
    if count:
        assert sum("…" in word for word, _, _ in words) >= 1 + 2 * count


def test_labels_are_broken_between_words_and_shortened(words):
    panel(Image.new("RGB", (240, 240)), [Column(Image.new("RGB", (240, 240)), "word " * 400)])
    lines = [word for word, _, _ in words if "word" in word]
    assert len(lines) == 2
    assert set(lines[0].split()) == {"word"}
    assert lines[1].endswith("…")


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("crème brûlée", "creme brulee"),
        ("two\nlines\tand\0more", "two lines andmore"),
        ("\ud800surrogate", "surrogate"),
        ("漢字", "漢字"),
        ("שלום 😀", "שלום 😀"),
    ],
)
def test_labels_that_the_font_lacks_do_not_crash(words, label, shown):
    panel(photo(), [Column(photo(), label)], title=label)
    assert [word for word, _, _ in words[:2]] == [shown, shown]


def test_empty_label_and_title():
    assert panel(photo(), [Column(photo(), "")]).size == panel(photo(), [Column(photo(), "x")]).size


# comparison and grid


def test_comparison_has_a_row_for_each_method_and_a_column_for_each_class(words):
    image = Image.new("RGB", (300, 200), (10, 200, 30))
    cells = [
        Column(Image.new("RGB", (300, 200), (200, 10, 30)), "tabby", 0.8731, ""),
        Column(Image.new("RGB", (300, 200), (30, 10, 200)), "lynx", 0.1, "the map is flat"),
    ]
    rows = [
        Row("scorecam", ["at relu", "cost: C"], cells),
        Row("cam", [], [], "cam needs another head"),
        Row("fem", ["at relu", "cost: none"], cells),
    ]
    pixels = np.asarray(comparison(image, rows, "m.onnx on x.png", "against"))
    at = {word: xy for word, xy, _ in words}
    shown = [word for word, _, _ in words]
    assert shown[0] == "m.onnx on x.png"
    assert {"against", "nothing", "tabby", "87.3 %", "lynx", "10.0 %"} <= set(shown)
    assert shown.count("the map is flat") == shown.count("at relu") == 2
    assert shown.count("tabby") == 1
    places = {}
    for color in (10, 200, 30), (200, 10, 30), (30, 10, 200):
        found = (pixels == color).all(axis=-1)
        assert found.sum() == 2 * 300 * 200
        places[color] = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    for color, label in (((200, 10, 30), "tabby"), ((30, 10, 200), "lynx")):
        assert places[color][1][0] == at[label][0]
    photo_rows, photo_columns = places[10, 200, 30]
    assert photo_columns[0] > at["scorecam"][0] + 220
    assert (photo_rows == places[200, 10, 30][0]).all()
    # The names stand beside the tops of their rows; the reason stands in the place of the pictures.
    assert photo_rows[0] <= at["scorecam"][1] <= photo_rows[0] + 5
    assert photo_rows[200] <= at["fem"][1] <= photo_rows[200] + 5
    assert at["cam needs another head"] == (photo_columns[0], at["cam"][1])
    assert photo_rows[199] < at["cam"][1] < photo_rows[200]


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000)])
def test_comparison_keeps_every_text_on_the_sheet(words, size):
    long = "a very long text that goes on and on " * 20
    cells = [Column(Image.new("RGB", size), long, 0.5, long)] * 3
    rows = [Row(long, [long, long], cells), Row(long, [], [], long)]
    made = comparison(Image.new("RGB", size), rows, long)
    for _, (x, y), right in words:
        assert 32 <= x <= right <= made.width - 32
        assert 0 < y < made.height - 40


def test_grid_draws_each_cell_in_whole_pixels_and_numbers_them(words):
    cells = np.random.default_rng(0).integers(0, 200, (7, 2, 3, 3), np.uint8)
    pixels = np.asarray(grid(cells, "seven", "what it means"))
    shown = [word for word, _, _ in words]
    assert shown == ["seven", "what it means", "0", "1", "2", "0", "3", "6"]
    (_, (x, _), _), (_, (_, y), _) = words[2], words[5]
    for index, cell in enumerate(cells):
        left, top = x + index % 3 * (32 * 3 + 2), y + index // 3 * (32 * 2 + 2)
        drawn = pixels[top : top + 64, left : left + 96]
        np.testing.assert_array_equal(drawn, cell.repeat(32, axis=0).repeat(32, axis=1))
    assert (pixels[-32:] == 255).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 300), (2048, 7, 7), (64, 112, 112), (5, 1, 900)])
def test_grid_of_any_shape_holds_all_cells(words, shape):
    pixels = np.asarray(grid(np.full((*shape, 3), 77, np.uint8), "t", "l"))
    drawn = (pixels == 77).all(axis=-1).sum()
    count, height, width = shape
    factor = round((drawn / (count * height * width)) ** 0.5)
    assert drawn >= count * height * width * factor**2 >= count * height * width
    for _, (x, y), right in words:
        assert 32 <= x <= right <= pixels.shape[1]
        assert 0 < y < pixels.shape[0] - 20
    numbers = [(xy[0], right) for word, xy, right in words[2:] if xy[1] == words[2][1][1] and word.isdigit()]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(numbers))


# save_png


def test_save_png_is_lossless_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "map.png"
    save_png(photo(), path)
    save_png(photo(50, 50), str(path))
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(image, photo(50, 50))
    assert os.listdir(tmp_path) == ["map.png"]  # noqa: PTH208


def test_save_png_honours_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_png(photo(), tmp_path / "map.png")
    finally:
        os.umask(before)
    assert (tmp_path / "map.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_save_png_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch, error):
    path = tmp_path / "map.png"
    path.write_bytes(b"old")

    def save(self, file, *args, **options):
        file.write(b"half a picture")
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
    expected = OnnxcamError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_png(photo(), path)
    if expected is OnnxcamError:
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.png"]
    assert path.read_bytes() == b"old"


def test_save_png_names_a_folder_that_is_missing_or_no_folder(tmp_path):
    with pytest.raises(OnnxcamError, match=r"^cannot write .*map\.png: No such file or directory$"):
        save_png(photo(), tmp_path / "no" / "map.png")
    (tmp_path / "file").touch()
    with pytest.raises(OnnxcamError, match=r"^cannot write .*map\.png: Not a directory$"):
        save_png(photo(), tmp_path / "file" / "map.png")


def test_save_png_does_not_replace_a_folder(tmp_path):
    (tmp_path / "map.png").mkdir()
    with pytest.raises(OnnxcamError, match=r"cannot write .*map\.png: "):
        save_png(photo(), tmp_path / "map.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_save_png_to_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OnnxcamError, match="Permission denied"):
        save_png(photo(), tmp_path / "map.png")
    tmp_path.chmod(0o700)
