"""Heat maps of a folder by a DataLoader and pytorch-grad-cam: ``peer_folder.py FOLDER MODEL``; in seconds."""

import sys
import time
from pathlib import Path

import torch
from PIL import Image

from tests import vision  # noqa: F401

import torchvision  # isort: skip
from pytorch_grad_cam import GradCAM  # isort: skip

BATCH = 8


class Photos(torch.utils.data.Dataset):
    """The photos, prepared as torchvision's weights ask for."""

    def __init__(self, folder):
        self.paths = sorted(Path(folder).iterdir())
        self.prepare = torchvision.transforms.Compose(
            [
                torchvision.transforms.Resize(256),
                torchvision.transforms.CenterCrop(224),
                torchvision.transforms.ToTensor(),
                torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.prepare(Image.open(self.paths[index]).convert("RGB"))


def main():
    torch.set_num_threads(2)
    model = torchvision.models.get_model(sys.argv[2]).eval()
    loader = torch.utils.data.DataLoader(Photos(sys.argv[1]), BATCH, num_workers=1)
    cam = GradCAM(model, [model.layer4 if hasattr(model, "layer4") else model.features[-1]])
    start = time.perf_counter()
    count = sum(len(cam(pictures, None)) for pictures in loader)
    assert count == len(loader.dataset)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
