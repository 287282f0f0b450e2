"""The table of operators: complete, and the same in the documentation."""

from pathlib import Path

import onnx

from onnxcam.coverage import table
from onnxcam.quantised import FUNCTIONS
from onnxcam.vjp import RULES

ROOT = Path(__file__).parents[1]


def test_every_operator_has_a_rule_or_a_reason():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table().splitlines()[2:]]
    names = [row[0] for row in rows]
    assert len(names) == len(set(names))
    assert {f"{d}.{n}" if d else n for d, n in (*RULES, *FUNCTIONS)} <= set(names)
    for name, _, gradient, tests in rows:
        if gradient.startswith("none: "):
            assert "newer" not in gradient, name
            assert onnx.defs.has(name)
        else:
            assert (ROOT / "onnxcam" / gradient.strip("`")).is_file(), name
            assert (ROOT / tests.strip("`")).is_file(), name


def test_the_documentation_holds_the_table():
    """Made by: onnxcam operators, below the heading of docs/operators.md."""
    assert (ROOT / "docs/operators.md").read_text().endswith(table() + "\n")
