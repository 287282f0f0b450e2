import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from onnxcam.backward import gradient, path
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import check, normalise
from tests.checks import quiet, reference

RNG = np.random.default_rng(1)
BOTH = pytest.mark.parametrize("symbolic", [False, True])


def gradients(text, feeds, seed, wrt=("x",), opset=21, ort=True, constants=None):
    """Run the gradients of y of the graph written in `text`, in onnx.reference and onnxruntime."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}, "com.example": 1]> {text}')
    for name, array in (constants or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = normalise(ir.from_proto(proto))
    values = {v.name: v for v in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]}
    y = values["y"]
    given = ir.Value(name="seed", shape=y.shape, type=y.type)
    model.graph.inputs.append(given)
    op = Emitter(model.graph, opset, "test")
    found = []
    for name in wrt:
        dx = gradient(op, y, given, values[name])
        assert dx is not None, f"no gradient reaches {name}"
        dx = op.Identity(dx)
        assert dx.dtype == values[name].dtype
        dx.shape = values[name].shape
        found.append(dx)
    model.graph.outputs[:] = found
    op.remove_dead([])
    check(model)
    proto = ir.to_proto(model)
    feeds = {**feeds, "seed": seed}
    results = [reference(proto).run(None, feeds)]
    if ort:
        results.append(onnxruntime.InferenceSession(proto.SerializeToString(), quiet()).run(None, feeds))
    for again in results[1:]:
        for a, b in zip(results[0], again, strict=True):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1e-6)
    return [np.float32(a) for a in results[0]]


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@BOTH
@pytest.mark.parametrize(("kind", "low", "high", "zero"), [("uint8", 0, 255, 100), ("int8", -128, 127, -3)])
def test_fake_quantised_values_keep_their_gradient(kind, low, high, zero, symbolic):
    """DQ(Q(x)) has slope 1 where x is in the range of the type, 0 where it is clamped; as in torch."""
    shape = "N, C" if symbolic else "3, 40"
    x = np.linspace(-20, 25, 120, dtype=np.float32).reshape(3, 40)
    seed = normal(3, 40)
    (dx,) = gradients(
        f"""graph (float[{shape}] x) => (float[{shape}] y)
            <float scale = {{0.1}}, {kind} zero = {{{zero}}}> {{
            q = QuantizeLinear(x, scale, zero)
            y = DequantizeLinear(q, scale, zero) }}""",
        {"x": x},
        seed,
    )
    t = torch.tensor(x, requires_grad=True)
    torch.fake_quantize_per_tensor_affine(t, 0.1, zero, low, high).backward(torch.tensor(seed))
    assert 0 < np.count_nonzero(t.grad) < x.size
    np.testing.assert_allclose(dx, t.grad.numpy(), rtol=1e-5)


def test_the_ends_of_the_range_are_in_it():
    """A zero after Relu is stored as the lowest number without having been clamped."""
    x = np.array([-0.04, 0.0, 0.04, 25.5, 25.54, 25.56], np.float32)
    (dx,) = gradients(
        """graph (float[6] x) => (float[6] y) <float scale = {0.1}> {
            q = QuantizeLinear(x, scale)
            y = DequantizeLinear(q, scale) }""",
        {"x": x},
        np.ones(6, np.float32),
    )
    np.testing.assert_allclose(dx, [1, 1, 1, 1, 1, 0], rtol=1e-6)


@BOTH
@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 8), 1), ((2, 3, 8), -2), ((3, 8), 0), ((2, 8, 3), 2)])
def test_per_axis(shape, axis, symbolic):
    scale, zero = np.array([0.01, 0.02, 0.005], np.float32), np.array([3, 0, -9], np.int8)
    sizes = ", ".join("ABC"[: len(shape)] if symbolic else map(str, shape))
    x, seed = 1.5 * normal(*shape), normal(*shape)
    (dx,) = gradients(
        f"""graph (float[{sizes}] x) => (float[{sizes}] y) {{
            q = QuantizeLinear<axis = {axis}>(x, scale, zero)
            y = DequantizeLinear<axis = {axis}>(q, scale, zero) }}""",
        {"x": x},
        seed,
        constants={"scale": scale, "zero": zero},
    )
    t = torch.tensor(x, requires_grad=True)
    torch.fake_quantize_per_channel_affine(
        t, torch.tensor(scale), torch.tensor(zero.astype(np.int32)), axis % len(shape), -128, 127
    ).backward(torch.tensor(seed))
    assert 0 < np.count_nonzero(t.grad) < x.size
    np.testing.assert_allclose(dx, t.grad.numpy(), rtol=1e-5)


@BOTH
def test_blocked(symbolic):
    shape = "A, B" if symbolic else "3, 6"
    scale = np.array([[0.01, 0.02, 0.005], [0.02, 0.01, 0.01], [0.004, 0.01, 0.02]], np.float32)
    x, seed = 1.5 * normal(3, 6), normal(3, 6)
    text = f"""graph (float[{shape}] x) => (float[{shape}] y) {{
        q = QuantizeLinear<block_size = 2, output_dtype = 3>(x, scale)
        y = DequantizeLinear<block_size = 2>(q, scale) }}"""
    (dx,) = gradients(text, {"x": x}, seed, constants={"scale": scale})
    inside = np.abs(np.rint(x / np.repeat(scale, 2, axis=1)) + 0.5) < 128
    assert 0 < np.count_nonzero(inside) < x.size
    np.testing.assert_allclose(dx, np.where(inside, seed, 0), rtol=1e-5)


@BOTH
@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("scale_shape", [(), (6,), (1,)])
def test_the_gradient_of_the_scale(scale_shape, block, symbolic):
    """Esser et al. 2020, eq. 3: round(x/s) - x/s inside the range, the end of the range outside."""
    if block:
        scale_shape = (4, 3)
    scale = RNG.uniform(0.005, 0.02, scale_shape).astype(np.float32)
    sizes = ["4, 6", ", ".join(map(str, scale_shape))]
    if symbolic:
        sizes = ["A, B", ", ".join("CD"[: len(scale_shape)])]
    x, seed = 1.5 * normal(4, 6), normal(4, 6)
    scale_type = f"float[{sizes[1]}]" if scale_shape else "float"
    blocks = f", block_size = {block}" if block else ""
    _, dscale = gradients(
        f"""graph (float[{sizes[0]}] x, {scale_type} scale) => (float[{sizes[0]}] y) {{
            q = QuantizeLinear<output_dtype = 3{blocks}>(x, scale)
            y = DequantizeLinear<axis = 1{blocks}>(q, scale) }}""",
        {"x": x, "scale": scale},
        seed,
        wrt=("x", "scale"),
    )
    wide = np.repeat(scale, 2, axis=1) if block else np.broadcast_to(scale, (4, 6))
    stored = np.rint(x / wide)
    slope = seed * np.where(np.abs(stored + 0.5) < 128, stored - x / wide, np.clip(stored, -128, 127))
    if block:
        want = slope.reshape(4, 3, 2).sum(-1)
    else:
        want = slope.sum(0) if scale_shape == (6,) else slope.sum().reshape(scale_shape)
    np.testing.assert_allclose(dscale, want, rtol=1e-4, atol=1e-3)


def test_half_precision_does_not_lose_small_gradients():
    """The stored number's gradient is scale times smaller: it is kept in float32."""
    seed = np.full(4, 2e-6, np.float16)
    (dx,) = gradients(
        """graph (float16[4] x) => (float16[4] y) <int8 zero = {0}> {
            q = QuantizeLinear(x, scale, zero)
            y = DequantizeLinear(q, scale, zero) }""",
        {"x": np.array([0.1, -0.2, 0.3, 9], np.float16)},
        seed,
        constants={"scale": np.float16(0.01)},
    )
    np.testing.assert_array_equal(dx, np.float32([*seed[:3], 0]))


