"""One runtime in a process of its own: a line of JSON in, a line of JSON out.

    python -m benchmarks.runtimes.engines NAME FOLDER

A request names a model file and holds its inputs; the answer holds the outputs, or what the runtime said.
FOLDER is where npm has put onnxruntime-web.
"""

import base64
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[str, Arrays], Arrays]

CHROMIUM = "/usr/bin/chromium"
_WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")


def packed(arrays: Arrays) -> dict[str, Any]:
    """Make JSON of arrays."""
    return {
        name: {"type": a.dtype.name, "dims": a.shape, "data": base64.b64encode(a.tobytes()).decode()}
        for name, a in arrays.items()
    }


def unpacked(found: dict[str, Any]) -> Arrays:
    """Undo `packed`."""
    return {
        name: np.frombuffer(base64.b64decode(a["data"]), a["type"]).reshape(a["dims"]).copy()
        for name, a in found.items()
    }


def onnxruntime(path: str, feeds: Arrays) -> Arrays:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def reference(path: str, feeds: Arrays) -> Arrays:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(path)
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def openvino(path: str, feeds: Arrays) -> Arrays:
    """In single precision: where the processor has bfloat16 it is the default."""
    from openvino import Core

    compiled = Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(feeds)
    return {name: found[output] for name, output in zip(_output_names(path), compiled.outputs, strict=True)}


def tract(path: str, feeds: Arrays) -> Arrays:
    import tract as library

    model = library.onnx().load(path)
    inputs = [model.input_name(i) for i in range(model.input_count())]
    runnable = model.into_model().into_runnable()
    found = runnable.run([feeds[name] for name in inputs])
    return {name: value.to_numpy() for name, value in zip(_output_names(path), found, strict=True)}


def opencv(path: str, feeds: Arrays) -> Arrays:
    import cv2

    net = cv2.dnn.readNetFromONNX(path, cv2.dnn.ENGINE_NEW)
    if net.empty():
        raise RuntimeError("the new engine cannot load the model")
    for name, array in feeds.items():
        net.setInput(array, name)
    outputs = _output_names(path)
    return dict(zip(outputs, map(np.asarray, net.forward(outputs)), strict=True))


def _output_names(path: str) -> list[str]:
    import onnx

    return [output.name for output in onnx.load(path, load_external_data=False).graph.output]


def in_browser(folder: Path, provider: str) -> Iterator[Run]:
    """Headless Chromium with onnxruntime-web, whose files come from `folder`."""
    from playwright.sync_api import Route, sync_playwright

    dist = folder / "node_modules" / "onnxruntime-web" / "dist"

    def serve(route: Route) -> None:
        name = route.request.url.rpartition("/")[2]
        if name:
            route.fulfill(path=Path(__file__).with_name(name) if name == "web.mjs" else dist / name)
        else:
            route.fulfill(body="<!doctype html><title>onnxcam</title>", content_type="text/html")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_WEBGPU))
        page = browser.new_page()
        page.route("**/*", serve)
        page.goto("http://localhost/")

        def run(path: str, feeds: Arrays) -> Arrays:
            model = base64.b64encode(Path(path).read_bytes()).decode()
            script = """async ([model, feeds, provider]) => {
                const ort = await import("/ort.webgpu.bundle.min.mjs");
                const { run } = await import("/web.mjs");
                return await run(ort, model, feeds, provider);
            }"""
            return unpacked(page.evaluate(script, [model, packed(feeds), provider]))

        yield run


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    # Libraries write to the standard output what they like.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    own: dict[str, Run] = {f.__name__: f for f in (onnxruntime, reference, openvino, tract, opencv)}
    for run in [own[name]] if name in own else in_browser(folder, name):
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"outputs": packed(run(request["model"], unpacked(request["feeds"])))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
