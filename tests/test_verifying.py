"""Explained models that are as they should be, and ones in which something was changed."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from onnxcam import OnnxcamError, layers, onnxfile, verifying
from onnxcam.attaching import attach
from onnxcam.card import KEY
from onnxcam.cli import app, main
from onnxcam.differences import Tail, slopes
from onnxcam.verifying import verify
from onnxcam.vjp import RULES
from tests.graphs import CLASS_MAPS, DEEP, FLAT_HEAD, LINEAR, RICH, RICH_WEIGHTS, build
from tests.small import FACTS, classifier, saved

EVERYTHING = ("cam", "heatmap", "activations", "gradients", "attributions")
CHECKS = ["card", "graph", "operators", "original", "maps", "gradient", "size"]


@pytest.fixture
def files(tmp_path):
    """Save a model and an explained one beside it."""

    def save(model, **options):
        original, explained = tmp_path / "original.onnx", tmp_path / "explained.onnx"
        onnx.save(model, original)
        attach(original, explained, **options)
        return explained, original

    return save


@pytest.fixture
def deep(files):
    """DEEP, explained at r, as a proto; `verdicts` saves it."""
    explained, _ = files(build(DEEP), layer="r")
    return onnx.load(explained)


@pytest.fixture
def verdicts(tmp_path):
    """Verify a proto; what did not pass, by the name of the check."""

    def of(proto, against=None):
        path = tmp_path / "changed.onnx"
        onnx.save(proto, path)
        report = verify(path, against)
        return {check.name: check.text for check in report.checks if check.passed is False}

    return of


def figures(report):
    assert report.passed, str(report)
    return {check.name: check for check in report.checks}


def distance(report):
    """The figure of the gradient."""
    check = figures(report)["gradient"]
    assert check.passed, check.text
    return max(float(part.split()[2]) for part in check.text.split("; "))


# Each with the distance of the gradient that it may have: ten times what was measured.
GOOD = {
    "gradcam": (RICH, {}, 1e-6),
    "a layer before a pool that has ties": (RICH, {"layer": "r1"}, 1e-6),
    "a layer whose values pass elsewhere too": (RICH, {"layer": "h3"}, 1e-6),
    "two layers": (RICH, {"layer": ["r1", "cat"], "fuse": "max"}, 1e-6),
    "at the picture": (RICH, {"method": "saliency"}, 1e-6),
    "every output": (RICH, {"emit": EVERYTHING}, 1e-6),
    "contrast": (RICH, {"target": "contrast"}, 1e-6),
    "rivals": (RICH, {"target": "rivals"}, 1e-6),
    "a seed": (RICH, {"target": "seed"}, 1e-6),
    "after the softmax": (CLASS_MAPS, {"score": "after"}, 1e-6),
    "before the softmax": (CLASS_MAPS, {}, 1e-6),
    "classes required": (RICH, {"class_input": "required"}, 1e-6),
    "portable": (DEEP, {"layer": "r", "portable": True}, 1e-6),
    "a dialect": (RICH, {"compat": "pytorch-grad-cam"}, 1e-6),
    "evidence and smoothing": (RICH, {"evidence": "counterfactual", "smooth": ["augmentation"]}, 1e-6),
    "a linear head": (LINEAR, {"method": "cam"}, 1e-6),
    "tanh behind a matrix": (FLAT_HEAD, {}, 1e-5),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_attach_makes_passes(files, name):
    graph, options, most = GOOD[name]
    explained, original = files(build(graph, **(RICH_WEIGHTS if graph is RICH else {})), **options)
    report = verify(explained, original)
    assert [check.name for check in report.checks] == CHECKS
    assert distance(report) <= most
    found = figures(report)
    assert "weights equal, outputs identical to those of" in found["original"].text
    assert found["maps"].text.endswith("node for node")
    added = explained.stat().st_size - original.stat().st_size
    assert f"{added:+,} on the original" in found["size"].text


def test_without_the_original(files):
    explained, _ = files(build(DEEP), layer="r")
    report = verify(explained)
    assert distance(report) <= 1e-6
    assert figures(report)["original"].text == (
        "outputs identical to those of the file without what was added"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"nhwc": True},
        {"batch": 3},
        {"classes": 1},
        {"classes": 2},
        {"opset": 11},
        {"softmax": True},
        {"size": ("H", "W")},
    ],
    ids=str,
)
def test_kinds_of_models(files, options):
    explained, original = files(classifier(**options), **FACTS)
    assert distance(verify(explained, original)) <= 3e-6


@pytest.mark.parametrize(
    "options",
    [
        {"embed_preprocess": True, "on_demand": True, "emit": ("cam", "heatmap", "overlay")},
        {"embed_preprocess": True, "class_input": "required", "method": "saliency"},
        {"embed_preprocess": True, "target": "seed"},
        {"on_demand": True, "class_input": "required"},
    ],
    ids=str,
)
def test_pictures_and_demand(files, options):
    explained, original = files(classifier(size=("H", "W")), height=16, width=20, **FACTS, **options)
    report = verify(explained, original)
    assert distance(report) <= 3e-6
    assert ("picture" in figures(report)) == ("embed_preprocess" in options)


@pytest.mark.parametrize(("field", "value"), [("scale", 1 / 127), ("mean", [0.45]), ("color", "BGR")])
def test_a_picture_that_is_prepared_in_another_way(files, verdicts, field, value):
    explained, _ = files(classifier(), embed_preprocess=True, **FACTS)
    proto = onnx.load(explained)
    entry = next(entry for entry in proto.metadata_props if entry.key == KEY)
    card(proto, input={**json.loads(entry.value)["input"], field: value})
    assert "picture" in verdicts(proto)


def test_maps_that_nobody_asked_for(files, verdicts):
    explained, _ = files(classifier(), on_demand=True)
    proto = onnx.load(explained)
    choice = next(n for n in proto.graph.node if n.op_type == "If")
    for attribute in choice.attribute:
        if attribute.name == "then_branch":
            made = attribute.g
    for attribute in choice.attribute:
        attribute.g.CopyFrom(made)
    assert "is made where cam_wanted is false" in verdicts(proto)["maps"]


def test_a_picture_that_the_graph_does_not_take(files, verdicts):
    explained, _ = files(classifier())
    proto = onnx.load(explained)
    card(proto, picture="cam_picture")
    assert "the card's picture is 'cam_picture'" in verdicts(proto)["card"]


def test_half_precision(files):
    explained, original = files(build(FLAT_HEAD, dtype="float16"))
    assert distance(verify(explained, original)) <= 2e-2  # 2e-3 here: twice the last bit


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "eigencam"}, "eigencam has none"),
        ({"method": "scorecam"}, "scorecam has none"),
        ({"method": "guidedbackprop"}, "goes by another rule"),
    ],
    ids=str,
)
def test_what_has_no_derivative_is_said(files, options, reason):
    explained, original = files(build(RICH, **RICH_WEIGHTS), **options)
    check = figures(verify(explained, original))["gradient"]
    assert check.passed is None
    assert reason in check.text


def test_rounded_scores_have_no_derivative(files):
    graph = DEEP.replace("T[6,5] fc", "T[6,5] fc, T step = {0.01}, uint8 zero = {0}").replace(
        "s = Relu(d)", "q = QuantizeLinear(d, step, zero) e = DequantizeLinear(q, step, zero) s = Relu(e)"
    )
    explained, original = files(build(graph), layer="r")
    check = figures(verify(explained, original))["gradient"]
    assert check.passed is None
    assert "rounded" in check.text


def test_operators_on_stored_numbers(files):
    """They are unfolded while gradients are made, and folded again in the file."""
    graph = """(T[N,3,8,10] x) => (T[N,5] scores)
    <T[4,5] fc, T step = {0.05}, uint8 zero = {3}, int8[4,3,3,3] w, T wide = {0.02}, int8 none = {0}>
    {
        q = QuantizeLinear(x, step, zero)
        c = QLinearConv<kernel_shape=[3,3], pads=[1,1,1,1]>(q, step, zero, w, wide, none, step, zero)
        d = DequantizeLinear(c, step, zero)
        r = Relu(d)
        p = GlobalAveragePool(r)
        f = Flatten(p)
        scores = MatMul(f, fc)
    }"""
    weights = np.random.default_rng(0).integers(-99, 99, (4, 3, 3, 3))
    explained, original = files(build(graph, w=weights), layer="r")
    assert distance(verify(explained, original)) <= 1e-6
    explained, original = files(build(graph, w=weights), method="saliency")
    found = figures(verify(explained, original))
    assert "weights equal, outputs identical" in found["original"].text
    assert "rounded" in found["gradient"].text


def test_the_original_s_own_foreign_operators_are_named(files):
    extra = [
        helper.make_node("QuickGelu", ["features"], ["changed"], "gelu", domain="com.microsoft", alpha=1.702)
    ]
    explained, original = files(classifier(extra=extra), layer="features")
    found = figures(verify(explained, original))
    assert "the original itself has com.microsoft.QuickGelu" in found["operators"].text
    assert found["gradient"].passed is None
    assert "reference evaluator cannot run" in found["gradient"].text


def test_branches_are_closed_again(files):
    graph = """(T[N,3,8,10] x) => (T[N,5] scores) <T[4,3,3,3] w, T[4,5] fc, T zero = {0}>
    {
        c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
        m = ReduceMax<keepdims=0>(x)
        on = Greater(m, zero)
        s = If(on) <
            then_branch = t () => (T[N,4,8,10] y0) { b = Tanh(c) y0 = Exp(b) },
            else_branch = e () => (T[N,4,8,10] z0) { z0 = Sigmoid(c) }>
        p = GlobalAveragePool(s)
        f = Flatten(p)
        scores = MatMul(f, fc)
    }"""
    explained, original = files(build(graph), layer="c")
    outputs = [node.output for node in onnx.load(explained).graph.node if node.name.startswith("If")]
    assert len(outputs[0]) > 1
    assert distance(verify(explained, original)) <= 1e-6


# What somebody may change, and the check that must fail.


def node(proto, part, op_type):
    """The first node of that operator, in a Scan's body too, whose name has that part."""
    nodes = list(proto.graph.node)
    for n in nodes:
        nodes.extend(inner for a in n.attribute for inner in a.g.node)
    return next(n for n in nodes if part in n.name and n.op_type == op_type)


