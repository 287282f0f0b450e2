"""The page that explains photos in a browser: what it consists of, served, or written as one file.

The page itself lies in ``web/``; onnxruntime-web is fetched into it once, and no later step needs a network.
"""

import base64
import gzip
import hashlib
import html
import io
import json
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcam.card import WANTED, Card
from onnxcam.errors import OnnxcamError
from onnxcam.files import replacing

if TYPE_CHECKING:
    import onnx_ir as ir

VERSION = "1.30.0"
"""Of onnxruntime-web, by Microsoft, MIT licence."""
_INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 of the package, as npm's registry states it."""
_FETCHED = {
    "ort.wasm.bundle.min.mjs": "package/dist/ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm": "package/dist/ort-wasm-simd-threaded.wasm",
    "package.json": "package/package.json",
}
"""Names in ``ort/`` of what is taken from the package."""

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
_HEADERS = {
    # Both isolate the page from others, without which browsers allow it one thread.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The page says so too, but its worker goes by what the server says.
    "Content-Security-Policy": "connect-src 'self' blob: data:",
    "Cache-Control": "no-cache",
}

_ATTACH = "onnxcam attach MODEL -o explained.onnx --embed-preprocess --class-input required"

Content = Path | bytes


def folder() -> Path:
    """Return the page's folder: beside this package in a checkout, inside of it where it is installed."""
    package = Path(__file__).parent
    checkout = package.parent / "web"
    return checkout if (checkout / "index.html").is_file() else package / "web"


def fetch() -> Path:
    """Fetch onnxruntime-web from npm's registry into the page's folder ``ort``, unless it is there.

    The registry is that of the environment variable ``npm_config_registry``, if set.

    Returns:
        The folder.

    Raises:
        OnnxcamError: the registry cannot be reached, sends something else, or the folder cannot be written.
    """
    target = folder() / "ort"
    if _is_fetched(target):
        return target
    environment = {name.lower(): value for name, value in os.environ.items()}  # npm takes either case
    registry = environment.get("npm_config_registry") or "https://registry.npmjs.org"
    url = f"{registry.rstrip('/')}/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            package = answer.read()
    except (OSError, ValueError) as error:
        raise OnnxcamError(f"cannot fetch {url}: {getattr(error, 'reason', None) or error}") from error
    if base64.b64encode(hashlib.sha512(package).digest()).decode() != _INTEGRITY:
        raise OnnxcamError(f"{url} is not the package that npm published: its SHA-512 differs")
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise OnnxcamError(f"{target} cannot be made: {error.strerror or error}") from error
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for name, member in _FETCHED.items():
            content = archive.extractfile(member)
            assert content is not None
            with replacing(target / name) as file:
                shutil.copyfileobj(content, file)
    return target


def _is_fetched(target: Path) -> bool:
    """Tell whether all of this very version lies there; ``package.json`` is written last."""
    try:
        return bool(json.loads((target / "package.json").read_bytes())["version"] == VERSION)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def site(models: Sequence[Path] = ()) -> dict[str, Content]:
    """Return all files of the page by their paths on a server.

    Args:
        models: what it offers, explained models fit for a browser; if none are given, those in the page's
            folder ``models``, which may be none.

    Raises:
        OnnxcamError: onnxruntime-web was not fetched, or a model cannot be used in a browser.
    """
    root = folder()
    if not _is_fetched(root / "ort"):
        raise OnnxcamError(
            f"the page needs onnxruntime-web {VERSION} from npm, a download of 33 MB; "
            "fetch it once with: onnxcam web --fetch"
        )
    for model in models:
        check(model)
    if not models and (root / "models" / "index.json").is_file():
        listed = json.loads((root / "models" / "index.json").read_bytes())
        offered = {entry["path"]: (entry["name"], root / "models" / entry["path"]) for entry in listed}
    else:
        offered = {f"{number}.onnx": (_text(model.name), model) for number, model in enumerate(models)}
    index = [{"name": name, "path": path} for path, (name, _) in offered.items()]
    return {
        **{path.name: path for path in sorted(root.iterdir()) if path.suffix in _TYPES},
        **{f"ort/{name}": root / "ort" / name for name in _FETCHED if name != "package.json"},
        "models/index.json": json.dumps(index).encode(),
        **{f"models/{path}": file for path, (_, file) in offered.items()},
    }


