"""How far gradients are from differences of the scores: ``python -m benchmarks.verifying``.

Each model of ``models/`` is explained at every eighth layer, at its default one and at the picture, and
verified by `onnxcam.verify`, on random pictures.
"""

import tempfile
import time
from pathlib import Path

from onnxcam import attach, layers, verify
from onnxcam.attaching import prepared

MODELS = Path(__file__).parents[1] / "models"


def main():
    with tempfile.TemporaryDirectory() as folder:
        explained = Path(folder) / "explained.onnx"
        for path in sorted(MODELS.glob("*.onnx")):
            model = prepared(path)
            source, logits = layers.picture(model), layers.scores(model).logits
            found = layers.explainable(source, logits)
            chosen = {layer.name: None for layer in [*found[::8], layers.default(found, source, logits)]}
            for options in [*({"layer": name} for name in chosen), {"method": "saliency"}]:
                attach(path, explained, **options)
                start = time.perf_counter()
                report = verify(explained, path)
                (check,) = (check for check in report.checks if check.name == "gradient")
                verdict = "passed" if report.passed else "FAILED"
                print(
                    f"{path.name}: {verdict}: {check.text}; {time.perf_counter() - start:.0f} s", flush=True
                )


if __name__ == "__main__":
    main()
