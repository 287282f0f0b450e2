"""Control flow and functions on the way of a gradient: against central differences, torch and onnxruntime."""

import io
import re
import textwrap
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference.op_run import OpRun

import onnxcam
import onnxcam.vjp
from onnxcam import layers
from onnxcam.attaching import attach, prepared
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import normalise
from onnxcam.vjp import RULES, vjp
from onnxcam.vjp.shapes import unbroadcast
from tests.checks import NEW_OPS, quiet, reference, relative_error
from tests.graphs import EVERYTHING, build, picture, run, weights_of

WEIGHTS = "<T[3] k, T[3,3] w, T two = {2.0}, int64[1] one = {1}, int64[2] rows = {-1, 3}, T[1] zero = {0}>"

# Each an `If` between x [N,3] and y [N,3]; `on` is an input.
IFS = {
    "in the middle": """a = Tanh(x) s = If(on) <
        then_branch = t () => (T[N,3] y0) { b = MatMul(a, w) y0 = Exp(b) },
        else_branch = e () => (T[N,3] z0) { b = Sin(a) c = Mul(b, k) z0 = Mul(c, c) }> y = Mul(s, s)""",
    "at the end": """a = Tanh(x) y = If(on) <
        then_branch = t () => (T[N,3] y0) { b = MatMul(a, w) y0 = Sigmoid(b) },
        else_branch = e () => (T[N,3] z0) { z0 = Exp(a) }>""",
    "reads the input and a value between, read outside too": """a = Tanh(x) s = If(on) <
        then_branch = t () => (T[N,3] y0) { b = Mul(a, x) y0 = Mul(b, a) },
        else_branch = e () => (T[N,3] z0) { z0 = Exp(x) }> p = Mul(s, a) y = Add(p, x)""",
    "a branch that passes on what it reads": """a = Tanh(x) s = If(on) <
        then_branch = t () => (T[N,3] y0) { y0 = Identity(a) },
        else_branch = e () => (T[N,3] z0) { z0 = Identity(x) }> y = Mul(s, s)""",
    "a branch that depends on nothing": """a = Tanh(x) s = If(on) <
        then_branch = t () => (T[N,3] y0) { y0 = Exp(a) },
        else_branch = e () => (T[3] z0) { z0 = Mul(k, k) }> y = Mul(s, x)""",
    "a branch that is only a weight": """s = If(on) <
        then_branch = t () => (T[3] y0) <T[3] y0 = {1, 2, 3}> { },
        else_branch = e () => (T[N,3] z0) { z0 = Exp(x) }> y = Mul(s, x)""",
    "weights of its own": """s = If(on) <
        then_branch = t () => (T[N,3] y0) <T[3] own = {3, 4, 5}> { b = Mul(x, own) y0 = Exp(b) },
        else_branch = e () => (T[N,3] z0) <T[3] own = {6, 7, 8}> { b = Sub(x, own) z0 = Mul(b, b) }>
        y = Sub(s, k)""",
    "constants of its own": """s = If(on) <
        then_branch = t () => (T[N,1] y0) { axis = Constant<value_ints=[1]>() y0 = ReduceSum(x, axis) },
        else_branch = e () => (T[N,3] z0) { c = Constant<value: tensor = T[3] {1, 2, 3}>() b = Mul(x, c)
            z0 = Sin(b) }> y = Mul(s, x)""",
    "a constant that it works out": """s = If(on) <
        then_branch = t () => (T[N,1] y0) { axis = Mul(one, one) b = Slice(x, first, one, axis) y0 = Exp(b) },
        else_branch = e () => (T[N,3] z0) { z0 = Sin(x) }> y = Mul(s, x)""",
    "one gradient for two values": """a = Tanh(x) s = If(on) <
        then_branch = t () => (T[N,3] y0) { b = Add(a, x) y0 = Exp(b) },
        else_branch = e () => (T[N,3] z0) { z0 = Add(a, x) }> y = Mul(s, a)""",
    "several outputs": """a = Tanh(x) s, u, v = If(on) <
        then_branch = t () => (T[N,3] y0, T[N,1] y1, T[3] y2) { y0 = Exp(a) y1 = ReduceSum(y0, one)
            y2 = Neg(k) },
        else_branch = e () => (T[N,3] z0, T[N,1] z1, T[3] z2) { b = Sin(a) z0 = Mul(b, b)
            z1 = ReduceMax(a, one) z2 = Mul(k, k) }>
        p = Mul(s, u) y = Mul(p, v)""",
    "one output that goes nowhere": """s, u = If(on) <
        then_branch = t () => (T[N,3] y0, int64[N] y1) { y0 = Exp(x) y1 = ArgMax<axis=1, keepdims=0>(x) },
        else_branch = e () => (T[N,3] z0, int64[N] z1) { z0 = Sin(x) z1 = ArgMin<axis=1, keepdims=0>(x) }>
        y = Mul(s, s)""",
    "another inside": """a = Tanh(x) s = If(on) <
        then_branch = t () => (T[N,3] y0) { b = Exp(a) c = Sin(b) m = ReduceSum<keepdims=0>(c)
            f = Greater(m, zero) g = Squeeze(f) h = If(g) <
                then_branch = tt () => (T[N,3] y1) { n = Mul(b, x) o = Exp(n) y1 = Mul(o, c) },
                else_branch = te () => (T[N,3] y2) { y2 = Mul(c, c) }> y0 = Mul(h, b) },
        else_branch = e () => (T[N,3] z0) { h = Neg(x) off = Not(on) z0 = If(off) <
                then_branch = et () => (T[N,3] z1) { n = Exp(h) z1 = Mul(n, a) },
                else_branch = ee () => (T[N,3] z2) { z2 = Identity(a) }> }> y = Mul(s, a)""",
    "two with the same names inside": """s = If(on) <
        then_branch = t () => (T[N,3] y0) { b = Exp(x) y0 = Sin(b) },
        else_branch = e () => (T[N,3] y0) { b = Sin(x) y0 = Exp(b) }>
        y = If(on) <
        then_branch = t () => (T[N,3] y0) { b = Exp(s) y0 = Sin(b) },
        else_branch = e () => (T[N,3] y0) { b = Sin(s) y0 = Exp(b) }>""",
    "indices and masks inside": """s = If(on) <
        then_branch = t () => (T[N,3] y0) { g = Greater(x, k) b = Mul(x, x) y0 = Where(g, b, x) },
        else_branch = e () => (T[N,2] z0) { v, i = TopK<axis=1>(x, one) j = Concat<axis=1>(i, i)
            m = GatherElements<axis=1>(x, j) z0 = Mul(m, m) }>
        n = ReduceSum(s, one) y = Mul(n, x)""",
    "dimensions that differ": """r = Tanh(x) s = If(on) <
        then_branch = t () => (T[M] y0) { f = Reshape(r, minus) y0 = Exp(f) },
        else_branch = e () => (T[N,1,3] z0) { f = Sin(r) z0 = Unsqueeze(f, one) }>
        p = Reshape(s, rows) y = Mul(p, p)""",
    "dimensions that differ, unknown behind it too": """r = Tanh(x) s = If(on) <
        then_branch = t () => (T[M] y0) { f = Reshape(r, minus) y0 = Exp(f) },
        else_branch = e () => (T[N,1,3] z0) { f = Sin(r) z0 = Unsqueeze(f, one) }>
        q = Exp(s) u = Mul(q, s) v = Add(u, two) p = Reshape(v, rows) y = Mul(p, p)""",
    "dimensions that only the branch taken has": """s = If(true) <
        then_branch = t () => (T[N,3] y0) { y0 = Exp(x) },
        else_branch = e () => (T[3,N,1] z0) { b = Unsqueeze(x, one) c = Sin(b)
            z0 = Transpose<perm=[2,0,1]>(c) }> y = Gemm(s, w)""",
    "a condition that is constant": """s = If(true) <
        then_branch = t () => (T[N,3] y0) { y0 = Exp(x) },
        else_branch = e () => (T[N,3] z0) { z0 = Sin(x) }> y = Mul(s, s)""",
    "a condition that is worked out": """c = Shape<start=1>(x) d = Equal(c, one) s = If(d) <
        then_branch = t () => (T[N,3] y0) { y0 = Exp(x) },
        else_branch = e () => (T[N,3] z0) { z0 = Sin(x) }> y = Mul(s, s)""",
    "a condition that depends on the picture": """m = ReduceMean<keepdims=0>(x) c = Greater(m, two)
        d = Not(on) o = Or(c, d) s = If(o) <
        then_branch = t () => (T[N,3] y0) { y0 = Exp(x) },
        else_branch = e () => (T[N,3] z0) { b = Mul(x, m) z0 = Sin(b) }> y = Mul(s, s)""",
    "a condition that depends on the number of rows": """n = Shape<end=1>(x) c = Equal(n, one) s = If(c) <
        then_branch = t () => (T[3] y0) { b = Squeeze(x, first) y0 = Exp(b) },
        else_branch = e () => (T[N,3] z0) { z0 = Sin(x) }> y = Mul(s, x)""",
}


