"""Maps of a transformer's attention."""

from typing import TYPE_CHECKING

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.registry import method

if TYPE_CHECKING:
    from onnxcam.probe import Probe


@method(
    "legrad",
    cost="1 backward",
    gives="map",
    rectified=False,
    unsigned=True,
    requires="attention",
    instead="gradcam, which needs none",
)
def legrad(op: Emitter, probe: "Probe") -> Value:
    """Mean over layers, heads and queries of relu(dy/dS), S the attention's softmax. Bousselham et al. 2024.

    What is left is a number for each token that is attended to; class and register tokens are dropped. y is
    the model's own score for every layer, where the paper (eq. 6-10) puts each layer's tokens through the
    classifier. The layers are those after the tokens that are named, by default all.
    """

    def of(*das: Value) -> list[Value]:
        attended = [op.ReduceMean(op.Relu(da), [2, 3], keepdims=0) for da in das]  # [N,k,T]
        tokens = attended[0] if len(attended) == 1 else op.Mean(*attended)
        return [op.Squeeze(probe.grid.planes(op, op.Unsqueeze(tokens, [3])), [2])]

    return probe.per_sum_at(probe.attention(), of)[0]
