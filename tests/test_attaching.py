import hashlib
import json

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from PIL import Image

from onnxcam.attaching import attach, prepared
from onnxcam.card import KEY, Card
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.methods.scaling import heatmap
from tests import checks, graphs
from tests.checks import quiet, reference, relative_error
from tests.graphs import build, explained, picture, run
from tests.test_models import MODELS, ONNX_FILES, for_lite0, for_orientation, for_squeezenet

PHOTO = {
    "efficientnet_lite0.onnx": lambda: for_lite0("cat_and_coffee.png"),
    "pp_lcnet_orientation.onnx": lambda: for_orientation("page.png"),
    "squeezenet1_1.onnx": lambda: for_squeezenet("cat_and_coffee.png"),
}


def torch_gradients(model, x, classes, layer, score="before"):
    """Of RICH, row n*K+k the gradient of the k-th class of image n, by torch in float64."""
    weights = {
        name: array.astype(np.float64) if array.dtype.kind == "f" else array
        for name, array in graphs.weights_of(model).items()
    }
    values = graphs.rich_in_torch(torch.tensor(x.astype(np.float64)).requires_grad_(), weights)
    scores = values["scores"] if score == "before" else values["scores"].softmax(1)
    rows = [
        torch.autograd.grad(scores[n, k], values[layer], retain_graph=True)[0][n].numpy()
        for n in range(len(x))
        for k in classes[n]
    ]
    return values["scores"].detach().numpy(), np.stack(rows)


# The contract: what stays, what is added


@pytest.mark.parametrize("name", ONNX_FILES)
@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_real_models_keep_inputs_outputs_and_values(name, method, tmp_path):
    before = hashlib.sha256((MODELS / name).read_bytes()).hexdigest()
    attach(MODELS / name, tmp_path / "out.onnx", method=method, emit=graphs.EVERYTHING)
    assert hashlib.sha256((MODELS / name).read_bytes()).hexdigest() == before
    plain, added = onnx.load(MODELS / name), onnx.load(tmp_path / "out.onnx")
    assert list(added.graph.input)[: len(plain.graph.input)] == list(plain.graph.input)
    assert list(added.graph.output)[: len(plain.graph.output)] == list(plain.graph.output)
    x = PHOTO[name]()
    feeds = {plain.graph.input[0].name: x}
    wanted, got = run(plain, feeds), run(added, feeds)
    for output, value in wanted.items():
        assert relative_error(got[output], value) <= 1e-5
    assert np.isfinite(got["cam"]).all()
    assert got["cam_heatmap"].max() == 1
    assert got["cam_heatmap"].min() == 0


@pytest.mark.parametrize("name", ONNX_FILES)
def test_real_models_pass_the_checker_and_declare_every_output(name, tmp_path):
    attach(MODELS / name, tmp_path / "out.onnx", emit=graphs.EVERYTHING)
    check_added(onnx.load(tmp_path / "out.onnx"), plain=onnx.load(MODELS / name))


@pytest.mark.parametrize(
    ("graph", "layer"),
    [
        (graphs.LINEAR, "r"),
        (graphs.DEEP, "r"),
        (graphs.DEEP, "x"),
        (graphs.CONV_HEAD, "r"),
        (graphs.CLASS_MAPS, "r"),
        (graphs.FLAT_HEAD, "m"),
    ],
)
@pytest.mark.parametrize("score", ["before", "after"])
@pytest.mark.parametrize("opset", [18, 21])
def test_small_models_pass_the_checker_and_declare_every_output(graph, layer, score, opset):
    plain = build(graph, opset=opset)
    added = explained(plain, layer=layer, score=score)
    check_added(added, plain)
    assert {i.version for i in added.opset_import} == {opset}


