"""Drawing random graphs from nearly all operators that a gradient passes through.

A graph grows node by node: a value is drawn, then one of the operators that can read it, then the operator's
other inputs and its attributes. All values are worked out on the way, at the input where the gradient is
taken, so that nothing overflows and no operator stands at one of its kinks. What Hypothesis draws are the
shape of the input, a seed, and which of its nodes to take: a failing graph is made smaller by leaving some
out.
"""

import contextlib
import itertools
import math
import warnings

import numpy as np
import onnx
from hypothesis import assume
from hypothesis import strategies as st
from onnx.reference.op_run import OpRun

from onnxcam.seed import _ROW_BY_ROW
from tests import checks
from tests.checks import reference
from tests.vjp import test_norm, test_pool, test_resize

REPAIRED = (test_norm, test_pool, test_resize)
"""They teach `reference` to compute in double what onnx.reference computes in float32 or wrongly."""


class Mean(OpRun):
    """onnx.reference's own adds to the first operand in place, which then must have the full shape."""

    def _run(self, *xs):
        return (sum(xs) / len(xs),)


checks.NEW_OPS += [Mean]

MARGIN = 1e-3
"""How far the values that an operator with a kink reads stay from it; a step of the differences is 1e-6."""

LARGEST = 50.0
MOST_ELEMENTS = 300
"""A node is not added if what it computes is larger."""


class Unfit(Exception):  # noqa: N818
    """The node drawn last has no place here."""