def case(name, dtype):
    weights = WEIGHTS.replace(">", ", int64[1] minus = {-1}, int64[1] first = {0}, bool true = {1}>")
    return build(f"(T[N,3] x, bool on) => (T[N,3] y) {weights} {{ {IFS[name]} }}", dtype=dtype)


def differences(total, x, step=1e-6):
    """The gradient of ``total(x)`` at `x` [...] by central differences."""
    found = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[at], down[at] = x[at] + step, x[at] - step
        found[at] = (total(up) - total(down)) / (up[at] - down[at])
    return found


@pytest.mark.parametrize("name", IFS)
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_through_both_branches(name, on, n):
    rng = np.random.default_rng(n)
    x, seed = rng.standard_normal((2, n, 3))
    feeds = {"on": np.array(on), "y_seed": seed}
    forward = reference(case(name, "double"))
    wanted = differences(
        lambda x: float((forward.run(["y"], {"x": x, "on": feeds["on"]})[0] * seed).sum()), x
    )
    added = ir.to_proto(onnxcam.gradient(case(name, "double"), "y", "x"))
    onnx.checker.check_model(added, full_check=True)
    y, dx = reference(added).run(["y", "x_gradient"], {"x": x, **feeds})
    np.testing.assert_array_equal(y, forward.run(["y"], {"x": x, "on": feeds["on"]})[0])
    assert dx.shape == wanted.shape
    assert relative_error(dx, wanted) < 1e-8
    single = ir.to_proto(onnxcam.gradient(case(name, "float"), "y", "x"))
    session = onnxruntime.InferenceSession(single.SerializeToString(), quiet())
    feeds = {"x": x.astype(np.float32), "on": feeds["on"], "y_seed": seed.astype(np.float32)}
    assert relative_error(session.run(["x_gradient"], feeds)[0], wanted) < 1e-5


# Classifiers with an `If` between the layer r [N,4,5,4] and the scores; `big` is a threshold.
POOLED = "p = GlobalAveragePool(s) f = Flatten(p) scores = MatMul(f, fc)"
CONVOLUTIONS = f"""
    then_branch = t () => (T[N,6,5,4] y0) {{ n = Neg(r) a = Mul(n, half)
        b = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(a, v) y0 = Tanh(b) }},
    else_branch = e () => (T[N,6,5,4] z0) {{ b = Conv<kernel_shape=[1,1]>(r, u) d = Sigmoid(b)
        z0 = Mul(b, d) }}> {POOLED}"""
