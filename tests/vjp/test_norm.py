import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference.op_run import OpRun

from onnxcam.backward import gradient
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import check, normalise
from tests import checks
from tests.checks import check_vjp, quiet, reference

RNG = np.random.default_rng(1)
BOTH = pytest.mark.parametrize("symbolic", [False, True])
F = torch.nn.functional


class GroupNormalization(OpRun):
    """In the dtype of x; onnx.reference goes through the function's float32, and cannot infer opset 18's."""

    def _run(self, x, scale, bias, num_groups=None, epsilon=None, **_):
        grouped = x.reshape(len(x), num_groups, -1)
        centred = grouped - grouped.mean(2, keepdims=True)
        normal = (centred / np.sqrt((centred**2).mean(2, keepdims=True) + epsilon)).reshape(x.shape)
        along = (-1, *[1] * (x.ndim - 2))
        scale, bias = (np.repeat(v, x.shape[1] // len(v)).reshape(along) for v in (scale, bias))
        return ((normal * scale + bias).astype(x.dtype),)


class MeanVarianceNormalization(OpRun):
    """Without the cancellation of E[x^2] - E[x]^2 in the function that defines it."""

    def _run(self, x, axes=None):
        centred = x - x.mean(tuple(axes), keepdims=True)
        return (centred / (np.sqrt((centred**2).mean(tuple(axes), keepdims=True)) + x.dtype.type(1e-9)),)


class LpNormalization(OpRun):
    """onnx.reference's own forgets the absolute value."""

    def _run(self, x, axis=None, p=None):
        norm = (np.abs(x) ** p).sum(axis, keepdims=True) ** (1 / p)
        return (np.where(norm == 0, 0, x / np.where(norm == 0, 1, norm)).astype(x.dtype),)


class LRN(OpRun):
    """onnx.reference's own goes over the batch where it means the channels."""

    def _run(self, x, alpha=None, beta=None, bias=None, size=None):
        before = (size - 1) // 2
        squares = np.pad(x * x, [(0, 0), (before, size - 1 - before), *[(0, 0)] * (x.ndim - 2)])
        total = sum(squares[:, i : i + x.shape[1]] for i in range(size))
        return (x / (bias + alpha / size * total) ** beta,)


checks.NEW_OPS += [GroupNormalization, MeanVarianceNormalization, LpNormalization, LRN]


def normal(*shape):
    return RNG.standard_normal(shape)


def positive(*shape):
    return RNG.uniform(0.5, 2.0, shape)


@BOTH
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 2, 4)])
def test_batch_normalization(shape, symbolic):
    c = shape[1]

    def batch_norm(x, scale, bias, mean, variance):
        # Through torch's own, mean and variance get no gradient.
        along = (1, -1, *[1] * (len(shape) - 2))
        scale, bias, mean, variance = (v.reshape(along) for v in (scale, bias, mean, variance))
        return (x - mean) / (variance + 1e-3).sqrt() * scale + bias

    inputs = [normal(*shape), normal(c), normal(c), normal(c), positive(c)]
    check_vjp("BatchNormalization", inputs, against=batch_norm, symbolic=symbolic, epsilon=1e-3)


def test_batch_normalization_with_constant_parameters():
    inputs = [normal(2, 3, 4), normal(3), normal(3), normal(3), positive(3)]
    check_vjp(
        "BatchNormalization",
        inputs,
        against=lambda x, s, b, m, v: F.batch_norm(x, m, v, s, b),
        constant=[1, 2, 3, 4],
    )


def test_batch_normalization_in_training_is_refused():
    inputs = [normal(2, 3, 4), normal(3), normal(3), normal(3), positive(3)]
    with pytest.raises(OnnxcamError, match="training mode"):
        check_vjp("BatchNormalization", inputs, count=3, wrt=[0], training_mode=1)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 3, 8), -1), ((2, 3, 4, 5), 1), ((2, 3, 4, 5), -2), ((6, 5), 0), ((2, 3, 4), 2)]
)
def test_layer_normalization(shape, axis, bias, symbolic):
    inner = shape[axis % len(shape) :]
    check_vjp(
        "LayerNormalization",
        [normal(*shape), normal(*inner), *[normal(*inner)] * bias],
        against=lambda x, *parameters: F.layer_norm(x, inner, *parameters, eps=1e-3),
        symbolic=symbolic,
        axis=axis,
        epsilon=1e-3,
    )


