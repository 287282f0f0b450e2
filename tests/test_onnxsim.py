"""Gradients against those of onnxsim's ``graph_grad``, which were written by others for another purpose.

It differentiates 46 operators, of static shapes, in float32, for quantisation-aware training. Both are given
the same model of opset 17 and both results run in onnxruntime.
"""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxsim import graph_grad, qat_graph

import onnxcam
from onnxcam.vjp import RULES
from tests.checks import quiet
from tests.graphs import build

RNG = np.random.default_rng(7)
TOLERANCE = 3e-6
"""Of the largest element. Float32 has 7 digits and the two add up in other orders: up to 7e-7 is measured."""

BOTH = sorted(graph_grad.supported_ops() & {name for domain, name in RULES if not domain})
STRAIGHT_THROUGH = {"QuantizeLinear", "DequantizeLinear"}
"""Their gradients are a convention, and compared in the last three tests."""

ONLY_THERE = {"IsNaN"}
"""Its output is no floating-point value: no gradient passes through it in onnxcam."""


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape):
    return RNG.uniform(0.5, 2, shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


def float32(value):
    return np.float32(value)


def binary(second=normal):
    pairs = [((2, 3), (2, 3)), ((2, 3, 4), (3, 1)), ((3,), (2, 1, 3)), ((2, 1, 4), (3, 1))]
    return [([normal(*a), second(*b)], {}) for a, b in pairs]


def unary(inputs=normal, **attributes):
    return [([inputs(2, 3, 4)], attributes)]


# For each operator: inputs (integers and booleans, and floating-point ones without dimensions, are weights),
# and attributes. No element is at a kink: there the two may choose different slopes.
CASES = {
    "Add": binary(),
    "AveragePool": [
        ([normal(1, 2, 7, 6)], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
        ([normal(1, 2, 7, 6)], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
        ([normal(2, 3, 9)], {"kernel_shape": [4], "strides": [3], "auto_pad": "SAME_UPPER"}),
    ],
    "BatchNormalization": [
        ([normal(2, 3, 4, 5), *(normal(3) for _ in range(3)), positive(3)], {"epsilon": 0.01})
    ],
    "Clip": [([normal(3, 4), float32(-0.5), float32(0.75)], {}), ([normal(3, 4), float32(-0.5)], {})],
    "Concat": [([normal(2, 3), normal(2, 1), normal(2, 4)], {"axis": 1}), ([normal(2, 3)] * 2, {"axis": -2})],
    "Conv": [
        (
            [normal(1, 4, 7, 6), normal(6, 2, 3, 2), normal(6)],
            {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]},
        ),
        ([normal(1, 2, 9, 8), normal(3, 2, 3, 3)], {"strides": [2, 3], "auto_pad": "SAME_LOWER"}),
        ([normal(1, 2, 9, 8), normal(3, 2, 3, 3)], {"dilations": [2, 3]}),
        ([normal(2, 3, 9), normal(3, 1, 4)], {"group": 3, "strides": [3]}),
        ([normal(1, 2, 3, 4, 5), normal(2, 2, 2, 3, 2)], {"pads": [0, 1, 1, 1, 0, 0]}),
    ],
    "DepthToSpace": [([normal(1, 8, 2, 3)], {"blocksize": 2, "mode": mode}) for mode in ("DCR", "CRD")],
    "Div": binary(positive),
    "Dropout": [*unary(), ([normal(2, 3), float32(0.5)], {})],
    "Elu": unary() + unary(alpha=1.75),
    "Erf": unary(),
    "Exp": unary(),
    "Expand": [([normal(3, 1), ints(2, 3, 4)], {}), ([normal(2, 1, 3), ints(1, 4, 1)], {})],
    "Gather": [([normal(3, 4), ints(0, 2, 0)], {}), ([normal(3, 4), np.array(-1)], {"axis": 1})],
    "Gemm": [
        ([normal(2, 3), normal(3, 4), normal(4)], {}),
        ([normal(3, 2), normal(4, 3), normal(2, 1)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 1.5}),
    ],
    "GlobalAveragePool": [([normal(2, 3, 4, 5)], {}), ([normal(2, 3, 4)], {})],
    "Identity": unary(),
    "InstanceNormalization": [([normal(2, 3, 4, 5), normal(3), normal(3)], {"epsilon": 0.01})],
    "LayerNormalization": [
        ([normal(2, 3, 8), normal(8), normal(8)], {"epsilon": 0.01}),
        ([normal(2, 3, 4), normal(3, 4)], {"axis": 1, "epsilon": 0.01}),
    ],
    "LeakyRelu": unary() + unary(alpha=0.25),
    "Log": unary(positive),
    "MatMul": [
        ([normal(*a), normal(*b)], {})
        for a, b in [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((1, 2, 3), (4, 3, 2))]
    ],
    "MaxPool": [
        ([normal(1, 2, 7, 6)], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
        ([normal(1, 2, 7, 6)], {"kernel_shape": [2, 2], "dilations": [2, 3]}),
        ([normal(1, 2, 3, 4, 5)], {"kernel_shape": [2, 2, 2], "strides": [1, 2, 2]}),
    ],
    "Mul": binary(),
    "Neg": unary(),
    "PRelu": [([normal(2, 3), normal(1)], {})],
    "Pad": [([normal(2, 3), ints(0, 1, 2, 0), float32(0.5)], {})],
    "ReduceMean": [
        ([normal(2, 3, 4)], {"axes": [1, -1]}),
        ([normal(2, 3, 4)], {"axes": [1], "keepdims": 0}),
        ([normal(2, 3)], {}),
    ],
    "ReduceSum": [
        ([normal(2, 3, 4), ints(0, 2)], {}),
        ([normal(2, 3, 4), ints(-1)], {"keepdims": 0}),
        ([normal(2, 3)], {}),
    ],
    "Relu": unary(),
    "Reshape": [([normal(2, 3, 4), ints(0, -1)], {})],
    "Sigmoid": unary(),
    "Slice": [([normal(5, 6), ints(1, 0), ints(4, 2**31), ints(0, -1), ints(1, 2)], {})],
    "Softmax": unary() + unary(axis=1),
    "Softplus": unary(),
    "Split": [
        ([normal(2, 6), ints(1, 3, 2)], {"axis": 1, "outputs": 3}),
        ([normal(4, 2)], {"axis": -2, "outputs": 2}),
    ],
    "Sqrt": unary(positive),
    "Squeeze": [([normal(2, 1, 3, 1), ints(1, -1)], {}), ([normal(1, 3)], {})],
    "Sub": binary(),
    "Tanh": unary(),
    "Transpose": unary(perm=[2, 0, 1]) + unary(),
    "Unsqueeze": [([normal(2, 3), ints(1, -1)], {})],
    "Where": [([np.array([True, False, True]), normal(2, 3), normal(2, 1)], {})],
}


def one_node(op_type, inputs, attributes):
    """A model of one node, and its inputs by name."""
    attributes = dict(attributes)
    arrays = {f"x{i}": a for i, a in enumerate(inputs)}
    given = {name: a for name, a in arrays.items() if a.dtype.kind == "f" and a.ndim}
    made = [f"y{i}" for i in range(attributes.pop("outputs", 1))]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op_type, list(arrays), made, **attributes)],
        "graph",
        [onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, a.shape) for k, a in given.items()],
        [onnx.helper.make_empty_tensor_value_info(name) for name in made],
        [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items() if name not in given],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, data_prop=True), given


