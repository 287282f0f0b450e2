"""Tries explained models and gradient rules in every runtime, and writes docs/runtimes.md: ``make runtimes``.

    python -m benchmarks.runtimes FOLDER            # everything; goes on where it stopped
    python -m benchmarks.runtimes FOLDER --known webgpu    # of WebGPU, takes only what was found so far

FOLDER is where npm has put onnxruntime-web. What was found stays in build/runtimes.jsonl, by runtime,
version and file, so that nothing in it is ever out of date.
"""

import argparse
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.runtimes.engine import Engine
from benchmarks.runtimes.engines import CHROMIUM, Arrays
from benchmarks.runtimes.models import CASES, ROOT, Case
from benchmarks.runtimes.nets import CLASSES, NETS, PICTURE, net
from benchmarks.runtimes.page import Finding, page
from onnxcam import gradient

FOUND = ROOT / "build" / "runtimes.jsonl"
PAGE = ROOT / "docs" / "runtimes.md"

RUNTIMES = {
    "wasm": "onnxruntime-web, wasm",
    "webgpu": "onnxruntime-web, WebGPU",
    "openvino": "OpenVINO",
    "tract": "tract",
    "opencv": "OpenCV DNN",
    "reference": "onnx.reference",
}
"""What the page calls each engine."""


class Bench:
    """The engines, and what was found with them."""

    def __init__(self, folder: Path, only_known: Sequence[str] = ()) -> None:
        self.only_known = only_known
        self.versions = versions(folder)
        self._folder = folder
        self._engines: dict[str, Engine] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._wanted: dict[bytes, Arrays] = {}
        FOUND.parent.mkdir(exist_ok=True)
        for line in FOUND.read_text().splitlines() if FOUND.exists() else ():
            entry = json.loads(line)
            self._known[entry.pop("key")] = entry

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines.values():
            engine.close()

    def find(self, name: str, model: Path, feeds: Arrays) -> Finding | None:
        """Run a model in a runtime and compare with onnxruntime; None: not known and not to be tried."""
        contents = model.read_bytes() + b"".join(key.encode() + a.tobytes() for key, a in feeds.items())
        digest = hashlib.sha256(contents).digest()
        key = f"{name} {self.versions[name]} {digest.hex()}"
        if key not in self._known and name in self.only_known:
            return None
        if key not in self._known:
            if digest not in self._wanted:
                self._wanted = {digest: self.engine("onnxruntime").run(model, feeds)}
            entry = self._compared(name, model, feeds, self._wanted[digest])
            with FOUND.open("a") as file:
                file.write(json.dumps({"key": key, **entry}) + "\n")
            self._known[key] = entry
        return Finding(**self._known[key])

    def _compared(self, name: str, model: Path, feeds: Arrays, wanted: Arrays) -> dict[str, Any]:
        try:
            found = self.engine(name).run(model, feeds)
        except RuntimeError as error:
            return {"refused": said(str(error))}
        return {"differences": {key: difference(found[key], value) for key, value in wanted.items()}}

    def engine(self, name: str) -> Engine:
        """The engine of a runtime, started when it is first asked for."""
        if name not in self._engines:
            self._engines[name] = Engine(name, self._folder)
        return self._engines[name]


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, relative to the largest value; infinite if shapes differ or it is none."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got.astype(np.float64) - want).max() / max(np.abs(want).max(), 1e-30))


def said(error: str) -> str:
    """The part of a runtime's message that says what is wrong."""
    text = error.partition("Stack backtrace")[0].rpartition("OpConversionFailure:")[2]
    text = re.sub(r"OpenCV\(\S+\) \S+ error: \S+ ", "", text)
    text = re.sub(r"in function '.*?'(?=\s|$)", "", text, flags=re.DOTALL)
    text = re.sub(r"\s+at (async )?\S+ \(http.*", "", text, flags=re.DOTALL)
    text = re.sub(r"Summary:.*", "", text, flags=re.DOTALL)
    causes = re.findall(r"^\s*\d+: (.*)$", text, flags=re.MULTILINE)
    first = re.sub(r"\s+", " ", text.partition("Caused by")[0]).strip()
    return (f"{first}: {causes[-1].strip()}" if causes else first)[:240]


