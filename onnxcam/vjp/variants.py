"""VARIANTS: what some methods propagate instead of the gradient, as rules in the place of others."""

from collections.abc import Mapping

from onnxcam.vjp.registry import RULES, Rule

VARIANTS: dict[str, Mapping[tuple[str, str], Rule]] = {
    "relu as identity": {("", "Relu"): RULES["", "Identity"]},
}