CLASSIFIERS = {
    "in the middle": f"s = If(on) < {CONVOLUTIONS}",
    "in the middle, by the picture": f"""m = ReduceMean<keepdims=0>(x) bright = Greater(m, big)
        s = If(bright) < {CONVOLUTIONS}""",
    "at the end": """scores = If(on) <
        then_branch = t () => (T[N,5] y0) { p = GlobalAveragePool(r) f = Flatten(p) g = MatMul(f, h1)
            i = Relu(g) y0 = MatMul(i, fc) },
        else_branch = e () => (T[N,5] z0) { f = Flatten(r) g = MatMul(f, flat) i = Tanh(g)
            z0 = MatMul(i, fc) }>""",
    "where all would be linear": """p = GlobalAveragePool(r) f = Flatten(p) g = MatMul(f, h1) s = If(on) <
        then_branch = t () => (T[N,6] y0) { y0 = Neg(g) },
        else_branch = e () => (T[N,6] z0) { z0 = Add(g, g) }> scores = MatMul(s, fc)""",
    "by the number of pictures": """q = GlobalMaxPool(r) p = Mul(q, q) n = Shape<end=1>(x)
        alone = Equal(n, one) s = If(alone) <
        then_branch = t () => (T[4] y0) { y0 = Squeeze(p) },
        else_branch = e () => (T[N,4] z0) { f = Flatten(p) z0 = Exp(f) }>
        f = Reshape(s, to4) g = MatMul(f, h1) scores = MatMul(g, fc)""",
}


def classifier(name, dtype, batch, *, moved=False):
    """With ``moved``, `delta` [N,4,5,4] is added to the layer r."""
    layer = "r0 = Sigmoid(c) r = Add(r0, delta)" if moved else "r = Sigmoid(c)"
    return build(
        f"""(T[{batch},3,5,4] x, bool on{", T[N,4,5,4] delta" if moved else ""}) => (T[{batch},5] scores)
        <T[4,3,3,3] w, T[6,4,3,3] v, T[6,4,1,1] u, T[4,6] h1, T[80,6] flat, T[6,5] fc, int64[1] one = {{1}},
         int64[2] to4 = {{-1, 4}}, T big = {{0}}, T half = {{0.5}}>
        {{ c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w) {layer} {CLASSIFIERS[name]} }}""",
        dtype=dtype,
    )


# Of three pictures, known beforehand, the branch for one would be invalid.
BATCHES = [(n, b, name) for n, b in ((3, "N"), (1, "N"), (3, "3"), (1, "1")) for name in CLASSIFIERS]
BATCHES.remove((3, "3", "by the number of pictures"))


@pytest.mark.parametrize(("n", "batch", "name"), BATCHES)
@pytest.mark.parametrize("on", [True, False])
def test_explanations_through_both_branches(n, batch, name, on):
    x = np.random.default_rng(3).standard_normal((n, 3, 5, 4))
    x += (0.1 if on else -0.1) - x.mean()
    classes = np.array([[3, -1], [0, 4], [-2, 2]])[:n]
    forward = reference(classifier(name, "double", batch, moved=True))
    feeds = {"x": x, "on": np.array(on)}
    scores = forward.run(None, {**feeds, "delta": np.zeros((n, 4, 5, 4))})[0]
    chosen = np.where(classes < 0, np.argsort(-scores, axis=1)[np.arange(n)[:, None], -1 - classes], classes)
    wanted = np.zeros((n, 2, 80))
    for at in range(80):
        delta = np.zeros((n, 80))
        delta[:, at] = 1e-5
        ends = [forward.run(None, {**feeds, "delta": d.reshape(-1, 4, 5, 4)})[0] for d in (delta, -delta)]
        wanted[:, :, at] = np.take_along_axis(ends[0] - ends[1], chosen, axis=1) / 2e-5
    wanted = wanted.reshape(-1, 4, 5, 4)
    added = ir.to_proto(attach(classifier(name, "double", batch), layer="r", emit=EVERYTHING))
    onnx.checker.check_model(added, full_check=True)
    got = dict(zip(EVERYTHING, reference(added).run(None, {**feeds, "cam_class": classes})[-4:], strict=True))
    assert relative_error(got["gradients"], wanted) < 1e-8
    single = ir.to_proto(attach(classifier(name, "float", batch), layer="r", emit=EVERYTHING))
    session = onnxruntime.InferenceSession(single.SerializeToString(), quiet())
    by_ort = session.run(None, {"x": x.astype(np.float32), "on": np.array(on), "cam_class": classes})
    np.testing.assert_allclose(by_ort[0], scores, rtol=1e-4, atol=1e-5)
    assert relative_error(by_ort[-1], wanted) < 5e-6


def test_what_stays_of_an_if_that_the_gradient_passes_through():
    """Its nodes and outputs, in order; behind them what the gradient reads of a branch."""
    plain = classifier("in the middle", "float", "N")
    added = ir.to_proto(attach(plain, layer="r"))
    old, new = (next(n for n in m.graph.node if n.op_type == "If") for m in (plain, added))
    assert list(new.input) == list(old.input)
    assert list(new.output) == ["s", "cam/gradcam/gradient/If_2/read", "cam/gradcam/gradient/If_2/read_1"]
    stated = {v.name: v.type.tensor_type.shape.dim for v in added.graph.value_info}
    assert not any(dim.HasField("dim_value") for name in new.output[1:] for dim in stated[name])
    for theirs, ours, further in zip(old.attribute, new.attribute, [0, 2], strict=True):
        made = [(n.op_type, list(n.output)) for n in ours.g.node]
        count = len(theirs.g.node)
        assert made[:count] == [(n.op_type, list(n.output)) for n in theirs.g.node]
        assert all(name.startswith("cam/gradcam/gradient/If_2/") for _, (name,) in made[count:])
        assert len(made[count:]) == 2 - further
    assert [o.name for o in added.graph.output] == ["scores", "cam", "cam_heatmap"]
    x = picture(2, 3, 5, 4)
    for on in (True, False):
        feeds = {"x": x, "on": np.array(on)}
        np.testing.assert_array_equal(run(added, feeds)["scores"], run(plain, feeds)["scores"])