class Graph:
    """A graph in the making.

    Attributes:
        nodes: so far.
        arrays: everything that a node may read, by name, in float64.
        weights: the names of those that are constants; the only other one that no node makes is ``x``.
    """

    def __init__(self, seed, shape, opset, symbolic):
        self.seed, self.opset, self.symbolic = seed, opset, symbolic
        self.random = np.random.default_rng(seed)
        self.nodes, self.weights = [], []
        self.arrays = {"x": self.random.standard_normal(shape)}

    def __repr__(self):
        shapes = {name: a.shape for name, a in self.arrays.items()}
        return "\n".join(
            [
                f"opset {self.opset}, symbolic {self.symbolic}",
                *map(onnx.printer.to_text, self.nodes),
                str(shapes),
            ]
        )

    def number(self, low, high):
        return int(self.random.integers(low, high + 1))

    def flag(self):
        return self.number(0, 1) == 1

    def one(self, options):
        options = list(options)
        return options[self.number(0, len(options) - 1)]

    def some(self, options, least=1):
        options = list(options)
        return [options[i] for i in self.random.permutation(len(options))[: self.number(least, len(options))]]

    def maybe(self, **attributes):
        """Each attribute or its default."""
        return {name: value for name, value in attributes.items() if self.flag()}

    def values(self, fits=lambda a: True):
        """The names of the floating-point values that fit: ``x`` and what nodes made of it or of weights."""
        made = ["x", *(name for node in self.nodes for name in node.output if name in self.arrays)]
        return [name for name in made if self.arrays[name].dtype.kind == "f" and fits(self.arrays[name])]

    def value(self, fits=lambda a: True):
        """One of them, most often the latest."""
        names = self.values(fits)
        if not names:
            raise Unfit
        return names[-1] if self.number(0, 2) else self.one(names)

    def constant(self, array):
        name = f"w{len(self.arrays)}"
        self.arrays[name] = np.asarray(array)
        self.weights.append(name)
        return name

    def weight(self, *shape, fan_in=1):
        """A weight, now and then one that a node passes on, so that it is not known before the run."""
        name = self.constant(self.random.standard_normal(shape) / math.sqrt(fan_in))
        return name if self.number(0, 5) else self.node("Identity", name)

    def positive(self, *shape):
        return self.constant(self.random.uniform(0.5, 2.0, shape))

    def ints(self, *values):
        return self.constant(np.array(values, np.int64))

    def sizes(self, *values):
        """The same, or worked out by nodes from the shape of ``x``, as exporters write it.

        Not for Split and CenterCropPad: onnx 1.23 then infers no rank of what they make, which is refused.
        """
        if self.number(0, 2):
            return self.ints(*values)
        nothing = self.node("Mul", self.node("Shape", "x", end=1), self.ints(0))
        return self.node("Add", nothing, self.ints(*values))

    def node(self, op_type, *inputs, outputs=1, **attributes):
        """Add a node, work it out and return the name of its first output."""
        names = [f"v{len(self.arrays) + i}" for i in range(outputs)]
        node = onnx.helper.make_node(op_type, inputs, names, f"n{len(self.nodes)}", **attributes)
        feeds = {name: self.arrays[name] for name in inputs if name}
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of windows that hold nothing
                found = reference(self._alone(node, feeds)).run(None, feeds)
        except (TypeError, ValueError) as error:
            # onnx.reference 1.23 makes no array of some functions of a scalar; or three shapes do not fit.
            if "Issues with types" in str(error) or "could not be broadcast" in str(error):
                raise Unfit from error
            raise
        for name, array in zip(names, map(np.asarray, found), strict=True):
            small = array.dtype.kind != "f" or np.abs(array).max(initial=0) <= LARGEST  # no NaN is
            if not small or not 0 < array.size <= MOST_ELEMENTS or array.ndim > 6:
                raise Unfit
            self.arrays[name] = array
        self.nodes.append(node)
        return names[0]

    def _alone(self, node, feeds):
        given = [info_of(name, a) for name, a in feeds.items()]
        made = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
        return model_of([node], given, made, [], self.opset)

    def model(self, outputs, dtype=np.float64, symbolic=False, cut="x"):
        """The graph as a model.

        Args:
            outputs: names of values.
            dtype: what takes the place of float64.
            symbolic: whether dimensions of ``x`` have no number.
            cut: a value that becomes an input, though a node computes it.
        """
        arrays = {k: a.astype(dtype) if a.dtype == np.float64 else a for k, a in self.arrays.items()}
        shape = [f"d{i}" if symbolic and i in self.symbolic else d for i, d in enumerate(arrays["x"].shape)]
        given = [info_of("x", arrays["x"], shape)]
        if cut != "x":
            given.append(info_of(cut, arrays[cut]))
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        nodes = []
        for node in self.nodes:
            own = onnx.NodeProto()
            own.CopyFrom(node)
            own.output[:] = [f"{name} cut" if name == cut else name for name in node.output]
            if node.op_type == "Cast":
                own.attribute[0].i = kind
            nodes.append(own)
        model = model_of(
            nodes,
            given,
            [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs],
            [onnx.numpy_helper.from_array(arrays[name], name) for name in self.weights],
            self.opset,
        )
        for info in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output:
            own = next(own for own in model.graph.output if own.name == info.name)
            if info.type.tensor_type.HasField("shape"):
                own.CopyFrom(info)
            else:
                a = arrays[info.name]
                own.CopyFrom(info_of(info.name, a, [None] * a.ndim if symbolic and self.symbolic else None))
        return model

    @contextlib.contextmanager
    def attempt(self):
        """Take back what is added within the block if it turns out unfit."""
        nodes, arrays, weights = len(self.nodes), len(self.arrays), len(self.weights)
        try:
            yield
        except Unfit:
            del self.nodes[nodes:], self.weights[weights:]
            for name in list(self.arrays)[arrays:]:
                del self.arrays[name]

    def within(self, x, low, high):
        """`x`, or if it leaves the interval a multiple of it plus a number that does not."""
        a = self.arrays[x]
        if a.min() >= low and a.max() <= high:
            return x
        scale = (high - low) / max(np.ptp(a), 1.0)
        x = self.node("Mul", x, self.constant(np.array(scale)))
        return self.node("Add", x, self.constant(low - self.arrays[x].min()))

    def before(self, names):
        """The names of everything that these values are computed from."""
        needed = set(names)
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
        return needed

    def scores(self, x):
        """What is left of `x` with at most two dimensions."""
        if self.arrays[x].ndim <= 2:
            return x
        x = self.node("Flatten", x)
        width = self.arrays[x].shape[1]
        return self.node("MatMul", x, self.constant(self.random.uniform(-1, 1, (width, 3)) / width))

    def away(self, x, *points):
        """Refuse `x` if an element of it is near one of the points."""
        for point in points:
            self.apart(self.arrays[x], point)

    def apart(self, a, b):
        """Refuse arrays of which elements at the same place are near each other."""
        try:
            near = np.abs(a - b).min() < MARGIN
        except ValueError as error:  # no such place
            raise Unfit from error
        if near:
            raise Unfit


def info_of(name, array, shape=None):
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, array.shape if shape is None else shape)


def model_of(nodes, inputs, outputs, weights, opset):
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


OPERATORS = {}
"""For each operator, the functions that add it: which arrays it may read first, and how it is added."""


def operator(*names, fits=lambda a: True, since=18):
    """Register ``add(graph, name, x)``, which adds the operator called `name` to read `x`."""

    def register(add):
        for name in names:
            OPERATORS[name] = (fits, since, add)
        return add

    return register


def of_rank(*ranks):
    return lambda a: a.ndim in ranks


