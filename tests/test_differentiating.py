import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

import onnxcam
from onnxcam.errors import OnnxcamError
from tests.checks import reference, relative_error

TWO_OUTPUTS = """
<ir_version: 8, opset_import: ["" : 18]>
two (double[N,3] x, double[N,3] z) => (double[N,4] y, double[N,3] s)
{
    h = Mul (x, z)
    t = Tanh (h)
    y = MatMul (t, w)
    s = Exp (h)
    count = Shape (x)
}
"""


@pytest.fixture
def model():
    proto = onnx.parser.parse_model(TWO_OUTPUTS)
    w = np.random.default_rng(0).standard_normal((3, 4))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return proto


def test_of_several_outputs_at_inputs_and_between_against_torch(model):
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal((2, 3)) for name in ("x", "z", "s_seed")}
    feeds["y_seed"] = rng.standard_normal((2, 4))
    before = model.SerializeToString()
    proto = ir.to_proto(onnxcam.gradient(model, ["y", "s"], ["x", "z", "h"]))
    assert model.SerializeToString() == before
    onnx.checker.check_model(proto, full_check=True)
    assert [i.name for i in proto.graph.input] == ["x", "z", "y_seed", "s_seed"]
    y, s, *found = reference(proto).run(None, feeds)
    x, z = (torch.tensor(feeds[name], requires_grad=True) for name in ("x", "z"))
    h = x * z
    h.retain_grad()
    w = torch.tensor(onnx.numpy_helper.to_array(model.graph.initializer[0]))
    outputs = torch.tanh(h) @ w, torch.exp(h)
    sum((o * torch.tensor(feeds[f"{n}_seed"])).sum() for o, n in zip(outputs, "ys", strict=True)).backward()
    for got, want in zip((y, s), outputs, strict=True):
        np.testing.assert_allclose(got, want.detach(), rtol=1e-12)
    for got, value in zip(found, (x, z, h), strict=True):
        assert relative_error(got, value.grad) < 1e-12


def test_a_single_name_is_enough_and_the_file_is_written(model, tmp_path):
    path = tmp_path / "gradient.onnx"
    onnxcam.gradient(model, "s", "h", path)
    h = np.array([[0.5, -1.0, 2.0]])
    s, gradient = reference(onnx.load(path)).run(
        None, {"x": h, "z": np.ones((1, 3)), "s_seed": np.ones((1, 3))}
    )[1:]
    np.testing.assert_allclose(gradient, np.exp(h), rtol=1e-12)
    np.testing.assert_allclose(s, np.exp(h), rtol=1e-12)


@pytest.mark.parametrize(
    ("outputs", "wrt", "message"),
    [
        ("q", "x", "no output 'q'"),
        ("y", "xx", "no value 'xx'"),
        ("y", "count", "'count' is not of floating point"),
        ("y", "s", "no gradient reaches 's' from y"),
        ("y", [], "no value is named"),
    ],
)
def test_what_cannot_be_differentiated(model, outputs, wrt, message):
    with pytest.raises(OnnxcamError, match=message):
        onnxcam.gradient(model, outputs, wrt)