def test_the_gradient_is_that_of_the_numbers_that_were_drawn():
    """A branch is not run a second time: it would draw others."""
    text = """(T[2,3] x, bool on) => (T[2,3] y) { y = If(on) <
        then_branch = t () => (T[2,3] y0) { n = RandomNormal<shape=[2,3]>() y0 = Mul(n, x) },
        else_branch = e () => (T[2,3] z0) { z0 = Neg(x) }> }"""
    added = ir.to_proto(onnxcam.gradient(build(text), "y", "x"))
    x = np.full((2, 3), 2, np.float32)
    got = run(added, {"x": x, "on": np.array(True), "y_seed": np.ones_like(x)})
    assert np.std(got["y"]) > 0.1
    np.testing.assert_array_equal(got["x_gradient"], got["y"] / 2)


# What exporters write


class Branching(torch.nn.Module):
    """torch.cond on the mean of the picture, between the layer `relu` and the head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU()
        self.left, self.right = torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.Conv2d(4, 6, 5, padding=2)
        self.head = torch.nn.Linear(6, 5)

    def forward(self, x):
        r = self.relu(self.conv1(x))
        z = torch.cond(
            x.mean() > 0,
            lambda r: torch.tanh(self.left(r)),
            lambda r: self.right(r).sin() * r.mean((1, 2, 3), True),
            (r,),
        )
        return self.head(z.mean((2, 3)))

    def behind_layer(self, x, r):
        z = torch.tanh(self.left(r)) if x.mean() > 0 else self.right(r).sin() * r.mean((1, 2, 3), True)
        return self.head(z.mean((2, 3)))


class Squeezing(torch.nn.Module):
    """The TorchScript exporter writes an If here, one of whose branches has a dimension less."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU()
        self.fc, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 5)

    def forward(self, x):
        return self.behind_layer(x, self.relu(self.conv1(x)))

    def behind_layer(self, x, r):
        most = r.amax((2, 3))
        return self.head(torch.tanh(self.fc((most * most).squeeze(0).reshape(-1, 4))))


@pytest.mark.parametrize(("make", "dynamo"), [(Branching, True), (Squeezing, False)])
def test_an_if_that_an_exporter_wrote_against_torch(make, dynamo):
    torch.manual_seed(0)
    net, file = make().eval(), io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["scores"], "verbose": False}
    names |= (
        {"dynamic_shapes": ({0: "N"},)} if dynamo else {"dynamic_axes": {"x": {0: "N"}, "scores": {0: "N"}}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(2, 3, 8, 10),), file, dynamo=dynamo, opset_version=18, **names)
    model = onnx.load_from_string(file.getvalue())
    assert "If" in [node.op_type for node in model.graph.node]
    explained = ir.to_proto(attach(model, layer="relu", emit=EVERYTHING))
    classes = np.array([[3, 1], [0, 4], [2, 2]])
    for n, shift in ((3, 0.2), (3, -0.2), (1, 0.2)):
        x = torch.tensor(picture(n)) + shift
        r = net.relu(net.conv1(x)).detach().requires_grad_()
        scores = net.behind_layer(x, r)
        rows = [
            torch.autograd.grad(scores[i, k], r, retain_graph=True)[0] for i in range(n) for k in classes[i]
        ]
        wanted = [row[i // 2].numpy() for i, row in enumerate(rows)]
        got = run(explained, {"x": x.numpy(), "cam_class": classes[:n]})
        np.testing.assert_allclose(got["scores"], scores.detach().numpy(), atol=1e-5)
        assert relative_error(got["cam_gradients"], np.stack(wanted)) < 1e-5


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17])
def test_an_if_in_a_model_of_an_older_opset(opset, on):
    axes, given = ("<axes=[1]>", "") if opset < 13 else ("", ", one")
    model = build(
        f"""(T[N,3] x, bool on) => (T[N,3] y) <int64[1] one = {{1}}>
        {{ r = Tanh(x) m = ReduceSum<axes=[1]>(r) s = If(on) <
            then_branch = t () => (T[N,1] y0)
                {{ q = Squeeze{axes}(m{given}) u = Unsqueeze{axes}(q{given}) y0 = Exp(u) }},
            else_branch = e () => (T[N,3] z0) {{ z0 = Softmax<axis=1>(r) }}> y = Mul(s, r) }}""".replace(
            "<axes=[1]>(r)", f"{axes}(r{given})"
        ),
        dtype="double",
        opset=opset,
    )
    inner = model.graph.node[2].attribute[0].g.node[0]
    inner.name = "inner"
    inner.metadata_props.add(key="from", value="here")
    own = normalise(ir.from_proto(model))
    kept = next(n for n in own.graph.all_nodes() if n.name == "inner")
    assert (kept.op_type, dict(kept.metadata_props)) == ("Squeeze", {"from": "here"})
    x, seed = np.random.default_rng(0).standard_normal((2, 2, 3))
    added = ir.to_proto(onnxcam.gradient(model, "y", "x"))
    y, dx = reference(added).run(None, {"x": x, "on": np.array(on), "y_seed": seed})
    leaf = torch.tensor(x, requires_grad=True)
    r = leaf.tanh()
    wanted = (r.sum(1, keepdim=True).exp() if on else r.softmax(1)) * r
    (wanted * torch.tensor(seed)).sum().backward()
    assert relative_error(y, wanted.detach()) < 1e-14
    assert relative_error(dx, leaf.grad) < 1e-14


