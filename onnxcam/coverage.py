"""Which operators a gradient passes through: ``onnxcam operators`` prints it, docs/operators.md holds it."""

import onnx

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

_NEWER = "newer than this onnxcam"

_DIFFERENTIABLE = onnx.defs.OpSchema.DifferentiationCategory.Differentiable


def table() -> str:
    """Return a Markdown table of every operator that has a rule or, by its schema, could have one."""
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
    for domain, name in sorted(tagged | control | RULES.keys()):
        operator = f"{domain}.{name}" if domain else name
        since = ", ".join(map(str, sorted(versions.get(name, ())))) if not domain else "1"
        rule = RULES.get((domain, name))
        if (domain, name) == ("", "If"):
            lines.append(f"| {operator} | {since} | `backward.py` | `tests/test_control.py` |")
        elif rule is None:
            lines.append(f"| {operator} | {since} | none: {_NO_RULE.get(name, _NEWER)} | |")
        else:
            room = rule.function.__module__.rpartition(".")[2]
            lines.append(f"| {operator} | {since or '-'} | `vjp/{room}.py` | `tests/vjp/test_{room}.py` |")
    return "\n".join(lines)
