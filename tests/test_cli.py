"""The command line: exit codes, what goes to stdout and stderr, and what gets written."""

import inspect
import io
import json
import os
import pty
import re
import runpy
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import onnxcam.cli
import onnxcam.render
from onnxcam import __version__
from onnxcam.card import CLASS_INPUTS, EMITS, EVIDENCE, FUSIONS, SCORES, SMOOTHINGS
from onnxcam.dialects import DIALECTS
from onnxcam.methods import METHODS
from tests.small import FLAGS, classifier, floats, saved

ROOT = Path(__file__).parent.parent
COMMANDS = (
    *(
        "run",
        "attach",
        "export",
        "layers",
        "methods",
        "compare",
        "filters",
        "activations",
        "verify",
        "operators",
        "web",
    ),
)


@pytest.fixture
def call(monkeypatch, capfd):
    """Call the command line within this process and return its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["onnxcam", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            onnxcam.cli.main()
        return end.value.code or 0, *capfd.readouterr()

    return run


def started(*arguments, **options):
    """Start ``python cli.py`` in a process of its own."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, **options)


def finished(*arguments, **options):
    with started(*arguments, text=True, **options) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def is_refused(answer, pattern, *unwritten):
    """One line on stderr, nothing on stdout, exit code 2, nothing written."""
    code, out, err = answer
    assert (code, out) == (2, "")
    assert err.startswith("onnxcam: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert re.search(pattern, err), err
    for path in unwritten:
        assert not path.exists()


# What works


def test_run_writes_an_overlay_for_each_class_and_a_panel(small_explained, photo, tmp_path):
    out = tmp_path / "deep" / "out"
    code, text, err = finished("run", small_explained, photo, "-c", "cat", "-c", "90", "--output", out)
    assert (code, err) == (0, "")
    assert {path.name for path in out.iterdir()} == {
        "photo.0-cat.png",
        "photo.3-90.png",
        "photo.panel.png",
    }
    for path in out.glob("photo.?-*.png"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (40, 30))
    lines = text.splitlines()
    assert lines[0] == str(photo)
    assert len([line for line in lines if re.fullmatch(r" +\d+\.\d\d%  \w+ \(\d\)", line)]) == 4
    assert f"  why cat? {out / 'photo.0-cat.png'}" in lines
    assert lines[-1] == f"  all in one: {out / 'photo.panel.png'}"


def test_json_is_one_object_for_each_picture(small_explained, photo, tmp_path):
    second = tmp_path / "second.jpg"
    Image.new("L", (20, 50), 77).save(second)
    out = tmp_path / "out"
    code, text, err = finished(
        "run", small_explained, photo, second, "--json", "-c", "top2", "-c", "Cow", "-o", out
    )
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["image"] for row in rows] == [str(photo), str(second)]
    for row, size in zip(rows, [(40, 30), (20, 50)], strict=True):
        assert row.keys() == {"image", "predictions", "explanations", "model", "provider", "panel"}
        assert row["model"] == str(small_explained)
        assert row["provider"] == "CPUExecutionProvider"
        assert Path(row["panel"]).is_file()
        assert [p.keys() for p in row["predictions"]] == [{"index", "label", "score"}] * 4
        assert sum(p["score"] for p in row["predictions"]) == pytest.approx(1)
        assert len(row["explanations"]) in (2, 3)
        assert 2 in [e["class"] for e in row["explanations"]]
        for explanation in row["explanations"]:
            assert explanation.keys() == {
                "class",
                "label",
                "score",
                "method",
                "layer",
                "evidence",
                "target",
                "against",
                "minimum",
                "maximum",
                "peak",
                "note",
                "overlay",
            }
            assert (explanation["method"], explanation["layer"]) == ("gradcam", "features")
            assert 0 <= explanation["minimum"] < explanation["maximum"]
            x, y = explanation["peak"]
            assert 0 <= x < size[0]
            assert 0 <= y < size[1]
            with Image.open(explanation["overlay"]) as image:
                assert image.size == size


def test_json_has_no_nan(call, tmp_path, photo):
    infinite = numpy_helper.from_array(np.float32([np.inf]), "infinite")
    extra = [
        helper.make_node("Mul", ["features", "infinite"], ["huge"]),
        helper.make_node("Clip", ["huge", "", "most"], ["changed"]),
    ]
    most = numpy_helper.from_array(np.float32(1), "most")
    model = saved(tmp_path, extra=extra, weights=[infinite, most])
    code, text, err = call("run", model, photo, "--json", "--layer", "huge", "-o", tmp_path / "o", *FLAGS)
    if code == 0:
        (row,) = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        assert row["explanations"][0]["note"] == "not finite"
        assert row["explanations"][0]["peak"] is None
    else:
        is_refused((code, text, err), "not finite")