def test_weights_of_a_branch_are_not_doubled():
    model = classifier("in the middle", "float", "N")
    branch = model.graph.node[2].attribute[0].g
    weights = next(i for i in model.graph.initializer if i.name == "v")
    branch.initializer.append(weights)
    model.graph.initializer.remove(weights)
    added = ir.to_proto(attach(model, layer="r"))
    assert not any(a.g.initializer for node in added.graph.node for a in node.attribute)
    assert [i.name for i in added.graph.initializer if list(i.dims) == [6, 4, 3, 3]] == ["v"]
    x = {"x": picture(2, 3, 5, 4), "on": np.array(True)}
    plain = ir.to_proto(attach(classifier("in the middle", "float", "N"), layer="r"))
    np.testing.assert_array_equal(run(added, x)["cam"], run(plain, x)["cam"])


@pytest.mark.parametrize("opset", [13, 18])
def test_operators_of_onnxruntime_inside_a_branch(opset):
    """Those that ONNX's own inference must be told of, one in its domain and one not."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        main (float[N,3] x, bool on) => (float[N,3] y) <float[3] k = {{1, 2, 3}}> {{ y = If(on) <
            then_branch = t () => (float[N,3] y0) {{ a = SimplifiedLayerNormalization<axis = -1>(x, k)
                b = com.microsoft.QuickGelu<alpha = 1.5>(a) c = Transpose(b) d = Transpose(c) y0 = Exp(d) }},
            else_branch = e () => (float[N,3] z0) {{ z0 = Neg(x) }}> }}"""
    )
    x, seed = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    feeds = {"x": x, "on": np.array(True), "y_seed": seed}
    leaf = torch.tensor(x, requires_grad=True)
    a = torch.nn.functional.rms_norm(leaf, (3,), torch.tensor([1.0, 2.0, 3.0]), 1e-5)
    y = torch.exp(a * torch.sigmoid(1.5 * a))
    (y * torch.tensor(seed)).sum().backward()
    got = run(ir.to_proto(onnxcam.gradient(model, "y", "x")), feeds)
    assert relative_error(got["y"], y.detach()) < 1e-5
    assert relative_error(got["x_gradient"], leaf.grad) < 1e-5


def test_what_onnxruntime_fused_inside_a_branch(tmp_path):
    options = quiet()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    plain = classifier("in the middle", "float", "N")
    onnxruntime.InferenceSession(plain.SerializeToString(), options)
    fused = onnx.load(options.optimized_model_filepath)
    inner = [n.op_type for node in fused.graph.node for a in node.attribute for n in a.g.node]
    assert inner.count("FusedConv") == 1
    feeds = {"x": picture(2, 3, 5, 4), "cam_class": np.array([[1, -1]])}
    for on in (True, False):
        got, wanted = (
            run(ir.to_proto(attach(m, layer="r", emit=["gradients"])), {**feeds, "on": np.array(on)})
            for m in (fused, plain)
        )
        assert relative_error(got["cam_gradients"], wanted["cam_gradients"]) < 1e-5


# The model's own functions

IN_BOTH = """y = If(on) <
    then_branch = t () => (double[N,3] y0) { q = own.F(x) y0 = Exp(q) },
    else_branch = e () => (double[N,3] z0) { z0 = own.G(x) }>"""
F = """<domain: "own", opset_import: ["" : 18]> F (a) => (b) { q = Sigmoid(a) b = Mul(q, a) }"""
FUNCTIONS = {
    "called inside branches, and by another": (
        "r = own.F(x) " + IN_BOTH.replace("G(x)", "G(r)"),
        F
        + """<domain: "own", opset_import: ["" : 18, "own" : 1]> G (a) => (b) { q = own.F(a) b = Sin(q) }""",
    ),
    "names that branches use": (
        "r = own.F(x) " + IN_BOTH.replace("own.F(x)", "Neg(r)").replace("own.G(x)", "Neg(r)"),
        F,
    ),
    "with branches, called twice": (
        "r = own.H(x, on) y = own.H(r, on)",
        """<domain: "own", opset_import: ["" : 18]> H (a, c) => (b) { q = Tanh(a) b = If(c) <
            then_branch = t () => (t0) { m = Sin(q) t0 = Exp(m) },
            else_branch = e () => (e0) { m = Exp(q) e0 = Mul(m, a) }> }""",
    ),
    "of one name": (
        "r = own.F(x) s = other.F(r) y = own.F:twice(s)",
        F
        + """<domain: "other", opset_import: ["" : 18]> F (a) => (b) { b = Sin(a) }
        <domain: "own", overload: "twice", opset_import: ["" : 18]> F (a) => (b) { b = Add(a, a) }""",
    ),
    "of another opset": ("y = own.F(x)", F.replace("18", "17")),
    "with attributes and their defaults": (
        "y = own.A<alpha = 0.5>(x, on)",
        """<domain: "own", opset_import: ["" : 18]> A <alpha: float, beta: float = 2.0> (a, c) => (b) {
            b = If(c) <
                then_branch = t () => (t0) { t0 = LeakyRelu<alpha: float = @alpha>(a) },
                else_branch = e () => (e0) { e0 = Elu<alpha: float = @beta>(a) }> }""",
    ),
}


