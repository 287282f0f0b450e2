"""The page's files, its server and the single file; tests_web/ looks at the page in a browser."""

import base64
import gzip
import hashlib
import http.server
import io
import json
import re
import runpy
import shutil
import tarfile
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from onnxcam import webpage
from onnxcam.attaching import attach
from onnxcam.cli import app
from onnxcam.errors import OnnxcamError
from tests.small import FACTS, saved

ROOT = Path(__file__).parent.parent
FIT = {"embed_preprocess": True, "class_input": "required"}


@contextmanager
def running(server):
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The page in a folder of its own, without what is fetched and built."""
    folder = tmp_path / "web"
    shutil.copytree(webpage.folder(), folder, ignore=shutil.ignore_patterns("ort", "models"))
    monkeypatch.setattr(webpage, "folder", lambda: folder)
    return folder


@pytest.fixture
def whole(empty):
    """The page with a stand-in for onnxruntime-web."""
    (empty / "ort").mkdir()
    (empty / "ort" / "ort.wasm.bundle.min.mjs").write_text("export const x = '</script>';")
    (empty / "ort" / "ort-wasm-simd-threaded.wasm").write_bytes(bytes(range(256)))
    (empty / "ort" / "package.json").write_text(json.dumps({"version": webpage.VERSION}))
    return empty


@pytest.fixture
def fit(tmp_path):
    """A small model that a browser can use."""
    path = tmp_path / "fit.onnx"
    attach(saved(tmp_path), path, labels=["cat", "dog", "Cow", "90"], **FACTS, **FIT)
    return path


@contextmanager
def registry(monkeypatch, package, asked):
    """A registry of npm's that sends `package`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(package)

        def log_message(self, *args):
            pass

    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        monkeypatch.setenv("npm_config_registry", f"{url}/")
        yield url