def test_run_of_a_plain_model_is_that_of_the_explained_one(call, small, photo, tmp_path):
    explained = tmp_path / "explained.onnx"
    assert call("attach", small, "-o", explained, *FLAGS)[0] == 0
    assert call("run", explained, photo, "-o", tmp_path / "a", "-c", "top2")[0] == 0
    assert call("run", small, photo, "-o", tmp_path / "b", "-c", "top2", *FLAGS)[0] == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_attach_says_what_it_chose(call, small, tmp_path):
    before = small.read_bytes()
    out = tmp_path / "explained.onnx"
    code, text, err = call("attach", small, "-o", out, "--mean", "0.5,0.5,0.5", "--color", "RGB")
    assert (code, err) == (0, "")
    assert text.splitlines() == [
        f"{out}: gradcam at layer features, score before softmax",
        "  not on the card, to be given to 'onnxcam run': scale, std, resize",
    ]
    assert small.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["explained.onnx"]


def test_attach_options_reach_the_model(call, small, tmp_path):
    out = tmp_path / "explained.onnx"
    options = (
        "--emit",
        "cam, activations",
        "--class-input",
        "required",
        "--method",
        "hirescam",
        "--layer",
        "conv",
    )
    assert call("attach", small, "-o", out, *options, "--score", "after", "--scores", "scores")[0] == 0
    model = onnx.load(out)
    assert [o.name for o in model.graph.output] == ["scores", "cam", "cam_activations"]
    assert [i.name for i in model.graph.input] == ["image", "cam_class"]
    assert "cam_class" not in [i.name for i in model.graph.initializer]
    card = json.loads({p.key: p.value for p in model.metadata_props}["onnxcam"])
    assert (card["method"], card["layer"], card["score"]) == ("hirescam", "conv", "after")


def test_options_of_the_map_reach_the_model(call, small, photo, tmp_path):
    out = tmp_path / "explained.onnx"
    options = [
        *("--layer", "conv", "--layer", "features", "--fuse", "max", "--evidence", "both"),
        *("--smooth", "augmentation", "--smooth", "eigen", "--compat", "paper"),
    ]
    code, text, err = call("attach", small, "-o", out, *FLAGS, *options)
    assert (code, err) == (0, "")
    assert text.splitlines() == [
        f"{out}: gradcam at layer conv, features, max of the layers, smoothed by augmentation and eigen, "
        "evidence both, score before softmax"
    ]
    # The explained model is what these very options ask for, and gives what the plain one gives with them.
    for model, folder in ((out, "a"), (small, "b")):
        code, text, err = call("run", model, photo, *FLAGS, *options, "--json", "-o", tmp_path / folder)
        assert (code, err) == (0, "")
        assert json.loads(text)["explanations"][0]["evidence"] == "both"
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_map_without_anything_above_zero_is_named(call, photo, tmp_path):
    """The weights of the class are all below zero."""
    model = onnx.load(saved(tmp_path, outputs=[]))
    (w2,) = (t for t in model.graph.initializer if t.name == "w2")
    w2.CopyFrom(numpy_helper.from_array(-np.abs(numpy_helper.to_array(w2)), "w2"))
    onnx.save(model, tmp_path / "negative.onnx")
    for method, note in (("gradcam", "all zero"), ("cam", "all negative")):
        arguments = ("run", tmp_path / "negative.onnx", photo, *FLAGS, "--method", method, "-o", tmp_path)
        code, text, _ = call(*arguments)
        assert code == 0
        assert f"(the map is {note}: nothing speaks for the class)" in text
        (found,) = json.loads(call(*arguments, "--json")[1])["explanations"]
        assert (found["note"], found["peak"]) == (note, None)
        assert (found["minimum"] < 0) == (method == "cam")


def test_layers(call, small):
    code, text, err = call("layers", small)
    assert (code, err) == (0, "")
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["name", "shape", "operator", "module", "positions"]
    assert lines[1:] == [
        ["conv", "Nx6x8x12", "Conv", "-", "planes"],
        ["*", "features", "Nx6x8x12", "Relu", "-", "planes"],
    ]
    code, text, err = call("layers", small, "--json")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["name"] for row in rows] == ["conv", "features"]
    assert [row["default"] for row in rows] == [False, True]
    assert rows[0] == {
        "name": "conv",
        "shape": ["N", 6, 8, 12],
        "operator": "Conv",
        "node": "conv1",
        "module": None,
        "grid": "planes",
        "zero_gradient": False,
        "default": False,
    }


def test_methods(call):
    code, text, err = call("methods")
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(METHODS)
    at = lines.index("cam")
    assert lines[at + 1] == "    sum_k W_ck A_k, signed. Zhou et al. 2016, eq. 2."
    assert lines[at + 2].startswith("    needs: gradient, a head that averages ")
    code, text, err = call("methods", "--json")
    rows = {row["name"]: row for row in map(json.loads, text.splitlines())}
    assert (code, list(rows)) == (0, list(METHODS))
    cam = {
        "name": "cam",
        "summary": "sum_k W_ck A_k, signed. Zhou et al. 2016, eq. 2.",
        "needs": ["gradient"],
        "cost": "1 backward",
        "looks_at": "layer",
        "requires": "a head that averages the feature map and weighs its channels",
    }
    assert cam.items() <= rows["cam"].items()
    assert rows["eigencam"]["needs"] == ["activation"]
    assert rows["shapleycam"]["needs"] == ["gradient", "second derivative"]
    assert rows["scorecam"]["needs"] == ["runs of the model"]
    for name, row in rows.items():
        assert row["compat"][0] == "paper"
        assert set(row["compat"]) == {d for d, dialect in DIALECTS.items() if name in dialect.methods}