def calling(nodes, functions):
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 18, "own" : 1, "other" : 1]>
        main (double[N,3] x, bool on) => (double[N,3] y) {{ {nodes} }} {functions}"""
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("on", [True, False])
def test_functions_are_inlined_wherever_they_are_called(name, on):
    model = calling(*FUNCTIONS[name])
    x, seed = np.random.default_rng(0).standard_normal((2, 2, 3))
    added = ir.to_proto(onnxcam.gradient(model, "y", "x"))
    assert not added.functions
    assert [i.name for i in added.graph.input] == ["x", "on", "y_seed"]
    y, dx = reference(added).run(None, {"x": x, "on": np.array(on), "y_seed": seed})
    # onnx.reference knows neither overloads nor attributes inside branches.
    forward = onnxruntime.InferenceSession(model.SerializeToString(), quiet())
    feeds = {"on": np.array(on)} if "on" in [i.name for i in forward.get_inputs()] else {}
    np.testing.assert_allclose(y, forward.run(None, {"x": x, **feeds})[0], rtol=1e-13)
    wanted = differences(lambda x: float((forward.run(None, {"x": x, **feeds})[0] * seed).sum()), x)
    assert relative_error(dx, wanted) < 1e-8


def test_a_function_that_passes_on_what_it_gets():
    """onnxruntime refuses it, ONNX does not."""
    model = calling(
        "y = own.P(x)", """<domain: "own", opset_import: ["" : 18]> P (a) => (a) { b = Abs(a) }"""
    )
    added = ir.to_proto(onnxcam.gradient(model, "y", "x"))
    x, seed = np.random.default_rng(0).standard_normal((2, 2, 3))
    for got, wanted in zip(reference(added).run(None, {"x": x, "y_seed": seed}), (x, seed), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("nodes", "functions", "message"),
    [
        (
            """y = own.B<yes = t () => (double[N,3] a) { a = Exp(x) },
                no = e () => (double[N,3] b) { b = Abs(x) }>(on)""",
            """<domain: "own", opset_import: ["" : 18]> B <yes, no> (c) => (d)
            { d = If<then_branch: graph = @yes, else_branch: graph = @no>(c) }""",
            r"the model's function own\.B cannot be inlined: it takes a graph as an attribute",
        ),
        (
            "y = own.F(x, on)",
            F,
            "the model's functions cannot be inlined: .*'own::F': call site has 2 inputs",
        ),
        (
            "y = own.F(x)",
            F.replace("b = Mul", "b = own.F(a) c = Mul"),
            "the model is not valid: .* own::F -> own::F",
        ),
        ("y = own.F(x)", F.replace("18", "11"), "the model is not valid: Opset import .* imports version 11"),
    ],
)
def test_functions_that_cannot_be_inlined(nodes, functions, message):
    functions = functions.replace("Sigmoid", "Softmax")
    with pytest.raises(OnnxcamError, match=f"^{message}"):
        onnxcam.gradient(calling(nodes, functions), "y", "x")


# What stops a gradient

LOOP = """[lap] {} = Loop<body = b (int64 i, bool c, T[N,3,4,5] a) => (bool c0, T[N,3,4,5] a0)
    {{ c0 = Identity(c) a0 = Mul(a, {}) }}>({}, true, {})"""
LOOPS = {
    "Loop": LOOP.format("s", "two", "three", "r"),
    "Loop that only reads from outside": LOOP.format("s", "r", "three", "x"),
    "Loop in a branch": f"""s = If(true) <
        then_branch = t () => (T[N,3,4,5] y0) {{ {LOOP.format("y0", "two", "three", "r")} }},
        else_branch = e () => (T[N,3,4,5] z0) {{ z0 = Exp(r) }}>""",
    "Scan": "[lap] s = Scan<num_scan_inputs = 1, body = b (T[3,4,5] a) => (T[3,4,5] a0) { a0 = Sin(a) }>(r)",
    "SequenceMap": """q = SplitToSequence<axis=0>(r, one)
        [lap] t = SequenceMap<body = b (T[1,3,4,5] a) => (T[1,3,4,5] a0) { a0 = Sin(a) }>(q)
        s = ConcatFromSequence<axis=0>(t)""",
}
BESIDE = {
    "before the layer": LOOP.format("q", "two", "three", "x") + " r = Relu(q) s = Exp(r)",
    "next to it": "r = Relu(x) " + LOOP.format("q", "two", "three", "x") + " s = Mul(r, q)",
    "only its shape counts": "r = Relu(x) "
    + LOOP.format("q", "two", "three", "r")
    + """ u = Shape(q)
        z = ConstantOfShape(u) y = Exp(r) s = Add(y, z)""",
    "only its sign counts": "r = Relu(x) "
    + LOOP.format("q", "two", "three", "r")
    + """ g = Greater(q, two)
        y = Exp(r) s = Where(g, y, r)""",
    "behind it": "r = Relu(x) s = Exp(r) " + LOOP.format("q", "two", "three", "r"),
}


def looping(text):
    model = build(
        f"""(T[N,3,4,5] x) => (T[N,5] scores)
        <T[3,5] fc, int64 three = {{3}}, bool true = {{1}}, int64 one = {{1}}, T two = {{2.0}}>
        {{ {text} {POOLED} }}"""
    )
    # onnx infers no shape for what a loop computes: exporters note it.
    noted = {"q", "s"} & {
        o for node in model.graph.node for o in node.output if node.op_type != "SplitToSequence"
    }
    for name in noted:
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, ["N", 3, 4, 5]))
    return model


@pytest.mark.parametrize("name", LOOPS)
def test_loops_on_the_way_are_refused_by_name(name):
    model = looping("r = Relu(x) " + LOOPS[name])
    message = (
        rf"^there is no gradient rule for the operator {name.split()[0]} \(node 'lap'\), through which the "
        "gradient must pass; choose a layer after it, or export the model with the loop unrolled$"
    )
    with pytest.raises(OnnxcamError, match=message):
        attach(model, layer="r")
    with pytest.raises(OnnxcamError, match=message):
        onnxcam.gradient(model, "scores", "r")
    if "branch" not in name:
        assert attach(model, layer="s")


@pytest.mark.parametrize("name", BESIDE)
def test_loops_beside_the_way_are_no_hindrance(name):
    model = looping(BESIDE[name])
    x = picture(2, 3, 4, 5)
    got = run(
        ir.to_proto(attach(model, layer="r", emit=["gradients"])), {"x": x, "cam_class": np.array([[2]])}
    )
    weights = weights_of(model)["fc"][:, 2].reshape(1, 3, 1, 1) / 20
    r = np.maximum(x * 8 if name == "before the layer" else x, 0)
    slope = {"next to it": x * 8, "only its sign counts": np.where(r * 8 > 2, np.exp(r), 1)}.get(
        name, np.exp(r)
    )
    np.testing.assert_allclose(got["cam_gradients"], weights * slope, rtol=1e-5, atol=1e-7)


# Operators of other domains


class Wobble(OpRun):
    """(scale sin(bend x), exp(x)): two outputs, an attribute, an input that may be left out."""

    op_domain = "com.example"

    def _run(self, x, scale=None, bend=1.0):
        bent = np.sin(bend * x)
        return (bent if scale is None else bent * scale, np.exp(x))


@pytest.fixture
def wobble(monkeypatch):
    monkeypatch.setitem(RULES, ("com.example", "Wobble"), None)
    monkeypatch.setattr("tests.checks.NEW_OPS", [*NEW_OPS, Wobble])

    @vjp("Wobble", domain="com.example")
    def rule(op, dys, ys, x, scale=None, *, bend=1.0):
        dx = dscale = None
        if dys[0] is not None:
            dx = op.Mul(op.Mul(dys[0], op.Cos(op.Mul(x, bend))), bend)
            if scale is not None:
                dx = op.Mul(dx, scale)
                dscale = unbroadcast(op, op.Mul(dys[0], op.Sin(op.Mul(x, bend))), scale, ys[0])
        if dys[1] is not None:
            grown = op.Mul(dys[1], ys[1])
            dx = grown if dx is None else op.Add(dx, grown)
        return dx, dscale

    return rule


def wobbling(nodes):
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 18, "com.example" : 1]>
        main (double[N,3] x, double[3] k, bool on) => (double[N,3] y) <double[N,3] w, double[N,3] v>
        {{ {nodes} }}"""
    )


