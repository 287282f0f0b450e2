"""LeGrad against torch, on transformers that torch's exporter wrote."""

import warnings
from unittest import mock

import numpy as np
import pytest
import torch

from onnxcam import layers, onnxfile
from onnxcam.attaching import attach
from onnxcam.errors import OnnxcamError
from tests import graphs
from tests.checks import relative_error
from tests.graphs import build, explained, run
from tests.test_grid import GRID, HEIGHT, WIDTH, ChannelsLast, Transformer

CLASSES = np.array([[3, 1], [0, 4]])


def exported(net, file, dtype=torch.float32):
    x = torch.randn(2, 3, HEIGHT, WIDTH, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (x,), file, dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=({0: "N"},)
        )
    return x


def attended(net, x, k, last=2):
    """The mean over the `last` blocks, the heads and the queries of the rectified gradients: [T]."""
    softmaxes, softmax = [], torch.softmax

    def recording(*args):
        softmaxes.append(softmax(*args))
        return softmaxes[-1]

    with mock.patch("torch.softmax", recording):
        scores = net(x)
    found = torch.autograd.grad(scores[0, k], softmaxes[-last:])
    return torch.stack([g[0].relu().mean((0, 1)) for g in found]).mean(0)


@pytest.mark.parametrize(
    ("before", "after", "pool"), [(1, 0, "first"), (5, 0, "first"), (0, 1, "last"), (0, 0, "mean")]
)
def test_legrad_against_torch(before, after, pool, tmp_path):
    torch.manual_seed(0)
    net = Transformer(before, after, pool).eval().double()
    x = exported(net, tmp_path / "net.onnx", torch.float64)
    added = explained(tmp_path / "net.onnx", method="legrad", emit=("cam",))
    got = run(added, {"x": x.numpy(), "cam_class": CLASSES}, by="ref")["cam"]
    assert got.shape == (2, 2, *GRID)
    for n in range(2):
        for k in range(2):
            tokens = attended(net, x[n : n + 1], CLASSES[n, k])[before : before + GRID[0] * GRID[1]]
            assert relative_error(got[n, k], tokens.reshape(GRID)) <= 1e-7


def test_the_layer_says_from_where_on_attention_counts(tmp_path):
    torch.manual_seed(0)
    net = Transformer(1, 0, "first").eval()
    x = exported(net, tmp_path / "net.onnx")
    added = explained(tmp_path / "net.onnx", method="legrad", layer="blocks.1.norm1", emit=("cam", "heatmap"))
    got = run(added, {"x": x.numpy(), "cam_class": CLASSES})["cam"]
    wanted = attended(net, x[1:], 4, last=1)[1:].reshape(GRID)
    assert relative_error(got[1, 1], wanted.detach()) <= 1e-5


def test_default_layer_is_where_the_tokens_begin(tmp_path):
    torch.manual_seed(0)
    exported(Transformer(1, 0, "first").eval(), tmp_path / "net.onnx")
    model = onnxfile.normalise(onnxfile.load(tmp_path / "net.onnx"))
    source, logits = layers.picture(model), layers.scores(model).logits
    first = layers.REQUIREMENTS["attention"].default(layers.explainable(source, logits), source, logits)
    assert first.operator == "Concat"
    found = layers.attention_maps(first.value, logits)
    assert [value.producer().op_type for value in found] == ["Softmax", "Softmax"]


def test_without_attention_legrad_is_refused(tmp_path):
    with pytest.raises(OnnxcamError, match=r"legrad needs attention .*'r' is \[N,4,8,10\]; use gradcam"):
        attach(build(graphs.LINEAR), method="legrad")
    torch.manual_seed(0)
    exported(ChannelsLast().eval(), tmp_path / "net.onnx")
    with pytest.raises(OnnxcamError, match=r"legrad needs attention over .*; use gradcam"):
        attach(tmp_path / "net.onnx", method="legrad")


FUSED = """(float[N,3,8,8] x) => (float[N,4] scores) <float[6,3,4,4] w, float[6,4] fc, float[6] g, float[6] b,
 int64[3] flat = {0, 6, 4}, int64[1] one = {1}>
{
    c = Conv<kernel_shape=[4,4], strides=[4,4]>(x, w)
    r = Reshape(c, flat)
    t = Transpose<perm=[0,2,1]>(r)
    l = LayerNormalization(t, g, b)
    a = NAME
    p = ReduceMean<keepdims=0>(a, one)
    scores = MatMul(p, fc)
}"""


def test_fused_attention_is_refused_by_name():
    model = build(FUSED.replace("NAME", "Attention<q_num_heads=2, kv_num_heads=2>(l, l, l)"), opset=23)
    with pytest.raises(OnnxcamError, match=r"but node 'Attention_4' \(Attention\) has its weights inside"):
        attach(model, method="legrad", layer="l")


def test_a_softmax_that_is_no_attention_is_not_taken_for_one():
    """One over the channels."""
    model = build(FUSED.replace("NAME", "Softmax(l)"))
    with pytest.raises(OnnxcamError, match="there is none between layer 'l' and the scores"):
        attach(model, method="legrad", layer="l")