def check_added(added, plain, cam_on_picture=False):
    onnx.checker.check_model(added, full_check=True)
    onnx.shape_inference.infer_shapes(added, check_type=True, strict_mode=True)
    assert {i.domain for i in added.opset_import} == {""}
    assert added.ir_version <= 10
    old_values = {o for n in plain.graph.node for o in n.output}
    old = [n for n in added.graph.node if set(n.output) & old_values]
    new = [n for n in added.graph.node if not set(n.output) & old_values]
    assert [n.op_type for n in old] == [n.op_type for n in plain.graph.node]
    assert all(n.name.startswith("cam/") for n in every_node(new))
    assert all(n.domain == "" for n in every_node(new))
    assert len({n.name for n in every_node(new)}) == len(list(every_node(new)))
    weights = {i.name for i in plain.graph.initializer}
    constants = [i.name for i in added.graph.initializer if i.name not in weights]
    assert all(name.startswith("cam/") or name == "cam_class" for name in constants)
    read = {i for n in every_node(added.graph.node) for i in n.input}
    assert read >= set(constants), "constants that nothing reads"
    outputs = {o.name for o in added.graph.output} | {
        o for b in bodies(every_node(new)) for o in (v.name for v in b.output)
    }
    assert all(set(n.output) & (read | outputs) for n in every_node(new)), "nodes that nothing reads"
    shapes = {
        o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in added.graph.output
    }
    batch = shapes["cam"][0]
    given = added.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch == (given.dim_param or given.dim_value)
    c, h, w = shapes["cam_activations"][1:]
    height, width = shapes["cam_heatmap"][2:]
    assert all(isinstance(d, int) and d > 0 for d in (c, h, w, height, width))
    assert shapes["cam"] == [batch, "cam_classes", *((height, width) if cam_on_picture else (h, w))]
    assert shapes["cam_heatmap"] == [batch, "cam_classes", height, width]
    assert shapes["cam_activations"] == [batch, c, h, w]
    assert shapes["cam_gradients"] == ["cam_rows", c, h, w]
    types = {o.name: o.type.tensor_type.elem_type for o in added.graph.output}
    assert types["cam"] == types["cam_heatmap"] == onnx.TensorProto.FLOAT


def bodies(nodes):
    return [a.g for n in nodes for a in n.attribute if a.HasField("g")]


def every_node(nodes):
    for node in nodes:
        yield node
        for body in bodies([node]):
            yield from every_node(body.node)


@pytest.mark.parametrize("emit", [(kind,) for kind in graphs.EVERYTHING] + [("heatmap", "cam")])
@pytest.mark.parametrize(("graph", "layer"), [(graphs.LINEAR, "r"), (graphs.DEEP, "r")])
def test_only_what_is_asked_for_is_emitted(emit, graph, layer):
    model = build(graph)
    full = run(explained(model, layer=layer), picture(2))
    added = explained(model, layer=layer, emit=emit)
    names = [{"cam": "cam"}.get(kind, f"cam_{kind}") for kind in graphs.EVERYTHING if kind in emit]
    assert [o.name for o in added.graph.output] == ["scores", *names]
    got = run(added, picture(2))
    for name in got:
        np.testing.assert_array_equal(got[name], full[name])
    read = {i for n in every_node(added.graph.node) for i in n.input}
    assert {i.name for i in added.graph.initializer} <= read | {"cam_class"}
    if emit == ("activations",):
        assert [n.op_type for n in added.graph.node][len(model.graph.node) :] == ["Identity"]


def test_models_in_memory_stay_as_they_are():
    proto = build(graphs.DEEP)
    data = proto.SerializeToString()
    attach(proto, layer="r")
    assert proto.SerializeToString() == data
    model = ir.from_proto(proto)
    data = ir.to_proto(model).SerializeToString()
    attach(model, layer="r")
    assert ir.to_proto(model).SerializeToString() == data


def test_a_file_and_the_model_in_memory_give_the_same(tmp_path):
    proto = build(graphs.DEEP)
    onnx.save(proto, tmp_path / "m.onnx")
    attach(tmp_path / "m.onnx", tmp_path / "o.onnx", layer="r")
    assert onnx.load(tmp_path / "o.onnx") == ir.to_proto(attach(proto, layer="r"))


def test_card():
    model = attach(build(graphs.LINEAR), labels="abcde", height=8, width=10, mean=[1], std=[2], color="BGR")
    card = json.loads(model.metadata_props[KEY])
    assert card["layer"] == "r"
    assert (card["scores"], card["scores_are"], card["score"]) == ("scores", "logits", "before")
    assert card["labels"] == list("abcde")
    assert card["input"] == {
        "name": "x", "layout": "NCHW", "height": 8, "width": 10, "color": "BGR", "mean": [1.0], "std": [2.0],
        "interpolation": "bilinear",
    }  # fmt: skip
    assert Card.from_metadata(model.metadata_props).method == "gradcam"


# cam_class


def single_runs(model, x, classes, by="ort"):
    rows = [
        [run(model, {"x": x[n : n + 1], "cam_class": np.array([[k]])}, by=by) for k in classes[n]]
        for n in range(len(x))
    ]
    return {
        "cam": np.stack([[r["cam"][0, 0] for r in row] for row in rows]),
        "cam_heatmap": np.stack([[r["cam_heatmap"][0, 0] for r in row] for row in rows]),
        "cam_gradients": np.concatenate([r["cam_gradients"] for row in rows for r in row]),
    }