def test_compare(call, small, photo, tmp_path):
    out = tmp_path / "side.png"
    options = ("--methods", "gradcam, eigencam", "-c", 0, "-c", "top2", "--evidence", "both", "-o", out)
    code, text, err = call("compare", small, photo, *options, *FLAGS)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        rf"gradcam: \d+\.\d\d s\neigencam: \d+\.\d\d s\nside by side: {re.escape(str(out))}\n", text
    )
    with Image.open(out) as image:
        assert image.format == "PNG"
    options = ("--methods", "gradcam", "-c", 0, "-o", out)
    assert call("compare", small, photo, *options, "--against", 1, *FLAGS)[0] == 0
    is_refused(
        call("compare", small, photo, *options, "--target", "class", "--against", 1, *FLAGS),
        "explains the target class, which compares no classes",
    )


def test_compare_names_a_method_that_cannot_be_applied_and_the_rest_go_on(call, small, photo, tmp_path):
    out = tmp_path / "side.png"
    arguments = ("compare", small, photo, "--layer", "conv", "-o", out, *FLAGS)
    code, text, err = call(*arguments, "--methods", "cam,gradcam")
    assert code == 1
    assert re.match(r"gradcam: .* s\nside by side: ", text)
    reason = (
        "cam needs a head .* but node 'relu1' .Relu. lies between the layer and the scores; use gradcam.*"
    )
    assert re.fullmatch(f"onnxcam: {reason}\n", err)
    assert out.exists()
    out.unlink()
    is_refused(call(*arguments, "--methods", "cam"), "^onnxcam: cam needs a head that averages", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "gradcam,gradcan"], "no method 'gradcan' .did you mean 'gradcam'"),
        (["--methods", ","], "no method to compare is given; methods: "),
        (["--layer", "cnv"], "onnxcam: the model has no layer 'cnv' .did you mean 'conv'"),
        (["-c", "9"], "onnxcam: class 9 is out of range"),
        (["--std", "0"], "onnxcam: std is .0.0.; every value must be above zero"),
        (["-o", "x.jpg"], "x.jpg must be called .png"),
        (["-o", "no/x.png"], "the folder no does not exist"),
    ],
)
def test_bad_option_of_compare(call, small, photo, tmp_path, options, message):
    out = tmp_path / "side.png"
    arguments = ("--methods", "gradcam,eigencam", "-o", out, *FLAGS, *options)
    is_refused(call("compare", small, photo, *arguments), message, out)


def test_what_is_drawn_from_stays(call, small, small_explained, photo, tmp_path):
    copy, picture = tmp_path / "model.png", tmp_path / "photo.png"
    copy.write_bytes(small.read_bytes())
    picture.write_bytes(photo.read_bytes())
    for command in (["compare", copy, picture, "--methods", "fem"], ["activations", copy, picture]):
        for path, what in ((copy, "model"), (picture, "picture")):
            is_refused(call(*command, *FLAGS, "-o", path), f"is the {what} itself, which stays as it is")
    is_refused(call("filters", copy, "-o", copy, "--color", "rgb"), "is the model itself")
    assert (copy.read_bytes(), picture.read_bytes()) == (small.read_bytes(), photo.read_bytes())
    answer = call("compare", small_explained, photo, "--methods", "fem", "-o", tmp_path / "x.png")
    is_refused(
        answer, "is explained already, with gradcam alone; give the original model", tmp_path / "x.png"
    )


def test_filters_and_activations(call, small, small_explained, photo, tmp_path):
    out = tmp_path / "grid.png"
    code, text, err = call("filters", small, "-o", out, "--color", "bgr")
    assert (code, text, err) == (0, f"6 colour filters 3x3 of conv1: {out}\n", "")
    with Image.open(out) as image:
        assert image.format == "PNG"
    assert call("filters", small_explained, "-o", out)[0] == 0
    out.unlink()
    is_refused(call("filters", small, "-o", out), "which order its colours are; give --color", out)
    is_refused(call("filters", small, "-o", out, "--color", "gray"), "color is GRAY; three channels are", out)
    for model, facts in ((small, FLAGS), (small_explained, ())):
        code, text, err = call("activations", model, photo, "-o", out, "--layer", "conv", *facts)
        assert (code, text, err) == (0, f"6 channels 8x12 of conv: {out}\n", "")
        assert out.exists()
        out.unlink()
    is_refused(call("activations", small, photo, "-o", out), "color, scale, mean, std, resize unknown", out)
    is_refused(
        call("activations", small, photo, *FLAGS, "--layer", "flat", "-o", out), "layer 'flat' is", out
    )