@pytest.mark.parametrize(
    "nodes",
    [
        "w, v = com.example.Wobble<bend = 0.7>(x, k) y = Mul(w, v)",
        "w, v = com.example.Wobble(x) y = Exp(w)",
        "w, v = com.example.Wobble<bend = 3.0>(x, k) y = Sin(v)",
        """y = If(on) <
            then_branch = t () => (double[N,3] y0) <double[N,3] c, double[N,3] d>
                { c, d = com.example.Wobble<bend = 0.7>(x, k) y0 = Mul(c, d) },
            else_branch = e () => (double[N,3] z0) { z0 = Exp(x) }>""",
    ],
)
def test_an_operator_with_a_rule_of_ones_own_against_differences(nodes, wobble):
    model = wobbling(nodes)
    x, seed = np.random.default_rng(0).standard_normal((2, 2, 3))
    feeds = {"x": x, "k": np.array([0.5, -1.0, 2.0]), "on": np.array(True)}
    reads = ["x", "k"] if "k)" in nodes and "Sin(v)" not in nodes else ["x"]
    forward = reference(model)
    added = ir.to_proto(onnxcam.gradient(model, "y", reads))
    found = reference(added).run([f"{name}_gradient" for name in reads], {**feeds, "y_seed": seed})
    for name, dx in zip(reads, found, strict=True):
        wanted = differences(
            lambda v, name=name: float((forward.run(None, {**feeds, name: v})[0] * seed).sum()), feeds[name]
        )
        assert dx.shape == wanted.shape
        assert relative_error(dx, wanted) < 1e-8


def test_an_operator_of_onnxruntime_with_a_rule_of_ones_own_against_torch(monkeypatch):
    """com.microsoft.Inverse, which onnxcam has no rule for, in the head of a classifier."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        main (float[N,3,3,3] x) => (float[N,9] scores) <int64[1] one = {1}, float[N,3,3,3] w>
        { r = Sigmoid(x) w = com.microsoft.Inverse(r) m = ReduceMean<keepdims=0>(w, one)
          scores = Flatten(m) }"""
    )
    with pytest.raises(
        OnnxcamError, match=r"com\.microsoft\.Inverse .* @vjp\('Inverse', domain='com\.microsoft'\)"
    ):
        attach(model, layer="r")
    monkeypatch.setitem(RULES, ("com.microsoft", "Inverse"), None)

    @vjp("Inverse", domain="com.microsoft")
    def inverse(op, dy, y, x):
        turned = op.Transpose(y, perm=[0, 1, 3, 2])
        return op.Neg(op.MatMul(op.MatMul(turned, dy), turned))

    added = ir.to_proto(attach(model, layer="r", emit=["gradients", "activations"]))
    x = picture(2, 3, 3, 3)
    got = run(added, {"x": x, "cam_class": np.array([[4, -1]])})
    r = torch.tensor(got["cam_activations"], requires_grad=True)
    scores = torch.linalg.inv(r).mean(1).flatten(1)
    rows = [
        torch.autograd.grad(scores[n, c], r, retain_graph=True)[0][n]
        for n in range(2)
        for c in (4, scores[n].argmax())
    ]
    assert relative_error(got["cam_gradients"], torch.stack(rows).numpy()) < 1e-4


def test_a_value_of_unknown_type_cannot_leave_its_branch(wobble):
    nodes = """y = If(on) <
        then_branch = t () => (double[N,3] y0) { c, d = com.example.Wobble(x) y0 = Mul(c, d) },
        else_branch = e () => (double[N,3] z0) { z0 = Exp(x) }>"""
    with pytest.raises(
        OnnxcamError, match=r"type of value 'd', inside node 'If_0' \(If\), is unknown; declare it"
    ):
        onnxcam.gradient(wobbling(nodes), "y", "x")


