"""A browser, the page in it, and what to read off the page."""

import base64
import contextlib
import http.server
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from onnxcam import Explainer, webpage

ROOT = Path(__file__).parent.parent
SEEN = Path(__file__).parent / "seen"
MODEL = ROOT / "web" / "models" / "efficientnet_lite0.onnx"
PHOTO = ROOT / "models" / "cat_and_coffee.png"
FLAGS = (
    "--no-sandbox",  # it refuses to start as root otherwise
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
)
CHROMIUMS_OWN = ".google.com", ".googleapis.com", ".gstatic.com"
"""Hosts that Chromium itself asks for this and that."""

BYTES = """(name) => {
  const canvas = document.getElementById("picture");
  const data = name === "heatmap"
    ? canvas.explanation.heatmap
    : canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 9999) text += String.fromCharCode(...bytes.subarray(i, i + 9999));
  return [canvas.height, canvas.width, btoa(text)];
}"""

expect.set_options(timeout=30_000)


class Screen:
    """The page in one tab. Controls are found as a screen reader names them."""

    def __init__(self, page, address):
        self.page = page
        self.complaints = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(address)

    def ready(self):
        expect(self.page.get_by_role("status")).to_contain_text("Now choose a photo")
        return self

    def give(self, photo):
        self.page.get_by_label("Choose a photo").set_input_files(photo)
        return self

    def open(self, model):
        self.page.get_by_label("Open a model").set_input_files(model)
        return self

    def shows(self, index=None):
        """Wait for the map of a class, or of whichever is the best."""
        picture = self.page.get_by_role("img", name="Heat map for")
        expect(picture).to_have_attribute("data-class", re.compile(".+" if index is None else f"^{index}$"))
        return self

    def says(self, pattern):
        expect(self.page.get_by_role("alert")).to_contain_text(pattern)

    @property
    def index(self):
        return self.page.evaluate("document.getElementById('picture').explanation.index")

    @property
    def labels(self):
        return self.page.evaluate("document.getElementById('picture').explanation.labels")

    @property
    def heatmap(self):
        """float32 [H,W], as the model in the page gave it."""
        height, width, text = self.page.evaluate(BYTES, "heatmap")
        return np.frombuffer(base64.b64decode(text), np.float32).reshape(height, width)

    @property
    def drawn(self):
        """uint8 [H,W,3], the pixels of the canvas."""
        height, width, text = self.page.evaluate(BYTES, "drawn")
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)[:, :, :3]

    def fade(self, percent):
        self.page.get_by_label("Opacity of the map").fill(str(percent))
        return self


@pytest.fixture(scope="session")
def proxy():
    """A server that all goes through what the browser wants from other machines; it only takes notes."""

    class Notes(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            host = self.path.removeprefix("http://").partition("/")[0].partition(":")[0]
            if not host.endswith(CHROMIUMS_OWN):
                self.server.asked.append(self.path)
            with contextlib.suppress(ConnectionError):
                self.send_error(502)

        do_POST = do_GET  # noqa: N815
        do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notes) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def elsewhere(proxy):
    """What the browser asked others for, in this test."""
    proxy.asked.clear()
    return proxy.asked


@pytest.fixture(scope="session")
def browser(proxy):
    with sync_playwright() as playwright:
        flags = [*FLAGS, f"--proxy-server=http://127.0.0.1:{proxy.server_port}"]  # it spares 127.0.0.1
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def origin():
    """The page as `onnxcam web` serves it, with the demo's model."""
    with webpage.server(webpage.site(), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def visit(browser, origin, elsewhere):
    """Open the page; it must not ask anybody else for anything, nor may the browser complain."""
    screens = []

    def opened(address=origin, width=1280, height=800, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        screens.append(Screen(context.new_page(), address))
        return screens[-1]

    yield opened
    for screen in screens:
        screen.page.context.close()
        assert screen.complaints == []
    assert elsewhere == []


@pytest.fixture(scope="session")
def explainer():
    return Explainer(MODEL)
