import numpy as np
import onnx_ir as ir
import pytest
import torch

from onnxcam.attaching import attach
from onnxcam.backward import gradient, path
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import check, normalise
from onnxcam.vjp import RULES, Rule
from tests import graphs
from tests.checks import reference
from tests.graphs import build


def parsed(text, **options):
    model = normalise(ir.from_proto(build(text, dtype="double", **options)))
    values = {v.name: v for v in model.graph.inputs} | {v.name: v for n in model.graph for v in n.outputs}
    return model, values


def differentiate(text, source, output="y", rules=RULES, **options):
    """Return the model with the gradient of sum(seed * output) as output `dx`, or None if there is none."""
    model, values = parsed(text, **options)
    op = Emitter(model.graph, model.graph.opset_imports[""], "cam")
    y = values[output]
    seed = ir.Value(name="seed", shape=y.shape, type=y.type)
    model.graph.inputs.append(seed)
    found = gradient(op, y, seed, values[source], rules)
    if found is None:
        return None
    dx = op.Identity(found)
    dx.name = "dx"
    op.remove_dead([dx])
    model.graph.outputs[:] = [dx]
    check(model)
    return ir.to_proto(model)


def evaluate(text, feeds, source, output="y", **options):
    model = differentiate(text, source, output, **options)
    given = {i.name for i in model.graph.input}
    return reference(model).run(["dx"], {k: v for k, v in feeds.items() if k in given})[0]


RNG = np.random.default_rng(0)
X, SEED = RNG.standard_normal((2, 3)), RNG.standard_normal((2, 3))


def by_torch(function):
    x = torch.tensor(X, requires_grad=True)
    (function(x) * torch.tensor(SEED)).sum().backward()
    return x.grad.numpy()


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("y = Identity(x)", lambda x: x),
        ("y = Mul(x, x)", lambda x: x * x),
        (
            "a = Exp(x) b = Sin(x) c = Mul(a, b) d = Add(c, a) y = Add(d, x)",
            lambda x: x.exp() * x.sin() + x.exp() + x,
        ),
        ("a = Exp(x) y = Sum(a, a, x, a)", lambda x: 3 * x.exp() + x),
        ("a = Exp(x) b = Add(a, a) c = Mul(b, a) y = Sub(c, b)", lambda x: 2 * x.exp() ** 2 - 2 * x.exp()),
        (
            """a, b = Split<axis=1>(x, parts) c = Concat<axis=1>(b, a, b) d = Mul(c, c)
            y = Slice(d, one, four, one)""",
            lambda x: (torch.cat([x[:, 1:], x[:, :1], x[:, 1:]], 1) ** 2)[:, 1:4],
        ),
        ("a, b = Split<axis=1>(x, parts) c = Identity(k) y = Mul(x, c)", lambda x: 2 * x),
    ],
)
def test_every_use_of_a_value_adds_its_share(text, function):
    head = """(T[N,3] x) => (T[N,3] y)
    <int64[2] parts = {1, 2}, int64[1] one = {1}, int64[1] four = {4}, T[1] k = {2.0}>"""
    found = evaluate(f"{head} {{ {text} }}", {"x": X, "seed": SEED}, "x")
    np.testing.assert_allclose(found, by_torch(function), rtol=1e-12)


def test_the_source_may_be_inside_the_graph_and_in_the_middle_of_a_node():
    text = """(T[N,3] x) => (T[N,3] y) <int64[2] parts = {1, 2}>
    { a, b = Split<axis=1>(x, parts) c = Mul(b, b) y = Concat<axis=1>(a, c) }"""
    found = evaluate(text, {"x": X, "seed": SEED}, "b")
    np.testing.assert_allclose(found, 2 * X[:, 1:] * SEED[:, 1:], rtol=1e-12)


def test_a_gradient_of_which_onnx_infers_no_rank_has_that_of_its_value():
    """Of CenterCropPad to a size that is computed, as that of c is here."""
    text = """(T[3,3] x) => (T[5,3] y) <bool[3] kept = {1, 0, 1}, int64[1] five = {5}>
    { c = Compress<axis=0>(x, kept) y = CenterCropPad<axes=[0]>(c, five) }"""
    seed = RNG.standard_normal((5, 3))
    found = evaluate(text, {"x": RNG.standard_normal((3, 3)), "seed": seed}, "x")
    np.testing.assert_array_equal(found, [seed[1], np.zeros(3), seed[2]])


def test_the_output_itself():
    found = evaluate("(T[N,3] x) => (T[N,3] y) { y = Exp(x) }", {"x": X, "seed": SEED}, "y")
    np.testing.assert_array_equal(found, SEED)


def test_weights_can_be_the_source():
    feeds = {"x": X, "seed": SEED, "w": np.eye(3)}
    found = evaluate("(T[N,3] x, T[3,3] w) => (T[N,3] y) { y = MatMul(x, w) }", feeds, "w")
    np.testing.assert_allclose(found, X.T @ SEED, rtol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "{ i = Cast<to=7>(x) f = Cast<to=11>(i) y = Mul(f, f) }",
        "{ s = Shape(x) f = Cast<to=11>(s) m = ReduceProd(f) y = Expand(m, s) }",
        "{ z = ArgMax<axis=1>(x) f = Cast<to=11>(z) y = Add(k, f) }",
        "{ g = Greater(x, k) y = Where(g, k, kk) }",
        "{ y = Mul(k, kk) }",
        "{ r = Floor(x) y = Mul(r, k) }",
    ],
)
def test_what_carries_no_gradient(text):
    head = "(T[2,3] x) => (T[2,3] y) <T[2,3] k, T[2,3] kk> "
    assert differentiate(head + text, "x") is None


