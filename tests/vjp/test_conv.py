import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcam.backward import gradient
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import check, normalise
from tests.checks import check_vjp, dtypes_of_gradients, quiet, reference

RNG = np.random.default_rng(1)
BOTH = pytest.mark.parametrize("symbolic", [False, True])


def normal(*shape):
    return RNG.standard_normal(shape)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 3, 7, 6), (4, 3, 3, 2), {}),
        ((2, 4, 7, 6), (6, 2, 3, 3), {"group": 2, "strides": [2, 3], "pads": [1, 1, 1, 1]}),
        ((1, 4, 9, 8), (4, 1, 3, 3), {"group": 4, "dilations": [2, 1], "pads": [2, 1, 2, 1]}),
        # depthwise with strides: between the elements of dy come zeros, none or one too many at the end
        ((2, 4, 8, 9), (4, 1, 3, 5), {"group": 4, "strides": [2, 3], "pads": [1, 2, 1, 2]}),
        (
            (1, 3, 9, 12),
            (3, 1, 2, 3),
            {"group": 3, "strides": [3, 2], "dilations": [2, 1], "pads": [1, 0, 1, 0]},
        ),
        ((1, 3, 7, 7), (3, 1, 1, 1), {"group": 3, "strides": [2, 2]}),
        ((2, 3, 11), (3, 1, 4), {"group": 3, "strides": [2], "pads": [1, 1]}),
        ((1, 2, 9, 10), (3, 2, 4, 3), {"strides": [3, 2], "dilations": [2, 2], "pads": [3, 2, 3, 2]}),
        # the few channels of a picture: in blocks, unless they do not fit
        ((2, 3, 8, 12), (5, 3, 7, 3), {"strides": [2, 2], "pads": [3, 1, 3, 1]}),
        ((1, 3, 12, 8), (2, 3, 4, 4), {"strides": [4, 4]}),
        ((1, 1, 9, 6), (2, 1, 5, 2), {"strides": [3, 3], "pads": [2, 0, 2, 0]}),
        ((1, 4, 6, 8), (3, 4, 1, 1), {"strides": [2, 2]}),
        ((1, 2, 7, 8), (3, 2, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((1, 2, 12, 12), (3, 2, 2, 2), {"strides": [3, 3]}),
        ((1, 2, 12, 12), (3, 2, 2, 2), {"strides": [3, 3], "pads": [1, 1, 1, 1]}),
        ((2, 3, 11), (4, 3, 4), {"strides": [3], "pads": [2, 2]}),
        ((1, 2, 5, 6, 4), (2, 2, 2, 3, 2), {"strides": [2, 1, 3], "pads": [0, 1, 1, 0, 1, 1]}),
    ],
)
@BOTH
def test_conv(x, w, attributes, symbolic):
    n = len(x) - 2
    functional = {
        1: torch.nn.functional.conv1d,
        2: torch.nn.functional.conv2d,
        3: torch.nn.functional.conv3d,
    }[n]

    def conv(x, w, b):
        return functional(
            x,
            w,
            b,
            stride=attributes.get("strides", 1),
            padding=attributes.get("pads", [0] * n)[:n],
            dilation=attributes.get("dilations", 1),
            groups=attributes.get("group", 1),
        )

    check_vjp(
        "Conv",
        [normal(*x), normal(*w), normal(w[0])],
        against=conv,
        symbolic=symbolic,
        kernel_shape=w[2:],
        **attributes,
    )


