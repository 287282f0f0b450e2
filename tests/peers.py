"""The maps of pytorch-grad-cam, torch-cam and captum as these return them, each from one function."""

import contextlib
import importlib

from tests import vision  # noqa: F401

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
}
TORCHCAM = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMpp",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "cam": "CAM",
    "scorecam": "ScoreCAM",
}
CAPTUM = {"gradcam": "LayerGradCam"}
PEERS = {"pytorch-grad-cam": PYTORCH_GRAD_CAM, "torchcam": TORCHCAM, "captum": CAPTUM}
"""Name of each method's class, by dialect."""

RETURNED = {"pytorch-grad-cam": "cam_heatmap", "torchcam": "cam", "captum": "cam"}
"""The output that holds what the peer returns."""

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

    targets = [lambda scores: sign * scores[index]] * len(pictures)
    options = {}
    if method == "ablationcam":
        vit = planes is not None
        options["ablation_layer"] = getattr(
            pytorch_grad_cam.ablation_layer, "AblationLayerVit" if vit else "AblationLayer"
        )()
    kind = getattr(pytorch_grad_cam, PYTORCH_GRAD_CAM[method])
    with fixed_sign(), kind(model, layers, planes, **options) as cam:
        return cam(pictures, targets, **smoothing)


def by_torchcam(method, model, layers, pictures, index, planes=None, sign=1, head=None):
    """Return what torch-cam does for each layer, normalised: a list of [N,h,w]; `head` is CAM's Linear."""
    import torchcam.methods

    options = {"fc_layer": head} if method == "cam" else {"reshape_transform": planes}
    wanted = {"class_idx": index} if sign == 1 else {"targets": lambda scores: sign * scores[index]}
    with getattr(torchcam.methods, TORCHCAM[method])(model, layers, **options) as extractor:
        return [cam.numpy() for cam in extractor(scores=model(pictures), **wanted)]


def by_captum(_method, model, layer, pictures, index, relu=False):
    """Return LayerGradCam's [N,1,h,w]."""
    from captum.attr import LayerGradCam

    found = LayerGradCam(model, layer).attribute(pictures, index, relu_attributions=relu)
    return found.detach()


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