def test_a_path_through_whole_numbers_adds_nothing():
    text = "(T[2,3] x) => (T[2,3] y) { i = Cast<to=7>(x) f = Cast<to=11>(i) m = Mul(f, x) y = Sub(m, f) }"
    found = evaluate(text, {"x": X, "seed": SEED}, "x")
    np.testing.assert_allclose(found, SEED * np.trunc(X), rtol=1e-12)


def test_the_path_is_what_lies_between_in_the_order_it_runs():
    text = """(T[N,3] x, T[N,3] z) => (T[N,3] y)
    { a = Exp(x) b = Exp(z) c = Add(a, b) d = Shape(c)
      e = Sin(b) f = Mul(c, e) g = Neg(a) y = Expand(f, d) }"""
    _, values = parsed(text)

    def names(source, output="y"):
        return [n.outputs[0].name for n in path(values[output], values[source])]

    assert names("x") == ["a", "c", "f", "y"]
    assert names("c") == ["f", "y"]
    assert sorted(names("b")) == ["c", "e", "f", "y"]
    assert names("g") == []
    assert names("y") == []
    assert names("x", "g") == ["a", "g"]
    assert names("y", "x") == []


@pytest.mark.parametrize(("op_type", "slope"), [("Add", -2999), ("Sub", 3001)])
def test_a_graph_of_thousands_of_nodes(op_type, slope):
    chain = " ".join(f"v{i + 1} = {op_type}(v{i}, x)" for i in range(3000))
    text = f"(T[N,3] x) => (T[N,3] y) {{ v0 = Neg(x) {chain} y = Neg(v3000) }}"
    _, values = parsed(text)
    assert len(path(values["y"], values["x"])) == 3002
    ones = np.ones((2, 3))
    np.testing.assert_allclose(evaluate(text, {"x": ones, "seed": ones}, "x"), slope)


def test_no_rule():
    text = "(T[N,3] x) => (T[N,3] y) { a = Exp(x) y = Neg(a) }"
    rules = {key: rule for key, rule in RULES.items() if key != ("", "Exp")}
    with pytest.raises(OnnxcamError) as caught:
        differentiate(text, "x", rules=rules)
    message = str(caught.value)
    assert message == (
        "there is no gradient rule for the operator Exp (node 'Exp_0'), through which the gradient must pass"
        "; choose a layer after it, or replace it; 'onnxcam operators' lists the operators that have a rule"
    )


def test_no_rule_is_needed_off_the_path():
    text = "(T[N,3] x) => (T[N,3] y) <T[3] k> { a = Exp(x) b = Neg(a) c = Exp(b) y = Sub(b, k) }"
    rules = {key: rule for key, rule in RULES.items() if key != ("", "Exp")}
    assert differentiate(text, "a", rules=rules) is not None


def test_what_is_unknown_because_of_an_operator_without_a_rule_is_not_the_complaint():
    model, values = parsed("(T[3,3] x) => (T[3,3] y) { a = Exp(x) b = Tanh(a) c = Abs(b) y = MatMul(c, a) }")
    values["c"].shape = None
    op = Emitter(model.graph, 18, "cam")
    seed = ir.Value(name="seed", shape=values["y"].shape, type=values["y"].type)
    with pytest.raises(OnnxcamError, match=r"dimensions of value 'c' .* 'c', which node 'Abs_2' \(Abs\)"):
        gradient(op, values["y"], seed, values["x"])
    rules = {key: rule for key, rule in RULES.items() if key != ("", "Exp")}
    with pytest.raises(OnnxcamError, match=r"no gradient rule for the operator Exp \(node 'Exp_0'\)"):
        gradient(op, values["y"], seed, values["x"], rules)


def test_an_attribute_that_the_rule_does_not_know():
    rule = RULES["", "Softmax"]
    rules = {**RULES, ("", "Softmax"): Rule(rule.function, rule.every_output, frozenset())}
    text = "(T[N,3] x) => (T[N,3] y) { y = Softmax<axis=1>(x) }"
    with pytest.raises(
        OnnxcamError, match="rule of Softmax does not know the attribute axis of node 'Softmax_0'"
    ):
        differentiate(text, "x", rules=rules)


def test_a_gradient_at_an_output_that_the_rule_does_not_know():
    def first_only(op, dy, y, x, parts, *, axis=0):
        raise AssertionError

    rules = {**RULES, ("", "Split"): Rule(first_only, False, frozenset({"axis"}))}
    text = "(T[N,3] x) => (T[N,2] y) <int64[2] parts = {1, 2}> { a, b = Split<axis=1>(x, parts) y = Exp(b) }"
    with pytest.raises(
        OnnxcamError, match=r"no gradient through the second output of Split \(node 'Split_0'\)"
    ):
        differentiate(text, "x", rules=rules)


def test_names_tell_which_node_a_gradient_belongs_to():
    model = build(graphs.DEEP)
    model.graph.node[2].name = "/layer1/conv/Conv"
    added = ir.to_proto(attach(model, layer="r"))
    inner = [n.name for a in added.graph.node for b in a.attribute for n in b.g.node]
    for node in ("layer1/conv/Conv", "GlobalAveragePool_4", "Relu_3", "Flatten_5"):
        assert any(name.startswith(f"cam/gradcam/gradient/{node}/") for name in inner)
