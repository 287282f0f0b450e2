"""Heat maps of a folder by onnxcam: ``own_folder.py FOLDER EXPLAINED``; prints seconds."""

import sys
import time
from pathlib import Path

from onnxcam import Explainer


def main():
    photos = sorted(Path(sys.argv[1]).iterdir())
    explainer = Explainer(sys.argv[2], pictures=len(photos))
    start = time.perf_counter()
    count = sum(1 for found in explainer.many(photos) if found.heatmap.shape)
    assert count == len(photos)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