@pytest.mark.parametrize(
    ("graph", "layer", "loops"),
    [
        (graphs.LINEAR, "r", False),
        (graphs.DEEP, "s", False),
        (graphs.DEEP, "r", True),
        (graphs.DEEP, "x", True),
        (graphs.CONV_HEAD, "r", False),
        (graphs.CLASS_MAPS, "r", True),
        (graphs.FLAT_HEAD, "m", False),
        (graphs.FLAT_HEAD, "c", True),
    ],
)
@pytest.mark.parametrize("score", ["before", "after"])
@pytest.mark.parametrize(("by", "dtype", "tolerance"), [("ort", "float", 1e-6), ("ref", "double", 1e-9)])
def test_six_maps_in_one_run_equal_six_runs(graph, layer, loops, score, by, dtype, tolerance):
    model = explained(build(graph, dtype=dtype), layer=layer, score=score)
    assert any(n.op_type == "Scan" for n in model.graph.node) == loops
    x, classes = picture(3), np.array([[0, 4], [2, 2], [-1, 3]])
    x = x.astype(np.float64 if dtype == "double" else np.float32)
    together = run(model, {"x": x, "cam_class": classes}, by=by)
    assert together["cam_gradients"].shape[0] == 6
    for name, alone in single_runs(model, x, classes, by).items():
        assert together[name].shape == alone.shape
        assert relative_error(together[name], alone) <= tolerance, name
    one = run(model, {"x": x, "cam_class": classes[:1]}, by=by)
    for name, alone in single_runs(model, x, classes[[0, 0, 0]], by).items():
        assert relative_error(one[name], alone) <= tolerance, name


