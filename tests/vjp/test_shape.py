import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnxcam.backward import gradient
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import check, normalise
from tests.checks import check_vjp, dtypes_of_gradients, quiet

RNG = np.random.default_rng(4)


def normal(*shape):
    return RNG.standard_normal(shape)


def ints(*values):
    return np.array(values, np.int64)


SYMBOLIC = pytest.mark.parametrize("symbolic", [False, True])
CONSTANT = pytest.mark.parametrize("constant", [[1], []])


@pytest.mark.parametrize(
    ("shape", "asked", "allowzero"),
    [
        ((2, 3, 4), (6, 4), 0),
        ((2, 3, 4), (-1, 4), 0),
        ((2, 3, 4), (0, -1), 0),
        ((2, 3, 4), (0, 0, 2, -1), 0),
        ((2, 3, 4), (24,), 0),
        ((1, 1), (), 0),
        ((), (1, 1), 0),
        ((2, 3, 4), (4, 3, 2), 1),
    ],
)
@CONSTANT
@SYMBOLIC
def test_reshape(shape, asked, allowzero, constant, symbolic):
    check_vjp(
        "Reshape",
        [normal(*shape), ints(*asked)],
        constant=constant,
        symbolic=symbolic,
        **({"allowzero": 1} if allowzero else {}),
    )


def test_reshape_of_nothing():
    check_vjp("Reshape", [normal(2, 0, 3), ints(3, 0)], constant=[1], allowzero=1)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2])
@SYMBOLIC
def test_flatten(axis, symbolic):
    check_vjp("Flatten", [normal(2, 3, 4)], symbolic=symbolic, axis=axis)


def test_flatten_default():
    check_vjp("Flatten", [normal(2, 3, 4)], against=lambda x: x.flatten(1))


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 1, 3, 1), (1,)), ((2, 1, 3, 1), (-1, 1)), ((1, 1), (0, 1)), ((1, 2), (-2,))]
)
@CONSTANT
@SYMBOLIC
def test_squeeze(shape, axes, constant, symbolic):
    check_vjp("Squeeze", [normal(*shape), ints(*axes)], constant=constant, symbolic=symbolic)


def test_squeeze_of_all_axes_of_size_1():
    check_vjp("Squeeze", [normal(2, 1, 3, 1)], against=torch.squeeze)


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 3), (1,)), ((2, 3), (-1, 0)), ((), (0,)), ((2,), (0, 2, -3))]
)
@CONSTANT
@SYMBOLIC
def test_unsqueeze(shape, axes, constant, symbolic):
    check_vjp("Unsqueeze", [normal(*shape), ints(*axes)], constant=constant, symbolic=symbolic)


@pytest.mark.parametrize("perm", [None, [0, 2, 1, 3], [3, 0, 1, 2], [1, 2, 3, 0]])
@SYMBOLIC
def test_transpose(perm, symbolic):
    given = {} if perm is None else {"perm": perm}
    check_vjp(
        "Transpose",
        [normal(2, 3, 1, 4)],
        against=lambda x: x.permute(perm or [3, 2, 1, 0]),
        symbolic=symbolic,
        **given,
    )


@pytest.mark.parametrize(
    ("shape", "wide"),
    [
        ((3, 1), (3, 4)),
        ((1, 4), (3, 4)),
        ((4,), (2, 3, 4)),
        ((), (2, 3)),
        ((2, 1, 3), (1, 4, 1)),
        ((2, 3), (2, 3)),
        ((1, 1), (1, 1)),
        ((3, 1), (2, 1, 1)),
    ],
)
@CONSTANT
@SYMBOLIC
def test_expand(shape, wide, constant, symbolic):
    check_vjp("Expand", [normal(*shape), ints(*wide)], constant=constant, symbolic=symbolic)


