import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcam.backward import gradient
from onnxcam.emit import Emitter
from onnxcam.vjp import RULES
from tests.checks import check_vjp, dtypes_of_gradients, gradients_in

RNG = np.random.default_rng(2)
SHAPES = [(), (3,), (2, 3), (1, 3), (2, 1), (4, 2, 3), (4, 1, 1), (1, 2, 1)]
"""All broadcast to (4, 2, 3)."""

UNARY = {
    "Identity": (torch.clone, -2, 2),
    "Neg": (torch.neg, -2, 2),
    "Abs": (torch.abs, -2, 2),
    "Reciprocal": (torch.reciprocal, 0.2, 2),
    "Sqrt": (torch.sqrt, 0.2, 2),
    "Exp": (torch.exp, -2, 2),
    "Log": (torch.log, 0.2, 2),
    "Erf": (torch.erf, -2, 2),
    "Sin": (torch.sin, -4, 4),
    "Cos": (torch.cos, -4, 4),
    "Tan": (torch.tan, -1.4, 1.4),
    "Asin": (torch.asin, -0.99, 0.99),
    "Acos": (torch.acos, -0.99, 0.99),
    "Atan": (torch.atan, -4, 4),
    "Sinh": (torch.sinh, -3, 3),
    "Cosh": (torch.cosh, -3, 3),
    "Asinh": (torch.asinh, -4, 4),
    "Acosh": (torch.acosh, 1.01, 4),
    "Atanh": (torch.atanh, -0.99, 0.99),
}
STEPS = ["Ceil", "Floor", "Round", "Sign"]


def normal(*shape):
    return RNG.standard_normal(shape)


def away_from_zero(*shape):
    return RNG.uniform(0.5, 2, shape) * RNG.choice([-1, 1], shape)


@pytest.mark.parametrize("op_type", UNARY)
@pytest.mark.parametrize("symbolic", [False, True])
def test_unary(op_type, symbolic):
    function, low, high = UNARY[op_type]
    check_vjp(op_type, [RNG.uniform(low, high, (2, 3, 4))], against=function, symbolic=symbolic)
    check_vjp(op_type, [RNG.uniform(low, high, ())], against=function)


@pytest.mark.parametrize(
    ("op_type", "edge"), [("Abs", 0.0), ("Acosh", 1.0), ("Asin", 1.0), ("Acos", -1.0), ("Sqrt", 0.0)]
)
def test_at_the_edge_of_the_domain_as_in_torch(op_type, edge):
    """An infinite slope stays infinite, with torch's sign."""
    x = torch.tensor([edge], dtype=torch.float64, requires_grad=True)
    UNARY[op_type][0](x).sum().backward()
    with np.errstate(divide="ignore"):
        (got,) = gradients_in(np.float64, op_type, [np.array([edge])], np.ones(1))
    np.testing.assert_array_equal(got, x.grad.numpy())


def test_acosh_and_asinh_of_large_float16_numbers():
    """x^2 would overflow."""
    x = np.array([3e2, 3e4])
    for op_type in ("Acosh", "Asinh"):
        (got,) = gradients_in(np.float16, op_type, [x], np.ones(2))
        np.testing.assert_allclose(got, 1 / x, rtol=0.02)


@pytest.mark.parametrize("op_type", STEPS)
def test_steps_have_no_gradient(op_type):
    assert no_gradient(op_type)


def no_gradient(op_type, **attributes):
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20})
    op = Emitter(graph, 20, "test")
    y = op.node(op_type, x, **attributes)
    return gradient(op, y, y, x) is None


@pytest.mark.parametrize(
    ("start", "to"), [("float64", "float32"), ("float32", "float64"), ("float32", "float16")]
)
def test_cast(start, to):
    """The gradient takes the dtype of the input."""
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType[_onnx_name(start)]))
    like = ir.Value(name="like", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType[_onnx_name(to)]))
    op = Emitter(ir.Graph([x, like], [], nodes=[], opset_imports={"": 20}), 20, "test")
    for y in (op.Cast(x, to=like.dtype), op.CastLike(x, like)):
        dx = gradient(op, y, y, x)
        assert dx.dtype == x.dtype
        assert dx.producer().inputs[0] is y