@pytest.mark.parametrize("graph", [graphs.LINEAR, graphs.DEEP, graphs.CONV_HEAD, graphs.FLAT_HEAD])
@pytest.mark.parametrize("layer", ["r", "x"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_serves_several_classes(graph, layer, batch):
    model = explained(build(graph.replace("[N,", f"[{batch},")), layer=layer)
    free = explained(build(graph), layer=layer)
    x, classes = picture(batch), np.array([[0, 4, -2]] * batch)
    fixed, wanted = (run(m, {"x": x, "cam_class": classes}) for m in (model, free))
    for name, value in wanted.items():
        assert fixed[name].shape == value.shape
        assert relative_error(fixed[name], value) <= 1e-6, name
    declared = {o.name: o.type.tensor_type.shape.dim for o in model.graph.output}
    assert declared["cam"][0].dim_value == declared["cam_activations"][0].dim_value == batch


BIAS_ONLY = """(T[N,2,3,3] x) => (T[N,6] scores) <T[2,6] fc, T[6] bias>
{ p = GlobalAveragePool(x) f = Flatten(p) m = MatMul(f, fc) scores = Add(m, bias) }"""


@pytest.mark.parametrize("by", ["ort", "ref"])
def test_ranks_of_each_image_and_ties(by):
    """Image 0 ranks by the bias (ties: lower index first), image 1 by its own scores."""
    fc = np.zeros((2, 6))
    fc[0] = [0, 1, 2, 3, 4, 5]
    model = explained(build(BIAS_ONLY, fc=fc, bias=[1, 3, 3, 0, 3, 2]), layer="x")
    x = np.zeros((2, 2, 3, 3), np.float32)
    x[1, 0] = 10
    ranks = np.array([[-1, -2, -3, -4, -5, -6]])
    got = run(model, {"x": x, "cam_class": ranks}, by=by)["cam_gradients"][:, 0, 0, 0].reshape(2, 6) * 9
    np.testing.assert_allclose(got, [[1, 2, 4, 5, 0, 3], [5, 4, 3, 2, 1, 0]], atol=1e-5)


@pytest.mark.parametrize("by", ["ort", "ref"])
@pytest.mark.parametrize(("graph", "layer"), [(graphs.LINEAR, "r"), (graphs.DEEP, "r")])
@pytest.mark.parametrize("wrong", [5, 6, 2**40, 2**63 - 1, -6, -7, -(2**40), -(2**63)])
def test_a_class_that_does_not_exist_is_nan_and_zero(graph, layer, by, wrong):
    model = explained(build(graph), layer=layer)
    x = picture(2)
    got = run(model, {"x": x, "cam_class": np.array([[1, wrong], [-5, 4]])}, by=by)
    right = run(model, {"x": x, "cam_class": np.array([[1, 0], [-5, 4]])}, by=by)
    assert np.isnan(got["cam"][0, 1]).all()
    assert np.isnan(got["cam_gradients"][1]).all()
    assert not got["cam_heatmap"][0, 1].any()
    for n, k in ((0, 0), (1, 0), (1, 1)):
        np.testing.assert_array_equal(got["cam"][n, k], right["cam"][n, k])
        np.testing.assert_array_equal(got["cam_heatmap"][n, k], right["cam_heatmap"][n, k])
        np.testing.assert_array_equal(got["cam_gradients"][2 * n + k], right["cam_gradients"][2 * n + k])


@pytest.mark.parametrize(("graph", "layer"), [(graphs.LINEAR, "r"), (graphs.DEEP, "r")])
@pytest.mark.parametrize(
    ("images", "shape"), [(2, (3, 1)), (1, (3, 1)), (3, (2, 2)), (2, (1, 0)), (1, (0, 1))]
)
def test_classes_for_another_number_of_images_are_refused_by_the_runtime(graph, layer, images, shape):
    model = explained(build(graph), layer=layer)
    with pytest.raises(Exception, match=r"Expand|GatherElements|TopK|Reduce"):
        run(model, {"x": picture(images), "cam_class": np.zeros(shape, np.int64)})


def test_the_default_is_the_best_class_and_the_input_can_be_required():
    model = build(graphs.DEEP)
    optional, required = explained(model), explained(model, class_input="required")
    x = picture(2)
    best = np.array([[-1]])
    wanted = run(optional, {"x": x, "cam_class": best})
    for by in ("ort", "ref"):
        for name, value in run(optional, {"x": x}, by=by).items():
            assert relative_error(value, wanted[name]) <= 1e-5
    for name, value in run(required, {"x": x, "cam_class": best}).items():
        np.testing.assert_array_equal(value, wanted[name])
    assert [i.name for i in required.graph.input] == ["x", "cam_class"]
    assert "cam_class" not in {i.name for i in required.graph.initializer}
    with pytest.raises(ValueError, match="cam_class"):
        run(required, {"x": x})


# Gradients


@pytest.mark.parametrize("layer", ["x", "r1", "m1", "h2", "cat", "a", "se", "res"])
@pytest.mark.parametrize("score", ["before", "after"])
def test_gradients_equal_torchs(layer, score):
    x, classes = picture(2, 3, 13, 14), np.array([[0, 3, 1], [4, 2, 2]])
    for dtype, by, tolerance in (("double", "ref", 1e-9), ("float", "ort", 1e-4)):
        model = build(graphs.RICH, dtype=dtype, **graphs.RICH_WEIGHTS)
        added = explained(model, layer=layer, score=score)
        given = x.astype({"double": np.float64, "float": np.float32}[dtype])
        got = run(added, {"x": given, "cam_class": classes}, by=by)
        scores, gradients = torch_gradients(model, given, classes, layer, score)
        assert relative_error(got["scores"], scores) <= tolerance
        assert got["cam_gradients"].dtype == given.dtype
        assert relative_error(got["cam_gradients"], gradients) <= tolerance
        assert got["cam"].dtype == np.float32


@pytest.mark.parametrize("layer", ["r1", "cat", "a", "res"])
def test_half_precision(layer):
    x, classes = picture(2, 3, 13, 14, dtype=np.float16), np.array([[0, 3], [4, 2]])
    model = build(graphs.RICH, dtype="float16", **graphs.RICH_WEIGHTS)
    got = run(explained(model, layer=layer), {"x": x, "cam_class": classes})
    _, gradients = torch_gradients(model, x, classes, layer)
    assert got["cam_gradients"].dtype == got["cam_activations"].dtype == np.float16
    assert got["cam"].dtype == got["cam_heatmap"].dtype == np.float32
    assert relative_error(got["cam_gradients"], gradients) <= 5e-3


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "gradcam++"])
def test_maps_are_the_methods_of_activations_and_gradients(method):
    """The formulas once more, on what the same file emits."""
    x, classes = picture(3), np.array([[0, 4], [2, 2], [-1, 3]])
    got = run(explained(build(graphs.DEEP), layer="r", method=method), {"x": x, "cam_class": classes})
    a = got["cam_activations"].astype(np.float64)[:, None]
    g = got["cam_gradients"].astype(np.float64).reshape(3, 2, *a.shape[2:])
    if method == "hirescam":
        weighted = g * a
    elif method == "gradcam":
        weighted = g.mean((3, 4), keepdims=True) * a
    else:
        alpha = 1 / (2 + a.sum((3, 4), keepdims=True) * g)
        weighted = (alpha * np.maximum(g, 0)).sum((3, 4), keepdims=True) * a
    assert relative_error(got["cam"], np.maximum(weighted.sum(2), 0)) <= 1e-5


# The heat map


def scaled(values):
    low, high = values.min(), values.max()
    return (values - low) / (high - low)


