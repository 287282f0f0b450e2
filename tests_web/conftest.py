"""A browser, the page in it, and what to read off the page."""

import base64
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
        self.requests = []
        self.complaints = []
        page.on("request", lambda request: self.requests.append(request.url))
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
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
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
def visit(browser, origin):
    """Open the page; it must not ask anybody else for anything, nor may the browser complain."""
    screens = []

    def opened(address=origin, width=1280, height=800, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        screens.append((Screen(context.new_page(), address), address))
        return screens[-1][0]

    yield opened
    for screen, address in screens:
        screen.page.context.close()
        assert screen.complaints == []
        assert [url for url in screen.requests if not url.startswith((address, "blob:", "data:"))] == []


@pytest.fixture(scope="session")
def explainer():
    return Explainer(MODEL)
