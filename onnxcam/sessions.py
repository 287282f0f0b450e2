"""Opening onnxruntime sessions, for as many pictures as will come, and running them."""

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from onnxcam.errors import OnnxcamError

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""onnxruntime's name of each provider."""

FEW = 5
"""Up to so many pictures, opening the model sooner saves more than explaining them faster."""

MOST_AT_ONCE = 8
"""Pictures that are worked on at the same time, at most; each may need 40 MB for a photo of 12 megapixels."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a session is opened.

    Attributes:
        blocked: with onnxruntime's blocked layout of convolutions, into which it copies all weights: runs
            are faster, opening takes twice as long.
        at_once: how many runs go on at the same time.
        threads: of onnxruntime's pool, which those runs share, each bringing a thread of its own; None: as
            many as there are cores.
    """

    blocked: bool = True
    at_once: int = 2
    threads: int | None = None

    @classmethod
    def of(cls, pictures: int | None) -> "Plan":
        """Make it for so many pictures, each of one run; None: an unknown number, one now and then.

        Several pictures on a core each are done sooner than one after the other on all cores.
        """
        if pictures is None:
            return cls()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        at_once = max(1, min(pictures, cores, MOST_AT_ONCE))
        return cls(pictures > FEW, at_once, cores - at_once + 1 if at_once > 1 else None)


def in_parallel(
    function: Callable[[Any], Any], items: Iterable[Any], at_once: int
) -> Iterator["Future[Any]"]:
    """Yield ``function(item)`` as futures, in order, while those of the next items are being computed.

    Whatever is not yielded when the caller stops is not begun any more.
    """
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(at_once)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > at_once:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def provider_named(name: str) -> str:
    """Return onnxruntime's name of the provider.

    Raises:
        OnnxcamError: onnxruntime is not installed, or does not have the provider.
    """
    try:
        from onnxruntime import get_available_providers
    except ModuleNotFoundError:
        raise OnnxcamError(
            "onnxruntime is not installed; install it with: pip install 'onnxcam[cpu]' (or 'onnxcam[gpu]')"
        ) from None
    except ImportError as error:
        raise OnnxcamError(
            f"onnxruntime is installed but broken ({_first_line(error)}); "
            "uninstall onnxruntime and onnxruntime-gpu, then install one of them"
        ) from error
    available = [short for short, long in PROVIDERS.items() if long in get_available_providers()]
    if name not in available:
        hint = "; for CUDA: pip uninstall onnxruntime && pip install 'onnxcam[gpu]'" if name == "cuda" else ""
        raise OnnxcamError(
            f"provider {name!r} is not available; this onnxruntime has: {', '.join(available)}{hint}"
        )
    return PROVIDERS[name]


def _session(model: str, provider: str, plan: Plan) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not plan.blocked:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if plan.threads is not None:
        options.intra_op_num_threads = plan.threads
    # After a run the cores are for drawing; the threads would go on spinning on them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # It would warn of cam_class, whose default is meant to be overridden, and say errors twice.
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    if provider not in session.get_providers():
        raise OnnxcamError(
            f"onnxruntime has {provider} but cannot start it here; check the driver and CUDA libraries, "
            f"or choose another provider (running: {', '.join(session.get_providers())})"
        )
    return session


def open_file(path: Path, provider: str, plan: Plan, what: object = None) -> Any:
    """Open a session on a model file, with onnxcam's own words for what is wrong with the file.

    `what` is what it is called where it cannot be loaded; None: its path.
    """
    try:
        return _session(os.fspath(path), provider, plan)
    except OnnxcamError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base class
        from onnxcam import onnxfile

        onnxfile.load(path)
        raise OnnxcamError(f"onnxruntime cannot load {what or path}: {_first_line(error)}") from error


def start(model: "ir.Model", provider: str, what: object, plan: Plan = Plan()) -> Any:
    """Open a session on a model in memory.

    Args:
        model: it may be of any size.
        provider: onnxruntime's name of it.
        what: what the model is called where it cannot be loaded.
        plan: how it is opened.

    Raises:
        OnnxcamError: onnxruntime cannot load the model.
    """
    import tempfile

    from onnxcam import onnxfile

    with tempfile.TemporaryDirectory(prefix="onnxcam-") as folder:
        path = Path(folder) / "model.onnx"
        onnxfile.save(model, path)
        return open_file(path, provider, plan, what)


def run(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]], model: object
) -> list[NDArray[Any]]:
    """Run a session; `model` is what it is called where it cannot be run.

    Raises:
        OnnxcamError: it cannot.
    """
    try:
        result: list[NDArray[Any]] = session.run(list(outputs), dict(feeds))
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise OnnxcamError(f"onnxruntime cannot run {model}: {_first_line(error)}") from error
    return result


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
