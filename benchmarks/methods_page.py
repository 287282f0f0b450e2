"""What each method shows of a real photo: ``python -m benchmarks.methods_page`` writes ``docs/methods.md``.

EfficientNet-Lite0 explains "Egyptian cat" and "espresso" on the photo of both, the cat on the left. Of each
map the share of its energy that lies on the right half is printed, and the maps are drawn into
``docs/methods.png``.
"""

import dataclasses
from pathlib import Path

import numpy as np

from onnxcam.comparing import compare
from onnxcam.coverage import methods

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"
FACTS = {
    "color": "RGB",
    "scale": 1.0,
    "mean": (127,),
    "std": (128,),
    "resize": "stretch",
    "interpolation": "bicubic",
}
CLASSES = ("Egyptian cat", "espresso")
SLOW, NARROW = ("sscam", "iscam"), "add_530"
"""They run the model 11,520 times or more for the layer of 1,280 channels, so they look at one of 112."""


def right_share(found, k: int) -> float:
    """The share of a map's positive values, spread over the photo, that lies on its right half."""
    energy = np.maximum(found.viewport.to_picture(found.cam[k])[0], 0)
    return float(energy[:, energy.shape[1] // 2 :].sum() / max(energy.sum(), 1e-30))


def main() -> None:
    wanted = {row["name"]: row for row in methods()}
    at_the_end, narrow = (
        compare(
            MODELS / "efficientnet_lite0.onnx",
            MODELS / "cat_and_coffee.png",
            names,
            list(CLASSES),
            layer=layer,
            labels=(MODELS / "imagenet_labels.txt").read_text().splitlines(),
            preprocess=FACTS,
        )
        for names, layer in (([name for name in wanted if name not in SLOW], None), (SLOW, NARROW))
    )
    compared = dataclasses.replace(
        at_the_end,
        explanations=at_the_end.explanations | narrow.explanations,
        methods=tuple(wanted),
    )
    compared.sheet().convert("P", palette=1, colors=256).save(ROOT / "docs" / "methods.png", optimize=True)
    lines = []
    for name, row in wanted.items():
        if name in compared.reasons:
            shares = f"{compared.reasons[name]} | "
        else:
            found = compared.explanations[name]
            shares = " | ".join(f"{right_share(found, k):.1%}" for k in range(len(CLASSES)))
        lines.append(
            f"| `{name}` | {row['summary'].replace('|', chr(92) + '|')} | {row['cost']} | {shares} |\n"
        )
    (ROOT / "docs" / "methods.md").write_text(
        f"""# Methods

Written by `python -m benchmarks.methods_page`. `onnxcam methods` prints what each needs, and which
libraries' numbers it can have (`--compat`). Cost is in runs of the model beside the one that predicts; C is
the number of the layer's channels, P that of its positions.

The last two columns: EfficientNet-Lite0 explains `models/cat_and_coffee.png`, the cat on the left half and
the coffee on the right, and this share of the map's energy (its values above zero, spread over the photo)
lies on the **right** half. A method that tells the classes apart has little there for the cat and much for
the espresso. Eigen-CAM, KPCA-CAM and FEM look at no class. sscam and iscam, which run the model 35 and 9
times for each channel, look at `{NARROW}`, an earlier layer of 112 channels.

| method | map | cost | right half, Egyptian cat | right half, espresso |
|---|---|---|---|---|
{"".join(lines)}
![The maps of each method for both classes](methods.png)
"""
    )


if __name__ == "__main__":
    main()
