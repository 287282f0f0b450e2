"""Runs onnxcam from a checkout: ``python cli.py run model.onnx photo.jpg``."""

from onnxcam.cli import main

main()
