"""A runtime in a process of its own, started again when it dies."""

import contextlib
import json
import select
import subprocess
import sys
from pathlib import Path

from benchmarks.runtimes.engines import Arrays, packed, unpacked

SECONDS = 240
"""What one model may take; a browser on a software adapter compiles each shader on the processor."""


class Engine:
    """Runs models in one runtime.

    Attributes:
        name: a runtime of ``engines.py``, or ``wasm`` for onnxruntime-web in Node.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        if name == "wasm":
            self._command = ["node", str(Path(__file__).with_name("web.mjs")), str(folder)]
        else:
            self._command = [sys.executable, "-m", "benchmarks.runtimes.engines", name, str(folder)]
        self._process: subprocess.Popen[str] | None = None

    def run(self, model: Path, feeds: Arrays) -> Arrays:
        """Return the outputs by name.

        Raises:
            RuntimeError: the runtime refuses the model, dies over it or takes too long; what it said.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"model": str(model), "feeds": packed(feeds)}) + "\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
            raise RuntimeError("the process died" if ready else f"no answer in {SECONDS} s")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return unpacked(answer["outputs"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