def change(proto, name, values):
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values(array), array.dtype), name))


def card(proto, **fields):
    entry = next(entry for entry in proto.metadata_props if entry.key == KEY)
    entry.value = json.dumps({**json.loads(entry.value), **fields})


def test_a_constant_of_the_gradient(deep, verdicts):
    change(deep, "cam/gradcam/gradient/GlobalAveragePool_4/constant", lambda a: a * 1.001)
    assert verdicts(deep).keys() == {"maps"}


def test_a_sign(deep, verdicts):
    attributes = node(deep, "/gradient/Relu", "HardSigmoid").attribute
    next(each for each in attributes if each.name == "alpha").f *= -1
    assert verdicts(deep).keys() == {"maps"}


def test_an_operator(deep, verdicts):
    node(deep, "/gradient/", "Reshape").attribute.append(helper.make_attribute("allowzero", 0))
    assert not verdicts(deep)
    relu = node(deep, "cam/gradcam", "Relu")
    relu.op_type = "Abs"
    assert verdicts(deep).keys() == {"maps"}


def test_a_weight_and_a_node_of_the_original(deep, verdicts, tmp_path):
    change(deep, "v", lambda a: a * (1 + 1e-6))
    assert not verdicts(deep)  # nothing says what it was
    assert verdicts(deep, tmp_path / "original.onnx")["original"].startswith("weight 'v' is not that of")
    deep = onnx.load(tmp_path / "explained.onnx")
    next(n for n in deep.graph.node if n.op_type == "Flatten").attribute.append(
        helper.make_attribute("axis", 1)
    )
    assert verdicts(deep, tmp_path / "original.onnx")["original"].startswith(
        "node 'Flatten_5' is not that of"
    )


