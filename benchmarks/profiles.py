"""Where the time goes that explaining adds: onnxruntime's own profile, as tables.

    python -m benchmarks.profiles    # writes benchmarks/profiles.md

A node that was added is told by its name; what onnxruntime adds itself to change its layout (ReorderInput,
ReorderOutput) counts with the model. Times are medians of the runs; profiling adds some microseconds to each
node.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.pairs import THREADS, differentiated, picture, plain
from onnxcam import attach

PAGE = Path(__file__).with_name("profiles.md")
RUNS = 20
ADDED = ("cam/", "gradient/")


def profiled(path: Path, feeds: dict[str, np.ndarray]) -> list[tuple[bool, str, float]]:
    """Run a model and return its nodes: whether it was added, its operator, and its median time in us."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, THREADS
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    times = defaultdict(list)
    for event in events:
        name, operator = event["name"], event.get("args", {}).get("op_name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            times[name.removesuffix("_kernel_time"), operator].append(event["dur"])
    return [
        (name.startswith(ADDED), operator, float(np.median(values)))
        for (name, operator), values in times.items()
    ]


def table(path: Path, other: Path, feeds: dict[str, np.ndarray]) -> Iterator[str]:
    """Yield the lines of a table: each operator's time in the model `path`, and in it with `other` added."""
    alone, together = profiled(path, picture(path, 1)), profiled(other, feeds)
    columns = []
    for found, added in ((alone, False), (together, False), (together, True)):
        sums: dict[str, list[float]] = defaultdict(list)
        for is_added, operator, time in found:
            if is_added == added:
                sums[operator].append(time)
        columns.append(sums)
    yield "| operator | plain: us | nodes | the model's own: us | nodes | added: us | nodes |"
    yield "|---|---|---|---|---|---|---|"
    operators = sorted(set().union(*columns), key=lambda name: -sum(sum(c[name]) for c in columns[1:]))
    rest = [
        name
        for name in operators
        if sum(sum(c[name]) for c in columns) < 0.005 * sum(map(sum, columns[0].values()))
    ]
    for name in [name for name in operators if name not in rest]:
        yield f"| {name} | " + " | ".join(f"{sum(c[name]):.0f} | {len(c[name])}" for c in columns) + " |"
    cells = [[time for name in rest for time in c[name]] for c in columns]
    yield "| others | " + " | ".join(f"{sum(times):.0f} | {len(times)}" for times in cells) + " |"
    totals = [[time for times in c.values() for time in times] for c in columns]
    yield "| **all** | " + " | ".join(f"{sum(times):.0f} | {len(times)}" for times in totals) + " |"


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield "# Where the time goes"
    yield ""
    yield "Written by `make bench-why`, by onnxruntime's own profile of one picture on 2 threads."
    yield from (__doc__ or "").strip().splitlines()[4:]
    for name in ("resnet50", "efficientnet_b0", "mobilenet_v3_large"):
        path = plain(name)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.onnx"
            attach(path, out)
            yield f"\n## {name}, explained at its last layer\n"
            yield from table(path, out, picture(path, 1))
            feeds = differentiated(path, 1, out)
            yield f"\n## {name}, gradient at the input\n"
            yield from table(path, out, feeds)


if __name__ == "__main__":
    PAGE.write_text("\n".join(page()) + "\n")