@BOTH
def test_layer_normalization_with_a_broadcast_scale(symbolic):
    def layer_norm(x, scale, bias):
        return F.layer_norm(x, (4, 5)) * scale + bias

    inputs = [normal(2, 3, 4, 5), normal(4, 1), normal(1, 5)]
    # onnxruntime wants the whole shape.
    check_vjp("LayerNormalization", inputs, against=layer_norm, symbolic=symbolic, axis=2, ort=False)


@BOTH
@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 3, 8), -1), ((2, 3, 4, 5), 1), ((2, 3, 4, 5), -2), ((6, 5), 0)]
)
def test_rms_normalization(shape, axis, symbolic):
    inner = shape[axis % len(shape) :]
    check_vjp(
        "RMSNormalization",
        [normal(*shape), normal(*inner)],
        against=lambda x, scale: F.rms_norm(x, inner, scale, eps=1e-3),
        opset=23,
        symbolic=symbolic,
        axis=axis,
        epsilon=1e-3,
    )


@BOTH
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 4, 5), (1, 2, 3, 2, 4)])
def test_instance_normalization(shape, symbolic):
    def instance_norm(x, scale, bias):
        return F.instance_norm(x, weight=scale, bias=bias, eps=1e-3)

    inputs = [normal(*shape), normal(shape[1]), normal(shape[1])]
    check_vjp("InstanceNormalization", inputs, against=instance_norm, symbolic=symbolic, epsilon=1e-3)


def group_norm(groups, repeats):
    return lambda x, scale, bias: F.group_norm(
        x, groups, scale.repeat_interleave(repeats), bias.repeat_interleave(repeats), 1e-3
    )


@BOTH
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 3, 4), (1, 6, 2, 3, 2)])
@pytest.mark.parametrize("opset", [21, 24])
def test_group_normalization(opset, shape, groups, symbolic):
    check_vjp(
        "GroupNormalization",
        [normal(*shape), normal(6), normal(6)],
        against=group_norm(groups, 1),
        opset=opset,
        symbolic=symbolic,
        num_groups=groups,
        epsilon=1e-3,
    )


