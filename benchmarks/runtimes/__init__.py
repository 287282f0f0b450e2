"""Explained models in other runtimes than onnxruntime: ``make runtimes`` writes ``docs/runtimes.md``."""
