"""Where the positions of the picture lie in an activation: planes, channels-last maps or tokens."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.subgraphs import reads
from onnxcam.vjp.shapes import constant_array, dims, is_constant

PLANES, CHANNELS_LAST, TOKENS = "NCHW", "NHWC", "NTC"
"""How an activation is laid out: [N,C,h,w], [N,h,w,C] or [N,T,C]."""

_ON_PLANES = frozenset([
    "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool",
    "GroupNormalization", "InstanceNormalization", "LRN", "MaxPool", "Resize", "DepthToSpace", "SpaceToDepth",
    "FusedConv",
])  # fmt: skip
_REORDERING = frozenset([
    "Attention", "Einsum", "Expand", "Gather", "GatherElements", "GatherND", "Gemm", "If", "LSTM", "Loop",
    "GRU", "MatMul", "Reshape", "Scan", "ScatterElements", "ScatterND", "Softmax", "Transpose", "FusedMatMul",
])  # fmt: skip
_TURNS: dict[tuple[int, ...], tuple[str, str]] = {
    (0, 2, 3, 1): (PLANES, CHANNELS_LAST),
    (0, 3, 1, 2): (CHANNELS_LAST, PLANES),
}
_MOST_EXTRA_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the plane [h,w] lies in an activation.

    Attributes:
        order: ``NCHW``, ``NHWC`` or ``NTC``.
        height, width: of the plane; a symbol or None where the graph leaves it open.
        first: the token that holds the plane's first position; class and register tokens come before.
    """

    order: str
    height: int | str | None
    width: int | str | None
    first: int = 0

    def __str__(self) -> str:
        if self.order == TOKENS:
            last = self.first + self._count() - 1
            return f"tokens {self.first} to {last} as {self.height}x{self.width}"
        return "channels last" if self.order == CHANNELS_LAST else "planes"

    def _count(self) -> int:
        assert isinstance(self.height, int) and isinstance(self.width, int)
        return self.height * self.width

    def planes(self, op: Emitter, x: Value) -> Value:
        """View `x`, [...,C,h,w] in this order, as [...,C,h,w]; it may have any number of leading axes."""
        if self.order == PLANES:
            return x
        ndim = len(dims(x))
        if self.order == CHANNELS_LAST:
            return op.Transpose(x, perm=[*range(ndim - 3), ndim - 1, ndim - 3, ndim - 2])
        if dims(x)[-2] != self._count():
            x = op.Slice(x, [self.first], [self.first + self._count()], [ndim - 2])
        turned = op.Transpose(x, perm=[*range(ndim - 2), ndim - 1, ndim - 2])
        return op.Reshape(turned, [0] * (ndim - 1) + [self.height, self.width])

    def restore(self, op: Emitter, planes: Value, original: Value) -> Value:
        """Undo `planes` for [N,C,h,w]; tokens beside the plane are those of `original`."""
        if self.order == PLANES:
            return planes
        if self.order == CHANNELS_LAST:
            return op.Transpose(planes, perm=[0, 2, 3, 1])
        tokens = op.Transpose(op.Reshape(planes, [0, 0, -1]), perm=[0, 2, 1])
        last = self.first + self._count()
        parts = [tokens]
        if self.first:
            parts.insert(0, op.Slice(original, [0], [self.first], [1]))
        if dims(original)[1] != last:
            parts.append(op.Slice(original, [last], [np.iinfo(np.int64).max], [1]))
        return op.Concat(*parts, axis=1) if len(parts) > 1 else tokens

    def plane_of(self, live: np.ndarray) -> np.ndarray:
        """Return the part of a mask over tokens that belongs to the plane."""
        return live[self.first : self.first + self._count()]


def grids(
    nodes: Sequence[ir.Node], picture: Value, height: int | None, width: int | None
) -> dict[Value, Grid]:
    """Find the plane in every activation between the picture and the scores that has one.

    A convolution's input and output are planes; what a linear layer or a layer normalisation works on
    has its channels last; other operators that keep the axes in place pass this on, in both directions.

    Args:
        nodes: the nodes that the picture influences, in the order they run.
        picture: the model's input.
        height, width: of the picture, where they are known.
    """
    orders = _orders(nodes)
    joins = list(_joins(nodes))
    found: dict[Value, Grid] = {}
    planes: dict[tuple[int, int], None] = {}  # each once, in the order they were last seen
    for value in (value for node in nodes for value in node.outputs):
        order = orders.get(value)
        if order is None or dims(value)[0] != dims(picture)[0]:
            continue
        if order == TOKENS:
            grid = _grid_of_tokens(value, joins, planes, height, width)
        else:
            at = 2 if order == PLANES else 1
            grid = Grid(order, dims(value)[at], dims(value)[at + 1])
        if grid is None or (grid.height, grid.width) == (1, 1):
            continue
        found[value] = grid
        if isinstance(grid.height, int) and isinstance(grid.width, int):
            planes.pop((grid.height, grid.width), None)
            planes[grid.height, grid.width] = None
    return found