def packed():
    """An npm package with the names of onnxruntime-web's."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        contents = {
            "package/package.json": json.dumps({"version": webpage.VERSION}).encode(),
            "package/dist/ort.wasm.bundle.min.mjs": b"library",
            "package/dist/ort-wasm-simd-threaded.wasm": b"wasm",
            "package/dist/other": b"not needed",
        }
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_the_pages_colors_are_those_of_python():
    script = runpy.run_path(str(ROOT / "docs" / "colors.py"))["script"]()
    assert (ROOT / "web" / "colors.js").read_text() == script + "\n"


def test_onnxruntime_web_is_fetched_once(empty, monkeypatch):
    package, asked = packed(), []
    integrity = base64.b64encode(hashlib.sha512(package).digest()).decode()
    monkeypatch.setattr(webpage, "_INTEGRITY", integrity)
    with registry(monkeypatch, package, asked):
        assert webpage.fetch() == empty / "ort"
    assert asked == [f"/onnxruntime-web/-/onnxruntime-web-{webpage.VERSION}.tgz"]
    assert {path.name: path.read_bytes()[:7] for path in (empty / "ort").iterdir()} == {
        "ort.wasm.bundle.min.mjs": b"library",
        "ort-wasm-simd-threaded.wasm": b"wasm",
        "package.json": b'{"versi',
    }
    assert webpage.fetch() == empty / "ort"  # nobody answers any more, nor is anybody asked
    assert "ort/ort.wasm.bundle.min.mjs" in webpage.site()


def test_another_package_is_refused(empty, monkeypatch):
    with registry(monkeypatch, packed(), []), pytest.raises(OnnxcamError, match="its SHA-512 differs"):
        webpage.fetch()
    assert not (empty / "ort").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense"])
def test_a_registry_that_cannot_be_reached_is_named(empty, monkeypatch, url):
    monkeypatch.setenv("npm_config_registry", url)
    with pytest.raises(OnnxcamError, match=f"cannot fetch {url}/onnxruntime-web/"):
        webpage.fetch()


def test_without_onnxruntime_web_there_is_no_page(empty, fit):
    with pytest.raises(OnnxcamError, match="fetch it once with: onnxcam web --fetch"):
        webpage.site([fit])
    (empty / "ort").mkdir()
    (empty / "ort" / "package.json").write_text('{"version": "1.0.0"}')
    with pytest.raises(OnnxcamError, match="onnxcam web --fetch"):
        webpage.site([fit])


def test_the_server_sends_what_browsers_ask_for(whole, fit):
    with running(webpage.server(webpage.site([fit, fit]), 0)) as url:

        def get(path):
            with urllib.request.urlopen(f"{url}/{path}", timeout=10) as answer:
                return answer.headers, answer.read()

        for path, kind in {
            "": "text/html; charset=utf-8",
            "app.js?x=1": "text/javascript; charset=utf-8",
            "style.css": "text/css; charset=utf-8",
            "ort/ort.wasm.bundle.min.mjs": "text/javascript; charset=utf-8",
            "ort/ort-wasm-simd-threaded.wasm": "application/wasm",
            "models/index.json": "application/json",
        }.items():
            headers, _ = get(path)
            assert headers["Content-Type"] == kind
            assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        offered = json.loads(get("models/index.json")[1])
        assert offered == [{"name": "fit.onnx", "path": f"{number}.onnx"} for number in (0, 1)]
        assert get("models/1.onnx")[1] == fit.read_bytes()
        for path in ("models/2.onnx", "../pyproject.toml", "ort/package.json", "%2e%2e/pyproject.toml"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(path)
        fit.unlink()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("models/0.onnx")


def test_without_models_those_beside_the_page_are_offered(whole):
    assert json.loads(webpage.site()["models/index.json"]) == []
    (whole / "models").mkdir()
    (whole / "models" / "index.json").write_text('[{"name": "The demo", "path": "demo.onnx"}]')
    files = webpage.site()
    assert json.loads(files["models/index.json"]) == [{"name": "The demo", "path": "demo.onnx"}]
    assert files["models/demo.onnx"] == whole / "models" / "demo.onnx"


def test_one_file_holds_all_of_it(whole, fit, tmp_path):
    files, output = webpage.site([fit]), tmp_path / "one.html"
    webpage.single_file(files, output)
    page = output.read_text()
    found = re.findall(r'<script type="text/plain" id="(.*?)">(.*?)</script>', page)
    held = {path: gzip.decompress(base64.b64decode(text)) for path, text in found}
    assert held.keys() == {path for path in files if "/" in path} | {"worker.js"}
    for path, content in held.items():
        assert content == (files[path] if isinstance(files[path], bytes) else files[path].read_bytes())
    assert not re.search(r"<link [^>]*stylesheet|<script [^>]*src=|^import |^export ", page, re.MULTILINE)
    assert "Copyright (c) Microsoft Corporation" in page
    assert "'self'" not in page


def test_the_command_fetches_and_writes_one_file(whole, fit, tmp_path):
    def call(*arguments):
        done = CliRunner().invoke(app, ["web", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert call("--fetch") == f"onnxruntime-web {webpage.VERSION}: {whole / 'ort'}\n"
    output = tmp_path / "one.html"
    assert call("--single-file", output, fit) == f"{output}: 0.1 MB\n"
    assert 'id="models/0.onnx"' in output.read_text()
    with pytest.raises(OnnxcamError, match="is the model itself"):
        call("--single-file", fit, fit)


def test_one_file_is_written_whole_or_not_at_all(whole, fit, tmp_path):
    with pytest.raises(OnnxcamError, match="give the explained models"):
        webpage.single_file(webpage.site(), tmp_path / "one.html")
    files = webpage.site([fit])
    output = tmp_path / "one.html"
    output.write_text("before")
    fit.unlink()
    with pytest.raises(OnnxcamError, match="cannot be read: No such file"):
        webpage.single_file(files, output)
    assert output.read_text() == "before"
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"class_input": "required"}, "does not prepare the photo itself; attach the original model with"),
        ({"embed_preprocess": True}, "leaves the class optional"),
        ({**FIT, "target": "seed"}, "explains a weighted sum of scores"),
        ({**FIT, "target": "contrast"}, "has an input 'cam_against' that the page cannot fill"),
        ({**FIT, "emit": ["cam"]}, "has no output 'cam_heatmap'"),
    ],
    ids=str,
)
def test_a_model_that_no_browser_can_use_is_refused(whole, tmp_path, options, reason):
    path = tmp_path / "unfit.onnx"
    attach(saved(tmp_path), path, **FACTS, **options)
    with pytest.raises(OnnxcamError, match=f"unfit.onnx {reason}"):
        webpage.site([path])


def test_a_plain_model_and_one_in_two_files_are_refused(whole, fit, tmp_path):
    with pytest.raises(OnnxcamError, match="does not explain itself yet; run: onnxcam attach MODEL"):
        webpage.site([saved(tmp_path)])
    model = onnx.load(fit)
    weight = numpy_helper.from_array(np.zeros(2000, np.float32), "large")
    model.graph.initializer.append(weight)
    two = tmp_path / "two.onnx"
    onnx.save(model, two, save_as_external_data=True, location="two.data", size_threshold=1000)
    with pytest.raises(OnnxcamError, match="keeps its weights in another file"):
        webpage.site([two])


def test_a_port_that_is_taken_is_named(whole):
    with running(webpage.server(webpage.site(), 0)) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(OnnxcamError, match=f"port {port} cannot be used: .*choose another with --port"):
            webpage.server(webpage.site(), port)