def test_an_output_of_the_original(deep, verdicts):
    at, last = next((i, n) for i, n in enumerate(deep.graph.node) if "scores" in n.output)
    last.output[0] = "before"
    deep.graph.node.insert(at + 1, helper.make_node("Add", ["before", "cam/one"], ["scores"], "cam/more"))
    deep.graph.initializer.append(numpy_helper.from_array(np.float32(1), "cam/one"))
    assert "'cam/more' has influence on an output of the original" in verdicts(deep)["card"]


def test_a_foreign_operator(deep, verdicts):
    found = node(deep, "cam/gradcam", "Relu")
    name = found.output[0]
    found.output[0] = "plain"
    at = list(deep.graph.node).index(found)
    deep.graph.node.insert(
        at + 1, helper.make_node("QuickGelu", ["plain"], [name], "mine", domain="com.microsoft")
    )
    deep.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert "'mine' is com.microsoft.QuickGelu" in verdicts(deep)["operators"]


def test_functions(deep, verdicts):
    deep.functions.append(
        helper.make_function(
            "own", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 18)]
        )
    )
    deep.opset_import.append(helper.make_opsetid("own", 1))
    assert verdicts(deep).keys() == {"operators"}


@pytest.mark.parametrize(
    ("fields", "check", "text"),
    [
        ({"method": "gradcan"}, "card", "there is no method 'gradcan' (did you mean"),
        ({"layer": "q"}, "card", "the model has no layer 'q'"),
        ({"layer": "scores"}, "card", "comes after the scores"),
        ({"scores": "r"}, "card", "the model has no output 'r'"),
        ({"scores_are": "probabilities"}, "card", "of scores_are: 'probabilities'; the graph says 'logits'"),
        ({"grid": "channels last"}, "card", "it says of grid: 'channels last'; the graph says None"),
        ({"labels": ["cat", "dog"]}, "card", "there are 2 labels for 5 classes"),
        ({"format": 2}, "card", "has format 2"),
        ({"target": "everything"}, "card", "target is 'everything'"),
        ({"compat": "nobody"}, "card", "compat is 'nobody'"),
        ({"input": {"name": "y"}}, "card", "it says of input"),
        ({"input": {"name": "x", "height": 9}}, "card", "height is given as 9"),
        ({"target": "contrast"}, "graph", "its inputs are x, cam_class; they should be"),
        ({"method": "hirescam"}, "maps", "off what this onnxcam makes"),
        ({"layer": "s"}, "graph", "'cam' is float [N,cam_classes,8,10]; it should be"),
        ({"layer": "c"}, "maps", "off what this onnxcam makes"),
        ({"score": "after"}, "maps", "off what this onnxcam makes"),
        ({"evidence": "both"}, "maps", "off what this onnxcam makes"),
    ],
    ids=str,
)  # fmt: skip
def test_a_card_that_says_something_else(deep, verdicts, fields, check, text):
    card(deep, **fields)
    assert text in verdicts(deep)[check]