def live_tokens(nodes: Sequence[ir.Node], logits: Value) -> dict[Value, np.ndarray]:
    """Find which tokens of an activation [N,T,C] can influence the scores at all.

    Args:
        nodes: those between the picture and the scores, in the order they run.
        logits: the scores.

    Returns:
        For each value of which only some tokens can, a mask [T]. Values that are not in it matter whole.
    """
    masks: dict[Value, np.ndarray | None] = {logits: None}
    for node in reversed(nodes):
        arriving = [masks[value] for value in node.outputs if value in masks]
        if not arriving:
            continue
        for value in reads(node):
            mask = _tokens_read(node, value, arriving[0] if len(node.outputs) == 1 else None)
            before = masks.get(value, np.zeros(0, bool))
            if before is None or mask is None:
                masks[value] = None
            else:
                masks[value] = mask | before if before.size else mask
    return {value: mask for value, mask in masks.items() if mask is not None}


def bottlenecks(nodes: Sequence[ir.Node], logits: Value) -> Iterator[Value]:
    """Yield the values through which everything flows that reaches the scores, in order."""
    produced = {value: i for i, node in enumerate(nodes) for value in node.outputs}
    last = dict.fromkeys(produced, -1)
    last[logits] = len(nodes)
    for i, node in enumerate(nodes):
        for value in reads(node):
            if value in last:
                last[value] = max(last[value], i)
    reach = -1
    for i, node in enumerate(nodes):
        # Nothing made earlier is still to be read after this node.
        if reach <= i:
            used = [value for value in node.outputs if last[value] >= 0]
            if len(used) == 1:
                yield used[0]
        reach = max([reach, *(last[value] for value in node.outputs)])


def _orders(nodes: Sequence[ir.Node]) -> dict[Value, str]:
    orders: dict[Value, str] = {}
    growing = True
    while growing:
        before = len(orders)
        for node in (*nodes, *reversed(nodes)):
            for value, order in _known(node, orders):
                orders.setdefault(value, order)
        growing = len(orders) > before
    return orders


def _known(node: ir.Node, orders: dict[Value, str]) -> Iterable[tuple[Value, str]]:
    """Yield what `node` tells of the layouts of its inputs and outputs."""
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    if x is None or x.shape is None or y.shape is None:
        return
    if node.op_type in _ON_PLANES:
        yield from ((value, PLANES) for value in (x, y) if len(dims(value)) == 4)
    elif _works_on_last_axis(node):
        last = {4: CHANNELS_LAST, 3: TOKENS}
        yield from ((value, last[len(dims(value))]) for value in (x, y) if len(dims(value)) in last)
    elif node.op_type == "ReduceMean":
        order = pooled_order(node)
        if order is not None:
            yield x, order
    elif node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        given = _TURNS.get(tuple(perm.as_ints())) if perm is not None else None
        if given is not None and (orders.get(x) == given[0] or orders.get(y) == given[1]):
            yield x, given[0]
            yield y, given[1]
    elif node.op_type == "Reshape":
        # [N,h,w,C] and [N,h*w,C]
        for wide, flat in ((x, y), (y, x)):
            a, b = dims(wide), dims(flat)
            fits = len(a) == 4 and len(b) == 3 and a[0] == b[0] and a[3] == b[2] and isinstance(b[2], int)
            if fits and (orders.get(wide) == CHANNELS_LAST or orders.get(flat) == TOKENS):
                yield wide, CHANNELS_LAST
                yield flat, TOKENS
    elif node.op_type not in _REORDERING:
        ndim = len(dims(y))
        alike = [v for v in (*node.inputs, *node.outputs) if v is not None and not is_constant(v)]
        alike = [v for v in alike if v.shape is not None and len(v.shape) == ndim]
        known = next((orders[v] for v in alike if v in orders), None)
        if known is not None:
            yield from ((value, known) for value in alike)


def pooled_order(node: ir.Node) -> str | None:
    """Return the layout of what `node`, a ReduceMean, averages over its whole plane; None if it does not."""
    x, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    along = None if axes is None else constant_array(axes)
    if x is None or x.shape is None or along is None:
        return None
    ndim = len(dims(x))
    places = (ndim, tuple(sorted(int(axis) % ndim for axis in along)))
    return {(4, (2, 3)): PLANES, (4, (1, 2)): CHANNELS_LAST, (3, (1,)): TOKENS}.get(places)


def _works_on_last_axis(node: ir.Node) -> bool:
    if node.op_type in ("LayerNormalization", "RMSNormalization", "SkipLayerNormalization"):
        axis = node.attributes.get("axis")
        ndim = len(dims(node.outputs[0]))
        return axis is None or axis.as_int() % ndim == ndim - 1
    if node.op_type not in ("MatMul", "FusedMatMul") or node.inputs[1] is None:
        return False
    weights = node.inputs[1]
    return is_constant(weights) and len(dims(weights)) == 2