def same_padding(size, auto_pad, kernel_shape, strides, dilations=(1, 1), **_):
    """What auto_pad adds: all that comes before, then all that comes after."""
    spans = zip(size, kernel_shape, strides, dilations, strict=True)
    totals = [max((-(-n // step) - 1) * step + hole * (k - 1) + 1 - n, 0) for n, k, step, hole in spans]
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return less + more if auto_pad == "SAME_UPPER" else more + less


@BOTH
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [1, 1]},
        {"strides": [2, 3]},
        {"strides": [2, 1], "dilations": [1, 2]},
        {"strides": [2, 2], "dilations": [2, 1]},
    ],
)
def test_conv_auto_pad(attributes, auto_pad, symbolic):
    x, w = normal(1, 2, 7, 8), normal(3, 2, 4, 3)

    def conv(x, w):
        if auto_pad == "VALID":
            return torch.nn.functional.conv2d(x, w, None, **options)
        top, left, bottom, right = same_padding((7, 8), auto_pad, (4, 3), **attributes)
        padded = torch.nn.functional.pad(x, [left, right, top, bottom])
        return torch.nn.functional.conv2d(padded, w, None, **options)

    options = {"stride": attributes["strides"], "dilation": attributes.get("dilations", [1, 1])}
    check_vjp(
        "Conv",
        [x, w],
        against=conv,
        symbolic=symbolic,
        # onnxruntime takes no dilations with it.
        ort="dilations" not in attributes or auto_pad == "VALID",
        auto_pad=auto_pad,
        kernel_shape=[4, 3],
        **attributes,
    )


@BOTH
def test_conv_asymmetric_padding(symbolic):
    check_vjp(
        "Conv",
        [normal(1, 2, 6, 7), normal(3, 2, 3, 3)],
        symbolic=symbolic,
        kernel_shape=[3, 3],
        pads=[0, 2, 1, 0],
        strides=[2, 2],
    )


@st.composite
def convolutions(draw, transposed):
    """Shapes of picture and weights, and attributes."""
    n, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inner, outer = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, strides = ([draw(st.integers(1, 3)) for _ in range(n)] for _ in range(2))
    dilations = [draw(st.integers(1, 2)) for _ in range(n)]
    attributes = {"group": group, "kernel_shape": kernel, "strides": strides, "dilations": dilations}
    auto_pad = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * n)]
    else:
        attributes["auto_pad"] = auto_pad
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    if transposed:
        attributes["output_padding"] = [draw(st.integers(0, s - 1)) for s in strides]
        # So large that the output has elements whatever is cut off.
        size = [draw(st.integers(4, 5)) for _ in range(n)]
        return (1, group * inner, *size), (group * inner, outer, *kernel), attributes
    size = [draw(st.integers(e, e + [6, 4, 2][n - 1])) for e in extents]
    return (draw(st.integers(1, 2)), group * inner, *size), (group * outer, inner, *kernel), attributes


any_convolution = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@any_convolution
@given(case=convolutions(transposed=False), symbolic=st.booleans(), bias=st.booleans())
def test_any_conv(case, symbolic, bias):
    x, w, attributes = case
    n, kernel, strides = len(x) - 2, attributes["kernel_shape"], attributes["strides"]
    same = attributes.get("auto_pad", "").startswith("SAME")
    pads = attributes.get("pads", [0] * 2 * n)
    if same:
        pads = same_padding(x[2:], **attributes)

    def conv(x, w, b=None):
        edges = [edge for i in reversed(range(n)) for edge in (pads[i], pads[n + i])]
        padded = torch.nn.functional.pad(x, edges)
        function = getattr(torch.nn.functional, f"conv{n}d")
        return function(padded, w, b, strides, 0, attributes["dilations"], attributes["group"])

    check_vjp(
        "Conv",
        [normal(*x), normal(*w), *([normal(w[0])] if bias else [])],
        against=conv,
        symbolic=symbolic,
        # onnxruntime takes no dilations with it, and fails where windows lie apart.
        ort=not same or (max(attributes["dilations"]) == 1 and all(map(int.__le__, strides, kernel))),
        **attributes,
    )


@any_convolution
@given(case=convolutions(transposed=True), symbolic=st.booleans())
def test_any_conv_transpose(case, symbolic):
    """`reference` computes it by torch."""
    x, w, attributes = case
    if "auto_pad" in attributes:
        # Of these together onnx infers another size than the standard and onnxruntime have.
        del attributes["output_padding"]
    inputs = [normal(*x), normal(*w), normal(w[1] * attributes["group"])]
    check_vjp("ConvTranspose", inputs, symbolic=symbolic, **attributes)
    assert_onnxruntime_computes_the_same("ConvTranspose", inputs, **attributes)


def test_conv_with_constant_weights_computes_no_gradient_of_them():
    check_vjp("Conv", [normal(1, 2, 6, 7), normal(3, 2, 3, 3), normal(3)], constant=[1, 2])


def test_conv_with_weights_of_unknown_size_is_refused():
    with pytest.raises(OnnxcamError, match="kernel size"):
        check_vjp("Conv", [normal(1, 2, 6, 7), normal(3, 2, 3, 3)], symbolic=True)


def transposed(attributes):
    n = len(attributes["kernel_shape"])
    return lambda x, w, b: getattr(torch.nn.functional, f"conv_transpose{n}d")(
        x,
        w,
        b,
        attributes.get("strides", 1),
        attributes.get("pads", [0] * n)[:n],
        attributes.get("output_padding", 0),
        attributes.get("group", 1),
        attributes.get("dilations", 1),
    )


