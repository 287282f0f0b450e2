"""Makes torchvision, and the peers that import it, usable beside torch's CPU build. Import it first."""

import torch

# PyPI's torchvision brings compiled operators for another build of torch; its models use none of them.
_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