def heat(cam, size, *, nhwc=False, symbolic=False, by="ort", signed=False):
    shape = [1, *size, 3] if nhwc else [1, 3, *size]
    declared = ["n", "h", "w", 3] if nhwc else ["n", 3, "h", "w"]
    cam = np.asarray(cam, np.float32)
    plane = ["a", "b"] if symbolic else cam.shape[2:]
    given = [
        ir.Value(name="cam", shape=ir.Shape(["N", "K", *plane]), type=ir.TensorType(ir.DataType.FLOAT)),
        ir.Value(
            name="x", shape=ir.Shape(declared if symbolic else shape), type=ir.TensorType(ir.DataType.FLOAT)
        ),
    ]
    graph = ir.Graph(given, [], nodes=[], name="heat", opset_imports={"": 18})
    op = Emitter(graph, 18, "test")
    rows = 1 if nhwc else 2
    wanted = op.Shape(given[1], start=rows, end=rows + 2) if symbolic else list(size)
    graph.outputs.append(op.Identity(heatmap(op, given[0], wanted, signed)))
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    feeds = {"cam": cam, "x": np.zeros(shape, np.float32)}
    if by == "ref":
        with np.errstate(all="ignore"):  # numpy warns of what is not finite
            return reference(model).run(None, feeds)[0]
    return onnxruntime.InferenceSession(model.SerializeToString(), quiet()).run(None, feeds)[0]


@pytest.mark.parametrize(
    ("plane", "size"), [((7, 7), (224, 224)), ((3, 5), (17, 11)), ((4, 6), (4, 6)), ((9, 8), (5, 3))]
)
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("symbolic", [False, True])
def test_heatmap_is_bilinear_with_half_pixel_centres(plane, size, nhwc, symbolic):
    cam = np.random.default_rng(0).standard_normal((2, 3, *plane)).astype(np.float32)
    full = torch.nn.functional.interpolate(torch.tensor(cam), size=size, mode="bilinear", align_corners=False)
    got = heat(cam, size, nhwc=nhwc, symbolic=symbolic)
    wanted = np.stack([[scaled(m) for m in row] for row in full.numpy()])
    assert got.shape == (2, 3, *size)
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_heatmap_equals_pillows():
    cam = np.random.default_rng(1).standard_normal((1, 1, 7, 5)).astype(np.float32)
    pillow = Image.fromarray(cam[0, 0]).resize((60, 91), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(heat(cam, (91, 60))[0, 0], scaled(np.asarray(pillow)), atol=2e-5)


NAN, INF, HUGE = float("nan"), float("inf"), 3e38
MAPS = {
    "plain": ([[0, 1], [2, 4]], None),
    "partly negative": ([[-4, -2], [-1, 0.5]], None),
    "negative": ([[-4, -2], [-1, -0.5]], 0),
    "nothing above zero": ([[-4, -2], [-1, 0]], 0),
    "tiny": ([[0, 1e-36], [2e-36, 4e-36]], None),
    "large": ([[0, 1e38], [-1e38, 1.5e38]], None),
    "zero": ([[0, 0], [0, 0]], 0),
    "flat": ([[0.1, 0.1], [0.1, 0.1]], 0),
    "flat, negative": ([[-7.3, -7.3], [-7.3, -7.3]], 0),
    "nan": ([[0, 1], [NAN, 4]], 0),
    "nan first": ([[NAN, 1], [2, 4]], 0),
    "all nan": ([[NAN, NAN], [NAN, NAN]], 0),
    "inf": ([[0, 1], [INF, 4]], 0),
    "-inf": ([[0, 1], [-INF, 4]], 0),
    "all inf": ([[INF, INF], [INF, INF]], 0),
    "inf and nan": ([[INF, NAN], [-INF, 0]], 0),
    "beyond the span": ([[-HUGE, HUGE], [0, 0]], 0),
}


@pytest.mark.parametrize("by", ["ort", "ref"])
def test_heatmap_is_between_0_and_1_or_zero_whatever_the_map(by):
    """All at once: no map has an effect on another."""
    got = heat([[values] for values, _ in MAPS.values()], (5, 7), by=by)
    for (name, (values, expected)), found in zip(MAPS.items(), got[:, 0], strict=True):
        if expected is None:
            assert (found.min(), found.max()) == (0, 1), name
            corners = found[[0, 0, -1, -1], [0, -1, 0, -1]]
            np.testing.assert_allclose(
                corners, scaled(np.array(values, np.float64)).ravel(), atol=1e-6, err_msg=name
            )
        else:
            assert not found.any(), name


SIGNED = {
    "both": ([[-1, 0], [2, 4]], [[-0.25, 0], [0.5, 1]]),
    "negative": ([[-4, -2], [-1, 0]], [[-1, -0.5], [-0.25, 0]]),
    "all negative": ([[-4, -2], [-1, -8]], [[-0.5, -0.25], [-0.125, -1]]),
    "flat": ([[-3, -3], [-3, -3]], [[0, 0], [0, 0]]),
    "nan": ([[-1, NAN], [2, 4]], [[0, 0], [0, 0]]),
    "inf": ([[-INF, 1], [2, 4]], [[0, 0], [0, 0]]),
}


@pytest.mark.parametrize("by", ["ort", "ref"])
def test_signed_heatmap_keeps_zero(by):
    got = heat([[values] for values, _ in SIGNED.values()], (2, 2), by=by, signed=True)
    np.testing.assert_allclose(got[:, 0], [wanted for _, wanted in SIGNED.values()], rtol=1e-6)


@pytest.mark.parametrize("value", np.random.default_rng(0).standard_normal(20))
def test_heatmap_of_a_flat_map_is_zero_at_any_size(value):
    assert not heat(np.full((1, 1, 7, 6), value), (31, 45)).any()


@pytest.mark.parametrize(
    ("graph", "layer"),
    [
        (graphs.LINEAR, "r"),
        (graphs.LINEAR, "x"),
        (graphs.DEEP, "r"),
        (graphs.CLASS_MAPS, "r"),
        (graphs.RICH, "x"),
        (graphs.RICH, "cat"),
    ],
)
def test_one_file_explains_pictures_of_any_size(graph, layer):
    declared = "13,14" if graph is graphs.RICH else "8,10"
    weights = graphs.RICH_WEIGHTS if graph is graphs.RICH else {}
    model = explained(build(graph.replace(declared, "H,W"), **weights), layer=layer)
    for size in ((8, 10), (13, 7)):
        fixed = explained(build(graph.replace(declared, "{},{}".format(*size)), **weights), layer=layer)
        feeds = {"x": picture(2, 3, *size), "cam_class": np.array([[0, 3]])}
        got, wanted = run(model, feeds), run(fixed, feeds)
        assert got["cam_heatmap"].shape == (2, 2, *size)
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, atol=1e-5)