def by_onnxcam(model, feeds, wrt):
    names = [info.name for info in model.graph.output]
    return run(ir.to_proto(onnxcam.gradient(model, names, wrt)), [f"{name}_gradient" for name in wrt], feeds)


def by_onnxsim(model, feeds, wrt):
    builder = qat_graph.GraphBuilder("backward_")
    builder.initializer.extend(model.graph.initializer)
    known = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in known}
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    seeds = {info.name: f"{info.name}_seed" for info in model.graph.output}
    found = graph_grad.build_backward(builder, list(model.graph.node), shapes, seeds, wrt)
    both = onnx.ModelProto()
    both.CopyFrom(model)
    for info in model.graph.output:
        seed = both.graph.input.add()
        seed.CopyFrom(info)
        seed.name = seeds[info.name]
    del both.graph.output[:], both.graph.initializer[:]
    both.graph.initializer.extend(builder.initializer)
    both.graph.node.extend(builder.nodes)
    both.graph.node.extend(onnx.helper.make_node("Identity", [found[n]], [f"{n}_gradient"]) for n in wrt)
    both.graph.output.extend(
        onnx.helper.make_tensor_value_info(f"{n}_gradient", onnx.TensorProto.FLOAT, shapes[n]) for n in wrt
    )
    both.functions.extend(builder.functions)
    both.opset_import.extend(onnx.helper.make_opsetid(f.domain, 1) for f in builder.functions[:1])
    return run(onnx.inliner.inline_local_functions(both), [f"{name}_gradient" for name in wrt], feeds)


def run(model, names, feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString(), quiet())
    given = {info.name for info in session.get_inputs()}
    return session.run(names, {name: a for name, a in feeds.items() if name in given})


def with_seeds(model, inputs):
    shapes = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output}
    return {**inputs, **{f"{name}_seed": normal(*shape) for name, shape in shapes.items()}}