def versions(folder: Path) -> dict[str, str]:
    """The version of each engine."""
    found = json.loads((folder / "node_modules" / "onnxruntime-web" / "package.json").read_text())["version"]
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    browser = subprocess.run(
        [CHROMIUM, "--version"], capture_output=True, text=True, check=True
    ).stdout.split()
    return {
        "wasm": f"{found} in Node {node.removeprefix('v')}",
        "webgpu": f"{found} in Chromium {browser[1]}",
        "openvino": importlib.metadata.version("openvino"),
        "tract": importlib.metadata.version("tract"),
        "opencv": importlib.metadata.version("opencv-python-headless"),
        "reference": importlib.metadata.version("onnx"),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
    }


def models(bench: Bench, folder: Path, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """What became of each case: one row for each form, with a finding by runtime."""
    rows = []
    for case in CASES:
        path = folder / "model.onnx"
        for portable in (False, True):
            feeds = case.attach(path, portable)
            rows.append({"case": case, "portable": portable, "findings": tried(bench, case, path, feeds)})
            show(f"{case.model}, {case.what}, {'portable' if portable else 'default'}")
        onnx.save(case.plain(fixed=True), path)
        rows[-1]["plain"] = rows[-2]["plain"] = tried(bench, case, path, case.picture())
    return rows


def tried(bench: Bench, case: Case, path: Path, feeds: Arrays) -> dict[str, Finding]:
    """What each runtime makes of a file; the reference evaluator takes minutes for a model of a real size."""
    names = [name for name in RUNTIMES if name != "reference" or case.small]
    found = {name: bench.find(name, path, feeds) for name in names}
    return {name: finding for name, finding in found.items() if finding is not None}


def rules(bench: Bench, folder: Path, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """What became of each net: findings by runtime of the net itself and of its gradient in both forms."""
    rng = np.random.default_rng(3)
    feeds = {"x": rng.standard_normal(PICTURE).astype(np.float32)}
    rows = []
    for name in NETS:
        model = net(name)
        paths = {form: folder / f"{form}.onnx" for form in ("plain", "default", "portable")}
        onnx.save(model, paths["plain"])
        for form in ("default", "portable"):
            found = gradient(model, "scores", "r", portable=form == "portable")
            onnx.save(ir.to_proto(found), paths[form])
        count = model.graph.output[0].type.tensor_type.shape.dim[0].dim_value
        seeded = {**feeds, "scores_seed": rng.standard_normal((count, CLASSES)).astype(np.float32)}
        row = {
            runtime: {
                form: bench.find(runtime, path, feeds if form == "plain" else seeded)
                for form, path in paths.items()
            }
            for runtime in RUNTIMES
        }
        complete = {runtime: forms for runtime, forms in row.items() if None not in forms.values()}
        rows.append({"net": name, "findings": complete})
        show(name)
    return rows


def converted(folder: Path, bench: Bench) -> dict[str, Any]:
    """Convert an explained model to the format .ort with onnxruntime's own tool, and run it."""
    path = folder / "explained.onnx"
    feeds = next(case for case in CASES if case.model == "squeezenet1_1").attach(path, False)
    tool = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(path)]
    subprocess.run([*tool, "--optimization_style", "Fixed"], check=True, capture_output=True)
    engine = bench.engine("onnxruntime")
    found, wanted = engine.run(path.with_suffix(".ort"), feeds), engine.run(path, feeds)
    config = path.with_suffix(".required_operators.config").read_text().splitlines()
    return {
        "difference": max(difference(found[name], value) for name, value in wanted.items()),
        "size": path.with_suffix(".ort").stat().st_size / path.stat().st_size,
        "operators": [line for line in config if not line.startswith("#")],
    }


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.runtimes")
    parser.add_argument("folder", type=Path, help="where npm has put onnxruntime-web")
    parser.add_argument(
        "--known",
        nargs="*",
        choices=RUNTIMES,
        default=(),
        help="do not run these: write what was found so far",
    )
    given = parser.parse_args(arguments)
    bench = Bench(given.folder.resolve(), given.known)

    def show(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            text = page(
                RUNTIMES,
                bench.versions,
                models(bench, where, show),
                rules(bench, where, show),
                converted(where, bench),
            )
    finally:
        bench.close()
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