CEILED = """(T[N,3,9,11] x) => (T[N,5] scores) <T[4,3,3,3] w, T[4,3,2,2] v, T[4,5] fc>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    r = Sigmoid(c)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2], pads=[1,1,1,1], ceil_mode=1>(r)
    a = AveragePool<kernel_shape=[2,2], strides=[2,2], pads=[1,1,1,1], ceil_mode=1>(m)
    b = Conv<kernel_shape=[2,2], strides=[2,2], pads=[1,1,1,1]>(x, v)
    j = Add(m, b)
    t = Tanh(j)
    p = GlobalAveragePool(t)
    q = GlobalAveragePool(a)
    s = Add(p, q)
    f = Flatten(s)
    scores = MatMul(f, fc)
}"""


@pytest.mark.parametrize("layer", ["r", "x"])
def test_pools_of_which_onnx_infers_a_wrong_size(layer):
    """Before opset 22 it counts a window too many, and refuses to add the pooled map to another."""
    plain = build(CEILED)
    with pytest.raises(onnx.shape_inference.InferenceError, match="Incompatible dimensions"):
        onnx.shape_inference.infer_shapes(plain, strict_mode=True)
    feeds = {"x": picture(2, 3, 9, 11), "cam_class": np.array([[0, 3]])}
    got = run(explained(plain, layer=layer), feeds)
    wanted = run(explained(build(CEILED.replace("9,11", "H,W")), layer=layer), feeds)
    for name, value in wanted.items():
        assert got[name].shape == value.shape
        assert relative_error(got[name], value) <= 1e-6


NHWC = (
    graphs.DEEP.replace("(T[N,3,8,10] x)", "(T[N,8,10,3] x)")
    .replace("{\n", "{\n    t = Transpose<perm=[0,3,1,2]>(x)\n", 1)
    .replace("(x, w)", "(t, w)")
)


def test_channels_last():
    nchw, nhwc = explained(build(graphs.DEEP), layer="r"), explained(build(NHWC), layer="r")
    assert json.loads(nhwc.metadata_props[0].value)["input"]["layout"] == "NHWC"
    x = picture(2)
    wanted, got = run(nchw, x), run(nhwc, np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=1e-6)


def test_a_layout_that_only_the_caller_knows_counts_for_the_heatmap_too():
    """Nothing in [N,H,W,C] tells which axis holds the channels."""
    model = NHWC.replace("T[N,8,10,3] x", "T[N,H,W,C] x")
    got = run(explained(build(model), layer="r", layout="NHWC"), picture(1, 8, 10, 3))
    assert got["cam_heatmap"].shape == (1, 1, 8, 10)


