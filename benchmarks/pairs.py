"""Measuring two things in turn, in one run: what the benchmarks share."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.zoo import exported, made
from onnxcam import gradient

BUILT = Path(__file__).parents[1] / "build" / "bench"
THREADS = 2


@dataclasses.dataclass(frozen=True)
class Ratio:
    """What the first of two things took in units of the second.

    Attributes:
        low, median, high: quartiles of the ratios, pair by pair.
        seconds: medians of what both took.
        pairs: how many there were.
        best: what the median would be if the second took no longer than the predictions that it needs; None:
            not measured.
    """

    low: float
    median: float
    high: float
    seconds: tuple[float, float]
    pairs: int
    best: float | None = None

    @classmethod
    def of(cls, times: Sequence[Sequence[float]] | NDArray[np.float64]) -> "Ratio":
        """Make it of the measurements [pairs,2] of both, or [pairs,3] with those of the predictions alone."""
        array = np.asarray(times)
        low, median, high = np.percentile(array[:, 0] / array[:, 1], [25, 50, 75])
        first, second = np.median(array[:, :2], axis=0)
        best = float(np.median(array[:, 0] / array[:, 2])) if array.shape[1] > 2 else None
        return cls(float(low), float(median), float(high), (float(first), float(second)), len(array), best)


def in_turn(
    first: Callable[[], object], second: Callable[[], object], pairs: int, warm: int = 3, rest: float = 0.0
) -> Ratio:
    """Compare the times of two calls, see `rounds`."""
    return Ratio.of(rounds((first, second), pairs, warm, rest))


def rounds(
    calls: Sequence[Callable[[], object]], count: int, warm: int = 3, rest: float = 0.0, row: int = 1
) -> NDArray[np.float64]:
    """Call each in turn, every second time in the other order, and return the seconds [count,calls].

    Args:
        calls: what is measured.
        count: how often.
        warm: calls of each before, which are not measured.
        rest: seconds before each, in which the threads of another one come to rest.
        row: how many in a row are one measurement, of which the mean counts. Where there are several, one
            more goes before them, as cores that rested take longer at first.
    """
    for _ in range(warm):
        for call in calls:
            call()
    times = np.zeros((count, len(calls)))
    for number, took in enumerate(times):
        for which in range(len(calls)) if number % 2 else reversed(range(len(calls))):
            time.sleep(rest)
            if row > 1:
                calls[which]()
            start = time.perf_counter()
            for _ in range(row):
                calls[which]()
            took[which] = (time.perf_counter() - start) / row
    return times


def session(path: Path) -> onnxruntime.InferenceSession:
    """Open a session as onnxcam does: two threads, which leave the cores to the other one after a run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, THREADS
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def plain(name: str) -> Path:
    """Return the ONNX file of a torchvision model with random weights, made in a process of its own."""
    path = BUILT / f"{name}.onnx"
    if not path.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.pairs", name], check=True)
    return path


def picture(path: Path, batch: int) -> dict[str, np.ndarray]:
    """Return random pictures for a model."""
    model = session(path).get_inputs()[0]
    size = [d if isinstance(d, int) else 224 for d in model.shape[1:]]
    return {model.name: np.random.default_rng(0).standard_normal((batch, *size), np.float32)}


def differentiated(path: Path, batch: int, out: Path) -> dict[str, np.ndarray]:
    """Write a model with the gradient of its scores at its input to `out`, and return feeds for class 0."""
    feeds = picture(path, batch)
    scores = session(path).get_outputs()[0]
    gradient(path, scores.name, next(iter(feeds)), out)
    seed = np.zeros((batch, scores.shape[1]), np.float32)
    seed[:, 0] = 1
    return {**feeds, f"{scores.name}_seed": seed}


def _export(name: str) -> None:
    from tests import vision  # noqa: F401

    module, pictures = made(f"torchvision/{name}")
    program, _ = exported(module, pictures)
    BUILT.mkdir(parents=True, exist_ok=True)
    part = BUILT / f"{name}.part"
    program.save(part, external_data=False)
    part.replace(BUILT / f"{name}.onnx")


if __name__ == "__main__":
    _export(sys.argv[1])
