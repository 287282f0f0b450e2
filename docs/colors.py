"""Prints web/colors.js, the colours of onnxcam/render.py: python docs/colors.py > web/colors.js."""

import json

import numpy as np

from onnxcam.render import OPACITY, _strengths, colorize


def script() -> str:
    """Return web/colors.js."""
    parts = [
        "// Made by docs/colors.py. A scale runs from 0 to 1, the signed one from -1 to 1: the colour of each level,",
        "// RGB, and how opaque it is.",
        "",
        "const bytes = (hex) => Uint8Array.from(hex.match(/../g), (byte) => parseInt(byte, 16));",
    ]
    for name, low, count in ("UNSIGNED", 0, 256), ("SIGNED", -1, 255):
        colors = colorize(np.linspace(low, 1, count, dtype=np.float32), signed=low < 0)
        opacities = [round(float(strength), 6) for strength in _strengths(low < 0)]
        parts += [
            "",
            f"export const {name} = {{",
            f'  colors: bytes("{colors.tobytes().hex()}"),',
            f"  strengths: {json.dumps(opacities)},",
            "};",
        ]
    return "\n".join([*parts, "", f"export const OPACITY = {OPACITY};"])


if __name__ == "__main__":
    print(script())