# The score before and after the softmax

LOGITS = graphs.DEEP.replace("scores = MatMul", "logits = MatMul")
ENDS = {
    "none": ("scores = Identity(logits)", "logits"),
    "softmax": ("scores = Softmax<axis=1>(logits)", "probabilities"),
    "last axis": ("scores = Softmax(logits)", "probabilities"),
    "log": ("scores = LogSoftmax(logits)", "logits"),
    "sigmoid": ("scores = Sigmoid(logits)", "probabilities"),
    "identity": ("q = Softmax<axis=1>(logits) i = Identity(q) scores = Identity(i)", "probabilities"),
    "reshape": (
        "u = Unsqueeze(logits, two) q = Softmax<axis=1>(u) scores = Squeeze(q, two)",
        "probabilities",
    ),
    "transposed": (
        "t = Transpose(logits) q = Softmax<axis=0>(t) scores = Transpose<perm=[1,0]>(q)",
        "probabilities",
    ),
    "cast": ("q = Softmax(logits) wide = Cast<to=11>(q) scores = Cast<to=1>(wide)", "probabilities"),
}


def ending(end):
    graph = LOGITS.replace("T[6,5] fc>", "T[6,5] fc, int64[1] two = {2}>")
    return build(graph.replace("(f, fc)", "(f, fc)\n    " + ENDS[end][0]))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("batch", ["N", "1"])
def test_before_explains_the_logits_whatever_follows_them(end, batch):
    model = ending(end)
    model.graph.input[0].type.tensor_type.shape.dim[0].CopyFrom(dim(batch))
    x, classes = picture(1 if batch == "1" else 2), np.array([[0, 4, -2]])
    got = run(explained(model, layer="r"), {"x": x, "cam_class": classes})
    wanted = run(explained(ending("none"), layer="r"), {"x": x, "cam_class": classes})
    assert relative_error(got["cam_gradients"], wanted["cam_gradients"]) <= 1e-6
    assert card_of(explained(model, layer="r")).scores_are == ENDS[end][1]


def dim(batch):
    known = {"dim_value": int(batch)} if batch.isdecimal() else {"dim_param": batch}
    return onnx.TensorShapeProto.Dimension(**known)


def card_of(model):
    return Card.from_metadata({p.key: p.value for p in model.metadata_props})


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("layer", ["r", "s"])
def test_after_explains_the_probability_that_the_model_gives(end, layer):
    """By the chain rule from the gradients of all logits, in float64."""
    x, every = picture(2), np.array([[0, 1, 2, 3, 4]])
    before = run(explained(ending("none"), layer=layer), {"x": x, "cam_class": every})
    logits = before["scores"].astype(np.float64)
    g = before["cam_gradients"].astype(np.float64).reshape(2, 5, *before["cam_activations"].shape[1:])
    t = torch.tensor(logits, requires_grad=True)
    probabilities = t.sigmoid() if end == "sigmoid" else t.softmax(1)
    jacobian = np.stack(
        [torch.autograd.grad(probabilities[:, k].sum(), t, retain_graph=True)[0] for k in range(5)], 1
    )
    wanted = np.einsum("nkm,nmchw->nkchw", jacobian, g)
    got = run(explained(ending(end), layer=layer, score="after"), {"x": x, "cam_class": every})
    assert relative_error(got["cam_gradients"].reshape(wanted.shape), wanted) <= 1e-4


@pytest.mark.parametrize("end", ENDS)
def test_labels_are_counted_on_the_output(end):
    model = ending(end)
    model.graph.input[0].type.tensor_type.shape.dim[0].CopyFrom(dim("1"))
    assert card_of(explained(model, labels="abcde")).labels == tuple("abcde")


