"""The shortest script around pytorch-grad-cam that does what ``onnxcam run`` does, for PHOTO and OUT."""

import sys

import numpy as np
import torch
from PIL import Image

from tests import vision  # noqa: F401

import torchvision  # isort: skip
from pytorch_grad_cam import GradCAM  # isort: skip
from pytorch_grad_cam.utils.image import show_cam_on_image  # isort: skip

torch.set_num_threads(2)
model = torchvision.models.resnet50().eval()
photo = Image.open(sys.argv[1]).convert("RGB")
crop = torchvision.transforms.Compose(
    [torchvision.transforms.Resize(256), torchvision.transforms.CenterCrop(224)]
)(photo)
pixels = np.asarray(crop, np.float32) / 255
x = torchvision.transforms.functional.normalize(
    torch.from_numpy(pixels).permute(2, 0, 1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
)
cam = GradCAM(model, [model.layer4])(x[None], None)[0]
Image.fromarray(show_cam_on_image(pixels, cam, use_rgb=True)).save(sys.argv[2])
