import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx.reference.op_run import OpRun

from onnxcam.backward import gradient
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import check, normalise
from tests import checks
from tests.checks import check_vjp, dtypes_of_gradients, quiet, reference

RNG = np.random.default_rng(1)
BOTH = pytest.mark.parametrize("symbolic", [False, True])


def resize_model(shape, dtype, symbolic=False, opset=20, constants=(), differentiate=True, **attributes):
    """One Resize of x; `constants` maps the names of its other inputs to arrays."""
    constants = dict(constants)
    names = ["x", *(name if name in constants else "" for name in ("roi", "scales", "sizes"))]
    node = onnx.helper.make_node("Resize", names, ["y"], "node", **attributes)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    given_shape = [f"d{i}" for i in range(len(shape))] if symbolic else shape
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info("x", kind, given_shape)],
        [onnx.helper.make_empty_tensor_value_info("y")],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    if not differentiate:
        return model
    del model.graph.output[:]  # its type, which onnx would ask for, is known only to inference
    own = normalise(ir.from_proto(model))
    x, y = own.graph.inputs[0], own.graph.node("node").outputs[0]
    seed = ir.Value(name="seed", shape=y.shape, type=ir.TensorType(ir.DataType(kind)))
    own.graph.inputs.append(seed)
    op = Emitter(own.graph, opset, "test")
    dx = op.Identity(gradient(op, y, seed, x))
    dx.name, dx.shape = "dx", x.shape
    own.graph.outputs.append(dx)
    op.remove_dead([])
    check(own)
    return ir.to_proto(own)


def in_reference(model):
    return lambda feeds: reference(model).run(None, feeds)[0]


def in_onnxruntime(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), quiet())
    return lambda feeds: session.run(None, feeds)[0]


def check_resize(shape, symbolic=False, ort=True, onnx_reference=True, rtol=1e-9, **kwargs):
    """In each runtime the gradient is the transpose of that runtime's own Resize, element by element."""
    runtimes = [(in_reference, np.float64, rtol)] * onnx_reference
    runtimes += [(in_onnxruntime, np.float32, 1e-5)] * ort
    for runtime, dtype, tolerance in runtimes:
        forward = runtime(resize_model(shape, dtype, symbolic, differentiate=False, **kwargs))
        zero = forward({"x": np.zeros(shape, dtype)})
        seed = np.random.default_rng(2).standard_normal(zero.shape).astype(dtype)
        expected = np.zeros(shape, dtype)
        for at in itertools.product(*map(range, shape)):
            impulse = np.zeros(shape, dtype)
            impulse[at] = 1
            expected[at] = np.sum(seed * (forward({"x": impulse}) - zero))
        assert np.abs(expected).max() > 0
        got = runtime(resize_model(shape, dtype, symbolic, **kwargs))({"x": expected * 0, "seed": seed})
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def floats(*values):
    return np.array(values, np.float32)


def ints(*values):
    return np.array(values, np.int64)


COORDINATES = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]


@BOTH
@pytest.mark.parametrize("scales", [(2.0, 3.0), (0.6, 1.7)])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize(mode, coordinates, scales, symbolic):
    constants = {"scales": floats(1, 1, *scales)}
    check_resize(
        (1, 1, 4, 5), symbolic, constants=constants, mode=mode, coordinate_transformation_mode=coordinates
    )