def _grid_of_tokens(
    value: Value,
    joins: Sequence[list[int | str | None]],
    planes: Iterable[tuple[int, int]],
    height: int | None,
    width: int | None,
) -> Grid | None:
    """Match T tokens with a plane seen before, the latest of those, or with the aspect of the picture."""
    tokens = dims(value)[1]
    if not isinstance(tokens, int):
        return None
    fitting = [(tokens - h * w, -i, h, w) for i, (h, w) in enumerate(planes) if h * w <= tokens]
    if height is not None and width is not None:
        for extra in range(min(tokens, _MOST_EXTRA_TOKENS + 1)):
            h = math.isqrt((tokens - extra) * height // width)
            if h and h * (h * width // height) == tokens - extra:
                fitting.append((extra, 1, h, h * width // height))
    if not fitting or min(fitting)[0] > _MOST_EXTRA_TOKENS:
        return None
    extra, _, h, w = min(fitting)
    return Grid(TOKENS, h, w, _first_token(joins, tokens, h * w) if extra else 0)


def _joins(nodes: Iterable[ir.Node]) -> Iterator[list[int | str | None]]:
    """Yield the numbers of tokens that each Concat of tokens [N,T,C] puts beside each other."""
    for node in nodes:
        if node.op_type != "Concat" or node.outputs[0].shape is None or len(dims(node.outputs[0])) != 3:
            continue
        if node.attributes["axis"].as_int() in (1, -2):
            yield [dims(v)[1] if v is not None and v.shape is not None else None for v in node.inputs]


def _first_token(joins: Iterable[list[int | str | None]], tokens: int, plane: int) -> int:
    """Find where the plane's tokens begin where the others were put beside them; else they come last."""
    for sizes in joins:
        if plane in sizes and _total(sizes) == tokens:
            before = sizes[: sizes.index(plane)]
            return sum(size for size in before if isinstance(size, int))
    return tokens - plane


def _total(sizes: Sequence[int | str | None]) -> int | None:
    return sum(s for s in sizes if isinstance(s, int)) if all(isinstance(s, int) for s in sizes) else None


def _tokens_read(node: ir.Node, x: Value, arriving: np.ndarray | None) -> np.ndarray | None:
    """Which tokens of `x` matter, if those in `arriving` (None: all) of the node's output do. None: all."""
    tokens = _tokens(x)
    if tokens is None:
        return None
    y = node.outputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if node.op_type == "Concat" and axis in (1, -2) and arriving is not None:
        return _own_part(node, x, arriving)
    places: np.ndarray | slice | None = None
    if node.op_type == "Gather" and axis in (1, -2) and x is node.inputs[0]:
        places = None if node.inputs[1] is None else constant_array(node.inputs[1])
    elif node.op_type == "Slice" and x is node.inputs[0]:
        places = _sliced_tokens(node)
    if places is not None:
        mask = np.zeros(tokens, bool)
        if arriving is None or isinstance(places, np.ndarray):
            mask[places] = True
        else:
            mask[places] = arriving
        return mask
    if arriving is None or _tokens(y) != tokens:
        return None
    keeps = _works_on_last_axis(node) or node.op_type not in _REORDERING
    # Between [1,T,C] and [T,C], as onnxruntime's optimiser writes it around a Gemm.
    keeps |= node.op_type == "Reshape" and dims(x)[-1] == dims(y)[-1] and len(dims(x)) != len(dims(y))
    turned = node.attributes["transA"].as_int() if "transA" in node.attributes else 0
    keeps |= node.op_type == "Gemm" and x is node.inputs[0] and not turned
    return arriving if keeps and arriving.size == tokens else None


def _tokens(x: Value) -> int | None:
    """Return the number of tokens in [N,T,C], or in one image's [T,C]."""
    sizes = dims(x) if x.shape is not None else []
    tokens = sizes[-2] if len(sizes) in (2, 3) else None
    return tokens if isinstance(tokens, int) else None


def _own_part(node: ir.Node, x: Value, arriving: np.ndarray) -> np.ndarray | None:
    """Of a mask over the tokens that a Concat puts beside each other, the part of `x`. None: all."""
    mask: np.ndarray | None = None
    begin = 0
    for value in node.inputs:
        size = dims(value)[1] if value is not None and value.shape is not None else None
        if not isinstance(size, int):
            return None
        if value is x:
            part = arriving[begin : begin + size]
            mask = part if mask is None else mask | part
        begin += size
    return mask


def _sliced_tokens(node: ir.Node) -> slice | None:
    """The tokens that a Slice of axis 1 alone keeps."""
    arrays = [None if v is None else constant_array(v) for v in node.inputs[1:]]
    if any(a is None or a.size != 1 for a in arrays) or len(arrays) < 3:
        return None
    begin, end, axis = (int(a.reshape(())) for a in arrays[:3])  # type: ignore[union-attr]
    step = 1 if len(arrays) < 4 else int(arrays[3].reshape(()))  # type: ignore[union-attr]
    return slice(begin, end, step) if axis in (1, -2) and step > 0 else None
