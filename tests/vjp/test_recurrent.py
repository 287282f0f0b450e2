import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from onnxcam.errors import OnnxcamError
from tests.checks import _one_node_model, check_vjp, quiet
from tests.graphs import build, explained, picture, run, weights_of

RNG = np.random.default_rng(6)

T, N, WIDTH, H = 3, 2, 2, 3
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
STATES = {"RNN": 1, "GRU": 1, "LSTM": 2}
SYMBOLIC = pytest.mark.parametrize("symbolic", [False, True])
DIRECTION = pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
OPERATOR = pytest.mark.parametrize("op_type", ["RNN", "GRU", "LSTM"])


def normal(*shape):
    return RNG.standard_normal(shape)


def inputs_of(op_type, direction, layout=0, biases=True, initial=True, peepholes=False):
    d, g = (2 if direction == "bidirectional" else 1), GATES[op_type] * H
    x, h = (normal(T, N, WIDTH), normal(d, N, H)) if not layout else (normal(N, T, WIDTH), normal(N, d, H))
    inputs = [x, normal(d, g, WIDTH), normal(d, g, H), normal(d, 2 * g) if biases else None, None]
    inputs += [h] + [normal(*h.shape)] * (STATES[op_type] - 1) if initial else []
    if peepholes:
        inputs += [None] * (7 - len(inputs)) + [normal(d, 3 * H)]
    while inputs[-1] is None:
        inputs.pop()
    return inputs


def in_torch(op_type, direction, layout, nonlinearity="tanh"):
    """Return a function that computes the operator's outputs with torch's own layers."""
    g = GATES[op_type]
    order = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 2, 3, 1]}[op_type]

    def gates(v):
        return torch.cat([v.chunk(g)[i] for i in order])

    def layer(x, w, r, b, _, *states):
        d = w.shape[0]
        if layout:
            x, states = x.transpose(0, 1), [s.transpose(0, 1) for s in states]
        flat = []
        for k in range(d):
            flat += [gates(w[k]), gates(r[k]), gates(b[k][: g * H]), gates(b[k][g * H :])]
        if direction == "reverse":
            x = x.flip(0)
        common = (flat, True, 1, 0.0, False, d == 2, False)
        if op_type == "LSTM":
            y, *final = torch.lstm(x, tuple(states), *common)
        else:
            function = torch.gru if op_type == "GRU" else getattr(torch, f"rnn_{nonlinearity}")
            y, *final = function(x, states[0], *common)
        if direction == "reverse":
            y = y.flip(0)
        y = y.unflatten(2, (d, H)).transpose(1, 2)
        if layout:
            return (y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in final))
        return (y, *final)

    return layer


@OPERATOR
@DIRECTION
@pytest.mark.parametrize("layout", [0, 1])
@SYMBOLIC
def test_against_torch(op_type, direction, layout, symbolic):
    check_vjp(
        op_type,
        inputs_of(op_type, direction, layout),
        against=in_torch(op_type, direction, layout),
        wrt=[0, *range(5, 5 + STATES[op_type])] if symbolic or layout else None,
        outputs=(0, STATES[op_type]),
        count=1 + STATES[op_type],
        symbolic=symbolic,
        ort=layout == 0,  # onnxruntime 1.32 knows no other layout
        hidden_size=H,
        direction=direction,
        **({"layout": 1} if layout else {}),
        **({"linear_before_reset": 1} if op_type == "GRU" else {}),
    )


@OPERATOR
@pytest.mark.parametrize("outputs", [(0,), (1,), (2,)])
@SYMBOLIC
def test_one_output(op_type, outputs, symbolic):
    if outputs[0] > STATES[op_type]:
        pytest.skip("there is no such output")
    check_vjp(
        op_type,
        inputs_of(op_type, "bidirectional", biases=False, initial=False),
        outputs=outputs,
        count=1 + STATES[op_type],
        symbolic=symbolic,
        hidden_size=H,
        direction="bidirectional",
    )


@DIRECTION
@SYMBOLIC
def test_gru_that_resets_before_the_product(direction, symbolic):
    check_vjp(
        "GRU", inputs_of("GRU", direction), count=2, outputs=(0,), symbolic=symbolic, hidden_size=H,
        direction=direction,
    )  # fmt: skip


@DIRECTION
@pytest.mark.parametrize("initial", [False, True])
@SYMBOLIC
def test_lstm_peepholes(direction, initial, symbolic):
    check_vjp(
        "LSTM", inputs_of("LSTM", direction, initial=initial, peepholes=True), count=3, outputs=(0, 2),
        wrt=[0, 3, 7] if initial else [2, 7],
        symbolic=symbolic, hidden_size=H, direction=direction,
    )  # fmt: skip


def test_weights_are_left_alone():
    check_vjp("LSTM", inputs_of("LSTM", "forward", initial=False), constant=[1, 2, 3], hidden_size=H)