@BOTH
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 3, 4)])
@pytest.mark.parametrize("opset", [18, 20])
def test_group_normalization_with_a_scale_for_each_group(opset, shape, groups, symbolic):
    """As before opset 21; onnx calls that deprecated, onnxruntime runs it."""
    check_vjp(
        "GroupNormalization",
        [normal(*shape), normal(groups), normal(groups)],
        against=group_norm(groups, 6 // groups),
        opset=opset,
        symbolic=symbolic,
        num_groups=groups,
        epsilon=1e-3,
    )


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_what_follows_a_group_normalization_has_a_shape(opset):
    model = normalise(
        ir.from_proto(
            onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": {opset}]>
                graph (float[N, 4, H, W] x, float[{4 if opset == 21 else 2}] s) => (float[N, 4, H, W] y) {{
                g = GroupNormalization<num_groups = 2>(x, s, s)
                f = Flatten(g)
                y = Relu(g) }}""")
        )
    )
    assert str(model.graph.node(0).outputs[0].shape) == "[N,4,H,W]"
    assert len(model.graph.node(1).outputs[0].shape) == 2


@pytest.mark.parametrize("axes", [None, [1, 2, 3], [-1, 0], [2]])
def test_mean_variance_normalization(axes):
    """In float32: onnx's inference refuses the operator in any other type, and without axes."""
    along = axes or [0, 2, 3]
    x, seed = normal(2, 3, 4, 5).astype(np.float32), normal(2, 3, 4, 5).astype(np.float32)
    t = torch.tensor(x.astype(float), requires_grad=True)
    deviation = t.var(along, correction=0, keepdim=True).sqrt()
    ((t - t.mean(along, keepdim=True)) / (deviation + 1e-9)).backward(torch.tensor(seed.astype(float)))
    model = gradient_model(
        "MeanVarianceNormalization", [x], checked=axes is not None, **({} if axes is None else {"axes": axes})
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), quiet())
    for run in (reference(model).run, session.run):
        np.testing.assert_allclose(run(None, {"x0": x, "seed": seed})[0], t.grad.numpy(), rtol=0, atol=1e-5)


def test_mean_variance_normalization_of_a_flat_picture_has_finite_slopes():
    x = np.ones((1, 2, 3, 3), np.float32)
    model = gradient_model("MeanVarianceNormalization", [x], axes=[2, 3])
    assert np.isfinite(reference(model).run(None, {"x0": x, "seed": x})[0]).all()


@BOTH
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_lp_normalization(axis, p, symbolic):
    def lp_norm(x):
        return x / (x.abs() ** p).sum(axis, keepdim=True) ** (1 / p)

    check_vjp("LpNormalization", [normal(3, 4, 5)], against=lp_norm, symbolic=symbolic, axis=axis, p=p)


@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization_of_zeros_has_no_slope(p):
    x = np.zeros((2, 3), np.float32)
    model = gradient_model("LpNormalization", [x], p=p, axis=1)
    (dx,) = reference(model).run(None, {"x0": x, "seed": x + 1})
    assert (dx == 0).all()


@BOTH
@pytest.mark.parametrize("size", [1, 3, 4, 5])
@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 4, 3, 2)])
def test_lrn(shape, size, symbolic):
    attributes = {"size": size, "alpha": 0.3, "beta": 0.6, "bias": 1.5}

    def lrn(x):
        before = (size - 1) // 2
        padded = F.pad((x * x).movedim(1, -1), (before, size - 1 - before))
        d = 1.5 + 0.3 / size * padded.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
        return x / d**0.6

    # onnxruntime wants pictures and an odd size. Attributes are float32.
    ort = len(shape) == 4 and size % 2 == 1
    check_vjp("LRN", [normal(*shape)], against=lrn, symbolic=symbolic, rtol=1e-6, ort=ort, **attributes)


@BOTH
@pytest.mark.parametrize(
    ("inputs", "constant"),
    [
        ([], []),
        ([np.float64(0.3)], [1]),
        ([np.float64(0.3), np.bool_(False)], [1, 2]),
        ([None, np.bool_(False)], [2]),
    ],
)
def test_dropout(inputs, constant, symbolic):
    check_vjp(
        "Dropout",
        [normal(2, 3), *inputs],
        against=lambda x, *_: x,
        wrt=[0],
        constant=constant,
        symbolic=symbolic,
    )


@pytest.mark.parametrize("constant", [[1, 2], [1]])
def test_dropout_in_training_is_refused(constant):
    with pytest.raises(OnnxcamError, match="training mode"):
        check_vjp("Dropout", [normal(2, 3), np.float64(0.3), np.bool_(True)], wrt=[0], constant=constant)


def gradient_model(op_type, inputs, opset=20, checked=True, **attributes):
    """The gradients of all inputs, each in its own dtype; the seed is called ``seed``."""
    names = [f"x{i}" for i in range(len(inputs))]
    kinds = [onnx.helper.np_dtype_to_tensor_dtype(a.dtype) for a in inputs]
    kind = kinds[-1] if op_type == "RMSNormalization" else kinds[0]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op_type, names, ["y"], "node", **attributes)],
        "graph",
        [
            onnx.helper.make_tensor_value_info(name, kind, a.shape)
            for name, kind, a in zip(names, kinds, inputs, strict=True)
        ],
        [onnx.helper.make_tensor_value_info("y", kind, inputs[0].shape)],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    model = ir.from_proto(proto)
    if checked:
        model = normalise(model)
    y = model.graph.outputs[0]
    seed = ir.Value(name="seed", shape=y.shape, type=y.type)
    model.graph.inputs.append(seed)
    op = Emitter(model.graph, opset, "test")
    found = []
    for x in model.graph.inputs[: len(names)]:
        dx = op.Identity(gradient(op, y, seed, x))
        assert dx.dtype == x.dtype
        found.append(dx)
    model.graph.outputs[:] = found
    op.remove_dead([])
    if not y.uses():
        model.graph.remove(y.producer())  # in half precision onnx.reference overflows there
    if checked:
        check(model)
    return ir.to_proto(model)