@BOTH
@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 3, 4, 3), (3, 4, 3, 2), {}),
        ((2, 3, 4, 3), (3, 4, 3, 2), {"strides": [2, 3], "pads": [1, 0, 1, 0]}),
        ((2, 4, 3, 4), (4, 3, 3, 3), {"group": 2, "strides": [2, 2], "output_padding": [1, 0]}),
        (
            (1, 4, 3, 4),
            (4, 1, 3, 3),
            {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        ),
        ((1, 2, 4, 3), (2, 3, 2, 3), {"dilations": [3, 2], "strides": [1, 2], "output_padding": [0, 1]}),
        ((2, 3, 5), (3, 2, 4), {"strides": [3], "pads": [2, 2], "output_padding": [2]}),
        ((1, 2, 2, 3, 2), (2, 2, 2, 3, 2), {"strides": [2, 1, 3], "pads": [0, 1, 1, 0, 1, 1]}),
    ],
)
def test_conv_transpose(x, w, attributes, symbolic):
    attributes = {"kernel_shape": w[2:], **attributes}
    bias = normal(w[1] * attributes.get("group", 1))
    check_vjp(
        "ConvTranspose",
        [normal(*x), normal(*w), bias],
        against=transposed(attributes),
        symbolic=symbolic,
        **attributes,
    )


@BOTH
def test_conv_transpose_with_output_padding_beyond_the_stride(symbolic):
    attributes = {"kernel_shape": [2, 3], "dilations": [3, 2], "strides": [1, 2], "output_padding": [2, 1]}
    inputs = [normal(1, 2, 4, 3), normal(2, 3, 2, 3), normal(3)]
    # onnxruntime refuses it, torch does not.
    check_vjp(
        "ConvTranspose", inputs, against=transposed(attributes), symbolic=symbolic, ort=False, **attributes
    )


@BOTH
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("w", [(2, 3, 3, 4), (2, 3, 1, 2), (2, 3, 4, 5)])
def test_conv_transpose_auto_pad(w, auto_pad, symbolic):
    attributes = {"auto_pad": auto_pad, "kernel_shape": w[2:], "strides": [2, 3]}
    x = normal(1, 2, 4, 3)
    check_vjp("ConvTranspose", [x, normal(*w)], symbolic=symbolic, **attributes)
    assert_onnxruntime_computes_the_same("ConvTranspose", [x, normal(*w)], **attributes)


@BOTH
@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("output_padding", [[0, 0], [1, 0]])
@pytest.mark.parametrize("output_shape", [[6, 9], [7, 8], [9, 10], [10, 11]])
def test_conv_transpose_output_shape(output_shape, output_padding, auto_pad, symbolic):
    attributes = {
        "auto_pad": auto_pad,
        "kernel_shape": [3, 4],
        "strides": [2, 3],
        "output_padding": output_padding,
        "output_shape": output_shape,
    }
    x, w = normal(1, 2, 4, 3), normal(2, 3, 3, 4)
    check_vjp("ConvTranspose", [x, w], symbolic=symbolic, **attributes)
    assert_onnxruntime_computes_the_same("ConvTranspose", [x, w], **attributes)


def test_conv_transpose_auto_pad_with_output_padding():
    # With a known image size, onnx infers another output size than the standard and onnxruntime have.
    attributes = {
        "kernel_shape": [4, 4],
        "strides": [2, 3],
        "output_padding": [1, 1],
        "auto_pad": "SAME_UPPER",
    }
    x, w = normal(1, 2, 4, 3), normal(2, 3, 4, 4)
    check_vjp("ConvTranspose", [x, w], symbolic=True, **attributes)
    assert_onnxruntime_computes_the_same("ConvTranspose", [x, w], **attributes)


@BOTH
@pytest.mark.parametrize(
    ("image", "block", "attributes"),
    [
        ((5, 6), (2, 3), {}),
        ((5, 6), (2, 3), {"strides": [2, 1], "pads": [1, 0, 1, 0]}),
        ((7, 6), (2, 2), {"dilations": [3, 2], "strides": [1, 2]}),
        ((7, 6), (3, 2), {"dilations": [1, 2], "strides": [2, 2], "pads": [1, 2, 1, 2]}),
    ],
)
def test_col2im(image, block, attributes, symbolic):
    def fold(x, *_):
        return torch.nn.functional.fold(
            x,
            image,
            block,
            attributes.get("dilations", 1),
            attributes.get("pads", [0, 0])[:2],
            attributes.get("strides", 1),
        )

    unfold = torch.nn.Unfold(
        block,
        attributes.get("dilations", 1),
        attributes.get("pads", [0, 0])[:2],
        attributes.get("strides", 1),
    )
    length = unfold(torch.zeros(1, 1, *image)).shape[-1]
    check_vjp(
        "Col2Im",
        [normal(2, 3 * block[0] * block[1], length), np.array(image), np.array(block)],
        against=fold,
        constant=[2],
        symbolic=symbolic,
        **attributes,
    )


