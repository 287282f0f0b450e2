"""The table of rules: each has a test, and its attributes and defaults are those of the ONNX schema."""

import inspect
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxcam
from onnxcam.vjp import RULES
from tests.checks import reference

TESTS = "\n".join(
    path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name
)


@pytest.mark.parametrize(("domain", "op_type"), sorted(RULES))
def test_every_rule_has_a_test(domain, op_type):
    assert re.search(rf'"{op_type}"|= {op_type}[<(]', TESTS), f"no test in tests/vjp names {op_type}"


@pytest.mark.parametrize(
    "op_type", sorted(name for domain, name in RULES if not domain and onnx.defs.has(name))
)
def test_attributes_and_their_defaults_are_the_schemas(op_type):
    parameters = inspect.signature(RULES["", op_type].function).parameters
    for name, attribute in onnx.defs.get_schema(op_type).attributes.items():
        if name not in parameters:
            continue  # the rule refuses a node that has it
        default = parameters[name].default
        if attribute.required:
            assert default is inspect.Parameter.empty, name
        elif attribute.default_value.type:
            expected = onnx.helper.get_attribute_value(attribute.default_value)
            if isinstance(expected, list):
                continue  # no list can stand in a signature; the rule fills it in for None
            expected = expected.decode() if isinstance(expected, bytes) else expected
            # ONNX holds floats in single precision.
            assert default == (pytest.approx(expected) if isinstance(expected, float) else expected), name
        else:
            assert default is None, name


def test_a_gradient_has_as_many_dimensions_as_its_value():
    """Also where a rule cuts it out by sizes of the run, behind which onnx knows no number of dimensions."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        m (double[N,A,3] a, double[N,B,3] b) => (double[N,5,3] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] all = {9223372036854775807}>
        { s = Slice (a, zero, all, one, two) y = Concat<axis = 1> (s, b) }
    """)
    proto = ir.to_proto(onnxcam.gradient(model, "y", ["a", "b"]))
    seed = np.arange(15.0).reshape(1, 5, 3)
    feeds = {"a": np.zeros((1, 4, 3)), "b": np.zeros((1, 3, 3)), "y_seed": seed}
    _, da, db = reference(proto).run(None, feeds)
    np.testing.assert_array_equal(da[:, ::2], seed[:, :2])
    np.testing.assert_array_equal(da[:, 1::2], 0)
    np.testing.assert_array_equal(db, seed[:, 2:])
