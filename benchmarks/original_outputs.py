"""How far the original outputs move when a model is explained: ``python benchmarks/original_outputs.py``.

Each model of ``models/`` is explained at every fourth layer and at its default one; its own output is
compared with the plain model's, in onnxruntime on the CPU, on a random batch of two.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from onnxcam import layers
from onnxcam.attaching import attach, prepared

MODELS = Path(__file__).parents[1] / "models"


def run(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def main():
    for path in sorted(MODELS.glob("*.onnx")):
        model = prepared(path)
        source, logits = layers.picture(model), layers.scores(model).logits
        found = layers.explainable(source, logits)
        chosen = {layer.name for layer in [*found[::4], layers.default(found, source, logits)]}
        x = np.random.default_rng(0).standard_normal((2, *list(source.shape)[1:])).astype(np.float32)
        plain = run(path, x)
        errors = []
        for name in chosen:
            explained = ir.to_proto(attach(path, layer=name)).SerializeToString()
            errors.append(float(np.abs(run(explained, x) - plain).max() / np.abs(plain).max()))
        same = sum(error == 0 for error in errors)
        print(f"{path.name}: identical at {same} of {len(errors)} layers, at most {max(errors):.1e} off")


if __name__ == "__main__":
    main()