def test_the_real_models_logits_are_found():
    found = {name: card_of(ir.to_proto(attach(MODELS / name))).scores_are for name in ONNX_FILES}
    assert found == {
        "efficientnet_lite0.onnx": "logits",
        "pp_lcnet_orientation.onnx": "probabilities",
        "squeezenet1_1.onnx": "probabilities",
    }


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcan"}, "no method 'gradcan' \\(did you mean 'gradcam'"),
        ({"emit": ()}, "nothing to emit"),
        (
            {"emit": ("cam", "heat")},
            "output is 'heat'; it must be one of cam, heatmap, overlay, activations, gradients",
        ),
        ({"score": "between"}, "score is 'between'; it must be one of before, after"),
        ({"class_input": "both"}, "class input is 'both'"),
        ({"labels": ["a", "b"]}, "there are 2 labels for 5 classes"),
        ({"layout": "CHWN"}, "layout is 'CHWN'; it must be one of NCHW, NHWC"),
        ({"height": 7}, "height is given as 7, but the model's input is 8 pixels there"),
        ({"color": "GRAY"}, "color is GRAY, but the model's input has 3 channels"),
        ({"layer": "q"}, "no layer 'q'"),
        ({"layer": "f"}, "layer 'f' is \\[N,4\\]; a map needs an activation"),
        ({"scores": "r"}, "no output 'r'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(OnnxcamError, match=message) as caught:
        attach(build(graphs.LINEAR), **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="'colour'"):
        attach(build(graphs.LINEAR), colour="RGB")


def test_an_explained_model_is_refused(tmp_path):
    attach(build(graphs.LINEAR), tmp_path / "e.onnx")
    with pytest.raises(
        OnnxcamError, match="explained already \\(gradcam at r\\); attach to the original model"
    ):
        attach(tmp_path / "e.onnx")


def renamed(model, old, new):
    """Give a value another name, wherever it stands."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = new if value.name == old else value.name
    return model


@pytest.mark.parametrize("name", ["cam", "cam_class", "cam_heatmap"])
@pytest.mark.parametrize("value", ["x", "scores", "r", "w"])
def test_names_that_attach_needs(name, value):
    with pytest.raises(OnnxcamError, match=f"a value called '{name}' already, a name that attach needs"):
        attach(renamed(build(graphs.LINEAR), value, name))


def test_other_names_under_the_prefix_are_left_alone():
    model = renamed(renamed(build(graphs.LINEAR), "p", "cam/class/TopK"), "r", "seed")
    got, wanted = run(explained(model), picture(2)), run(explained(build(graphs.LINEAR)), picture(2))
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_the_model_itself_is_never_overwritten(tmp_path, link):
    path = other = tmp_path / "m.onnx"
    onnx.save(build(graphs.LINEAR), path)
    if link:
        other = tmp_path / "other.onnx"
        getattr(other, link)(path)
    data = path.read_bytes()
    with pytest.raises(OnnxcamError, match="is the model itself, which is never modified"):
        attach(path, other)
    assert path.read_bytes() == data


def test_prepared_copies():
    model = ir.from_proto(build(graphs.LINEAR))
    assert prepared(model) is not model


def test_an_operator_of_ones_own_with_a_rule_of_ones_own(monkeypatch):
    """What docs/operators.md shows, with a custom operator that the test's reference evaluator knows."""
    from onnxcam.vjp import RULES, vjp

    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18, "com.example" : 1]>
        wobbly (double[N,2,3,4] x) => (double[N,2] s)
        <double[N,2,3,4] c>
        {
            c = com.example.Wobble (x)
            p = GlobalAveragePool (c)
            f = Flatten (p)
            s = MatMul (f, w)
        }
    """)
    w = np.array([[1.0, -2.0], [0.5, 3.0]])
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    monkeypatch.setitem(RULES, ("com.example", "Wobble"), None)

    @vjp("Wobble", domain="com.example")
    def wobble(op, dy, y, x):
        return op.Mul(dy, op.Cos(x))

    class Wobble(onnx.reference.op_run.OpRun):
        op_domain = "com.example"

        def _run(self, x):
            return (np.sin(x),)

    explained = ir.to_proto(attach(model, layer="x", emit=["gradients"]))
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 4))
    evaluator = onnx.reference.ReferenceEvaluator(explained, new_ops=[Wobble, *checks.NEW_OPS])
    (found,) = evaluator.run(["cam_gradients"], {"x": x, "cam_class": np.array([[1]])})
    np.testing.assert_allclose(found, np.cos(x) * w[:, 1].reshape(1, 2, 1, 1) / 12, rtol=1e-12)


def test_a_long_chain_of_products():
    """Longer than Python's stack is deep, of an operator that also brings weights into another form."""
    chain = " ".join(f"v{i + 1} = Mul(v{i}, one)" for i in range(600))
    text = graphs.LINEAR.replace("r = Relu(c)", f"v0 = Relu(c) {chain} r = Relu(v600)")
    model = build(text.replace("T[5] bias>", "T[5] bias, T one>"), one=1.0)
    found = ir.to_proto(attach(model, layer="v0", emit=["gradients"]))
    expected = ir.to_proto(attach(build(graphs.LINEAR), layer="r", emit=["gradients"]))
    feeds = {"x": picture(1), "cam_class": np.array([[3]])}
    gradient, last = (run(m, feeds)["cam_gradients"] for m in (found, expected))
    activation = run(explained(build(graphs.LINEAR), layer="r"), feeds)["cam_activations"]
    np.testing.assert_allclose(gradient, np.where(activation > 0, last, 0), rtol=1e-6)