@BOTH
@pytest.mark.parametrize("nearest_mode", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners"])
def test_resize_nearest_modes(nearest_mode, coordinates, symbolic):
    check_resize(
        (1, 1, 4, 5),
        symbolic,
        constants={"sizes": ints(1, 1, 8, 3)},
        mode="nearest",
        nearest_mode=nearest_mode,
        coordinate_transformation_mode=coordinates,
    )


@BOTH
@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("exclude_outside", [0, 1])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_antialias(mode, exclude_outside, coordinates, symbolic):
    check_resize(
        (1, 1, 7, 5),
        symbolic,
        constants={"sizes": ints(1, 1, 3, 8)},
        mode=mode,
        antialias=1,
        exclude_outside=exclude_outside,
        coordinate_transformation_mode=coordinates,
    )


@BOTH
def test_resize_cubic_with_another_coefficient(symbolic):
    check_resize(
        (1, 1, 4, 5),
        symbolic,
        constants={"scales": floats(1, 1, 1.5, 0.7)},
        mode="cubic",
        cubic_coeff_a=-0.5,
        exclude_outside=1,
    )


@BOTH
@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("sizes", [(5, 9), (9, 4), (3, 3)])
@pytest.mark.parametrize("how", [{"mode": "linear"}, {"mode": "cubic", "antialias": 1}, {"mode": "nearest"}])
def test_resize_that_keeps_the_aspect_ratio(how, sizes, policy, symbolic):
    check_resize(
        (1, 1, 4, 7),
        symbolic,
        constants={"sizes": ints(*sizes)},
        axes=[2, 3],
        keep_aspect_ratio_policy=policy,
        # onnx.reference computes antialiased cubic weights in float32: there they sum to 1 - 5e-8.
        rtol=1e-6 if "antialias" in how else 1e-9,
        **how,
    )


@BOTH
@pytest.mark.parametrize("roi", [(0.1, 0.2, 0.9, 0.7), (-0.2, 0.3, 0.8, 1.3)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_crop(mode, roi, symbolic):
    top, left, bottom, right = roi
    check_resize(
        (1, 1, 6, 5),
        symbolic,
        constants={"roi": floats(0, 0, top, left, 1, 1, bottom, right), "sizes": ints(1, 1, 4, 7)},
        mode=mode,
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=3.0,
    )


@BOTH
@pytest.mark.parametrize(
    ("shape", "constants", "attributes"),
    [
        ((2, 3, 4), {"scales": floats(1, 1, 2)}, {"mode": "linear"}),
        ((1, 2, 3, 2, 3), {"scales": floats(1, 1, 2, 1, 1.5)}, {"mode": "linear"}),
        ((1, 2, 3, 2, 3), {"scales": floats(1, 1, 2, 2, 2)}, {"mode": "nearest"}),
        ((2, 3, 2, 3), {"scales": floats(2, 0.5, 1, 3)}, {"mode": "nearest"}),
        ((2, 3, 4), {"sizes": ints(7, 5)}, {"mode": "nearest", "axes": [2, 1]}),
        ((5,), {"scales": floats(1.5)}, {"mode": "nearest"}),
    ],
)
def test_resize_of_any_axes(shape, constants, attributes, symbolic):
    # onnxruntime interpolates 3-D pictures of 4 dimensions only.
    check_resize(
        shape,
        symbolic,
        ort=attributes["mode"] == "nearest" or len(shape) > 3,
        constants=constants,
        **attributes,
    )


@BOTH
def test_resize_of_axes_counted_from_the_end(symbolic):
    # onnx.reference 1.23 takes no negative axes.
    check_resize(
        (1, 2, 4, 3),
        symbolic,
        onnx_reference=False,
        constants={"sizes": ints(7, 5)},
        axes=[-1, -2],
        mode="linear",
    )


def test_resize_serves_a_runtime_that_rounds_the_size_differently():
    """2.3 * 10 is 22.99 in float32: onnx.reference makes 22 elements of it, onnxruntime 23."""
    check_resize((1, 1, 2, 10), True, constants={"scales": floats(1, 1, 2, 2.3)}, mode="linear")


@pytest.mark.parametrize(
    ("attributes", "torch_mode"),
    [
        ({"mode": "linear", "coordinate_transformation_mode": "half_pixel"}, {"mode": "bilinear"}),
        (
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            {"mode": "bilinear", "align_corners": True},
        ),
        ({"mode": "cubic", "coordinate_transformation_mode": "half_pixel"}, {"mode": "bicubic"}),
        (
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            {"mode": "nearest"},
        ),
        ({"mode": "linear", "antialias": 1, "exclude_outside": 1}, {"mode": "bilinear", "antialias": True}),
    ],
)
def test_resize_against_torch(attributes, torch_mode):
    x = RNG.standard_normal((2, 3, 5, 6))
    seed = RNG.standard_normal((2, 3, 8, 4))
    model = resize_model(x.shape, np.float64, constants={"sizes": ints(2, 3, 8, 4)}, **attributes)
    t = torch.tensor(x, requires_grad=True)
    torch.nn.functional.interpolate(t, size=(8, 4), **torch_mode).backward(torch.tensor(seed))
    np.testing.assert_allclose(in_reference(model)({"x": x, "seed": seed}), t.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_of_half_precision(mode, dtype):
    """`resize_model` has onnx check the graph."""
    resize_model(
        (1, 2, 3, 4), ir.DataType[dtype].numpy(), constants={"scales": floats(1, 1, 2, 0.5)}, mode=mode
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_grid_sample_of_half_precision(mode, dtype):
    shapes = [(1, 2, 3, 4), (1, 2, 2, 2)]
    assert dtypes_of_gradients("GridSample", shapes, dtype, 22, mode=mode, padding_mode="reflection") == {
        dtype
    }


@pytest.mark.parametrize(
    ("head", "products"),
    [
        ("head = Shape<start = 0, end = 2>(x)", 2),
        ("all = Shape(x) head = Slice(all, zero, two)", 2),
        ("all = Shape(x) head = Slice(all, one, three)", 4),
        ("head = Shape<start = 1, end = 3>(x)", 4),
        ("head = Shape<start = 0, end = 2>(other)", 4),
    ],
)
def test_resize_to_a_size_joined_to_the_batch_and_channels_reads_no_batch(head, products):
    """As exporters write it: Concat(Shape(x)[:2], [8, 9]); then no matrix is made for the first two axes."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
            graph (float[N, C, H, W] x, float[A, B] other) => (float[D, E, 8, 9] y)
            <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}> {{
            {head}
            hw = Constant<value_ints = [8, 9]>()
            sizes = Concat<axis = 0>(head, hw)
            y = Resize<mode = "linear">(x, , , sizes)
        }}"""
    )
    model = normalise(ir.from_proto(proto))
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    seed = ir.Value(name="seed", shape=y.shape, type=y.type)
    op = Emitter(model.graph, 20, "test")
    assert gradient(op, y, seed, x) is not None
    assert [node.op_type for node in op.nodes].count("MatMul") == products


def test_resize_crop_that_keeps_the_aspect_ratio_is_refused():
    with pytest.raises(OnnxcamError, match="keep_aspect_ratio_policy not_larger"):
        resize_model(
            (1, 1, 4, 5),
            np.float32,
            constants={"roi": floats(0, 0, 1, 1), "sizes": ints(3, 3)},
            axes=[2, 3],
            coordinate_transformation_mode="tf_crop_and_resize",
            keep_aspect_ratio_policy="not_larger",
        )


class GridSample(OpRun):
    """torch's, which onnxruntime agrees with.

    onnx.reference 1.23 rounds coordinates to float32, and with cubic and border it clips the coordinate
    where both others clip the taps.
    """

    def _run(self, x, grid, mode=None, padding_mode=None, align_corners=None):
        x, grid = (torch.tensor(v.copy()) for v in (x, grid))
        return (by_torch(x, grid, mode, padding_mode, align_corners).numpy(),)


def by_torch(x, grid, mode, padding_mode, align_corners):
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return torch.nn.functional.grid_sample(x, grid, mode, padding_mode, bool(align_corners))


class AffineGrid(OpRun):
    """torch's, in the dtype of theta; onnx.reference 1.23 answers in float32."""

    def _run(self, theta, size, align_corners=None):
        grid = torch.nn.functional.affine_grid(torch.tensor(theta), size.tolist(), bool(align_corners))
        return (grid.numpy(),)


checks.NEW_OPS += [GridSample, AffineGrid]


def check_grid_sample(shape, out, mode, padding_mode, align_corners, symbolic=False, **kwargs):
    x, grid = RNG.standard_normal(shape), 1.4 * RNG.standard_normal((shape[0], *out, len(out)))
    opset = 16 if mode.startswith("bi") else 20
    check_vjp(
        "GridSample",
        [x, grid],
        against=lambda x, grid: by_torch(x, grid, mode, padding_mode, align_corners),
        wrt=[0] if mode == "nearest" else None,
        opset=max(opset, 18),
        symbolic=symbolic,
        mode=mode,
        padding_mode=padding_mode,
        align_corners=align_corners,
        **kwargs,
    )


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_grid_sample(mode, padding_mode, align_corners):
    check_grid_sample((2, 3, 4, 5), (3, 4), mode, padding_mode, align_corners, symbolic=True)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic", "bilinear", "bicubic"])
def test_grid_sample_of_fixed_size(mode):
    check_grid_sample((2, 3, 4, 5), (2, 2), mode, "reflection", 0)


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_grid_sample_of_a_volume(mode, padding_mode, align_corners):
    check_grid_sample((1, 2, 2, 3, 4), (2, 3, 2), mode, padding_mode, align_corners)


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_grid_sample_of_one_element(padding_mode):
    check_grid_sample((1, 2, 1, 1), (2, 3), "linear", padding_mode, 1)


def test_grid_sample_with_a_constant_grid():
    check_grid_sample((2, 3, 4, 5), (3, 4), "linear", "zeros", 0, constant=[1])


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 2, 3, 2, 4)])
def test_affine_grid(size, align_corners):
    n = len(size) - 2
    check_vjp(
        "AffineGrid",
        [RNG.standard_normal((size[0], n, n + 1)), ints(*size)],
        against=lambda theta, _: torch.nn.functional.affine_grid(theta, size, bool(align_corners)),
        align_corners=align_corners,
    )


any_size = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
LENGTHS = st.tuples(st.integers(1, 6), st.integers(1, 6))
HOW = st.one_of(
    st.fixed_dictionaries({"mode": st.just("linear")}, optional={"antialias": st.just(1)}),
    st.fixed_dictionaries(
        {"mode": st.just("cubic")},
        optional={"antialias": st.just(1), "exclude_outside": st.just(1), "cubic_coeff_a": st.just(-0.5)},
    ),
    st.fixed_dictionaries(
        {"mode": st.just("nearest")},
        optional={"nearest_mode": st.sampled_from(["round_prefer_ceil", "floor", "ceil"])},
    ),
)


@any_size
@given(
    lengths=LENGTHS,
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    how=HOW,
    coordinates=st.sampled_from(COORDINATES),
    symbolic=st.booleans(),
)
def test_resize_to_any_size(lengths, sizes, how, coordinates, symbolic):
    constants = {"sizes": ints(1, 1, *sizes)}
    check_resize(
        (1, 1, *lengths), symbolic, constants=constants, coordinate_transformation_mode=coordinates, **how
    )


@any_size
@given(
    lengths=LENGTHS,
    scales=st.tuples(*[st.sampled_from([0.5, 0.6, 1.0, 1.5, 2.0, 2.3, 3.0])] * 2),
    how=HOW,
    coordinates=st.sampled_from(COORDINATES),
    symbolic=st.booleans(),
)
def test_resize_by_any_scale(lengths, scales, how, coordinates, symbolic):
    assume(all(int(n * s) > 0 for n, s in zip(lengths, scales, strict=True)))
    constants = {"scales": floats(1, 1, *scales)}
    check_resize(
        (1, 1, *lengths), symbolic, constants=constants, coordinate_transformation_mode=coordinates, **how
    )