SMOOTH = {
    "Identity": (-50, 50), "Neg": (-50, 50), "Exp": (-5, 3), "Log": (0.2, 50), "Sqrt": (0.2, 50),
    "Reciprocal": (0.2, 50), "Erf": (-2, 2), "Sin": (-5, 5), "Cos": (-5, 5), "Tan": (-1.2, 1.2),
    "Asin": (-0.9, 0.9), "Acos": (-0.9, 0.9), "Atan": (-5, 5), "Sinh": (-3, 3), "Cosh": (-3, 3),
    "Asinh": (-5, 5), "Acosh": (1.2, 10), "Atanh": (-0.9, 0.9), "Sigmoid": (-5, 5), "Tanh": (-3, 3),
    "Softplus": (-5, 5), "Softsign": (-5, 5), "Mish": (-5, 5), "Dropout": (-50, 50),
}  # fmt: skip
"""Functions without a kink, and between which numbers they are neither steep nor flat."""


@operator(*SMOOTH)
def smooth(g, name, x):
    return g.node(name, g.within(x, *SMOOTH[name]))


@operator("Gelu", since=20)
def gelu(g, name, x):
    return g.node(name, g.within(x, -3, 3), **g.maybe(approximate="tanh"))


@operator("Swish", since=24)
def swish(g, name, x):
    if g.opset > 24:
        raise Unfit  # onnxruntime has none
    return g.node(name, g.within(x, -5, 5), **g.maybe(alpha=1.5))


KINKED = {
    "Relu": ({}, [0]),
    "LeakyRelu": ({"alpha": 0.25}, [0]),
    "ThresholdedRelu": ({"alpha": 0.5}, [0.5]),
    "Shrink": ({"bias": 0.25}, [-0.5, 0.5]),
    "HardSigmoid": ({"alpha": 0.5}, [-1, 1]),
    "HardSwish": ({}, [-3, 3]),
    "Elu": ({"alpha": 0.5}, [0]),
    "Selu": ({}, [0]),
    "Abs": ({}, [0]),
    "Sign": ({}, [0]),
    "Ceil": ({}, range(-50, 51)),
    "Floor": ({}, range(-50, 51)),
    "Round": ({}, np.arange(-50, 50) + 0.5),
}
"""Functions with kinks or steps, the attributes to draw them with and where those are."""


@operator(*KINKED)
def kinked(g, name, x):
    attributes, points = KINKED[name]
    g.away(x, *points)
    return g.node(name, x, **attributes)


@operator("Clip")
def clip(g, name, x):
    low, high = (bound if g.flag() else None for bound in (-0.5, 0.75))
    g.away(x, *(bound for bound in (low, high) if bound is not None))
    bounds = ["" if bound is None else g.constant(np.array(bound)) for bound in (low, high)]
    return g.node(name, x, *bounds[: 2 if bounds[1] else 1 if bounds[0] else 0])


@operator("PRelu", fits=lambda a: a.ndim > 0)
def prelu(g, name, x):
    g.away(x, 0)
    return g.node(name, x, g.weight(*narrower(g, g.arrays[x].shape)))


def narrower(g, shape):
    """A shape that is broadcast to `shape`."""
    shape = [1 if g.number(0, 2) == 0 else size for size in shape]
    return shape[g.number(0, len(shape)) :]


def beside(g, x):
    """Something that can stand beside `x` in an operation element by element: a value or a weight."""
    shape = g.arrays[x].shape

    def fits(a):
        with contextlib.suppress(ValueError):
            return np.broadcast_shapes(a.shape, shape) is not None
        return False

    if g.flag():
        return g.value(fits)
    wide = [size if size > 1 else g.number(1, 3) for size in shape]
    return g.weight(*narrower(g, [*([2] if g.number(0, 5) == 0 else []), *wide]))


@operator("Add", "Sub", "Mul", "Div", "Sum", "Mean", "Max", "Min", "Pow", "Mod", "Where")
def elementwise(g, name, x):
    y, attributes = beside(g, x), {}
    if name in ("Sum", "Mean", "Max", "Min"):
        operands = [x, y, *([beside(g, y)] if g.flag() else [])]
        if name in ("Max", "Min"):
            # Operands that tie share the gradient, which is no derivative if one is computed from the other.
            for a, b in itertools.combinations((g.arrays[operand] for operand in operands), 2):
                g.apart(a, b)
    elif name == "Pow":
        operands = [g.within(x, 0.3, 3), g.within(y, -2, 2)]
        if g.flag():
            operands[1] = g.constant(np.array(g.one([0.0, 0.5, 1.0, 2.0, 3.0, -1.0])))
    elif name == "Div":
        operands = [x, g.within(y, 0.3, 3)]
    elif name == "Mod":
        operands, attributes = [x, g.within(y, 0.3, 3)], {"fmod": 1}
        quotient = np.divide(*(g.arrays[v] for v in operands))
        g.apart(quotient, np.round(quotient))
    elif name == "Where":
        shape = narrower(g, g.arrays[x].shape)
        condition = g.constant(g.random.integers(0, 2, shape).astype(bool))
        operands = [condition, x, y]
    else:
        operands = [x, y]
    if g.flag() and name != "Where" and name not in ("Pow", "Div", "Mod"):
        operands.reverse()
    return g.node(name, *operands, **attributes)


