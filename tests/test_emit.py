import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcam.emit import Emitter, all_values
from tests.checks import reference

FLOAT, DOUBLE, INT64 = ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT64


def emitter(*shapes, dtype=FLOAT, opset=18):
    """An emitter and inputs x0, x1, ... of the given shapes."""
    inputs = [
        ir.Value(name=f"x{i}", shape=ir.Shape(s), type=ir.TensorType(dtype)) for i, s in enumerate(shapes)
    ]
    graph = ir.Graph(inputs, [], nodes=[], name="g", opset_imports={"": opset})
    return Emitter(graph, opset, "cam"), *inputs


def evaluate(op, *outputs, **feeds):
    op.graph.outputs.extend(outputs)
    model = ir.to_proto(ir.Model(op.graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    return reference(model).run(None, feeds)


# Constants


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, INT64])
@pytest.mark.parametrize("first", [False, True])
def test_a_number_takes_the_dtype_of_its_fellow_operand(dtype, first):
    op, x = emitter(["N", 3], dtype=dtype)
    y = op.Mul(2.0, x) if first else op.Mul(x, 2.0)
    constant = y.producer().inputs[0 if first else 1]
    assert (constant.dtype, y.dtype) == (dtype, dtype)
    assert constant.const_value.numpy().tolist() == 2
    assert constant.const_value.numpy().dtype == dtype.numpy()


def test_bfloat16_constants_are_rounded_to_bfloat16():
    op, x = emitter([2], dtype=ir.DataType.BFLOAT16)
    value = op.Add(x, 0.1).producer().inputs[1].const_value.numpy()
    assert value == ml_dtypes.bfloat16(0.1)


def test_a_number_does_not_take_the_dtype_of_an_operand_of_another_type():
    op, x = emitter([2, 3], dtype=DOUBLE)
    condition = op.Greater(x, 0)
    y = op.Where(condition, x, 0)
    assert condition.producer().inputs[1].dtype == DOUBLE
    assert y.producer().inputs[2].dtype == DOUBLE
    cut = op.Gather(x, 1)
    assert cut.producer().inputs[1].dtype == INT64


@pytest.mark.parametrize("exponent", [0.5, -0.75, 2.0])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_an_exponent_is_not_cut_to_an_integer(exponent, dtype):
    op, x = emitter([3], dtype=dtype)
    given = np.array([1, 2, 3], dtype.numpy())
    (found,) = evaluate(op, op.Pow(x, exponent), x0=given)
    np.testing.assert_allclose(found, given**exponent, rtol=1e-6)


def test_sequences_are_int64_and_arrays_stay_as_they_are():
    op, x = emitter([2, 3])
    y = op.Reshape(x, [3, -1])
    assert y.producer().inputs[1].const_value.numpy().dtype == np.int64
    assert op.Reshape(x, []).producer().inputs[1].const_value.numpy().dtype == np.int64
    z = op.OneHot(np.array([1, 2], np.int32), np.int64(4), np.array([0, 1], np.float64))
    assert [v.dtype for v in z.producer().inputs] == [ir.DataType.INT32, INT64, DOUBLE]
    assert z.dtype == DOUBLE


def test_equal_constants_are_one():
    op, x = emitter([2, 3])
    nodes = [op.Mul(x, 2.0), op.Mul(x, 2), op.Add(x, np.float32(2)), op.Add(x, np.array(2, np.float32))]
    assert len({y.producer().inputs[1] for y in nodes}) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.float32(2), np.float64(2)),
        (np.float32(0), np.int32(0)),
        (np.array([0, 0], np.int64), np.array([[0, 0]], np.int64)),
        (np.array([1], np.float32), np.array(1, np.float32)),
        (np.float32(0.0), np.float32(-0.0)),
        (np.array(0, np.float16), np.array(0, ml_dtypes.bfloat16)),
        (np.zeros(0, np.int64), np.zeros((0, 2), np.int64)),
        (np.array([1, 2]), np.array([2, 1])),
    ],
)
def test_different_constants_are_two(a, b):
    op, _ = emitter([2])
    assert op.constant(np.asarray(a)) is not op.constant(np.asarray(b))
    assert op.constant(np.asarray(a)) is op.constant(np.array(a))


def test_a_transposed_array_keeps_its_order():
    op, x = emitter([3, 2], dtype=INT64)
    array = np.arange(6).reshape(2, 3).T
    assert op.constant(array) is not op.constant(np.arange(6).reshape(3, 2))
    (found,) = evaluate(op, op.Add(x, array), x0=np.zeros((3, 2), np.int64))
    np.testing.assert_array_equal(found, array)


# Nodes


