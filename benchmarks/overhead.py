"""What the explanation costs: ``python benchmarks/overhead.py [PAIRS] [MODEL.onnx ...]``.

Runs the plain model, the explained one and one explained on demand, of which no map is wanted, in turn on one
random picture and two threads, and prints the medians of the ratios with quartiles. Models of ``models/`` by
default, explained at their default layer, with cam and heat map.
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
            explained, asked = Path(folder) / "explained.onnx", Path(folder) / "on_demand.onnx"
            attach(path, explained)
            attach(path, asked, on_demand=True)
            sessions = [session(each) for each in (path, explained, asked)]
            growth = explained.stat().st_size - path.stat().st_size
        picture = sessions[0].get_inputs()[0]
        feeds = {picture.name: np.random.default_rng(0).standard_normal((1, *picture.shape[1:]), np.float32)}
        times = np.array([[seconds(opened, feeds) for opened in sessions] for _ in range(pairs + 10)])[10:]
        print(f"{path.name}: plain {np.median(times[:, 0]) * 1e3:.1f} ms, {pairs} pairs")
        for what, column in ((f"explained ({growth / 1024:+.1f} KiB)", 1), ("on demand, no map wanted", 2)):
            low, median, high = np.percentile(times[:, column] / times[:, 0], [25, 50, 75])
            print(f"  {what}: {median:.3f} times that (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