@operator("Greater", "Less")
def chosen_by_comparison(g, name, x):
    """A Where between two values by which of them is the larger."""
    y = beside(g, x)
    g.apart(g.arrays[x], g.arrays[y])
    return g.node("Where", g.node(name, x, y), x, y)


REDUCTIONS = [
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceProd",
]  # fmt: skip


@operator(*REDUCTIONS, fits=lambda a: a.ndim > 0)
def reduction(g, name, x):
    if name in ("ReduceL1", "ReduceL2"):
        g.away(x, 0)
    if name == "ReduceLogSum":
        x = g.within(x, 0.2, 3)
    ndim = g.arrays[x].ndim
    axes = [axis - ndim * g.flag() for axis in g.some(range(ndim), least=0)]
    inputs = [x, g.ints(*axes)] if axes or g.flag() else [x]
    return g.node(name, *inputs, **g.maybe(keepdims=0, noop_with_empty_axes=1))


@operator("CumSum", fits=lambda a: a.ndim > 0)
@operator("CumProd", fits=lambda a: a.ndim > 0, since=26)
def running(g, name, x):
    ndim = g.arrays[x].ndim
    axis = g.constant(np.array(g.number(-ndim, ndim - 1)))
    return g.node(name, x, axis, **g.maybe(exclusive=1, reverse=1))


@operator("Softmax", "LogSoftmax", "LpNormalization", "Hardmax", fits=lambda a: a.ndim > 0)
def along_one_axis(g, name, x):
    ndim = g.arrays[x].ndim
    attributes = g.maybe(axis=g.number(-ndim, ndim - 1))
    if name == "LpNormalization":
        g.away(x, 0)
        attributes |= g.maybe(p=1)
    return g.node(name, x, **attributes)