def test_cast_to_float8_may_name_its_rounding():
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    op = Emitter(ir.Graph([x], [], nodes=[], opset_imports={"": 24}), 24, "test")
    y = op.Cast(x, to=ir.DataType.FLOAT8E4M3FN, saturate=0, round_mode="nearest")
    assert gradient(op, y, y, x).dtype == ir.DataType.FLOAT


def _onnx_name(dtype):
    return {"float16": "FLOAT16", "float32": "FLOAT", "float64": "DOUBLE"}[dtype]


@pytest.mark.parametrize(
    ("op_type", "function"),
    [("Add", torch.add), ("Sub", torch.sub), ("Mul", torch.mul), ("Div", torch.div)],
)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(a=st.sampled_from(SHAPES), b=st.sampled_from(SHAPES), symbolic=st.booleans())
def test_arithmetic(op_type, function, a, b, symbolic):
    check_vjp(
        op_type, [away_from_zero(*a), away_from_zero(*b)], against=function, symbolic=symbolic, ort=symbolic
    )


@pytest.mark.parametrize("op_type", ["Mul", "Div"])
@pytest.mark.parametrize("constant", [0, 1])
def test_arithmetic_with_a_weight(op_type, constant):
    function = torch.mul if op_type == "Mul" else torch.div
    check_vjp(
        op_type,
        [away_from_zero(2, 3), away_from_zero(3)],
        against=function,
        constant=[constant],
        symbolic=True,
    )


def test_a_value_that_is_used_twice():
    """Mul(x, x): the gradients of both inputs add up."""
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    op = Emitter(ir.Graph([x], [], nodes=[], opset_imports={"": 20}), 20, "test")
    y = op.Mul(x, x)
    assert gradient(op, y, y, x).producer().op_type == "Add"


@settings(deadline=None, derandomize=True, max_examples=15)
@given(a=st.sampled_from(SHAPES), b=st.sampled_from(SHAPES), symbolic=st.booleans())
def test_mod_truncated(a, b, symbolic):
    x, y = 5 * away_from_zero(*a), away_from_zero(*b)
    check_vjp("Mod", [x, y], against=torch.fmod, symbolic=symbolic, fmod=1, ort=symbolic)


@pytest.mark.parametrize("symbolic", [False, True])
def test_mod_floored(symbolic):
    """Floating-point operands are allowed from opset 28 on; onnxruntime does not have it yet."""
    x, y = 5 * away_from_zero(2, 3), away_from_zero(3)
    check_vjp("Mod", [x, y], against=torch.remainder, symbolic=symbolic, opset=28, ort=False)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(a=st.sampled_from(SHAPES), b=st.sampled_from(SHAPES), symbolic=st.booleans())
def test_pow(a, b, symbolic):
    x, y = RNG.uniform(0.3, 2, a), RNG.uniform(-2, 2, b)
    check_vjp("Pow", [x, y], against=torch.pow, symbolic=symbolic, ort=symbolic)


