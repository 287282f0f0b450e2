"""Class activation maps inside the ONNX file: Grad-CAM and its family without PyTorch.

``attach`` adds a gradient branch and maps to an ONNX classifier, ``export`` does so from PyTorch, and
``Explainer`` runs the result on pictures, ``compare`` does so with several methods. ``filters`` and
``activations`` look inside a model. ``gradient`` adds gradients alone, to any model. ``verify`` checks an
explained model that somebody else made. Importing the package imports none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcam.attaching import attach
    from onnxcam.card import Card, Preprocess
    from onnxcam.comparing import Comparison, compare
    from onnxcam.differentiating import gradient
    from onnxcam.errors import OnnxcamError
    from onnxcam.exporting import export
    from onnxcam.looking import Activations, Filters, activations, filters
    from onnxcam.runtime import Explainer, Explanation, Prediction
    from onnxcam.verifying import Report, verify

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Card",
    "Comparison",
    "Explainer",
    "Explanation",
    "Filters",
    "OnnxcamError",
    "Prediction",
    "Preprocess",
    "Report",
    "__version__",
    "activations",
    "attach",
    "compare",
    "export",
    "filters",
    "gradient",
    "verify",
]

_HOMES = {
    "attach": "attaching",
    "export": "exporting",
    "gradient": "differentiating",
    "compare": "comparing",
    "Comparison": "comparing",
    "filters": "looking",
    "Filters": "looking",
    "activations": "looking",
    "Activations": "looking",
    "Card": "card",
    "Preprocess": "card",
    "OnnxcamError": "errors",
    "Explainer": "runtime",
    "Explanation": "runtime",
    "Prediction": "runtime",
    "verify": "verifying",
    "Report": "verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxcam' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"onnxcam.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