def check(model, inputs):
    feeds, wrt = with_seeds(model, inputs), list(inputs)
    mine, other = by_onnxcam(model, feeds, wrt), by_onnxsim(model, feeds, wrt)
    for name, a, b in zip(wrt, mine, other, strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max(), err_msg=name)


def test_the_table_of_onnxsim_is_covered():
    assert graph_grad.supported_ops() - set(BOTH) == ONLY_THERE


@pytest.mark.parametrize("op_type", sorted(set(BOTH) - STRAIGHT_THROUGH))
def test_operator(op_type):
    for inputs, attributes in CASES[op_type]:
        check(*one_node(op_type, inputs, attributes))


BLOCKS = {
    "residual": """(float[2,3,8,8] x) => (float[2,5] y) <
        float[4,3,3,3] w, float[4] b, float[4,2,3,3] v, float[4,5] fc, int64[2] flat = {0, -1},
        float[4] scale, float[4] shift, float[4] mean, float[4] variance = {0.5, 1.0, 2.0, 1.5}>
    {
        c = Conv<pads = [1,1,1,1], strides = [2,2]>(x, w, b)
        r = Relu(c)
        d = Conv<pads = [1,1,1,1], group = 2>(r, v)
        n = BatchNormalization(d, scale, shift, mean, variance)
        s = Add(n, r)
        t = LeakyRelu<alpha = 0.25>(s)
        m = MaxPool<kernel_shape = [2,2], strides = [2,2]>(t)
        p = GlobalAveragePool(m)
        f = Reshape(p, flat)
        y = Gemm(f, fc)
    }""",
    "attention": """(float[2,5,8] x) => (float[2,5,8] y) <
        float[8] scale, float[8] shift, float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,16] up,
        float[16,8] down, float root = {0.70710677}, float one = {1}, float half = {0.5}>
    {
        n = LayerNormalization(x, scale, shift)
        q = MatMul(n, wq)
        k = MatMul(n, wk)
        v = MatMul(n, wv)
        kt = Transpose<perm = [0,2,1]>(k)
        l = MatMul(q, kt)
        p = Softmax(l)
        a = MatMul(p, v)
        r = Add(x, a)
        u = MatMul(r, up)
        scaled = Mul(u, root)
        e = Erf(scaled)
        more = Add(e, one)
        gate = Mul(more, half)
        g = Mul(u, gate)
        d = MatMul(g, down)
        y = Add(r, d)
    }""",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    model = build(BLOCKS[name], opset=17, ir_version=8)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    check(model, {"x": normal(*shape)})


SCALE = 0.25
QUANTISED = f"""(float[12] x) => (float[12] y) <float scale = {{{SCALE}}}, int8 zero = {{3}}>
{{
    q = QuantizeLinear(x, scale, zero)
    y = DequantizeLinear(q, scale, zero)
}}"""


def quantised(x, text=QUANTISED):
    """The gradients of both, and the seed."""
    model = onnx.shape_inference.infer_shapes(build(text, opset=17, ir_version=8))
    feeds = with_seeds(model, {"x": np.float32(x)})
    return by_onnxcam(model, feeds, ["x"])[0], by_onnxsim(model, feeds, ["x"])[0], feeds["y_seed"]


def test_values_that_are_quantised_keep_their_gradient_in_both():
    mine, other, _ = quantised(np.linspace(-30, 30, 12))
    np.testing.assert_allclose(mine, other, rtol=TOLERANCE)


def test_values_beyond_the_range_lose_their_gradient_as_in_torch_but_not_in_onnxsim():
    """onnxsim: dX = dY everywhere. The range is scale (-128 - zero) = -32.75 to scale (127 - zero) = 31."""
    x = torch.linspace(-60, 60, 12, requires_grad=True)
    mine, other, seed = quantised(x.detach().numpy())
    torch.fake_quantize_per_tensor_affine(x, SCALE, 3, -128, 127).backward(torch.tensor(seed))
    np.testing.assert_allclose(mine, x.grad.numpy(), rtol=TOLERANCE)
    assert 0 < np.count_nonzero(mine) < 12
    np.testing.assert_array_equal(other, seed)


def test_another_scale_to_dequantise_with_is_a_slope_but_not_in_onnxsim():
    """Y = s round(X / scale): the slope, by the difference over a whole step, is s / scale. onnxsim: 1."""
    text = QUANTISED.replace("<float", "<float s = {0.75}, float").replace("(q, scale", "(q, s")
    x = SCALE * np.arange(-6, 6)
    mine, other, seed = quantised(x, text)
    proto = build(text, opset=17, ir_version=8)
    ahead, behind = (run(proto, ["y"], {"x": np.float32(x + step)})[0] for step in (SCALE, -SCALE))
    np.testing.assert_allclose(mine, seed * (ahead - behind) / (2 * SCALE), rtol=TOLERANCE)
    np.testing.assert_array_equal(other, seed)
