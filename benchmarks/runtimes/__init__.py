"""What runtimes other than onnxruntime make of explained models: ``make runtimes`` writes ``docs/runtimes.md``."""