@pytest.mark.parametrize(
    ("shape", "repeats"),
    [
        ((2, 3), (2, 1)),
        ((2, 3), (1, 3)),
        ((2, 1, 3), (2, 3, 1)),
        ((4,), (1,)),
        ((2, 3), (3, 2)),
        ((4,), (3,)),
    ],
)
@CONSTANT
@SYMBOLIC
def test_tile(shape, repeats, constant, symbolic):
    check_vjp(
        "Tile",
        [normal(*shape), ints(*repeats)],
        against=lambda x, r: x.repeat(repeats),
        constant=constant,
        symbolic=symbolic,
    )


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
@pytest.mark.parametrize("sizes", [(2,), (2, 3), (1, 4, 2)])
@SYMBOLIC
def test_concat(axis, sizes, symbolic):
    def shape(size):
        result = [2, 3, 4]
        result[axis] = size
        return result

    check_vjp(
        "Concat",
        [normal(*shape(size)) for size in sizes],
        against=lambda *xs: torch.cat(xs, axis),
        symbolic=symbolic,
        axis=axis,
    )


def test_concat_of_a_weight():
    check_vjp("Concat", [normal(2, 3), normal(2, 2)], constant=[1], axis=1)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("outputs", [(0, 1, 2), (1,), (0, 2), (2,)])
@CONSTANT
@SYMBOLIC
def test_split_by_sizes(axis, outputs, constant, symbolic):
    check_vjp(
        "Split",
        [normal(7, 7), ints(1, 4, 2)],
        against=lambda x, s: x.split([1, 4, 2], axis),
        constant=constant,
        symbolic=symbolic,
        outputs=outputs,
        count=3,
        axis=axis,
    )


@pytest.mark.parametrize(("size", "count"), [(6, 3), (7, 3), (7, 2), (5, 4)])
@pytest.mark.parametrize("outputs", [(0,), (1,), "last", "all"])
@SYMBOLIC
def test_split_evenly(size, count, outputs, symbolic):
    if (size, count) == (5, 4):
        outputs = (0, 1, 2)  # the last part is empty
        count = 3
    chosen = {"last": (count - 1,), "all": tuple(range(count))}.get(outputs, outputs)
    check_vjp(
        "Split",
        [normal(2, size)],
        symbolic=symbolic,
        outputs=chosen,
        count=count,
        axis=1,
        num_outputs=count,
    )


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 0, 2, 0), (0, 2, 0, 1), (1, 2, 3, 4)])
@CONSTANT
@SYMBOLIC
def test_pad_constant(pads, constant, symbolic):
    check_vjp(
        "Pad",
        [normal(4, 5), ints(*pads), np.array(2.5)],
        against=lambda x, p, v: torch.nn.functional.pad(x, [pads[1], pads[3], pads[0], pads[2]], value=2.5),
        wrt=[0],
        constant=constant,
        symbolic=symbolic,
    )


@pytest.mark.parametrize("pads", [(0, -1, 0, 0), (-1, 2, 1, -2), (-1, -1, -1, 0)])
@CONSTANT
@SYMBOLIC
def test_pad_by_negative_amounts(pads, constant, symbolic):
    """onnx.reference 1.23 cannot compute such a Pad: onnxruntime does, and in double too."""
    x = normal(4, 5)
    expected = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.pad(expected, [pads[1], pads[3], pads[0], pads[2]])
    seed = normal(*y.shape)
    (y * torch.tensor(seed)).sum().backward()
    sizes = ["h", "w"] if symbolic else [4, 5]
    graph = helper.make_graph(
        [helper.make_node("Pad", ["x", "pads"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, sizes)]
        + ([] if constant else [helper.make_tensor_value_info("pads", onnx.TensorProto.INT64, [4])]),
        [helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, [None, None])],
        [onnx.numpy_helper.from_array(ints(*pads), "pads")] if constant else [],
    )
    got = gradient_in_onnxruntime(graph, {"x": x, "pads": ints(*pads)} if not constant else {"x": x}, seed)
    np.testing.assert_allclose(got, expected.grad.numpy(), rtol=1e-12, atol=1e-12)