def check(path: Path) -> None:
    """See that a model can be used by the page.

    Raises:
        OnnxcamError: what it lacks, and the command that makes it fit.
    """
    from onnxcam import onnxfile

    model = onnxfile.load(path)
    try:
        card = Card.from_metadata(model.metadata_props)
    except OnnxcamError as error:
        raise OnnxcamError(f"{path}: {error}") from None
    if card is None:
        raise OnnxcamError(f"{path} does not explain itself yet; run: {_ATTACH}")
    reason = _unfit(model, card)
    if reason is not None:
        raise OnnxcamError(f"{path} {reason}; attach the original model with: {_ATTACH}")
    if any(type(v.const_value).__name__ == "ExternalTensor" for v in model.graph.initializers.values()):
        raise OnnxcamError(
            f"{path} keeps its weights in another file; a browser takes a model of one file only"
        )


def _unfit(model: "ir.Model", card: Card) -> str | None:
    """Say why a browser cannot use an explained model; None: it can."""
    graph = model.graph
    names = [value.name for value in graph.inputs if value.name not in graph.initializers]
    if card.picture is None:
        return "does not prepare the photo itself"
    if card.target == "seed":
        return "explains a weighted sum of scores, but the page shows classes"
    if "cam_class" not in names:
        return "leaves the class optional, which no browser can change"
    unknown = [name for name in names if name not in (card.picture, "cam_class", WANTED)]
    if unknown:
        return f"has an input {unknown[0]!r} that the page cannot fill"
    made = [value.name for value in graph.outputs]
    lacking = [name for name in (card.scores, "cam", "cam_heatmap") if name not in made]
    return f"has no output {lacking[0]!r}" if lacking else None


def server(files: Mapping[str, Content], port: int) -> ThreadingHTTPServer:
    """Return a server of these files on 127.0.0.1; its ``serve_forever`` starts it.

    Args:
        files: by path, as `site` returns them.
        port: 0 for one that is free.

    Raises:
        OnnxcamError: the port is taken or may not be used.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/") or "index.html"
            try:
                body = _read(files[path])
            except (KeyError, OnnxcamError):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", _TYPES.get(Path(path).suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(body)))
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except ConnectionError:
                self.close_connection = True  # the browser has left

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OnnxcamError(f"port {port} cannot be used: {reason}; choose another with --port") from error


def single_file(files: Mapping[str, Content], output: Path) -> None:
    """Write the page and all that it reads as one HTML file, which works without a server and a network.

    Args:
        files: by path, as `site` returns them; they offer a model.
        output: where it is written, whole or not at all.

    Raises:
        OnnxcamError: there is no model, or a file cannot be read or written.
    """
    if not any(path.endswith(".onnx") for path in files):
        raise OnnxcamError("give the explained models that the page is to hold")
    page = _read(files["index.html"]).decode()
    style = f"<style>\n{_read(files['style.css']).decode()}</style>"
    script = f'<script type="module">\n{_joined(files, "app.js")}</script>'
    page = page.replace('<link rel="stylesheet" href="style.css">', style)
    page = page.replace('<script type="module" src="app.js"></script>', script)
    page = page.replace("'self'", "'unsafe-inline'")  # in the security policy: what is not in here is refused
    head, end, tail = page.partition("</body>")
    with replacing(output) as file:
        file.write(head.encode())
        file.write(b"<!--\n" + _read(files["ort-licence.txt"]) + b"-->\n")
        for path, content in files.items():
            if "/" in path or path == "worker.js":
                packed = base64.b64encode(gzip.compress(_read(content), mtime=0))
                file.write(f'<script type="text/plain" id="{html.escape(path)}">'.encode())
                file.write(packed + b"</script>\n")
        file.write((end + tail).encode())


def _joined(files: Mapping[str, Content], name: str) -> str:
    """Return a script of the page and all that it imports, as one."""
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        text = _read(files[name]).decode()
        for other in re.findall(r'^import .* from "\./(.*)";$', text, re.MULTILINE):
            add(other)
        text = re.sub(r'^import .* from "\./.*";\n', "", text, flags=re.MULTILINE)
        done[name] = re.sub(r"^export ", "", text, flags=re.MULTILINE)

    add(name)
    return "\n".join(done.values())


def _read(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        return content.read_bytes()
    except OSError as error:
        raise OnnxcamError(f"{content} cannot be read: {error.strerror or error}") from error


def _text(name: str) -> str:
    """Return a file's name without what is no text in it."""
    return name.encode("utf-8", "replace").decode()
