"""How the time to attach grows with the model: ``python benchmarks/attach_time.py [MODEL.onnx ...]``.

Chains, residual networks and transformers with random weights, of 100 to 10,000 nodes, are explained in
memory at their first activation, so that the gradient passes through every node, and at their default layer.
The exponent is the slope of log(seconds) over log(nodes): 1 where the time is proportional. Models that are
named are read and explained at their default layer, without writing the result; the best of five runs counts.
Seconds are the processor's, as attach runs on one core and other programs must not count.
"""

import sys
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcam import attach

NODES = (100, 300, 1000, 3000, 10000)


class Network:
    """A model in the making: nodes and random weights, named by their numbers."""

    def __init__(self):
        self.nodes, self.weights, self.rng = [], [], np.random.default_rng(0)

    def node(self, op_type, *inputs, name=None, **attributes):
        """Add a node and return the name of its output."""
        name = name or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def weight(self, *shape):
        """Add a random weight and return its name."""
        return self.constant(self.rng.standard_normal(shape, np.float32))

    def constant(self, array):
        """Add an array and return its name."""
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def model(self, pooled):
        """Return the model whose scores are one matrix product away from `pooled`, [N,8]."""
        self.node("Gemm", pooled, self.weight(8, 10), name="scores")
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 10])],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def convolutional(nodes, residual):
    net = Network()
    x = net.node("Conv", "image", net.weight(8, 3, 3, 3), pads=[1] * 4, name="first")
    while len(net.nodes) < nodes - 3:
        y = net.node("Conv", x, net.weight(8, 8, 3, 3), net.weight(8), pads=[1] * 4)
        y = net.node("Relu", y)
        x = net.node("Add", x, y) if residual else y
    return net.model(net.node("Flatten", net.node("GlobalAveragePool", x)))


def transformer(nodes):
    net = Network()
    patches = net.node("Conv", "image", net.weight(8, 3, 4, 4), strides=[4, 4])
    rows = net.node("Reshape", patches, net.constant(np.array([0, 8, 16])))
    tokens = net.node("Transpose", rows, perm=[0, 2, 1])
    token = net.node("Mul", net.node("ReduceMean", tokens, net.constant(np.array([1]))), net.weight(8))
    x = net.node("Concat", token, tokens, axis=1, name="first")
    while len(net.nodes) < nodes - 2:
        y = net.node("LayerNormalization", x, net.weight(8), net.weight(8))
        q, k, v = (net.node("MatMul", y, net.weight(8, 8)) for _ in range(3))
        p = net.node("Softmax", net.node("MatMul", q, net.node("Transpose", k, perm=[0, 2, 1])))
        x = net.node("Add", x, net.node("MatMul", net.node("MatMul", p, v), net.weight(8, 8)))
        y = net.node("LayerNormalization", x, net.weight(8), net.weight(8))
        y = net.node("Tanh", net.node("MatMul", y, net.weight(8, 16)))
        x = net.node("Add", x, net.node("MatMul", y, net.weight(16, 8)))
    return net.model(net.node("Gather", x, net.constant(np.array(0)), axis=1))


KINDS = {
    "chain": lambda nodes: convolutional(nodes, residual=False),
    "residual": lambda nodes: convolutional(nodes, residual=True),
    "transformer": transformer,
}


def seconds(model, layer=None):
    start = time.process_time()
    attach(model, layer=layer)
    return time.process_time() - start


def main():
    for path in sys.argv[1:]:
        count = len(onnx.load(path, load_external_data=False).graph.node)
        print(f"{path}: {min(seconds(path) for _ in range(5)):.2f} s, {count} nodes")
    for kind, build in KINDS.items():
        for layer in ("first", None):
            counts, times = [], []
            for nodes in NODES:
                model = build(nodes)
                counts.append(len(model.graph.node))
                times.append(seconds(model, layer))
            exponent = np.polyfit(np.log(counts), np.log(times), 1)[0]
            listed = ", ".join(f"{t:.2f} s for {n}" for n, t in zip(counts, times, strict=True))
            print(f"{kind}, {layer or 'default'} layer: {listed} nodes; exponent {exponent:.2f}", flush=True)


if __name__ == "__main__":
    main()