@pytest.mark.parametrize("power", [-2.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_pow_by_a_constant(power, shape):
    x = RNG.uniform(0.3, 2, (2, 3)) if power % 1 else away_from_zero(2, 3)
    check_vjp("Pow", [x, np.full(shape, power)], against=torch.pow, constant=[1], symbolic=True)


@pytest.mark.parametrize("constant", [[], [1]])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_pow_by_integers_of_negative_bases(dtype, constant):
    powers = np.array([-2, -1, 0, 1, 2, 3], dtype)
    check_vjp("Pow", [away_from_zero(2, 6), powers], against=torch.pow, constant=constant)
    check_vjp("Pow", [away_from_zero(2, 3), np.array(2, dtype)], against=torch.pow, constant=constant)


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_pow_at_zero(power):
    """As in torch; plain formulas give 0 * inf."""
    x, powers = np.array([0.0, 2.0]), np.array([power], float)
    a, b = torch.tensor(x, requires_grad=True), torch.tensor(powers, requires_grad=True)
    (a**b).sum().backward()
    with np.errstate(divide="ignore", invalid="ignore"):
        da, db = gradients_in(np.float64, "Pow", [x, powers], np.ones(2))
    np.testing.assert_allclose(da, a.grad.numpy())
    np.testing.assert_allclose(db, b.grad.numpy())


@pytest.mark.parametrize("symbolic", [False, True])
def test_sum_of_operands_of_which_none_has_the_full_shape(symbolic):
    check_vjp(
        "Sum", [normal(2, 1), normal(), normal(4, 1, 3)], against=lambda *xs: sum(xs), symbolic=symbolic
    )


@pytest.mark.parametrize(("op_type", "function"), [("Sum", sum), ("Mean", lambda xs: sum(xs) / len(xs))])
@pytest.mark.parametrize("symbolic", [False, True])
def test_sum_and_mean(op_type, function, symbolic):
    # onnx.reference's Mean adds in place, which works only if the first operand has the full shape.
    for shapes in ([(2, 3)], [(2, 3), (3,)], [(4, 2, 3), (), (2, 1), (4, 1, 3)]):
        inputs = [normal(*shape) for shape in shapes]
        check_vjp(op_type, inputs, against=lambda *xs: function(xs), symbolic=symbolic)


@pytest.mark.parametrize(("op_type", "function"), [("Max", torch.maximum), ("Min", torch.minimum)])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(a=st.sampled_from(SHAPES), b=st.sampled_from(SHAPES), symbolic=st.booleans(), ties=st.booleans())
def test_max_and_min(op_type, function, a, b, symbolic, ties):
    """Small whole numbers tie."""
    draw = (
        (lambda shape: RNG.integers(-1, 2, shape).astype(float)) if ties else (lambda shape: normal(*shape))
    )
    check_vjp(op_type, [draw(a), draw(b)], against=function, symbolic=symbolic, ort=symbolic)


@pytest.mark.parametrize("op_type", ["Max", "Min"])
def test_max_and_min_of_one_and_of_three(op_type):
    check_vjp(op_type, [normal(2, 3)], against=torch.clone)
    inputs = [normal(2, 3), normal(3), normal(2, 1)]
    check_vjp(op_type, inputs, symbolic=True)
    tied = [np.array([1.0, 5.0]), np.array([1.0, 5.0]), np.array([1.0, 5.0])]
    for got in gradients_in(np.float64, op_type, tied, np.array([3.0, 6.0])):
        np.testing.assert_array_equal(got, [1, 2])


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    condition=st.sampled_from(SHAPES),
    a=st.sampled_from(SHAPES),
    b=st.sampled_from(SHAPES),
    symbolic=st.booleans(),
)
def test_where(condition, a, b, symbolic):
    inputs = [RNG.integers(0, 2, condition).astype(bool), normal(*a), normal(*b)]
    check_vjp("Where", inputs, against=torch.where, symbolic=symbolic, ort=symbolic)


BINARY = ["Add", "Sub", "Mul", "Div", "Pow", "Sum", "Mean", "Max", "Min", "Mod"]


@pytest.mark.parametrize("op_type", [*UNARY, *BINARY])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types(op_type, dtype):
    opset = 22 if op_type in UNARY else 18
    attributes = {"fmod": 1} if op_type == "Mod" else {}
    shapes = [(2, 3), (3,)] if op_type in BINARY else [(2, 3)]
    assert dtypes_of_gradients(op_type, shapes, dtype, opset, **attributes) == {dtype}


def test_reciprocal_of_small_float16_numbers():
    """y^2 alone would overflow."""
    (got,) = gradients_in(np.float16, "Reciprocal", [np.array([2e-3])], np.array([1e-3]))
    np.testing.assert_allclose(got, -250, rtol=0.01)


def test_every_rule_of_elementwise_is_tested_here():
    from onnxcam.vjp import elementwise

    own = {name for (domain, name), rule in RULES.items() if rule.function.__module__ == elementwise.__name__}
    assert own == {*UNARY, *STEPS, *BINARY, "Cast", "CastLike", "Where"}