class BetaSwish(OpRun):
    op_domain = "com.example"

    def _run(self, x, beta=1.0):
        return (x / (1 + np.exp(-beta * x)),)


@pytest.mark.parametrize("attribute", ["", "<beta = 1.5>"])
def test_the_example_in_the_documentation_of_rules(attribute, monkeypatch):
    """The first one in ``help("onnxcam.vjp")``, word for word."""
    monkeypatch.setitem(RULES, ("com.example", "BetaSwish"), None)
    monkeypatch.setattr("tests.checks.NEW_OPS", [*NEW_OPS, BetaSwish])
    example = re.search(r"::\n\n((?:    .*\n|\n)+)", onnxcam.vjp.__doc__).group(1)
    exec(textwrap.dedent(example), {})
    model = wobbling(f"w = com.example.BetaSwish{attribute}(x) y = Mul(w, w)")
    x, seed = np.random.default_rng(0).standard_normal((2, 2, 3))
    wanted = differences(lambda x: float((reference(model).run(None, {"x": x})[0] * seed).sum()), x)
    added = ir.to_proto(onnxcam.gradient(model, "y", "x"))
    assert relative_error(reference(added).run(["x_gradient"], {"x": x, "y_seed": seed})[0], wanted) < 1e-8


@pytest.mark.parametrize("function", [lambda: None, lambda op, dy: None])
def test_what_cannot_be_a_rule(function):
    with pytest.raises(TypeError, match="a gradient rule takes op, dy, y and the node's inputs"):
        vjp("Wobble", domain="com.example")(function)
    assert ("com.example", "Wobble") not in RULES


def test_an_operator_of_another_domain_is_refused_with_what_to_do():
    model = wobbling("[here] w, v = com.example.Wobble(x) y = Exp(w)")
    with pytest.raises(OnnxcamError) as caught:
        onnxcam.gradient(model, "y", "x")
    assert str(caught.value) == (
        "there is no gradient rule for the operator com.example.Wobble (node 'here'), through which the "
        "gradient must pass; choose a layer after it, or register a rule in Python: "
        "from onnxcam.vjp import vjp, then @vjp('Wobble', domain='com.example') on a function that "
        "help('onnxcam.vjp') describes"
    )


# Layers

# Of the tokens n, one more than the picture has, the last Gather takes that one.
TOKENS = """(T[1,3,4,6] x, bool on) => (T[1,5] scores)
<T[8,3,2,2] w, T[1,1,8] class, T[8] scale, T[8] shift, T[8,5] fc, int64 zero = {{0}}, int64[1] one = {{1}},
 int64[7] turned = {{6, 5, 4, 3, 2, 1, 0}}, int64[3] flat = {{0, 8, -1}}>
{{
    c = Conv<kernel_shape=[2,2], strides=[2,2]>(x, w)
    f = Reshape(c, flat)
    t = Transpose<perm=[0,2,1]>(f)
    k = Concat<axis=1>(class, t)
    n = LayerNormalization(k, scale, shift)
    {}
    scores = MatMul(m, fc)
}}"""
READ_IN_A_BRANCH = {
    "averaged": """s = If(on) <
        then_branch = a () => (T[1,8] y0) { y0 = ReduceMean<keepdims=0>(n, one) },
        else_branch = b () => (T[1,8] z0) { z0 = Gather<axis=1>(n, zero) }>
        g = Gather<axis=1>(n, zero) m = Add(g, s)""",
    "moved": """s = If(on) <
        then_branch = a () => (T[1,7,8] y0) { y0 = Gather<axis=1>(n, turned) },
        else_branch = b () => (T[1,7,8] z0) { z0 = Identity(n) }>
        m = Gather<axis=1>(s, zero)""",
}


def test_layers_around_an_if():
    def listed(model):
        model = prepared(model)
        source, logits = layers.picture(model), layers.scores(model).logits
        found = layers.explainable(source, logits)
        return [layer.name for layer in found], layers.default(found, source, logits).name

    assert listed(classifier("in the middle", "float", "N")) == (["c", "r", "s"], "s")
    # What weighs the channels of r lies inside the branches.
    assert listed(classifier("at the end", "float", "N")) == (["c", "r"], "r")


@pytest.mark.parametrize("how", READ_IN_A_BRANCH)
def test_tokens_that_only_a_branch_reads_are_reached(how):
    model = build(TOKENS.format(READ_IN_A_BRANCH[how]))
    added = ir.to_proto(attach(model, layer="n", emit=["gradients"]))
    feeds = {"x": picture(1, 3, 4, 6), "cam_class": np.array([[2]])}
    share = np.full((1, 1, 2, 3), 1 / 7) if how == "averaged" else np.eye(1, 6, 5).reshape(1, 1, 2, 3)
    weights = weights_of(model)["fc"][:, 2].reshape(1, 8, 1, 1)
    for on in (True, False):
        got = run(added, {**feeds, "on": np.array(on)})["cam_gradients"]
        np.testing.assert_allclose(got, weights * share * on, rtol=1e-6)


@pytest.mark.parametrize("name", ["y0", "Tanh_3", "b"])
def test_what_lies_inside_a_branch_is_no_layer(name):
    model = classifier("in the middle", "float", "N")
    message = (
        rf"^{{}} '{name}' lies inside node 'If_2' \(If\), where nothing else can read it; .* such as 's'$"
    )
    with pytest.raises(OnnxcamError, match=message.format("layer")):
        attach(model, layer=name)
    with pytest.raises(OnnxcamError, match=message.format("value")):
        onnxcam.gradient(model, "scores", name)