HALVES = [
    ("BatchNormalization", [(2, 3, 4), 3, 3, 3, "positive"], 20, {}),
    ("LayerNormalization", [(2, 3, 8), 8, 8], 20, {}),
    ("RMSNormalization", [(2, 3, 8), 8], 23, {}),
    ("InstanceNormalization", [(2, 3, 8), 3, 3], 22, {}),
    ("GroupNormalization", [(2, 4, 8), 4, 4], 21, {"num_groups": 2}),
    ("LpNormalization", [(2, 3, 8)], 22, {}),
    ("LRN", [(2, 5, 3, 4)], 20, {"size": 3}),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize(("op_type", "shapes", "opset", "attributes"), HALVES)
def test_gradients_have_the_dtype_of_their_inputs(op_type, shapes, opset, attributes, dtype):
    inputs = [
        np.ones(3 if shape == "positive" else shape, ir.DataType[CODES[dtype]].numpy()) for shape in shapes
    ]
    gradient_model(op_type, inputs, opset, **attributes)


CODES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float64": "DOUBLE"}


@pytest.mark.parametrize(
    ("scale", "mean"),
    [("float32", "float32"), ("float16", "float32"), ("float32", "float16"), ("float16", "float16")],
)
def test_batch_normalization_of_half_precision(scale, mean):
    wide = [normal(2, 3, 4), normal(3), normal(3), normal(3), 1e-4 * positive(3)]
    dtypes = ["float16", scale, scale, mean, mean]
    inputs = [v.astype(dtype) for v, dtype in zip(wide, dtypes, strict=True)]
    model = gradient_model("BatchNormalization", inputs)
    seed = 0.01 * normal(2, 3, 4).astype(np.float16)
    got = reference(model).run(None, {**{f"x{i}": v for i, v in enumerate(inputs)}, "seed": seed})[0]
    factor = inputs[1].astype(float) / np.sqrt(inputs[4].astype(float) + 1e-5)
    np.testing.assert_allclose(got, seed.astype(float) * factor[:, None], rtol=3e-3)


@pytest.mark.parametrize(
    ("op_type", "parameters", "opset"),
    [("LayerNormalization", 2, 20), ("RMSNormalization", 1, 23), ("InstanceNormalization", 2, 20)],
)
def test_large_values_in_half_precision_do_not_overflow(op_type, parameters, opset):
    x = (300 * normal(1, 2, 64)).astype(np.float16)
    n = 2 if op_type == "InstanceNormalization" else 64
    inputs = [x, *[np.ones(n, np.float16)] * parameters]
    seed = normal(1, 2, 64).astype(np.float16)
    feeds = {**{f"x{i}": v for i, v in enumerate(inputs)}, "seed": 100 * seed}
    model = gradient_model(op_type, inputs, opset)
    wide = gradient_model(op_type, [v.astype(np.float64) for v in inputs], opset)
    got = reference(model).run(None, feeds)[0]
    want = reference(wide).run(None, {k: v.astype(np.float64) for k, v in feeds.items()})[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_rms_normalization_with_another_type_of_scale():
    x, scale, seed = (
        normal(2, 8).astype(np.float16),
        normal(8).astype(np.float32),
        normal(2, 8).astype(np.float32),
    )
    # onnx's inference takes the output's type from x.
    model = gradient_model("RMSNormalization", [x, scale], 23, checked=False)
    t = torch.tensor(x.astype(float), requires_grad=True)
    F.rms_norm(t, (8,), torch.tensor(scale.astype(float)), eps=1e-5).backward(
        torch.tensor(seed.astype(float))
    )
    got = reference(model).run(None, {"x0": x, "x1": scale, "seed": seed})[0]
    np.testing.assert_allclose(got, t.grad.numpy(), atol=5e-3)