def test_a_graph_that_is_not_valid(deep, verdicts):
    node(deep, "cam/gradcam", "Relu").input.append("r")
    found = verdicts(deep)
    assert found.keys() == {"graph"}
    assert "the explained model is not valid" in found["graph"]


def test_a_damaged_card(deep, verdicts):
    next(entry for entry in deep.metadata_props if entry.key == KEY).value = "{"
    assert "damaged" in verdicts(deep)["card"]


def test_a_truncated_map(deep, verdicts):
    found = next(n for n in deep.graph.node if "cam" in n.output)
    found.output[0] = "whole"
    for name in ("cam/starts", "cam/ends"):
        deep.graph.initializer.append(numpy_helper.from_array(np.array([int(name == "cam/ends") * 7]), name))
    deep.graph.initializer.append(numpy_helper.from_array(np.array([2]), "cam/axes"))
    deep.graph.node.append(
        helper.make_node("Slice", ["whole", "cam/starts", "cam/ends", "cam/axes"], ["cam"], "cam/cut")
    )
    for reader in deep.graph.node:
        if reader.name != "cam/cut":
            reader.input[:] = ["whole" if name == "cam" else name for name in reader.input]
    declared = next(v for v in deep.graph.output if v.name == "cam").type.tensor_type.shape.dim
    declared[2].dim_param = "rows"
    assert verdicts(deep) == {
        "maps": "cam differs in shape, or in what is not finite, from what this onnxcam makes of the model"
    }


def test_another_default_class(deep, verdicts):
    change(deep, "cam_class", lambda a: a + 1)
    assert verdicts(deep) == {"graph": "the default of 'cam_class' is not the documented one"}


def test_a_rule_that_is_wrong_here_too(files, monkeypatch):
    """The file is what this onnxcam makes; only the differences know better."""

    def wrong(op, node, arriving):
        dxs = RULES["", "Tanh"](op, node, arriving)
        return [None if dx is None else op.Mul(dx, 1.001) for dx in dxs]

    monkeypatch.setitem(RULES, ("", "Relu"), wrong)
    explained, original = files(build(DEEP), layer="r")
    report = verify(explained, original)
    assert [check.name for check in report.checks if check.passed is False] == ["gradient"]


