"""What the explanation costs: ``python benchmarks/overhead.py [PAIRS] [MODEL.onnx ...]``.

Runs the plain and the explained model in turn, on one random picture and two threads, and prints the median
of the ratios with quartiles. Models of ``models/`` by default, explained at their default layer, with cam and
heat map.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from onnxcam import attach

MODELS = Path(__file__).parents[1] / "models"


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    # A session's idle threads would otherwise go on spinning on the cores that the other one needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds(opened, feeds):
    start = time.perf_counter()
    opened.run(None, feeds)
    return time.perf_counter() - start


def main():
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    for path in [Path(p) for p in sys.argv[2:]] or sorted(MODELS.glob("*.onnx")):
        with tempfile.TemporaryDirectory() as folder:
            explained = Path(folder) / "explained.onnx"
            attach(path, explained)
            plain, with_cam = session(path), session(explained)
            growth = explained.stat().st_size - path.stat().st_size
        picture = plain.get_inputs()[0]
        feeds = {picture.name: np.random.default_rng(0).standard_normal((1, *picture.shape[1:]), np.float32)}
        for _ in range(10):
            seconds(plain, feeds), seconds(with_cam, feeds)
        times = np.array([(seconds(plain, feeds), seconds(with_cam, feeds)) for _ in range(pairs)])
        low, median, high = np.percentile(times[:, 1] / times[:, 0], [25, 50, 75])
        alone = np.median(times[:, 0]) * 1e3
        print(
            f"{path.name}: {median:.3f} times the plain model's {alone:.1f} ms "
            f"(quartiles {low:.3f} to {high:.3f}, {pairs} pairs), {growth / 1024:+.1f} KiB"
        )


if __name__ == "__main__":
    main()
