"""A net small enough to read, as ONNX text and as torch computes it, in float64."""

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from tests.graphs import build, weights_of

# The layer is r2; a convolution, a tanh and the head follow it.
TEXT = """(T[N,2,6,8] x) => (T[N,4] scores)
<T[3,2,3,3] w1, T[3] b1, T[3] scale, T[3] shift, T[3] mean, T[3] variance, T[5,3,3,3] w2, T[5] b2,
 T[4,5,3,3] w3, T[4] b3, T[1,4,1,1] added, T[4,4] fc, T[4] bias>
{
    c1 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)
    n1 = BatchNormalization(c1, scale, shift, mean, variance)
    r1 = Relu(n1)
    m1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
    c2 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(m1, w2, b2)
    r2 = Relu(c2)
    c3 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(r2, w3, b3)
    s3 = Add(c3, added)
    t3 = Tanh(s3)
    p = GlobalAveragePool(t3)
    f = Flatten(p)
    scores = Gemm<transB=1>(f, fc, bias)
}"""
# The same layer before a head that is linear in it.
HEAD = (
    TEXT[: TEXT.index("c3 =")].replace("T[4,4] fc", "T[4,5] fc")
    + """p = GlobalAveragePool(r2)
    f = Flatten(p)
    scores = Gemm<transB=1>(f, fc, bias)
}"""
)
HEAD = HEAD.replace("\n T[4,5,3,3] w3, T[4] b3, T[1,4,1,1] added,", "\n")
LAYER = "r2"
CLASSES = np.array([[1, 3], [0, 2], [3, 1]])


def model(text=TEXT, dtype="double"):
    rng = np.random.default_rng(5)
    given = {
        "variance": rng.uniform(0.5, 2, 3),
        "scale": rng.uniform(0.5, 1.5, 3),
        "added": rng.standard_normal((1, 4, 1, 1)),
        **{name: rng.standard_normal(n) / 2 for name, n in (("b1", 3), ("shift", 3), ("mean", 3))},
        **{name: rng.standard_normal(n) / 3 for name, n in (("b2", 5), ("b3", 4), ("bias", 4))},
    }
    return build(text, dtype=dtype, **given)


def pictures(count=3, dtype=np.float64):
    return np.random.default_rng(7).standard_normal((count, 2, 6, 8)).astype(dtype)


class Net:
    """The models in torch; `rectify` is what stands for Relu."""

    def __init__(self, proto, rectify=F.relu):
        self.proto, self.rectify = proto, rectify
        self.w = {name: torch.tensor(array, dtype=torch.float64) for name, array in weights_of(proto).items()}

    def values(self, x):
        """All values up to the layer, by name."""
        w, v = self.w, {}
        v["c1"] = F.conv2d(x, w["w1"], w["b1"], padding=1)
        epsilon = float(np.float32(1e-5))
        v["n1"] = F.batch_norm(v["c1"], w["mean"], w["variance"], w["scale"], w["shift"], eps=epsilon)
        v["c2"] = F.conv2d(F.max_pool2d(self.rectify(v["n1"]), 2), w["w2"], w["b2"], padding=1)
        v["r2"] = self.rectify(v["c2"])
        return v

    def rest(self, a):
        """All values after the layer, by name."""
        w, v = self.w, {}
        if "w3" in w:
            v["c3"] = F.conv2d(a, w["w3"], w["b3"], padding=1)
            v["s3"] = v["c3"] + w["added"]
            a = torch.tanh(v["s3"])
        v["scores"] = F.linear(a.mean((2, 3)), w["fc"], w["bias"])
        return v

    def a(self, x):
        return self.values(x)["r2"]

    def tail(self, a):
        return self.rest(a)["scores"]

    def y(self, x):
        return self.tail(self.a(x))

    def da(self, x, k):
        """The activation [C,h,w] of one picture and the gradient of class k there."""
        a = self.a(x).detach().requires_grad_()
        (g,) = torch.autograd.grad(self.tail(a)[0, k], a)
        return a.detach()[0], g[0]

    def dx(self, x, k):
        """The gradient [C,H,W] of class k at one picture."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.y(x)[0, k], x)[0][0]