def test_float8():
    x = np.array([0.3, -100, 440, 500, -900], np.float32)
    zero = np.zeros((), ml_dtypes.float8_e4m3fn)
    (dx,) = gradients(
        """graph (float[5] x) => (float[5] y) <float scale = {1.0}> {
            q = QuantizeLinear(x, scale, zero)
            y = DequantizeLinear(q, scale, zero) }""",
        {"x": x},
        np.ones(5, np.float32),
        constants={"zero": zero},
    )
    np.testing.assert_array_equal(dx, [1, 1, 1, 0, 0])


@BOTH
def test_what_moves_quantised_numbers_passes_their_gradient(symbolic):
    sizes = "N, 2, H, W" if symbolic else "1, 2, 4, 4"
    result = "N, H, W, C" if symbolic else "1, 2, 2, 2"
    x = RNG.permutation(32).reshape(1, 2, 4, 4).astype(np.float32) / 10
    seed = normal(1, 2, 2, 2)
    (dx,) = gradients(
        f"""graph (float[{sizes}] x) => (float[{result}] y)
            <float scale = {{0.05}}, uint8 zero = {{7}}, int64[4] shape = {{0, 2, -1, 4}}> {{
            q = QuantizeLinear(x, scale, zero)
            reshaped = Reshape(q, shape)
            pooled = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(reshaped)
            moved = Transpose<perm = [0, 2, 3, 1]>(pooled)
            y = DequantizeLinear(moved, scale, zero) }}""",
        {"x": x},
        seed,
    )
    t = torch.tensor(x, requires_grad=True)
    torch.nn.functional.max_pool2d(t, 2).permute(0, 2, 3, 1).backward(torch.tensor(seed))
    np.testing.assert_allclose(dx, t.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_dequantisation_by_hand():
    """Cast and Mul instead of DequantizeLinear: the gradient of a stored number is that of the number."""
    x, seed = normal(3, 4), normal(3, 4)
    (dx,) = gradients(
        """graph (float[3,4] x) => (float[3,4] y) <float scale = {0.05}, int8 zero = {7}> {
            q = QuantizeLinear(x, scale, zero)
            wide = Cast<to = 1>(q)
            y = Mul(wide, scale) }""",
        {"x": x},
        seed,
    )
    np.testing.assert_allclose(dx, seed, rtol=1e-5)


def test_a_quantised_network_against_torch():
    """Q, DQ around a convolution with quantised weights."""
    x, w, seed = normal(1, 2, 5, 5), RNG.integers(-99, 99, (3, 2, 3, 3), np.int8), normal(1, 3, 3, 3)
    (dx,) = gradients(
        """graph (float[1,2,5,5] x) => (float[1,3,3,3] y) <float scale = {0.05}, int8 zero = {0}> {
            q = QuantizeLinear(x, scale, zero)
            a = DequantizeLinear(q, scale, zero)
            weights = DequantizeLinear(w, scale, zero)
            c = Conv(a, weights)
            r = Relu(c)
            qr = QuantizeLinear(r, scale, zero)
            y = DequantizeLinear(qr, scale, zero) }""",
        {"x": x},
        seed,
        constants={"w": w},
    )
    t = torch.tensor(x, requires_grad=True)
    a = torch.fake_quantize_per_tensor_affine(t, 0.05, 0, -128, 127)
    r = torch.nn.functional.conv2d(a, torch.tensor(w.astype(np.float32) * np.float32(0.05))).relu()
    torch.fake_quantize_per_tensor_affine(r, 0.05, 0, -128, 127).backward(torch.tensor(seed))
    assert np.count_nonzero(t.grad) > 10
    np.testing.assert_allclose(dx, t.grad.numpy(), rtol=1e-4, atol=1e-4)


def test_an_operator_on_quantised_numbers_without_a_rule_is_named():
    with pytest.raises(OnnxcamError, match=r"operator com\.example\.QLinearSwirl \(node"):
        gradients(
            """graph (float[2,3] x) => (float[2,3] y) <float scale = {0.05}, uint8 zero = {0}, uint8[2,3] p> {
                q = QuantizeLinear(x, scale, zero)
                p = com.example.QLinearSwirl(q, scale, zero)
                y = DequantizeLinear(p, scale, zero) }""",
            {},
            None,
        )


def test_indices_and_shapes_of_quantised_numbers_carry_nothing():
    model = normalise(
        ir.from_proto(
            onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
                graph (float[2,3] x) => (float[2] y) <float scale = {0.05}, int8 zero = {0}> {
                q = QuantizeLinear(x, scale, zero)
                best = ArgMax<axis = 1, keepdims = 0>(q)
                y = Cast<to = 1>(best) }""")
        )
    )
    assert path(model.graph.outputs[0], model.graph.inputs[0]) == []
    assert [n.op_type for n in path(model.graph.node(0).outputs[0], model.graph.inputs[0])] == [
        "QuantizeLinear"
    ]


@BOTH
def test_dynamically_quantised_values_keep_their_gradient(symbolic):
    """The range is that of the values: nothing is clamped, and DQ(DynamicQuantizeLinear(x)) has slope 1."""
    shape = "N, C" if symbolic else "3, 4"
    x, seed = normal(3, 4), normal(3, 4)
    (dx,) = gradients(
        f"""graph (float[{shape}] x) => (float[{shape}] y) {{
            q, scale, zero = DynamicQuantizeLinear(x)
            y = DequantizeLinear(q, scale, zero) }}""",
        {"x": x},
        seed,
    )
    np.testing.assert_allclose(dx, seed, rtol=1e-6)