def test_slopes_by_hand():
    """y = sum of A^2 over the plane, through weights: along v it rises by 2 <w A, v>."""
    graph = """(T[N,1,2,2] x) => (T[N,2] scores) <T[1,2] w = {3, 5}>
        { a = Neg(x) b = Mul(a, a) p = GlobalAveragePool(b) f = Flatten(p) scores = MatMul(f, w) }"""
    model = onnxfile.normalise(ir.from_proto(build(graph)))
    found = layers.scores(model)
    layer = layers.locate(model, "a", layers.picture(model), found.logits)
    tail = Tail(model, layer.value, layer.grid, found, after=False)
    assert tail.reads == ()
    at = np.arange(4.0).reshape(1, 1, 2, 2)
    v = np.array([1.0, -1.0, 2.0, 0.5]).reshape(1, 1, 2, 2)
    expected = 2 * (at * v).sum() / 4 * np.array([3.0, -5.0])
    weights = np.array([[[1.0, 0.0], [0.0, -1.0]]])
    np.testing.assert_allclose(slopes(tail, at, {}, weights, [v])[0, :, 0], expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("off", "jump", "passed"),
    [
        (0, 0, True),
        (2e-3, 0, False),
        (2e-3, 1e-4, False),
        (2e-3, 1e-3, True),
        (2e-3, 0.1, None),
        (0.5, 0.01, False),
    ],
)
def test_what_a_jump_excuses(off, jump, passed):
    """A gradient that is off, where the derivatives jump if the last bits of the activation change."""
    at, directions = np.ones((2, 1, 1, 3)), [np.eye(3)[i].reshape(1, 1, 1, 3).repeat(2, 0) for i in range(3)]
    slope = np.ones((2, 1, 3))
    g = slope.reshape(2, 1, 1, 1, 3) * (1 + off * np.sqrt(3))

    def slopes(near_by):
        return slope if np.array_equal(near_by, at) else slope * (1 + jump * np.sqrt(3))

    found, text = verifying._judged(g, at, directions, slopes, verifying.NEAR)
    assert found is passed
    assert ("jump" in text) == (off > 0)


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_command(small, small_explained):
    done = invoke(small_explained, "--against", small)
    assert done.exit_code == 0, done.output
    first, *lines = done.output.splitlines()
    assert first == f"{small_explained}: gradcam at features"
    assert [line.split()[:2] for line in lines] == [*(["ok", name] for name in CHECKS[:-1]), ["-", "size"]]


def test_command_on_what_is_wrong(deep, tmp_path):
    card(deep, method="hirescam")
    onnx.save(deep, tmp_path / "changed.onnx")
    done = invoke(tmp_path / "changed.onnx")
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if "FAILED" in line]
    assert line.split()[:2] == ["FAILED", "maps"]


@pytest.mark.parametrize("what", ["plain", "missing", "text", "against explained", "against another"])
def test_command_on_what_cannot_be_checked(small, small_explained, tmp_path, capsys, monkeypatch, what):
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    arguments = {
        "plain": [small],
        "missing": [tmp_path / "none.onnx"],
        "text": [text],
        "against explained": [small_explained, "--against", small_explained],
        "against another": [small_explained, "--against", tmp_path / "none.onnx"],
    }[what]
    monkeypatch.setattr("sys.argv", ["onnxcam", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    if what == "plain":
        assert "is not an explained model" in err


def test_scores_that_are_not_finite(tmp_path):
    path = saved(tmp_path, weights=[])
    proto = onnx.load(path)
    change(proto, "b2", lambda a: a * np.nan)
    onnx.save(proto, path)
    attach(path, tmp_path / "explained.onnx")
    with pytest.raises(OnnxcamError, match="not finite"):
        verify(tmp_path / "explained.onnx")


def test_against_another_model(small_explained, tmp_path):
    other = saved(tmp_path, "other.onnx", classes=5)
    report = verify(small_explained, other)
    assert [check.name for check in report.checks if check.passed is False] == ["original"]
    assert verifying.Check("original", False, f"weight 'w2' is not that of {other}") in report.checks