def test_labels_file(call, small, photo, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_bytes("\ufeffKatze\r\n Hund \r\nKuh\r\nPferd, weiß\r\n\r\n".encode())
    code, text, _ = call(
        "run", small, photo, *FLAGS, "--labels", labels, "-c", "hund", "-c", 3, "-o", tmp_path / "o"
    )
    assert code == 0
    assert "why Hund?" in text
    assert {p.name for p in (tmp_path / "o").iterdir()} == {
        "photo.1-Hund.png",
        "photo.3-Pferd-weiß.png",
        "photo.panel.png",
    }


def test_odd_labels_make_usable_file_names(call, small, photo, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("../../etc/passwd\n???\n3\n" + "long " * 100 + "\n")
    code, _, _ = call("run", small, photo, *FLAGS, "--labels", labels, "-c", "top4", "-o", tmp_path / "o")
    assert code == 0
    long = "-".join(["long"] * 12)
    assert {p.name for p in (tmp_path / "o").iterdir()} == {
        "photo.0-etc-passwd.png",
        "photo.1.png",
        "photo.2-3.png",
        f"photo.3-{long}.png",
        "photo.panel.png",
    }


def test_same_names_in_different_folders_do_not_overwrite_each_other(call, small_explained, photo, tmp_path):
    pictures = []
    for place in ("a/x.png", "b/x.png", "b/X.jpg", "c/x-2.png"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (len(pictures) + 10, 10), (200, 40 * len(pictures), 0)).save(path)
        pictures.append(path)
    code, text, _ = call("run", small_explained, *pictures, "--json", "-c", 0, "-o", tmp_path / "o")
    assert code == 0
    rows = [json.loads(line) for line in text.splitlines()]
    for width, row in enumerate(rows, 10):
        with Image.open(row["explanations"][0]["overlay"]) as image:
            assert image.width == width
    assert len({path.name.casefold() for path in (tmp_path / "o").iterdir()}) == 8  # also where X is x


def test_file_names_that_are_no_text(small_explained, photo, tmp_path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(photo.read_bytes())
    for json_ in ((), ("--json",)):
        code, text, err = finished("run", small_explained, os.fsdecode(odd), *json_, "-o", tmp_path / "o")
        assert (code, err) == (0, "")
        if json_:
            assert json.loads(text)["image"] == os.fsdecode(odd)


# Pictures that need care


def cmyk(path):
    Image.new("CMYK", (40, 30), (0, 200, 0, 20)).save(path, "JPEG")


def grey16(path):
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(path, "PNG")


def palette(path):
    Image.radial_gradient("L").resize((40, 30)).convert("P").save(path, "PNG")


def alpha(path):
    Image.new("RGBA", (40, 30), (200, 0, 0, 100)).save(path, "PNG")


def animated(path):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def rotated(path):
    image = Image.new("RGB", (30, 40), "green")
    exif = image.getexif()
    exif[0x0112] = 8
    image.save(path, "JPEG", exif=exif)


def one_pixel(path):
    Image.new("1", (1, 1)).save(path, "PNG")


@pytest.mark.parametrize("make", [cmyk, grey16, palette, alpha, animated, rotated, one_pixel])
def test_pictures_of_every_kind(call, small_explained, tmp_path, make):
    make(tmp_path / "picture")
    code, _, err = call("run", small_explained, tmp_path / "picture", "-c", "cat", "-o", tmp_path / "o")
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "o" / "picture.0-cat.png") as image:
        assert image.size == ((1, 1) if make is one_pixel else (40, 30))


# Pictures that cannot be


def bomb(path):
    """A PNG whose header claims 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def short_jpeg(path):
    data = io.BytesIO()
    Image.effect_noise((400, 300), 90).save(data, "JPEG")
    path.write_bytes(data.getvalue()[:5000])


BAD_PICTURES = {
    "missing": (lambda path: None, "No such file"),
    "empty": (Path.touch, "is empty"),
    "folder": (Path.mkdir, "[Ii]s a directory"),
    "text": (lambda path: path.write_text("hello\nworld"), "is not a picture"),
    "short_jpeg": (short_jpeg, "cut short"),
    "bomb": (bomb, "too large"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_picture(call, small_explained, tmp_path, kind):
    make, message = BAD_PICTURES[kind]
    picture = tmp_path / "x y.png"
    make(picture)
    answer = call("run", small_explained, picture, "-o", tmp_path / "out")
    is_refused(
        answer,
        f"{re.escape(str(picture))}.*{message}|cannot read {re.escape(str(picture))}",
        tmp_path / "out",
    )
    assert re.search(message, answer[2])


def test_of_several_pictures_the_rest_go_on(small_explained, photo, tmp_path):
    short_jpeg(tmp_path / "short.jpg")
    (tmp_path / "text.txt").write_text("no picture")
    pictures = [tmp_path / "short.jpg", photo, tmp_path / "text.txt", photo]
    code, text, err = finished("run", small_explained, *pictures, "--json", "-c", 1, "-o", tmp_path / "o")
    assert code == 1
    assert [json.loads(line)["image"] for line in text.splitlines()] == [str(photo)] * 2
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("onnxcam: ")
    assert "short.jpg" in lines[0]
    assert "text.txt" in lines[1]
    assert len(list((tmp_path / "o").iterdir())) == 4


# Models that cannot be


def write(data):
    return lambda path: path.write_bytes(data)


def make(**options):
    return lambda path: saved(path.parent, path.name, **options)


def short_onnx(path):
    make()(path)
    path.write_bytes(path.read_bytes()[:-300])


def outside(path):
    """Weights that lie in the folder above."""
    model = classifier()
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    (path.parent / "weights.bin").rename(path.parent.parent / f"{path.parent.name}.bin")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../{path.parent.name}.bin"
    path.write_bytes(model.SerializeToString())


def beside(change):
    """Weights in a file beside the model, to which something happens."""

    def build(path):
        onnx.save(classifier(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        change(path.parent / "weights.bin")

    return build


def loop(path):
    """A Loop, through which there is no gradient, on the way."""
    step, condition = floats("i", []), floats("c", [])
    step.type.tensor_type.elem_type, condition.type.tensor_type.elem_type = (
        TensorProto.INT64,
        TensorProto.BOOL,
    )
    still = helper.make_tensor_value_info("c2", TensorProto.BOOL, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Neg", ["x"], ["y"])],
        "body",
        [step, condition, floats("x", None)],
        [still, floats("y", None)],
    )
    extra = [helper.make_node("Loop", ["trips", "", "features"], ["changed"], "round_and_round", body=body)]
    saved(path.parent, path.name, extra=extra, weights=[numpy_helper.from_array(np.array(3), "trips")])


def wobble(path):
    extra = [helper.make_node("Wobble", ["features"], ["changed"], "wobbly", domain="com.example")]
    saved(path.parent, path.name, extra=extra)


def no_picture(path):
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["tokens"], ["y"])],
        "g",
        [floats("tokens", [1, 7])],
        [floats("y", [1, 7])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def second_picture(path):
    extra = [helper.make_node("Mul", ["features", "mask"], ["changed"])]
    saved(path.parent, path.name, extra=extra, inputs=[floats("mask", ["N", 1, 8, 12])])


def two_scores(path):
    extra = [
        helper.make_node("GlobalMaxPool", ["features"], ["most"]),
        helper.make_node("Flatten", ["most"], ["others"]),
    ]
    saved(path.parent, path.name, extra=extra, outputs=[floats("others", ["N", 6])])


BAD_MODELS = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (Path.mkdir, "is a folder"),
    "empty": (Path.touch, "is empty"),
    "text": (write(b"hello, world\n" * 50), "is not an ONNX file, or it is cut short"),
    "zeros": (write(b"\0" * 500), "is not an ONNX file, or it is cut short"),
    "short": (short_onnx, "is not an ONNX file, or it is cut short"),
    "no_weights": (beside(Path.unlink), r"the file with its weights, weights\.bin, is not beside it"),
    "short_weights": (beside(lambda path: os.truncate(path, 50)), r"weights\.bin, is cut short"),
    "outside": (outside, r"point to '\.\./.*\.bin', outside the model's folder"),
    "no_picture": (no_picture, r"no image-like input .*; its inputs: 'tokens' \[1,7\]"),
    "two_pictures": (second_picture, r"2 image-like inputs \('image', 'mask'\)"),
    "two_scores": (two_scores, r"choose one with --scores\. Its outputs: 'scores' \[N,4\], 'others' \[N,6\]"),
    "loop": (loop, r"no gradient rule for the operator Loop \(node 'round_and_round'\)"),
    "wobble": (wobble, r"operator com\.example\.Wobble \(node 'wobbly'\)|onnxruntime cannot load .*Wobble"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
@pytest.mark.parametrize("command", ["attach", "run", "layers"])
def test_bad_model(call, photo, tmp_path, kind, command):
    build, message = BAD_MODELS[kind]
    model, out = tmp_path / "in" / "bad.onnx", tmp_path / "out"
    model.parent.mkdir()
    build(model)
    before = sorted(tmp_path.rglob("*"))
    if command == "layers":
        if kind in ("loop", "wobble"):
            return  # their layers can be listed
        answer = call("layers", model)
    elif command == "attach":
        answer = call(
            "attach", model, "-o", out, *(["--layer", "features"] if kind in ("loop", "wobble") else [])
        )
    else:
        answer = call("run", model, photo, *FLAGS, "--layer", "features", "-o", out)
    is_refused(answer, message, out)
    assert sorted(tmp_path.rglob("*")) == before


# Options that cannot be


BAD_ATTACH = {
    "unknown layer": (["--layer", "featurs"], "no layer 'featurs' .did you mean 'features'"),
    "layer after the scores": (["--layer", "scores"], "layer 'scores' comes after the scores"),
    "layer that is no map": (["--layer", "flat"], r"layer 'flat' is \[N,6\]; a map needs"),
    "method": (["--method", "gradcan"], "no method 'gradcan' .did you mean 'gradcam'"),
    "emit": (
        ["--emit", "cam,heat"],
        "output is 'heat'; it must be one of cam, heatmap, overlay, activations, gradients",
    ),
    "emit nothing": (["--emit", ","], "nothing to emit"),
    "class input": (
        ["--class-input", "never"],
        "class input is 'never'; it must be one of optional, required",
    ),
    "score": (["--score", "during"], "score is 'during'; it must be one of before, after"),
    "evidence": (
        ["--evidence", "none"],
        "evidence is 'none'; it must be one of for, against, both, counterfactual",
    ),
    "fuse": (["--fuse", "sum"], "fuse is 'sum'; it must be one of mean, max, product"),
    "smooth": (["--smooth", "blur"], "smoothing is 'blur'; it must be one of augmentation, eigen"),
    "compat": (["--compat", "keras"], "compat is 'keras'; it must be one of paper"),
    "empty layer": (["--layer", ""], "no layer ''"),
    "one of the layers": (["--layer", "conv", "--layer", "cnv"], "no layer 'cnv' .did you mean 'conv'"),
    "activations of several": (
        ["--layer", "conv", "--layer", "features", "--emit", "activations"],
        "activations are those of one layer; there are several",
    ),
    "attributions of a map": (
        ["--method", "eigencam", "--emit", "attributions"],
        "eigencam is not a sum over channels: it has no attributions",
    ),
    "scores": (["--scores", "score"], "no output 'score' .did you mean 'scores'"),
    "size": (["--size", "224x"], "size is '224x'; it must be PIXELS or HEIGHTxWIDTH"),
    "size zero": (["--size", "0"], "height is given as 0"),
    "another size": (["--size", "9x12"], "height is given as 9"),
    "color": (["--color", "hsv"], "color is 'HSV'; it must be one of RGB, BGR, GRAY"),
    "channels": (["--color", "gray"], "color is GRAY, but the model's input has 3 channels"),
    "scale": (["--scale", "1/0"], "'1/0' is not a number"),
    "scales": (["--scale", "1,2"], "scale is '1,2'; it must be one number"),
    "scale nan": (["--scale", "nan"], "scale is nan; it must be a number"),
    "mean": (["--mean", "0.5,x"], "'0.5,x' is not a number, or numbers with commas between"),
    "means": (
        ["--color", "rgb", "--mean", "1,2"],
        "mean has 2 values; give one, or one for each channel of RGB",
    ),
    "empty mean": (["--mean", ""], "'' is not a number"),
    "std": (["--std", "0"], r"std is \[0.0\]; every value must be above zero"),
    "std inf": (["--std", "inf"], r"std is \[inf\]"),
    "resize": (["--resize", "fit"], "resize is 'fit'; it must be stretch, crop or crop:PIXELS"),
    "resize too small": (["--resize", "crop:3"], "resize is 'crop:3'; the crop itself needs 12 pixels"),
    "interpolation": (["--interpolation", "area"], "interpolation is 'area'; it must be one of nearest"),
    "layout": (["--layout", "chw"], "layout is 'CHW'; it must be one of NCHW, NHWC"),
    "no labels file": (["--labels", "/nowhere/labels.txt"], "labels.txt cannot be read: No such file"),
    "labels folder": (["--labels", "/"], "/ cannot be read: Is a directory"),
    "labels binary": (["--labels", ROOT / "models/chelsea.png"], "is not a text file"),
    "labels count": (
        ["--labels", ROOT / "models/imagenet_labels.txt"],
        "there are 1000 labels for 4 classes",
    ),
}


@pytest.mark.parametrize("kind", BAD_ATTACH)
@pytest.mark.parametrize("command", ["attach", "run"])
def test_bad_option(call, small, photo, tmp_path, kind, command):
    options, message = BAD_ATTACH[kind]
    out = tmp_path / "out"
    if command == "attach":
        answer = call("attach", small, "-o", out, *options)
    elif {"--emit", "--class-input"}.intersection(options):
        return  # not an option of run
    else:
        answer = call("run", small, photo, *FLAGS, *options, "-o", out)
    is_refused(answer, message, out)
    assert not list(tmp_path.iterdir())


def test_layer_that_does_not_influence_the_scores(call, tmp_path):
    extra = [helper.make_node("Sigmoid", ["features"], ["aside"], "aside")]
    model = saved(tmp_path, extra=extra, outputs=[floats("aside", ["N", 6, 8, 12])])
    out = tmp_path / "out.onnx"
    answer = call("attach", model, "-o", out, "--layer", "aside")
    is_refused(answer, "layer 'aside' does not influence the scores", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-c", "4"], r"class 4 is out of range: the model has 4 classes \(0 to 3"),
        (["-c", "-5"], "class -5 is out of range"),
        (["-c", "top5"], "class -5 is out of range"),
        (["-c", "dgo"], r"no class is called 'dgo' \(did you mean 'dog'\?\)"),
        (["-c", "cat", "-c", ""], "a class is empty; give an index, a label or top3"),
        (["--provider", "cuda"], "provider 'cuda' is not available; this onnxruntime has: cpu"),
        (["--layer", "conv"], "explained already, with layer 'features' instead of 'conv'"),
        (["--method", "cam"], "explained already, with method 'gradcam' instead of 'cam'"),
        (
            ["--layer", "conv", "--layer", "features"],
            "explained already, with layer 'features' instead of 'conv, features'",
        ),
        (["--evidence", "both"], "explained already, without evidence 'both'; attach to the original"),
        (["--fuse", "max"], "explained already, without fuse 'max'"),
        (["--smooth", "eigen"], "explained already, without smooth 'eigen'"),
        (["--compat", "captum"], "explained already, with compat 'paper' instead of 'captum'"),
        (["--labels", os.devnull], "there are 0 labels for 4 classes"),
    ],
)
@pytest.mark.parametrize("pictures", [1, 2])
def test_bad_option_of_run(call, small_explained, photo, tmp_path, options, message, pictures):
    answer = call("run", small_explained, *[photo] * pictures, *options, "-o", tmp_path / "out")
    is_refused(answer, message, tmp_path / "out")


def test_missing_facts(call, small, photo, tmp_path):
    answer = call("run", small, photo, photo, "--mean", "0.5", "-o", tmp_path / "out")
    is_refused(
        answer, "color, scale, std, resize unknown; give --color, --scale, --std, --resize", tmp_path / "out"
    )


def test_explained_model_is_not_attached_again(call, small_explained, tmp_path):
    out = tmp_path / "x.onnx"
    is_refused(call("attach", small_explained, "-o", out), "explained already", out)


def test_opacity_is_that_of_the_pictures():
    for command in (onnxcam.cli.run, onnxcam.cli.compare):
        assert inspect.signature(command).parameters["opacity"].default == onnxcam.render.OPACITY


# Places that cannot be written to


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "file is not a folder; choose another with --output"),
        ("file/below", "file is not a folder; choose another with --output"),
        ("/proc/onnxcam", "cannot be made: No such file or directory"),
        ("/sys/kernel/onnxcam/x", "cannot be made: "),
        ("x" * 300, "cannot be made: File name too long"),
    ],
)
def test_output_folder_that_cannot_be_written(call, small_explained, photo, tmp_path, place, message):
    (tmp_path / "file").touch()
    answer = call("run", small_explained, photo, photo, "-o", tmp_path / place)
    is_refused(answer, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("folder", "is a folder; give the name of the file to write"),
        ("no/where.onnx", "the folder .*no does not exist"),
        ("model.onnx", "is the model itself, which stays as it is"),
        ("link.onnx", "is the model itself, which stays as it is"),
        ("/proc/x.onnx", "cannot be written: "),
        ("x" * 300, "cannot be written: File name too long"),
    ],
)
def test_output_file_that_cannot_be_written(call, tmp_path, place, message):
    model = saved(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.onnx").symlink_to(model)
    before = model.read_bytes()
    is_refused(call("attach", model, "-o", tmp_path / place), message)
    assert model.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "folder", "link.onnx"}


def test_full_disk_is_one_line(call, small_explained, photo, tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    answer = call("run", small_explained, photo, photo, photo, "-c", "cat", "-o", tmp_path / "out")
    is_refused(answer, r"cannot write .*out/photo\.0-cat\.png: No space left on device")
    assert not list((tmp_path / "out").iterdir())


def test_too_little_memory_is_one_line(call, small_explained, photo, tmp_path, monkeypatch):
    def large(self, *arguments, **options):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", large)
    is_refused(
        call("run", small_explained, photo, "-o", tmp_path / "out"), "not enough memory", tmp_path / "out"
    )


# Use


def test_the_documentation_holds_the_help():
    """Made by: make docs."""
    page = runpy.run_path(str(ROOT / "docs" / "cli.py"))["page"]()
    assert (ROOT / "docs" / "cli.md").read_text() == page + "\n"
    assert re.findall(r"^## onnxcam (.*)$", page, re.MULTILINE) == list(COMMANDS)
    for names in (EMITS, EVIDENCE, FUSIONS, SMOOTHINGS, SCORES, CLASS_INPUTS):
        assert all(name in page for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(call, command):
    code, text, err = call(command, "--help")
    assert (code, err) == (0, "")
    facts = "--labels --size --color --scale --mean --std --resize --interpolation --layout"
    maps = "--layer --method --evidence --fuse --smooth --compat --score"
    expected = {
        "run": f"--class {maps} --scores --output --provider --json --opacity {facts}",
        "attach": f"--output {maps} --emit --class-input --scores {facts}",
        "layers": "--scores --json",
        "export": f"--output --weights --input-size {maps} --emit --class-input --labels "
        "--color --scale --mean --std --resize --interpolation",
        "compare": f"--methods --output --class {maps} --scores --provider --opacity {facts}".replace(
            " --method ", " --target --against "
        ),
        "filters": "--output --color --scores",
        "activations": f"--output --layer --scores {facts}".replace(" --labels", ""),
        "methods": "--json",
        "verify": "--against",
        "operators": "",
        "web": "--port --single-file --fetch",
    }[command].split()
    assert set(expected) <= set(re.findall(r"--[a-z-]+", text))


def test_help_lists_the_commands(call):
    code, text, _ = call("--help")
    assert code == 0
    assert all(re.search(rf"^  {command} ", text, re.MULTILINE) for command in COMMANDS)
    assert call("--version")[1] == f"onnxcam {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run"],
        ["run", "model.onnx"],
        ["run", "model.onnx", "x.png", "--colour", "rgb"],
        ["run", "model.onnx", "x.png", "--provider", "tpu"],
        ["run", "model.onnx", "x.png", "--opacity", "2"],
        ["run", "model.onnx", "x.png", "--opacity", "nan"],
        ["attach", "model.onnx"],
        ["layers"],
        ["export"],
    ],
)
def test_wrong_use_exits_with_2(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err
    assert "Traceback" not in err


def test_wrong_use_in_a_process_of_its_own(tmp_path):
    code, out, err = finished("run", "model.onnx", "x.png", "--provider", "tpu", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "cpu" in err
    code, out, err = finished("run", "model.onnx", "x.png", cwd=tmp_path)
    assert (code, out, err) == (2, "", "onnxcam: model.onnx does not exist\n")
    assert not list(tmp_path.iterdir())


# Terminals, pipes and signals


def in_terminal(*arguments, stdout_too=True):
    """Run with stderr, and stdout if asked, on a terminal; return the exit code, the screen and the pipe."""
    ours, theirs = pty.openpty()
    pipe = {"stdout": theirs} if stdout_too else {}
    with started(*arguments, stderr=theirs, **pipe) as process:
        os.close(theirs)
        piped = b"" if stdout_too else process.stdout.read()
        screen = b""
        while True:
            try:
                read = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not read:
                break
            screen += read
    os.close(ours)
    return process.returncode, screen.decode(), piped.decode()


def seen(screen):
    """What a terminal shows in the end: a cleared line is gone."""
    return [line.rpartition("\r\x1b[2K")[2] for line in screen.split("\r\n")]


def test_progress_bar_on_a_terminal(small_explained, photo, tmp_path):
    code, screen, _ = in_terminal("run", small_explained, photo, photo, "nowhere.png", "-o", tmp_path)
    assert code == 1
    assert f"[{'.' * 40}] 0 of 3 pictures" in screen
    assert f"[{'#' * 26}{'.' * 14}] 2 of 3 pictures" in screen
    lines = seen(screen)
    assert lines[0] == lines[7] == str(photo)
    assert lines[-2:] == ["onnxcam: cannot read nowhere.png: No such file or directory", ""]
    assert not any("pictures" in line for line in lines)


def test_progress_bar_leaves_what_is_piped_alone(small_explained, photo, tmp_path):
    code, screen, piped = in_terminal(
        "run", small_explained, photo, photo, "nowhere.png", "--json", "-o", tmp_path, stdout_too=False
    )
    assert code == 1
    assert [json.loads(line)["image"] for line in piped.splitlines()] == [str(photo)] * 2
    assert "1 of 3 pictures" in screen
    assert seen(screen) == ["onnxcam: cannot read nowhere.png: No such file or directory", ""]


def test_no_progress_bar_for_one_picture_or_in_a_pipe(small_explained, photo, tmp_path):
    code, screen, _ = in_terminal("run", small_explained, photo, "-o", tmp_path)
    assert code == 0
    assert "pictures" not in screen
    code, text, err = finished("run", small_explained, photo, photo, "-o", tmp_path)
    assert (code, err) == (0, "")
    assert "pictures" not in text
    assert "\x1b" not in text


def test_reader_that_goes_away(small_explained, photo, tmp_path):
    process = started("run", small_explained, *[photo] * 20, "-o", tmp_path)
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert b"Traceback" not in err
    assert b"Exception" not in err


def test_interrupt(small_explained, photo, tmp_path):
    # What is ignored stays so in a child: SIGINT is, under a shell's `&`.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = started("run", small_explained, *[photo] * 2000, "-o", tmp_path)
    signal.signal(signal.SIGINT, inherited)
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, 2)
    assert b"Traceback" not in err
    assert not list(tmp_path.glob(".*"))


def test_a_picture_that_may_not_be_read_is_reported_and_the_rest_go_on(
    call, monkeypatch, small_explained, photo, tmp_path
):
    locked = tmp_path / "locked.png"
    locked.write_bytes(photo.read_bytes())
    read, access = Path.read_bytes, os.access

    def may_read(path):
        return Path(path).name != locked.name

    def guarded(path):
        if not may_read(path):
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    monkeypatch.setattr(os, "access", lambda path, mode: may_read(path) and access(path, mode))
    code, out, err = call("run", small_explained, locked, photo, *FLAGS, "-o", tmp_path / "o")
    assert (code, err) == (1, f"onnxcam: cannot read {locked}: Permission denied\n")
    assert photo.name in out