def test_types_and_shapes_are_known_at_once():
    op, x, w = emitter(["N", 3, 8, 8], [4, 3, 3, 3])
    y = op.Conv(x, w, kernel_shape=[3, 3], strides=[2, 2])
    assert (y.dtype, list(y.shape)) == (FLOAT, ["N", 4, 3, 3])
    r = op.Reshape(y, [0, -1])
    assert list(r.shape)[1:] == [36]
    assert op.Shape(y).dtype == INT64
    s = op.Slice(y, [0], [2], [1])
    assert list(s.shape)[1:] == [2, 3, 3]
    assert op.Cast(y, to=ir.DataType.FLOAT16).dtype == ir.DataType.FLOAT16


def test_constants_of_the_model_are_seen_whether_nodes_or_weights():
    """But not an input's default, which the run can override."""
    op, x = emitter([2, 1, 3])
    made = op.node("Constant", value=ir.tensor([1]))
    weight = ir.Value(name="w", shape=ir.Shape([1]), type=ir.TensorType(INT64), const_value=ir.tensor([1]))
    op.graph.register_initializer(weight)
    assert op.Squeeze(x, made).shape == op.Squeeze(x, weight).shape == ir.Shape([2, 3])
    op.graph.inputs.append(weight)
    assert op.Squeeze(x, weight).shape is None


def test_several_outputs():
    op, x = emitter([2, 6])
    a, b = op.Split(x, [2, 4], axis=1, outputs=2)
    assert [list(v.shape) for v in (a, b)] == [[2, 2], [2, 4]]
    values, _ = op.TopK(x, [1], outputs=2)
    data = np.arange(12, dtype=np.float32).reshape(2, 6)
    found = evaluate(op, a, b, values, x0=data)
    np.testing.assert_array_equal(found[1], data[:, 2:])
    np.testing.assert_array_equal(found[2], [[5], [11]])
    assert (a.name, b.name) == ("cam/Split", "cam/Split:1")


def test_operands_that_are_left_out():
    op, x = emitter([2, 3])
    y = op.Clip(x, None, 1.0)
    assert [v is None for v in y.producer().inputs] == [False, True, False]
    assert len(op.Clip(x, 1.0, None).producer().inputs) == 2
    (found,) = evaluate(op, y, x0=np.array([[-5, 0, 5]] * 2, np.float32))
    assert found[0].tolist() == [-5, 0, 1]


def test_attributes_that_are_none_are_left_out():
    op, x = emitter([2, 3])
    assert list(op.Softmax(x, axis=None).producer().attributes) == []
    assert op.Softmax(x, axis=0).producer().attributes["axis"].as_int() == 0


