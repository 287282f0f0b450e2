"""What there is, as ``onnxcam operators`` and ``onnxcam methods`` print it."""

from typing import Any

import onnx

from onnxcam.dialects import DIALECTS
from onnxcam.layers import REQUIREMENTS
from onnxcam.methods import METHODS
from onnxcam.quantised import FUNCTIONS
from onnxcam.vjp import RULES

_LOOP = "a loop; export the model with it unrolled"

_NO_RULE = {
    "LinearAttention": "no runtime has a kernel to check a rule against",
    "Loop": _LOOP,
    "MaxRoiPool": "its bins are laid out by boxes that the model computes: detection, not classification",
    "NegativeLogLikelihoodLoss": "a loss: it needs the true class and comes after the scores",
    "Scan": _LOOP,
    "SequenceMap": _LOOP,
    "SoftmaxCrossEntropyLoss": "a loss: it needs the true class and comes after the scores",
}

_NEEDS = {"a": "activation", "da": "gradient", "hda": "second derivative", "probe": "runs of the model"}

_NEWER = "newer than this onnxcam"

_DIFFERENTIABLE = onnx.defs.OpSchema.DifferentiationCategory.Differentiable


def table() -> str:
    """Return a Markdown table of every operator that has a rule or, by its schema, could have one.

    docs/operators.md holds it too.
    """
    schemas = {s.name: s for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
    versions: dict[str, list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, []).append(schema.since_version)
    tagged = {
        ("", name)
        for name, schema in schemas.items()
        if any(given.differentiation_category == _DIFFERENTIABLE for given in schema.inputs)
    }
    lines = ["| operator | since opset | gradient | tests |", "|---|---|---|---|"]
    control = {("", "If"), *(("", name) for name, reason in _NO_RULE.items() if reason == _LOOP)}
    for domain, name in sorted(tagged | control | RULES.keys() | FUNCTIONS.keys()):
        operator = f"{domain}.{name}" if domain else name
        since = ", ".join(map(str, sorted(versions.get(name, ())))) if not domain else "1"
        rule = RULES.get((domain, name))
        if (domain, name) == ("", "If"):
            lines.append(f"| {operator} | {since} | `backward.py` | `tests/test_control.py` |")
        elif rule is None and (domain, name) in FUNCTIONS:
            lines.append(f"| {operator} | {since} | `quantised.py` | `tests/test_quantised.py` |")
        elif rule is None:
            lines.append(f"| {operator} | {since} | none: {_NO_RULE.get(name, _NEWER)} | |")
        else:
            room = rule.function.__module__.rpartition(".")[2]
            lines.append(f"| {operator} | {since or '-'} | `vjp/{room}.py` | `tests/vjp/test_{room}.py` |")
    return "\n".join(lines)


def methods() -> list[dict[str, Any]]:
    """Return what there is to know of each method, as plain values for JSON.

    Keys: ``name``; ``summary``, the equation and its paper; ``needs``, of ``activation``, ``gradient``,
    ``second derivative`` and ``runs of the model``; ``cost``, see `onnxcam.methods.Method`; ``looks_at``,
    ``layer`` or ``picture``; ``requires``, what the model must have, or None; ``compat``, the dialects that
    have it.
    """
    return [
        {
            "name": name,
            "summary": method.summary,
            "needs": [_NEEDS[part] for part in method.needs],
            "cost": method.cost,
            "looks_at": "picture" if method.at_picture else "layer",
            "requires": REQUIREMENTS[method.requires].needs if method.requires else None,
            "compat": [dialect.name for dialect in DIALECTS.values() if name in dialect.methods],
        }
        for name, method in METHODS.items()
    ]
