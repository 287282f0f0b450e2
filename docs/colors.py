"""Prints web/colors.js, the colours of onnxcam/render.py: python docs/colors.py > web/colors.js."""

import json

from onnxcam.render import AGAINST, LUMA, OPACITY, PALE, color_table, strengths


def script() -> str:
    """Return web/colors.js."""
    parts = [
        "// Made by docs/colors.py. A scale runs from 0 to 1, the signed one from -1 to 1:",
        "// the colour of each level, RGB, and how opaque it is.",
        "",
        "const bytes = (hex) => Uint8Array.from(hex.match(/../g), (byte) => parseInt(byte, 16));",
    ]
    for name, signed in ("UNSIGNED", False), ("SIGNED", True):
        parts += [
            "",
            f"export const {name} = {{",
            f'  colors: bytes("{color_table(signed).tobytes().hex()}"),',
            f"  strengths: {json.dumps([round(float(strength), 6) for strength in strengths(signed)])},",
            "};",
        ]
    for name, value in ("AGAINST", AGAINST), ("LUMA", LUMA.tolist()), ("PALE", PALE), ("OPACITY", OPACITY):
        parts += ["", f"export const {name} = {json.dumps(value)};"]
    return "\n".join(parts)


if __name__ == "__main__":
    print(script())