def window(g, size, reach=2):
    """The attributes of a window that slides over spatial axes of these sizes; `reach`: the most padding."""
    kernel = [g.number(1, min(3, s)) for s in size]
    attributes = {"kernel_shape": kernel, "strides": [g.number(1, 2) for _ in size]}
    if g.number(0, 3) == 0:
        attributes["auto_pad"] = g.one(["SAME_UPPER", "SAME_LOWER", "VALID"])
        # onnxruntime fails where windows lie apart, which makes the padding negative.
        attributes["strides"] = [min(s, k) for s, k in zip(attributes["strides"], kernel, strict=True)]
        return attributes
    if g.flag():
        attributes["pads"] = [g.number(0, min(reach, k - 1)) for k in kernel * 2]
    if g.flag():
        most = [1 if k == 1 else min(2, (s - 1) // (k - 1)) for s, k in zip(size, kernel, strict=True)]
        attributes["dilations"] = [g.number(1, m) for m in most]
    return attributes


@operator("Conv", "ConvTranspose", fits=of_rank(3, 4, 5))
def convolution(g, name, x):
    _, channels, *size = g.arrays[x].shape
    group = g.one([d for d in (1, 2, channels) if channels % d == 0])
    attributes = window(g, size) | g.maybe(group=group)
    group = attributes.get("group", 1)
    features, kernel = g.number(1, 2), attributes["kernel_shape"]
    if name == "Conv":
        shape = (features * group, channels // group, *kernel)
    else:
        shape = (channels, features, *kernel)
        attributes.pop("auto_pad", None)
        if g.flag():
            attributes["output_padding"] = [g.number(0, stride - 1) for stride in attributes["strides"]]
    bias = [g.weight(features * group)] if g.flag() else []
    if g.flag():
        del attributes["kernel_shape"]
    return g.node(name, x, g.weight(*shape, fan_in=math.prod(shape[1:])), *bias, **attributes)


@operator("AveragePool", "MaxPool", "LpPool", fits=of_rank(3, 4, 5))
def pool(g, name, x):
    if name == "LpPool":
        g.away(x, 0)
    attributes = window(g, g.arrays[x].shape[2:], reach=1)
    if name == "AveragePool":
        attributes |= g.maybe(count_include_pad=1)
        if g.opset < 19:
            attributes.pop("dilations", None)
    if g.opset >= 22 and "auto_pad" not in attributes:  # onnx infers a wrong size before
        attributes |= g.maybe(ceil_mode=1)
    return g.node(name, x, **attributes)


@operator("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", fits=of_rank(3, 4, 5))
def global_pool(g, name, x):
    if name == "GlobalLpPool":
        g.away(x, 0)
        if g.opset >= 22:
            raise Unfit  # onnxruntime has none
    return g.node(name, x)


@operator("MaxUnpool", fits=lambda a: a.ndim == 4 and a.shape[2] % 2 == a.shape[3] % 2 == 0)
def max_unpool(g, name, x):
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    y = g.node("MaxPool", x, outputs=2, **attributes)
    return g.node(name, y, g.nodes[-1].output[1], **attributes)


@operator("BatchNormalization", "InstanceNormalization", fits=of_rank(3, 4, 5))
def channel_normalization(g, name, x):
    channels = g.arrays[x].shape[1]
    parameters = [g.weight(channels), g.weight(channels)]
    if name == "BatchNormalization":
        parameters += [g.weight(channels), g.positive(channels)]
    return g.node(name, x, *parameters, epsilon=0.125)


@operator("GroupNormalization", fits=lambda a: a.ndim in (3, 4, 5), since=21)
def group_normalization(g, name, x):
    channels = g.arrays[x].shape[1]
    groups = g.one([d for d in (1, 2, channels) if channels % d == 0])
    return g.node(name, x, g.weight(channels), g.weight(channels), num_groups=groups, epsilon=0.125)


@operator("LayerNormalization", fits=lambda a: a.ndim > 1)
@operator("RMSNormalization", fits=lambda a: a.ndim > 1, since=23)
def layer_normalization(g, name, x):
    shape = g.arrays[x].shape
    axis = g.number(1, len(shape) - 1)
    bias = [g.weight(*shape[axis:])] if name == "LayerNormalization" and g.flag() else []
    axis -= len(shape) * g.flag()
    return g.node(name, x, g.weight(*shape[axis:]), *bias, axis=axis, epsilon=0.125)


@operator("LRN", fits=of_rank(4))
def lrn(g, name, x):
    return g.node(name, x, size=g.one([1, 3, 5]), alpha=0.25, bias=1.5)


@operator("MatMul", fits=lambda a: a.ndim > 0)
def matmul(g, name, x):
    *batch, last = g.arrays[x].shape
    if g.flag():
        return g.node(name, x, g.weight(last, g.number(1, 3), fan_in=last))
    if g.flag() and batch:
        return g.node(name, g.weight(2, batch[-1], fan_in=batch[-1]), x)
    if len(batch) > 1 and g.flag():
        order = [*range(len(batch) - 1), len(batch), len(batch) - 1]
        return g.node(name, x, g.node("Transpose", g.value(lambda a: a.shape == (*batch, last)), perm=order))
    return g.node(name, x, g.weight(last))


@operator("Gemm", fits=of_rank(2))
def gemm(g, name, x):
    attributes = g.maybe(alpha=0.5, beta=1.5, transA=1, transB=1)
    rows, width = g.arrays[x].shape[:: -1 if "transA" in attributes else 1]
    features = g.number(1, 3)
    shape = (features, width) if "transB" in attributes else (width, features)
    bias = [g.weight(*narrower(g, (rows, features)))] if g.flag() else []
    return g.node(name, x, g.weight(*shape, fan_in=width), *bias, **attributes)


@operator("Einsum", fits=lambda a: a.ndim in (2, 3, 4))
def einsum(g, name, x):
    letters = "abcd"[: g.arrays[x].ndim]
    sizes = dict(zip(letters, g.arrays[x].shape, strict=True), e=2)
    other = "".join(g.some(letters + "e"))
    out = "".join(g.some(sorted(set(letters + other))))
    return g.node(name, x, g.weight(*(sizes[k] for k in other)), equation=f"{letters},{other}->{out}")


@operator("Det", fits=lambda a: a.ndim > 1 and a.shape[-1] == a.shape[-2])
def det(g, name, x):
    if g.symbolic:
        raise Unfit  # refused where the size of the matrix is not known
    return g.node(name, x)


@operator("Attention", fits=of_rank(4), since=23)
def attention(g, name, x):
    same = [x, *(g.value(lambda a: a.shape == g.arrays[x].shape) for _ in range(2))]
    return g.node(name, *same, **g.maybe(is_causal=1, scale=0.5))


@operator("RNN", "GRU", "LSTM", fits=of_rank(3))
def recurrent(g, name, x):
    width, hidden = g.arrays[x].shape[-1], 2
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[name] * hidden
    return g.node(
        name,
        x,
        g.weight(1, gates, width, fan_in=width),
        g.weight(1, gates, hidden),
        *([g.weight(1, 2 * gates)] if g.flag() else []),
        hidden_size=hidden,
        **({"linear_before_reset": 1} if name == "GRU" and g.flag() else {}),
    )


@operator("DFT", fits=lambda a: a.ndim > 1 and a.shape[-1] in (1, 2), since=20)
def dft(g, name, x):
    axis = g.constant(np.array(g.number(0, g.arrays[x].ndim - 2)))
    return g.node(name, x, "", axis, **g.maybe(inverse=1))


@operator("Reshape")
def reshape(g, name, x):
    size, shape = g.arrays[x].size, []
    while size > 1 and len(shape) < 4:
        shape.append(g.one([d for d in range(1, size + 1) if size % d == 0]))
        size //= shape[-1]
    shape = [*shape, *([size] if size > 1 else [])]
    if shape and g.flag():
        shape[g.number(0, len(shape) - 1)] = -1
    if shape and g.arrays[x].ndim and shape[0] == len(g.arrays[x]) and g.flag():
        shape[0] = 0
    return g.node(name, x, g.sizes(*shape))


@operator("Flatten")
def flatten(g, name, x):
    ndim = g.arrays[x].ndim
    return g.node(name, x, **(g.maybe(axis=g.number(-ndim, ndim)) if ndim else {"axis": 0}))


@operator("Transpose", fits=lambda a: a.ndim > 0)
def transpose(g, name, x):
    return g.node(name, x, **g.maybe(perm=g.random.permutation(g.arrays[x].ndim)))


@operator("Squeeze", fits=lambda a: 1 in a.shape)
def squeeze(g, name, x):
    shape = g.arrays[x].shape
    ones = [axis - len(shape) * g.flag() for axis, size in enumerate(shape) if size == 1]
    # Without axes, the number of dimensions is known only where all sizes are.
    known = not g.symbolic and all(node.op_type != "Shape" for node in g.nodes)
    return g.node(name, x, *([] if known and g.flag() else [g.ints(*g.some(ones))]))


@operator("Unsqueeze", fits=lambda a: a.ndim < 5)
def unsqueeze(g, name, x):
    ndim = g.arrays[x].ndim
    return g.node(name, x, g.ints(g.number(-ndim - 1, ndim)))


@operator("Expand", "Tile", fits=lambda a: a.ndim > 0)
def repeat(g, name, x):
    shape = g.arrays[x].shape
    if name == "Tile":
        return g.node(name, x, g.sizes(*(g.number(1, 2) for _ in shape)))
    wide = [g.number(1, 3) if size == 1 else g.one([size, 1]) for size in shape]
    return g.node(name, x, g.sizes(*([2] if g.flag() else []), *wide))


@operator("Concat", fits=lambda a: a.ndim > 0)
def concat(g, name, x):
    shape = g.arrays[x].shape
    axis = g.number(0, len(shape) - 1)

    def fits(a):
        return a.ndim == len(shape) and all(i == axis or a.shape[i] == n for i, n in enumerate(shape))

    parts = [x, *(g.value(fits) for _ in range(g.number(0, 2)))]
    if g.flag():
        parts.insert(0, g.weight(*shape))
    return g.node(name, *parts, axis=axis - len(shape) * g.flag())


@operator("Split", fits=lambda a: a.ndim > 0 and max(a.shape) > 1)
def split(g, name, x):
    shape = g.arrays[x].shape
    axis = g.one([axis for axis, size in enumerate(shape) if size > 1])
    first, at = g.number(1, shape[axis] - 1), axis - len(shape) * g.flag()
    if g.flag():
        g.node(name, x, g.ints(first, shape[axis] - first), outputs=2, axis=at)
    else:
        g.node(name, x, outputs=2, axis=at, num_outputs=2)
    return g.one(g.nodes[-1].output)


@operator("Pad", fits=lambda a: a.ndim > 0 and min(a.shape) > 1)
def pad(g, name, x):
    ndim, mode = g.arrays[x].ndim, g.one(["constant", "edge", "reflect", "wrap"])
    mode = "constant" if mode == "wrap" and g.opset < 19 else mode
    axes = g.some(range(ndim)) if g.flag() else None
    pads = [g.number(0, 1) for _ in range(2 * (ndim if axes is None else len(axes)))]
    fill = [g.constant(np.array(0.5))] if mode == "constant" and g.flag() else []
    where = [] if axes is None else [*(fill or [""]), g.ints(*axes)]
    return g.node(name, x, g.sizes(*pads), *(where or fill), **({} if mode == "constant" else {"mode": mode}))


@operator("Slice", fits=lambda a: a.ndim > 0)
def slice_(g, name, x):
    ndim = g.arrays[x].ndim
    axes = g.some(range(ndim))
    starts, ends, steps = [], [], [g.one([1, 1, 2, -1, -2]) for _ in axes]
    for axis, step in zip(axes, steps, strict=True):
        size = g.arrays[x].shape[axis]
        first, last = sorted((g.number(0, size - 1), g.number(0, size - 1)), reverse=step < 0)
        starts.append(first - size * g.flag())
        end = last + (1 if step > 0 else -1)
        ends.append(end if 0 <= end < size and g.flag() else end - size if 0 <= end < size else 2**31 * step)
    return g.node(name, x, g.sizes(*starts), g.sizes(*ends), g.ints(*axes), g.ints(*steps))


@operator("Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", fits=lambda a: a.ndim > 0)
def indexed(g, name, x):
    shape = g.arrays[x].shape
    axis = g.number(0, len(shape) - 1)

    def places(size, *counts):
        return g.random.integers(-size, size, counts)

    if name == "Gather":
        indices = g.one([places(shape[axis]), places(shape[axis], 2), places(shape[axis], 2, 1)])
        return g.node(name, x, g.constant(indices), axis=axis - len(shape) * g.flag())
    if name == "GatherElements":
        counts = [g.number(1, size) for size in shape]
        return g.node(name, x, g.constant(places(shape[axis], *counts)), axis=axis - len(shape) * g.flag())
    if name == "GatherND":
        return g.node(name, x, g.constant(places(shape[0], 2, 1)))
    reduction = g.one(["none", "add", "mul"])
    count = 1 if reduction == "none" else 2  # no two updates to one place without a reduction
    if name == "ScatterND":
        updates = g.weight(count, *shape[1:])
        return g.node(name, x, g.constant(places(shape[0], count, 1)), updates, reduction=reduction)
    counts = [count if i == axis else size for i, size in enumerate(shape)]
    if count > shape[axis]:
        raise Unfit
    indices = g.constant(places(shape[axis], *counts))
    return g.node(name, x, indices, g.weight(*counts), axis=axis, reduction=reduction)


@operator("TensorScatter", fits=lambda a: a.ndim > 2, since=24)
def tensor_scatter(g, name, x):
    shape = list(g.arrays[x].shape)
    shape[-2] = g.number(1, shape[-2])
    return g.node(name, x, g.weight(*shape))


@operator("TopK", fits=lambda a: a.ndim > 0)
def top_k(g, name, x):
    shape = g.arrays[x].shape
    axis = g.number(0, len(shape) - 1)
    k = g.sizes(g.number(1, shape[axis]))
    return g.node(name, x, k, outputs=2, axis=axis - len(shape) * g.flag(), **g.maybe(largest=0))


@operator("Compress", fits=lambda a: a.ndim > 0)
def compress(g, name, x):
    shape = g.arrays[x].shape
    axis = g.number(0, len(shape) - 1)
    return g.node(name, x, g.constant(g.random.integers(0, 2, shape[axis]).astype(bool)), axis=axis)


@operator("OneHot", fits=lambda a: a.size > 1)
def one_hot(g, name, x):
    off_and_on = g.node("Slice", g.node("Reshape", x, g.ints(-1)), g.ints(0), g.ints(2))
    return g.node(name, g.ints(*g.random.integers(-3, 3, 4)), g.constant(np.array(3)), off_and_on)


@operator("Trilu", fits=lambda a: a.ndim > 1)
def trilu(g, name, x):
    diagonal = [g.constant(np.array(g.number(-1, 1)))] if g.flag() else []
    return g.node(name, x, *diagonal, **g.maybe(upper=0))


@operator("CenterCropPad", fits=lambda a: a.ndim > 0)
def center_crop_pad(g, name, x):
    axis = g.number(0, g.arrays[x].ndim - 1)
    return g.node(name, x, g.ints(g.number(1, 4)), axes=[axis])


@operator("DepthToSpace", fits=lambda a: a.ndim == 4 and a.shape[1] % 4 == 0)
@operator("SpaceToDepth", fits=lambda a: a.ndim == 4 and a.shape[2] % 2 == 0 and a.shape[3] % 2 == 0)
def blocks(g, name, x):
    return g.node(name, x, blocksize=2, **(g.maybe(mode="CRD") if name == "DepthToSpace" else {}))


@operator("ReverseSequence", fits=lambda a: a.ndim > 1)
def reverse_sequence(g, name, x):
    time, batch = g.arrays[x].shape[:2]
    return g.node(name, x, g.ints(*g.random.integers(1, time + 1, batch)))


@operator("Resize", fits=of_rank(4))
def resize(g, name, x):
    mode = g.one(["nearest", "linear", "cubic"])
    how = g.one(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
    attributes = {"mode": mode, "coordinate_transformation_mode": how}
    if mode != "nearest" and g.flag():
        attributes["antialias"] = 1
    if g.flag():
        sizes = [*g.arrays[x].shape[:2], g.number(1, 5), g.number(1, 5)]
        return g.node(name, x, "", "", g.sizes(*sizes), **attributes)
    scales = np.array([1, 1, g.one([0.5, 1, 1.5, 2]), g.one([0.5, 1, 2])], np.float32)
    return g.node(name, x, "", g.constant(scales), **attributes)


@operator("GridSample", fits=of_rank(4), since=20)
def grid_sample(g, name, x):
    n = g.arrays[x].shape[0]
    theta = g.constant(np.eye(2, 3) + g.random.uniform(-0.3, 0.3, (n, 2, 3)))
    grid = g.node("AffineGrid", theta, g.ints(n, 1, 2, 3))
    mode = g.one(["linear", "cubic"])
    return g.node(name, x, grid, mode=mode, **g.maybe(align_corners=1, padding_mode="border"))


@operator("Col2Im", fits=lambda a: a.ndim == 3 and a.shape[1] % 2 == 0)
def col2im(g, name, x):
    length = g.arrays[x].shape[2]
    return g.node(name, x, g.sizes(1, length + 1), g.ints(1, 2))


@operator("CastLike")
def cast_like(g, name, x):
    return g.node(name, x, g.value())


@operator("ArgMax", "Shape", fits=lambda a: a.ndim > 0)
def positions(g, name, x):
    """A value that carries no gradient of `x` picks elements of another."""
    y = g.value(lambda a: a.ndim > 0 and len(a) > 1)
    place = g.node(name, x)
    place = g.node("Mod", place, g.ints(len(g.arrays[y])))
    return g.node("Gather", y, place)


@operator("Cast")
def cast(g, name, x):
    return g.node(name, x, to=onnx.TensorProto.DOUBLE)


def grow(g, steps, names):
    """Add a node at each step, as far as it is fit."""
    for step in steps:
        g.random = np.random.default_rng([g.seed, step])
        with g.attempt():
            x = g.value()
            fitting = [n for n in names if OPERATORS[n][1] <= g.opset and OPERATORS[n][0](g.arrays[x])]
            name = g.one(fitting)
            OPERATORS[name][2](g, name, x)


SEED, OPSET = st.integers(0, 2**24 - 1), st.sampled_from([18, 20, 22, 24, 26])
STEPS = st.sets(st.integers(1, 12), min_size=4).map(sorted)


@st.composite
def graphs(draw):
    """A graph, the names of its outputs, and a value between ``x`` and them."""
    size = st.integers(1, 4)
    shape = draw(st.one_of([st.tuples(st.integers(1, 3), *[size] * n) for n in (1, 2, 3, 3, 3, 4)]))
    symbolic = draw(st.sampled_from([[], [0], list(range(len(shape)))]))
    g = Graph(draw(SEED), shape, draw(OPSET), symbolic)
    grow(g, draw(STEPS), OPERATORS)
    made = [name for name in g.values() if name != "x"]
    assume(made)
    outputs = [g.scores(name) for name in dict.fromkeys([made[-1], draw(st.sampled_from(made))])]
    between = path(g, outputs)
    assume(between)
    return g, outputs, draw(st.sampled_from(between))


ROW_BY_ROW = sorted(_ROW_BY_ROW & OPERATORS.keys())
"""Operators of heads whose gradient may be worked out for all classes of all images at once."""


@st.composite
def classifiers(draw):
    """A graph of images [N,C,h,w] that do not influence each other, and the name of its scores [N,M]."""
    size = st.sampled_from([2, 4, 5])  # three columns would be three colours, in a model that has them last
    shape = draw(st.tuples(st.integers(2, 3), st.integers(1, 4), size, size))
    g = Graph(draw(SEED), shape, draw(OPSET), draw(st.sampled_from([[], [0]])))
    grow(g, draw(STEPS), draw(st.sampled_from([ROW_BY_ROW, ROW_BY_ROW, list(OPERATORS)])))
    last = g.values()[-1]
    assume(last != "x" and g.arrays[last].ndim > 1 and len(g.arrays[last]) == shape[0])
    scores = g.scores(last)
    assume("x" in g.before([scores]) and all(independent(g, scores, image) for image in range(shape[0])))
    return g, scores


def independent(g, scores, image):
    """Whether the scores of all other images stay the same when one changes."""
    changed = g.arrays["x"].copy()
    changed[image] = g.random.standard_normal(changed[image].shape)
    with np.errstate(all="ignore"):
        (found,) = reference(g.model([scores])).run(None, {"x": changed})
    return np.array_equal(*(np.delete(a, image, axis=0) for a in (found, g.arrays[scores])), equal_nan=True)


def path(g, outputs):
    """The floating-point values between ``x`` and the outputs."""
    depends = {"x"}
    for node in g.nodes:
        if depends.intersection(node.input):
            depends.update(node.output)
    return [name for name in g.values() if name != "x" and name in depends & g.before(outputs)]
