"""Maps of the activation alone, and of its principal component."""

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.algebra import PLANE, first_component, first_kernel_component
from onnxcam.methods.registry import method


@method("eigencam", cost="none", gives="map", rectified=False)
def eigencam(op: Emitter, a: Value) -> Value:
    """A projected onto its first principal direction. Muhammad and Yeasin 2020, eq. 3-4.

    The same for every class. The sign, which the decomposition leaves open, is such that the extreme of
    larger magnitude is positive.
    """
    return first_component(op, a)


@method("eigengradcam", cost="1 backward", gives="map", rectified=False)
def eigengradcam(op: Emitter, a: Value, da: Value) -> Value:
    """The product g A projected as by eigencam. Not of a paper: pytorch-grad-cam 2021."""
    return first_component(op, op.Mul(da, a))


@method("kpcacam", cost="none", gives="map", rectified=False)
def kpcacam(op: Emitter, a: Value) -> Value:
    """The first kernel principal component of A, by a sigmoid kernel. Karmani et al. 2024, arXiv:2410.00267.

    The same for every class. As in the authors' code the kernel is tanh(p . q / C + 1) for positions p and q
    of A less its mean over the plane, and is centred in turn; the sign is as eigencam's.
    """
    return first_kernel_component(op, a)


@method("fem", cost="none", rectified=False)
def fem(op: Emitter, a: Value) -> Value:
    """sum_k share_k A_k, share_k the share of positions with A_k > mean + 2 deviations. Fuad et al. 2020.

    The same for every class.
    """
    mean = op.ReduceMean(a, PLANE, keepdims=1)
    away = op.Sub(a, mean)
    deviation = op.Sqrt(op.ReduceMean(op.Mul(away, away), PLANE, keepdims=1))
    beyond = op.Greater(away, op.Mul(deviation, 2.0))
    return op.ReduceMean(op.CastLike(beyond, a), PLANE, keepdims=0)