def gradient_in_onnxruntime(graph, feeds, seed, opset=20):
    """Return the gradient of sum(seed * y) with respect to x."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    own = normalise(ir.from_proto(model))
    y = own.graph.outputs[0]
    op = Emitter(own.graph, opset, "test")
    given = ir.Value(name="seed", shape=ir.Shape(seed.shape), type=y.type)
    own.graph.inputs.append(given)
    dx = op.Identity(gradient(op, y, given, own.graph.inputs[0]))
    dx.shape = own.graph.inputs[0].shape
    own.graph.outputs.append(dx)
    op.remove_dead([])
    check(own)
    session = onnxruntime.InferenceSession(ir.to_proto(own).SerializeToString(), quiet())
    return session.run([dx.name], {**feeds, "seed": seed})[0]


@pytest.mark.parametrize("constant", [[1, 3], [1], [3], []])
@pytest.mark.parametrize("axes", [(1,), (-1, 1), (2, 0)])
@SYMBOLIC
def test_pad_along_axes(constant, axes, symbolic):
    pads = (1, 2, 3, 0)[: 2 * len(axes)]
    inputs = [normal(2, 3, 4), ints(*pads), None, ints(*axes)]
    check_vjp("Pad", inputs, constant=constant, symbolic=symbolic)


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (2, 0, 1, 0), (0, 2, 0, 2), (1, 2, 2, 1)])
@CONSTANT
@SYMBOLIC
def test_pad_by_copies(mode, pads, constant, symbolic):
    check_vjp("Pad", [normal(4, 5), ints(*pads)], constant=constant, symbolic=symbolic, mode=mode)


@pytest.mark.parametrize(
    ("mode", "torch_mode"), [("edge", "replicate"), ("reflect", "reflect"), ("wrap", "circular")]
)
def test_pad_by_copies_against_torch(mode, torch_mode):
    check_vjp(
        "Pad",
        [normal(2, 3, 4, 5), ints(0, 0, 1, 2, 0, 0, 2, 1)],
        against=lambda x, p: torch.nn.functional.pad(x, [2, 1, 1, 2], mode=torch_mode),
        constant=[1],
        mode=mode,
    )


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
def test_pad_by_copies_along_axes(mode):
    inputs = [normal(2, 3, 4), ints(1, 2, 0, 1), None, ints(-1, 1)]
    check_vjp("Pad", inputs, constant=[1, 3], mode=mode)


def test_pad_by_copies_refuses_axes_known_only_at_run_time():
    with pytest.raises(OnnxcamError, match="the axes of a Pad"):
        check_vjp("Pad", [normal(2, 3), ints(1, 1), None, ints(1)], constant=[1], mode="edge")


def test_pad_as_the_torchscript_exporter_writes_it():
    """It reverses a list of amounts, last axis first, by Reshape, Slice, Transpose and Cast."""
    nodes = [
        helper.make_node("Shape", ["list"], ["length"]),
        helper.make_node("Sub", ["eight", "length"], ["missing"]),
        helper.make_node(
            "ConstantOfShape", ["missing"], ["zeros"], value=onnx.numpy_helper.from_array(ints(0))
        ),
        helper.make_node("Concat", ["list", "zeros"], ["long"], axis=0),
        helper.make_node("Reshape", ["long", "pairs"], ["table"]),
        helper.make_node("Slice", ["table", "last", "first", "axis", "back"], ["reversed"]),
        helper.make_node("Transpose", ["reversed"], ["turned"], perm=[1, 0]),
        helper.make_node("Reshape", ["turned", "flat"], ["vector"]),
        helper.make_node("Cast", ["vector"], ["pads"], to=onnx.TensorProto.INT64),
        helper.make_node("Pad", ["x", "pads"], ["y"]),
    ]
    constants = {
        "list": ints(1, 2, 0, 3),
        "eight": ints(8),
        "pairs": ints(-1, 2),
        "last": ints(-1),
        "first": ints(np.iinfo(np.int64).min),
        "axis": ints(0),
        "back": ints(-1),
        "flat": ints(-1),
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, ["n", 3, None, None])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    x, seed = normal(2, 3, 4, 5), normal(2, 3, 7, 8)
    got = gradient_in_onnxruntime(graph, {"x": x}, seed)
    np.testing.assert_array_equal(got, seed[:, :, :-3, 1:-2])


@pytest.mark.parametrize(
    ("asked", "axes"),
    [((6, 6), None), ((3, 3), None), ((7, 2), None), ((4,), [1]), ((9, 2), [-1, 0]), ((5, 4), [1, 0])],
)
@CONSTANT
@SYMBOLIC
def test_center_crop_pad(asked, axes, constant, symbolic):
    given = {} if axes is None else {"axes": axes}
    check_vjp("CenterCropPad", [normal(4, 5), ints(*asked)], constant=constant, symbolic=symbolic, **given)


@pytest.mark.parametrize("mode", [None, "DCR", "CRD"])
@pytest.mark.parametrize("blocksize", [2, 3])
@SYMBOLIC
def test_depth_to_space(mode, blocksize, symbolic):
    x = normal(2, 2 * blocksize**2, 3, 2)
    given = {} if mode is None else {"mode": mode}
    shuffle = (lambda x: torch.pixel_shuffle(x, blocksize)) if mode == "CRD" else None
    check_vjp("DepthToSpace", [x], against=shuffle, symbolic=symbolic, blocksize=blocksize, **given)


@pytest.mark.parametrize("blocksize", [2, 3])
@SYMBOLIC
def test_space_to_depth(blocksize, symbolic):
    x = normal(2, 2, 3 * blocksize, blocksize)
    check_vjp("SpaceToDepth", [x], symbolic=symbolic, blocksize=blocksize)


def test_space_to_depth_crd():
    x = normal(1, 2, 4, 6)
    check_vjp(
        "SpaceToDepth",
        [x],
        against=lambda x: torch.pixel_unshuffle(x, 2),
        opset=28,
        ort=False,  # it knows opsets up to 26
        blocksize=2,
        mode="CRD",
    )


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [None, 0, 1, -2, 5])
@SYMBOLIC
def test_trilu(upper, k, symbolic):
    def against(x, *_):
        return (torch.triu if upper else torch.tril)(x, k or 0)

    inputs = [normal(2, 3, 4)] if k is None else [normal(2, 3, 4), np.array(k)]
    check_vjp("Trilu", inputs, against=against, symbolic=symbolic, upper=upper)


@pytest.mark.parametrize(("batch_axis", "time_axis"), [(1, 0), (0, 1)])
@SYMBOLIC
def test_reverse_sequence(batch_axis, time_axis, symbolic):
    check_vjp(
        "ReverseSequence",
        [normal(4, 4, 2), ints(1, 4, 2, 3)],
        symbolic=symbolic,
        batch_axis=batch_axis,
        time_axis=time_axis,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "double"])
@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [("Flatten", {}), ("Transpose", {}), ("DepthToSpace", {"blocksize": 2, "mode": "CRD"})],
)
def test_dtype(op_type, attributes, dtype):
    assert dtypes_of_gradients(op_type, [(1, 4, 2, 2)], dtype, 20, **attributes) == {dtype}


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.data())
def test_any_pad(data):
    shape = data.draw(st.lists(st.integers(3, 5), min_size=1, max_size=3))
    mode = data.draw(st.sampled_from(["constant", "edge", "reflect", "wrap"]))
    pads = data.draw(st.lists(st.integers(0, 2), min_size=2 * len(shape), max_size=2 * len(shape)))
    symbolic, constant = data.draw(st.booleans()), data.draw(st.booleans())
    check_vjp(
        "Pad", [normal(*shape), ints(*pads)], constant=[1] if constant else [], symbolic=symbolic, mode=mode
    )
