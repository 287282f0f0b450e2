"""The table of rules: each has a test, and its attributes and defaults are those of the ONNX schema."""

import inspect
import re
from pathlib import Path

import onnx
import pytest

from onnxcam.vjp import RULES

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
