"""Every method against torch in float64, written from its equation: one picture, one class at a time."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from onnxcam.methods import METHODS
from tests.checks import relative_error
from tests.graphs import explained, run
from tests.methods.nets import CLASSES, HEAD, LAYER, TEXT, Net, model, pictures
from tests.methods.test_noise import normal


def weighed(w, a):
    return F.relu((w * a).sum(0))


def gradcam(net, x, k):
    a, g = net.da(x, k)
    return weighed(g.mean((1, 2), keepdim=True), a)


def gradcam_plus_plus(net, x, k):
    a, g = net.da(x, k)
    alpha = g**2 / (2 * g**2 + a.sum((1, 2), keepdim=True) * g**3)
    return weighed((alpha * F.relu(g)).nansum((1, 2), keepdim=True), a)


def xgradcam(net, x, k):
    a, g = net.da(x, k)
    total = a.sum((1, 2), keepdim=True)
    return weighed(torch.where(total != 0, (g * a).sum((1, 2), keepdim=True) / total, 0), a)


def hirescam(net, x, k):
    a, g = net.da(x, k)
    return F.relu((g * a).sum(0))


def elementwise(net, x, k):
    a, g = net.da(x, k)
    return F.relu(g * a).sum(0)


def layercam(net, x, k):
    a, g = net.da(x, k)
    return F.relu((F.relu(g) * a).sum(0))


def finercam(net, x, k):
    """There are four classes, so the rivals are all the others."""
    a = net.a(x)[0].detach().requires_grad_()
    scores = net.tail(a[None])[0]
    others = [m for m in range(len(scores)) if m != k]
    (g,) = torch.autograd.grad(scores[k] - scores[others].mean(), a)
    return weighed(g.mean((1, 2), keepdim=True), a.detach())


def shapleycam(net, x, k):
    a, g = net.da(x, k)
    _, ha = torch.autograd.functional.hvp(lambda a: net.tail(a[None])[0, k], a, a)
    return weighed((g - ha / 2).mean((1, 2), keepdim=True), a)


def first_direction(t):
    """SVD by numpy, of positions by channels; the extreme of larger magnitude is positive."""
    rows = t.numpy().reshape(len(t), -1).T
    scores = rows @ np.linalg.svd(rows, full_matrices=False)[2][0]
    return np.sign(scores[np.abs(scores).argmax()]) * scores.reshape(t.shape[1:])


def eigencam(net, x, k):
    return first_direction(net.a(x)[0])


def eigengradcam(net, x, k):
    a, g = net.da(x, k)
    return first_direction(g * a)


def kpcacam(net, x, k):
    a = net.a(x)[0].numpy()
    rows = a.reshape(len(a), -1).T
    rows = rows - rows.mean(0)
    kernel = np.tanh(rows @ rows.T / len(a) + 1)
    centring = np.eye(len(kernel)) - 1 / len(kernel)
    values, vectors = np.linalg.eigh(centring @ kernel @ centring)
    scores = np.sqrt(values[-1]) * vectors[:, -1]
    return np.sign(scores[np.abs(scores).argmax()]) * scores.reshape(a.shape[1:])


def fem(net, x, k):
    a = net.a(x)[0]
    beyond = a > a.mean((1, 2), keepdim=True) + 2 * a.std((1, 2), keepdim=True, correction=0)
    return (beyond.double().mean((1, 2), keepdim=True) * a).sum(0)


def ablationcam(net, x, k):
    a = net.a(x)
    y = net.tail(a)[0, k]
    w = []
    for channel in range(a.shape[1]):
        without = a.clone()
        without[:, channel] = 0
        w.append((y - net.tail(without)[0, k]) / y)
    return weighed(torch.stack(w)[:, None, None], a[0])


def reciprocam(net, x, k):
    a = net.a(x)
    cam = torch.zeros(a.shape[2:], dtype=torch.float64)
    for i in range(a.shape[2]):
        for j in range(a.shape[3]):
            alone = torch.zeros_like(a)
            alone[..., i, j] = a[..., i, j]
            cam[i, j] = net.tail(alone)[0, k]
    return cam


def channel_masks(net, x):
    up = F.interpolate(net.a(x), x.shape[2:], mode="bilinear", align_corners=False)[0]
    low, high = up.amin((1, 2), keepdim=True), up.amax((1, 2), keepdim=True)
    return torch.where(high > low, (up - low) / (high - low), 0)


def scored(net, x, k, versions):
    w = torch.stack(
        [torch.stack([net.y(v)[0, k] for v in versions(m)]).mean() for m in channel_masks(net, x)]
    )
    return weighed(w.softmax(0)[:, None, None], net.a(x)[0])


def scorecam(net, x, k):
    return scored(net, x, k, lambda m: [x * m])


def sscam(net, x, k):
    noises = [torch.tensor(normal(i, x.shape[2:])) for i in range(35)]
    return scored(net, x, k, lambda m: [x * (m + 2 * noise) for noise in noises])


def iscam(net, x, k):
    return scored(net, x, k, lambda m: [x * m * i * (i - 1) / 20 for i in range(1, 11)])


def noisy(x):
    sigma = 0.15 * (x.max() - x.min())
    return [x + sigma * torch.tensor(normal(i, x.shape[1:])) for i in range(25)]


def smooth_gradcam_plus_plus(net, x, k):
    a = net.a(x)[0]
    g = torch.stack([net.da(v, k)[1] for v in noisy(x)])
    d1, d2, d3 = g.mean(0), (g**2).mean(0), (g**3).mean(0)
    alpha = d2 / (2 * d2 + a.sum((1, 2), keepdim=True) * d3)
    return weighed((alpha * F.relu(d1)).nansum((1, 2), keepdim=True), a)


def cam(net, x, k):
    return torch.einsum("c,chw->hw", net.w["fc"][k], net.a(x)[0])


def saliency(net, x, k):
    return net.dx(x, k).abs().amax(0)


def inputxgradient(net, x, k):
    return (net.dx(x, k) * x[0]).sum(0)


def integratedgradients(net, x, k):
    steps = [(i + 0.5) / 50 for i in range(50)]
    return (torch.stack([net.dx(x * t, k) for t in steps]).mean(0) * x[0]).sum(0)


def smoothgrad(net, x, k):
    return torch.stack([net.dx(v, k) for v in noisy(x)]).mean(0).abs().amax(0)


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, dy):
        (z,) = ctx.saved_tensors
        return dy * (dy > 0) * (z > 0)


class Deconvolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, dy):
        return dy * (dy > 0)


def guidedbackprop(net, x, k):
    return Net(net.proto, Guided.apply).dx(x, k).abs().amax(0)


def deconvnet(net, x, k):
    return Net(net.proto, Deconvolved.apply).dx(x, k).abs().amax(0)


def guidedgradcam(net, x, k):
    coarse = F.interpolate(gradcam(net, x, k)[None, None], x.shape[2:], mode="bilinear", align_corners=False)[
        0
    ]
    return (Net(net.proto, Guided.apply).dx(x, k) * coarse).abs().amax(0)


def fullgrad(net, x, k):
    w = net.w
    deviation = (w["variance"] + float(np.float32(1e-5))) ** 0.5
    biases = {
        "c1": w["b1"],
        "n1": w["shift"] - w["mean"] * w["scale"] / deviation,
        "c2": w["b2"],
        "c3": w["b3"],
        "s3": w["added"].flatten(),
    }
    values = net.values(x.clone().requires_grad_())
    values |= net.rest(values["r2"])
    found = torch.autograd.grad(values["scores"][0, k], [values[name] for name in biases])
    gradients = {name: g[0] for name, g in zip(biases, found, strict=True)}

    def psi(t):
        t = t.abs()
        t = (t - t.min()) / (t.max() - t.min())
        return F.interpolate(t[None], x.shape[2:], mode="bilinear", align_corners=False)[0].sum(0)

    full = psi(net.dx(x, k) * x[0])
    return full + sum(psi(gradients[name] * b[:, None, None]) for name, b in biases.items())


EXPECTED = {
    "cam": cam,
    "gradcam": gradcam,
    "finercam": finercam,
    "gradcam++": gradcam_plus_plus,
    "xgradcam": xgradcam,
    "hirescam": hirescam,
    "elementwise": elementwise,
    "layercam": layercam,
    "shapleycam": shapleycam,
    "eigencam": eigencam,
    "eigengradcam": eigengradcam,
    "kpcacam": kpcacam,
    "fem": fem,
    "ablationcam": ablationcam,
    "reciprocam": reciprocam,
    "scorecam": scorecam,
    "sscam": sscam,
    "iscam": iscam,
    "smoothgradcam++": smooth_gradcam_plus_plus,
    "saliency": saliency,
    "inputxgradient": inputxgradient,
    "integratedgradients": integratedgradients,
    "smoothgrad": smoothgrad,
    "guidedbackprop": guidedbackprop,
    "deconvnet": deconvnet,
    "guidedgradcam": guidedgradcam,
    "fullgrad": fullgrad,
}


def test_every_method_has_a_value_test():
    assert EXPECTED.keys() | {"legrad"} == METHODS.keys(), "legrad is in test_attention.py"


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize(("by", "dtype", "tolerance"), [("ref", "double", 1e-7), ("ort", "float", 2e-6)])
def test_values(name, by, dtype, tolerance):
    """Three pictures, two classes of each. The map is float32, so 1e-7 is its rounding.

    In float32 ablationcam subtracts two scores that are nearly the same.
    """
    tolerance *= 50 if name == "ablationcam" and by == "ort" else 1
    proto = model(HEAD if name == "cam" else TEXT, dtype)
    net, x = Net(proto), pictures(dtype=np.float64 if dtype == "double" else np.float32)
    layer = {} if METHODS[name].at_picture else {"layer": LAYER}
    got = run(explained(proto, method=name, emit=("cam",), **layer), {"x": x, "cam_class": CLASSES}, by=by)[
        "cam"
    ]
    for n, row in enumerate(CLASSES):
        for k, c in enumerate(row):
            one = torch.tensor(x[n : n + 1], dtype=torch.float64)
            assert relative_error(got[n, k], EXPECTED[name](net, one, c)) <= tolerance, (n, c)
