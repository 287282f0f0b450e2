"""Class activation maps inside the ONNX file: Grad-CAM and its family without PyTorch.

``attach`` adds a gradient branch and maps to an ONNX classifier, ``export`` does so from PyTorch, and
``Explainer`` runs the result on pictures. ``gradient`` adds gradients alone, to any model. Importing the
package imports none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcam.attaching import attach
    from onnxcam.card import Card, Preprocess
    from onnxcam.differentiating import gradient
    from onnxcam.errors import OnnxcamError
    from onnxcam.exporting import export
    from onnxcam.runtime import Explainer, Explanation, Prediction

__version__ = "0.1.0"

__all__ = [
    "Card",
    "Explainer",
    "Explanation",
    "OnnxcamError",
    "Prediction",
    "Preprocess",
    "__version__",
    "attach",
    "export",
    "gradient",
]

_HOMES = {
    "attach": "attaching",
    "export": "exporting",
    "gradient": "differentiating",
    "Card": "card",
    "Preprocess": "card",
    "OnnxcamError": "errors",
    "Explainer": "runtime",
    "Explanation": "runtime",
    "Prediction": "runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxcam' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"onnxcam.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
