"""Runs the JavaScript of docs/deploy.md in Node and compares what comes out: python docs/deploy.py DIR.

DIR has a ``node_modules`` with onnxruntime-web. Model and picture are those of ``make demo``.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from onnxcam import attach

ROOT = Path(__file__).parents[1]
CLASSES = (285, -1)
TOLERANCES = {(224, 224): (1e-5, 2), (450, 300): (1e-3, 6)}
"""How far scores (of the largest) and colours (in levels of 255) may be off, by width and height.

At the model's own size 7e-7 and 1 were measured. Where the picture is resized, sums that end in one half up
to the last bit become another level in another runtime, which changes the scores: 2.2e-4 and 3 were measured.
"""

HARNESS = """
import {{ readFileSync, writeFileSync }} from "node:fs";
const [height, width] = [{height}, {width}];
const pixels = new Uint8Array(readFileSync("pixels.bin"));
{snippet}
writeFileSync("scores.bin", scores);
writeFileSync("overlay.bin", overlay);
"""


def snippet(page: str, language: str) -> str:
    """Return the first block of code in `language`."""
    found = re.search(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found is not None, language
    return found[1]


def main(folder: Path) -> None:
    """Explain the model into `folder` and try pictures of several sizes."""
    attach(
        ROOT / "models" / "efficientnet_lite0.onnx",
        folder / "explained.onnx",
        emit=("overlay",),
        embed_preprocess=True,
        class_input="required",
        color="RGB",
        scale=1.0,
        mean=[127],
        std=[128],
        resize="stretch",
        interpolation="bicubic",
    )
    with Image.open(ROOT / "models" / "cat_and_coffee.png") as opened:
        photo = opened.convert("RGB")
    for size, (most, levels) in TOLERANCES.items():
        compare(folder, np.asarray(photo.resize(size)), most, levels)


def compare(folder: Path, picture: np.ndarray, most: float, levels: int) -> None:
    """Run the page's lines and onnxruntime on a picture; see that scores and colours are near enough."""
    (folder / "pixels.bin").write_bytes(picture.tobytes())
    text = snippet((ROOT / "docs" / "deploy.md").read_text(), "js")
    height, width = picture.shape[:2]
    (folder / "deploy.mjs").write_text(HARNESS.format(snippet=text, height=height, width=width))
    subprocess.run(["node", "deploy.mjs"], cwd=folder, check=True, timeout=300)
    session = onnxruntime.InferenceSession(folder / "explained.onnx", providers=["CPUExecutionProvider"])
    feeds = {"cam_picture": picture[None], "cam_class": np.array([CLASSES])}
    expected_scores, expected = session.run([session.get_outputs()[0].name, "cam_overlay"], feeds)
    scores = np.fromfile(folder / "scores.bin", np.float32).reshape(expected_scores.shape)
    overlay = np.fromfile(folder / "overlay.bin", np.uint8).reshape(expected.shape)
    off = float(np.abs(scores - expected_scores).max() / np.abs(expected_scores).max())
    away = int(np.abs(overlay.astype(int) - expected).max())
    print(f"{width}x{height}: scores within {off:.1e}, colours within {away} levels of Python's")
    assert (expected != picture).any()
    assert off <= most
    assert away <= levels


if __name__ == "__main__":
    main(Path(sys.argv[1]))
