"""The maps of pytorch-grad-cam, torch-cam and captum as these return them, each from one function."""

import contextlib
import copy
import importlib
import warnings

import numpy as np
import torch

from onnxcam.methods import METHODS
from tests import vision  # noqa: F401
from tests.methods.test_noise import normal

PYTORCH_GRAD_CAM = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "elementwise": "GradCAMElementWise",
    "layercam": "LayerCAM",
    "shapleycam": "ShapleyCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "fem": "FEM",
    "ablationcam": "AblationCAM",
    "scorecam": "ScoreCAM",
    "finercam": "FinerCAM",
    "kpcacam": "KPCA_CAM",
    "guidedbackprop": "GuidedBackpropReLUModel",
    "fullgrad": "FullGrad",
}
TORCHCAM = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMpp",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "cam": "CAM",
    "scorecam": "ScoreCAM",
    "sscam": "SSCAM",
    "iscam": "ISCAM",
    "smoothgradcam++": "SmoothGradCAMpp",
    "finercam": "FinerCAM",
    "legrad": "LeGrad",
}
CAPTUM = {
    "inputxgradient": "InputXGradient",
    "gradcam": "LayerGradCam",
    "hirescam": "LayerGradientXActivation",
    "saliency": "Saliency",
    "integratedgradients": "IntegratedGradients",
    "smoothgrad": "NoiseTunnel",
    "guidedbackprop": "GuidedBackprop",
    "deconvnet": "Deconvolution",
    "guidedgradcam": "GuidedGradCam",
}
PEERS = {"pytorch-grad-cam": PYTORCH_GRAD_CAM, "torchcam": TORCHCAM, "captum": CAPTUM}
"""Name of each method's class, by dialect."""

RETURNED = {"pytorch-grad-cam": "cam_heatmap", "torchcam": "cam", "captum": "cam"}
"""The output that holds the map that the peer returns."""


def returned(dialect, method):
    """Name the output that holds what the peer returns; attributions have a value for each channel."""
    whole = dialect == "captum" and method != "gradcam"
    return "cam_attributions" if whole or method == "guidedbackprop" else RETURNED[dialect]


class OwnNoise:
    """onnxcam's noise in the place of torch's distribution: the same for every picture, one field a call."""

    def __init__(self, deviation, axes, dtype):
        self.deviation, self.axes, self.dtype, self.calls = deviation, axes, dtype, 0

    def sample(self, size):
        """Return the next field, along the last `axes` of `size`."""
        field = torch.from_numpy(normal(self.calls, size[-self.axes :])).to(self.dtype)
        self.calls += 1
        return (self.deviation * field).expand(size)


@contextlib.contextmanager
def own_normal(samples):
    """Let ``torch.normal`` draw onnxcam's noise: the same `samples` fields for every picture."""
    drawn = torch.normal

    def drawing(_mean, deviation):
        fields = np.stack([normal(i, deviation.shape[1:]) for i in range(samples)])
        return torch.from_numpy(fields).float().repeat(len(deviation) // samples, 1, 1, 1) * deviation

    torch.normal = drawing
    try:
        yield
    finally:
        torch.normal = drawn


_PROJECTING = ("base_cam", "eigen_cam", "eigen_grad_cam", "hirescam", "grad_cam_elementwise", "layer_cam")


@contextlib.contextmanager
def fixed_sign():
    """Let pytorch-grad-cam's projections have the sign of its own SegEigenCAM, not whatever the SVD gives."""
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection_with_sign_correction

    with contextlib.ExitStack() as undo:
        for name in _PROJECTING:
            module = importlib.import_module(f"pytorch_grad_cam.{name}")
            undo.callback(setattr, module, "get_2d_projection", module.get_2d_projection)
            module.get_2d_projection = get_2d_projection_with_sign_correction
        yield


def by_pytorch_grad_cam(method, model, layers, pictures, index, planes=None, sign=1, **smoothing):
    """Return [N,H,W] for `sign` times the score of class `index`.

    Args:
        method: ours.
        model, layers, pictures: the module, modules in it, and [N,3,H,W].
        index: the class.
        planes: turns tokens into planes.
        sign: of the score.
        smoothing: of ``aug_smooth`` and ``eigen_smooth``.
    """
    import pytorch_grad_cam

    kind = getattr(pytorch_grad_cam, PYTORCH_GRAD_CAM[method])
    if method == "guidedbackprop":
        guided = kind(copy.deepcopy(model))
        return np.stack([guided(picture[None].clone(), index).transpose(2, 0, 1) for picture in pictures])
    if method == "finercam":
        with kind(model, layers, planes) as cam:
            return cam(pictures, target_idx=index)
    targets = [lambda scores: sign * scores[index]] * len(pictures)
    options = {}
    if method == "ablationcam":
        vit = planes is not None
        options["ablation_layer"] = getattr(
            pytorch_grad_cam.ablation_layer, "AblationLayerVit" if vit else "AblationLayer"
        )()
    if method == "fullgrad":
        layers, planes = [], None
    with fixed_sign(), kind(model, layers, planes, **options) as cam:
        return cam(pictures, targets, **smoothing)


def by_torchcam(method, model, layers, pictures, index, planes=None, sign=1, head=None):
    """Return what torch-cam does for each layer, normalised: a list of [N,h,w]; `head` is CAM's Linear."""
    import torchcam.methods

    options = {"fc_layer": head} if method == "cam" else {"reshape_transform": planes}
    if method == "legrad":
        layers, options = list(model.encoder.layers), {}
    wanted = {"class_idx": index} if sign == 1 else {"targets": lambda scores: sign * scores[index]}
    with getattr(torchcam.methods, TORCHCAM[method])(model, layers, **options) as extractor:
        if hasattr(extractor, "_distrib"):
            extractor._distrib = OwnNoise(
                extractor.std, 3 if method == "smoothgradcam++" else 2, pictures.dtype
            )
        return [cam.numpy() for cam in extractor(scores=model(pictures), **wanted)]


def by_captum(method, model, layer, pictures, index, relu=False):
    """Return captum's attributions [N,C,h,w]: of LayerGradCam, for which `relu` is, with C = 1."""
    import captum.attr

    kind = getattr(captum.attr, CAPTUM[method])
    if method == "gradcam":
        return kind(model, layer).attribute(pictures, index, relu_attributions=relu).detach()
    if method == "smoothgrad":
        with own_normal(5):
            return kind(captum.attr.Saliency(model)).attribute(pictures, target=index).detach()
    made = kind(model) if METHODS[method].at_picture else kind(model, layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets hooks
        return made.attribute(pictures.clone(), target=index).detach()


def refined_by_pytorch_grad_cam(method, model, layers, pictures, index):
    """Return its RefineCAM of `method`, [N,H,W]."""
    import pytorch_grad_cam

    targets = [lambda scores: scores[index]] * len(pictures)
    refine = pytorch_grad_cam.RefineCAM(
        model, layers, base_method=getattr(pytorch_grad_cam, PYTORCH_GRAD_CAM[method])
    )
    try:
        return refine(pictures, targets)
    finally:
        for cam in refine.base_cam_per_layer:
            cam.activations_and_grads.release()