@BOTH
def test_col2im_of_one_dimension_with_unequal_padding(symbolic):
    inputs = [normal(2, 3 * 2, 3), np.array([6]), np.array([2])]
    check_vjp("Col2Im", inputs, constant=[2], symbolic=symbolic, pads=[0, 1], strides=[2], ort=False)


def causal(inputs, seed, given, result, fixed, wrt, activation="none"):
    """Gradients of `result`, computed from y and state; in float32, as the operator takes no float64."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 27]> graph ({given}) => (float[A, B, D] z) {{
            y, state = CausalConvWithState<activation = "{activation}">({", ".join(inputs)})
            z = {result} }}"""
    )
    feeds = {k: np.float32(v) for k, v in inputs.items()}
    for name in fixed:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(feeds.pop(name), name))
    model = normalise(ir.from_proto(proto))
    z = model.graph.outputs[0]
    own_seed = ir.Value(name="seed", shape=z.shape, type=z.type)
    model.graph.inputs.append(own_seed)
    op = Emitter(model.graph, 27, "test")
    values = {v.name: v for v in model.graph.inputs}
    model.graph.outputs[:] = [op.Identity(gradient(op, z, own_seed, values[name])) for name in wrt]
    for name, dx in zip(wrt, model.graph.outputs, strict=True):
        dx.shape = values[name].shape
    check(model)
    return reference(ir.to_proto(model)).run(None, {**feeds, "seed": np.float32(seed)})


@BOTH
@pytest.mark.parametrize("activation", ["none", "silu", "swish"])
@pytest.mark.parametrize("result", ["Identity(y)", "Concat<axis = 2>(y, state)"])
def test_causal_conv_with_state(result, activation, symbolic):
    # Weights of unknown size are refused. onnxruntime 1.32 ends at opset 26.
    given = "float[N, C, L] x, float[N, C, K] past" if symbolic else "float[2,3,6] x, float[2,3,3] past"
    given += "" if symbolic else ", float[3,1,4] w, float[3] b"
    inputs = {"x": normal(2, 3, 6), "w": normal(3, 1, 4), "b": normal(3), "past": normal(2, 3, 3)}
    tensors = {name: torch.tensor(v, requires_grad=True) for name, v in inputs.items()}
    padded = torch.cat([tensors["past"], tensors["x"]], 2)
    z = torch.nn.functional.conv1d(padded, tensors["w"], tensors["b"], groups=3)
    z = z if activation == "none" else torch.nn.functional.silu(z)
    z = torch.cat([z, padded[..., 6:]], 2) if "state" in result else z
    seed = normal(*z.shape)
    z.backward(torch.tensor(seed))
    wrt = ["x", "past"] if symbolic else list(inputs)
    fixed = ["w", "b"] if symbolic else []
    found = causal(inputs, seed, given, result, fixed, wrt, activation=activation)
    for name, got in zip(wrt, found, strict=True):
        np.testing.assert_allclose(got, tensors[name].grad.numpy(), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("result", ["Identity(y)", "Identity(state)", "Concat<axis = 2>(y, state)"])
def test_causal_conv_without_state(result):
    x, w = normal(2, 3, 6), normal(3, 1, 4)
    t = torch.tensor(x, requires_grad=True)
    padded = torch.nn.functional.pad(t, (3, 0))
    parts = {"y": torch.nn.functional.conv1d(padded, torch.tensor(w), groups=3), "state": padded[..., 6:]}
    z = torch.cat([part for name, part in parts.items() if name in result.split("(")[1]], 2)
    seed = normal(*z.shape)
    z.backward(torch.tensor(seed))
    (dx,) = causal({"x": x, "w": w}, seed, "float[2,3,6] x", result, ["w"], ["x"])
    np.testing.assert_allclose(dx, t.grad.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_convolutions_of_half_precision(op_type, dtype):
    shapes = [(1, 2, 4, 4), (2, 2, 3, 3), (2,)]
    assert dtypes_of_gradients(op_type, shapes, dtype, 22, strides=[2, 2], pads=[1, 1, 1, 1]) == {dtype}


def assert_onnxruntime_computes_the_same(op_type, inputs, **attributes):
    """What central differences differentiate is what onnxruntime computes."""
    feeds = {f"x{i}": x.astype(np.float32) for i, x in enumerate(inputs)}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op_type, list(feeds), ["y"], **attributes)],
        "graph",
        [onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, x.shape) for k, x in feeds.items()],
        [onnx.helper.make_empty_tensor_value_info("y")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (got,) = onnxruntime.InferenceSession(model.SerializeToString(), quiet()).run(None, feeds)
    (want,) = reference(model).run(None, feeds)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