def test_what_onnx_does_not_allow_fails_at_once():
    op, x, w = emitter(["N", 3, 8, 8], [4, 5, 3, 3])
    with pytest.raises(onnx.shape_inference.InferenceError):
        op.MatMul(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
    with pytest.raises(onnx.defs.SchemaError):
        op.Reluu(x)
    with pytest.raises(AttributeError):
        op.relu(x)
    assert w.shape == [4, 5, 3, 3]


def test_the_schema_is_that_of_the_opset():
    assert emitter([2], opset=20)[0].Gelu(np.float32(1)).dtype == FLOAT
    with pytest.raises(onnx.defs.SchemaError):
        emitter([2], opset=18)[0].Gelu(np.float32(1))


# Names


def test_names_say_where_a_node_belongs():
    op, x = emitter([2])
    first = op.Relu(x)
    with op.scope("gradient/conv1"):
        second = op.Relu(x)
        with op.scope("/layer1/Relu"):
            third = op.Mul(x, 3.0)
        fourth = op.Relu(x)
    fifth = op.Relu(x)
    names = [v.name for v in (first, second, third, fourth, fifth)]
    assert names == [
        "cam/Relu",
        "cam/gradient/conv1/Relu",
        "cam/gradient/conv1/layer1/Relu/Mul",
        "cam/gradient/conv1/Relu_1",
        "cam/Relu_1",
    ]
    assert [n.name for n in op.nodes] == names
    assert third.producer().inputs[1].name == "cam/gradient/conv1/layer1/Relu/constant"


def test_a_scope_ends_when_an_error_does_not():
    op, x = emitter([2])
    with pytest.raises(ZeroDivisionError), op.scope("inner"):
        raise ZeroDivisionError
    assert op.Relu(x).name == "cam/Relu"


def test_names_of_the_model_are_not_taken_again():
    x = ir.Value(name="cam/Relu", shape=ir.Shape([2]), type=ir.TensorType(FLOAT))
    inner = ir.node("Neg", [x])
    inner.outputs[0].name = "cam/Relu_1"
    body = ir.Graph([], inner.outputs, nodes=[inner], name="then")
    condition = ir.Value(name="cam/Relu_2", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    node = ir.node(
        "If", [condition], {"then_branch": body, "else_branch": body.clone(allow_outer_scope_values=True)}
    )
    graph = ir.Graph([x, condition], [], nodes=[node], name="g", opset_imports={"": 18})
    op = Emitter(graph, 18, "cam")
    assert op.Relu(x).name == "cam/Relu_3"
    assert {"cam/Relu", "cam/Relu_1", "cam/Relu_2"} <= {v.name for v in all_values(graph)}


# Where nodes go


def test_before_puts_nodes_before_a_node():
    op, x = emitter([2])
    a = op.Relu(x)
    b = op.Neg(a)
    with op.before(b.producer()):
        c = op.Exp(a)
    d = op.Abs(b)
    b.replace_all_uses_with(c)
    assert [n.op_type for n in op.graph] == ["Relu", "Exp", "Neg", "Abs"]
    (found,) = evaluate(op, d, x0=np.array([1, -1], np.float32))
    np.testing.assert_allclose(found, np.exp([1, 0]), rtol=1e-6)


def test_before_goes_into_the_graph_of_the_node():
    op, x = emitter([2])
    body = ir.Graph([], [], nodes=[], name="body")
    with op.body(body):
        inner = op.Neg(x)
    with op.before(inner.producer()):
        op.Exp(x)
    op.Abs(x)
    assert [n.op_type for n in body] == ["Exp", "Neg"]
    assert [n.op_type for n in op.graph] == ["Abs"]


def looped(op, x, trips=3):
    """x * 0, x * 1, ... in a Scan; the 7 is a constant of the main graph."""
    step = ir.Value(name=op.fresh("step"), shape=ir.Shape([]), type=ir.TensorType(INT64))
    body = ir.Graph([step], [], nodes=[], name="body")
    with op.body(body):
        y = op.Add(op.Mul(x, op.Cast(step, to=FLOAT)), 7.0)
    body.outputs.append(y)
    stacked = op.Scan(np.arange(trips), body=body, num_scan_inputs=1)
    stacked.type, stacked.shape = y.type, ir.Shape([None, *y.shape])
    return stacked


def test_a_body_gets_the_nodes_and_the_main_graph_the_constants():
    op, x = emitter([2])
    y = looped(op, x)
    assert [n.op_type for n in op.graph] == ["Scan"]
    assert len(op.graph.initializers) == 2
    (found,) = evaluate(op, op.Identity(y), x0=np.array([1, 10], np.float32))
    np.testing.assert_array_equal(found, [[7, 7], [8, 17], [9, 27]])


# What nothing reads


def test_dead_nodes_and_constants_go():
    op, x = emitter([2])
    kept = op.Add(op.Mul(x, 2.0), 5.0)
    dead = op.Sub(op.Mul(op.Mul(x, 3.0), 2.0), kept)
    op.Exp(dead)
    op.remove_dead([kept])
    assert [n.op_type for n in op.graph] == ["Mul", "Add"]
    assert op.nodes == list(op.graph)
    assert sorted(v.const_value.numpy().item() for v in op.graph.initializers.values()) == [2, 5]
    again = op.Mul(x, 3.0)
    assert again.producer().inputs[1].name in op.graph.initializers


def test_nodes_go_whatever_the_order_they_were_emitted_in():
    """What a simplification puts in front of a dead node is emitted last."""
    op, x = emitter([2])
    a = op.Relu(x)
    b = op.Neg(a)
    with op.before(b.producer()):
        c = op.Exp(op.Mul(x, 3.0))
    a.replace_all_uses_with(c)
    kept = op.Abs(x)
    op.remove_dead([kept])
    assert [n.op_type for n in op.graph] == ["Abs"]
    assert not op.graph.initializers


def test_one_read_output_keeps_a_node():
    op, x = emitter([2, 6])
    _, b = op.Split(x, [2, 4], axis=1, outputs=2)
    op.remove_dead([b])
    assert [n.op_type for n in op.graph] == ["Split"]
    op.remove_dead([])
    assert not list(op.graph)
    assert not op.graph.initializers


def test_graph_outputs_and_the_models_own_nodes_stay():
    op, x = emitter([2])
    own = ir.node("Neg", [x])
    op.graph.append(own)
    op.graph.outputs.append(op.Relu(own.outputs[0]))
    op.Exp(own.outputs[0])
    op.remove_dead([])
    assert [n.op_type for n in op.graph] == ["Neg", "Relu"]


def test_a_dead_loop_goes_with_all_that_only_its_body_reads():
    op, x = emitter([2])
    kept = op.Abs(x)
    looped(op, op.Mul(x, 11.0))
    op.remove_dead([kept])
    assert [n.op_type for n in op.graph] == ["Abs"]
    assert not op.graph.initializers
    assert op.nodes == [kept.producer()]


def test_a_living_loop_loses_what_is_dead_in_its_body():
    op, x = emitter([2])
    y = looped(op, x)
    body = y.producer().attributes["body"].as_graph()
    with op.body(body):
        op.Exp(op.Mul(x, 5.0))
    op.remove_dead([y])
    assert [n.op_type for n in body] == ["Cast", "Mul", "Add"]
    (found,) = evaluate(op, y, x0=np.array([1, 10], np.float32))
    np.testing.assert_array_equal(found[2], [9, 27])
