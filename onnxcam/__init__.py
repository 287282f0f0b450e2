"""Class activation maps inside the ONNX file."""

__version__ = "0.1.0"