def check_in_onnxruntime(op_type, inputs, layer, **attributes):
    """Compare with torch what onnx.reference 1.23 does not know: sequence lengths, Relu."""
    count = 1 + STATES[op_type]
    wrt = [i for i, v in enumerate(inputs) if v is not None and v.dtype.kind == "f"]
    tensors = [None if v is None else torch.tensor(v, requires_grad=i in wrt) for i, v in enumerate(inputs)]
    outputs = layer(*tensors)
    seeds = {f"seed{k}": normal(*y.shape) for k, y in enumerate(outputs)}
    sum((y * torch.tensor(seeds[f"seed{k}"])).sum() for k, y in enumerate(outputs)).backward()
    for symbolic, asked in ((False, wrt), (True, wrt[:1])):
        model = _one_node_model(
            op_type, inputs, np.float32, asked, (), range(count), count, 20, "", symbolic,
            {"hidden_size": H, **attributes},
        )  # fmt: skip
        session = onnxruntime.InferenceSession(model.SerializeToString(), quiet())
        feeds = {f"x{i}": v for i, v in enumerate(inputs) if v is not None} | seeds
        feeds = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in feeds.items()}
        for i, got in zip(asked, session.run([f"dx{i}" for i in asked], feeds), strict=True):
            np.testing.assert_allclose(got, tensors[i].grad, rtol=1e-4, atol=1e-5, err_msg=f"input {i}")


def test_rnn_with_relu():
    inputs = inputs_of("RNN", "forward")
    layer = in_torch("RNN", "forward", 0, nonlinearity="relu")
    check_in_onnxruntime("RNN", inputs, layer, activations=["Relu"])


@OPERATOR
@DIRECTION
def test_sequence_lengths(op_type, direction):
    lengths = np.array([T - 2, T], np.int32)

    def layer(x, w, r, b, _, *states):
        each = [
            in_torch(op_type, direction, 0)(
                x[:length, n : n + 1], w, r, b, None, *(s[:, n : n + 1] for s in states)
            )
            for n, length in enumerate(lengths)
        ]
        ys = [torch.nn.functional.pad(y, [0, 0, 0, 0, 0, 0, 0, T - len(y)]) for y, *_ in each]
        return (
            torch.cat(ys, 2),
            *(torch.cat(s, 1) for s in zip(*(final for _, *final in each), strict=True)),
        )

    inputs = inputs_of(op_type, direction)
    inputs[4] = lengths
    options = {"linear_before_reset": 1} if op_type == "GRU" else {}
    check_in_onnxruntime(op_type, inputs, layer, direction=direction, **options)


@pytest.mark.parametrize(
    ("op_type", "attributes", "message"),
    [
        ("LSTM", {"clip": 3.0}, "LSTM with clip"),
        ("LSTM", {"input_forget": 1}, "input_forget"),
        ("GRU", {"activations": ["HardSigmoid", "Tanh"]}, "not HardSigmoid"),
    ],
)
def test_refusals(op_type, attributes, message):
    with pytest.raises(OnnxcamError, match=message):
        check_vjp(op_type, inputs_of(op_type, "forward"), hidden_size=H, **attributes)


@OPERATOR
@pytest.mark.parametrize("dtype", ["FLOAT16", "DOUBLE"])
def test_dtype(op_type, dtype):
    inputs = inputs_of(op_type, "bidirectional")
    model = _one_node_model(
        op_type, inputs, ir.DataType[dtype].numpy(), [0], (), (0,), 1, 20, "", True,
        {"hidden_size": H, "direction": "bidirectional"},
    )  # fmt: skip
    assert model.graph.output[0].type.tensor_type.elem_type == ir.DataType[dtype]


SEQUENCE = """(T[N,3,4,6] x) => (T[N,5] scores)
<T[4,3,3,3] k, T[2,12,4] w, T[2,12,3] r, T[2,24] b, T[3,5] fc, int64[1] rows = {2}, int64[2] both = {0, 1},
 int64[1] first = {0}>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, k)
    f = Tanh(c)
    m = ReduceMean<keepdims=0>(f, rows)
    s = Transpose<perm=[2,0,1]>(m)
    y, last = LSTM<hidden_size=3, direction="bidirectional">(s, w, r, b)
    mean = ReduceMean<keepdims=0>(y, both)
    end = ReduceMean<keepdims=0>(last, first)
    a = Add(mean, end)
    scores = MatMul(a, fc)
}"""


def test_gradients_of_a_classifier_that_reads_the_feature_map_as_a_sequence():
    """The Scans lie in the body of the Scan over the classes; Y and Y_h both lead to the scores."""
    model = build(SEQUENCE)
    w = {name: torch.tensor(array) for name, array in weights_of(model).items()}
    x, classes = picture(2, 3, 4, 6), np.array([[0, 3], [4, 1]])
    got = run(explained(model, layer="f"), {"x": x, "cam_class": classes})["cam_gradients"]
    f = torch.tanh(torch.nn.functional.conv2d(torch.tensor(x), w["k"], padding=1)).requires_grad_()
    zeros = torch.zeros(2, 2, H)
    y, last, _ = in_torch("LSTM", "bidirectional", 0)(
        f.mean(2).permute(2, 0, 1), w["w"], w["r"], w["b"], None, zeros, zeros
    )
    scores = (y.mean((0, 1)) + last.mean(0)) @ w["fc"]
    for n, row in enumerate(classes):
        for k, c in enumerate(row):
            (want,) = torch.autograd.grad(scores[n, c], f, retain_graph=True)
            np.testing.assert_allclose(got[2 * n + k], want[n], rtol=1e-4, atol=1e-6)
