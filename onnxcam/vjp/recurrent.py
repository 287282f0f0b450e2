"""LSTM, GRU and RNN: backpropagation through time (Werbos 1990), as two Scans for each direction.

The first Scan runs the cells again and saves what the second, which goes from the last step to the
first, reads. What does not depend on the step before, the products with the input and the gradients
of the weights, is one matrix product for all steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import gated, positions

_FIRST, _LAST = np.iinfo(np.int64).min, np.iinfo(np.int64).max

Values = list[Value]


@dataclasses.dataclass(frozen=True)
class _Activation:
    """An activation function f and ``slope(op, y, dy)``: dy f', in terms of y = f(x)."""

    operator: str
    slope: Callable[[Emitter, Value, Value], Value]

    def __call__(self, op: Emitter, x: Value) -> Value:
        return op.node(self.operator, x)


_ACTIVATIONS = {
    "sigmoid": _Activation("Sigmoid", lambda op, y, dy: op.Mul(dy, op.Mul(y, op.Sub(1.0, y)))),
    "tanh": _Activation("Tanh", lambda op, y, dy: op.Mul(dy, op.Sub(1.0, op.Mul(y, y)))),
    "relu": _Activation("Relu", lambda op, y, dy: gated(op, dy, op.Greater(y, 0.0))),
}


class _Cell(Protocol):
    """One step of a recurrent network; all values are [N,...].

    `forward` takes the states and the input's share of the gates and returns the new states, the
    hidden state first, and what `backward` needs to know. `backward` takes the gradients of the new
    states and returns those of the states, and of the shares that the input and the hidden state have
    in the gates.
    """

    def forward(self, states: Values, gates: Value) -> tuple[Values, Values]: ...

    def backward(self, dstates: Values, saved: Values) -> tuple[Values, Values]: ...

    def weights(self, dgates: Value, saved: Values) -> Values:
        """Return the gradient of the recurrent weights, and of the peepholes if there are any, from what
        all steps [T,N,...] gave and saved.
        """
        ...


@vjp("RNN")
def rnn(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    w: Value,
    r: Value,
    b: Value | None = None,
    lengths: Value | None = None,
    h0: Value | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> list[Value | None]:
    chosen = _activations("RNN", activations or ["Tanh", "Tanh"], 1, clip)

    def cell(d: int, r: Value, b: Value | None) -> _Cell:
        return _Rnn(op, r, b, *chosen[d])

    dx, (dw, db, dr), (dh0,) = _gradients(op, dys, x, w, r, b, lengths, [h0], direction, layout, cell)
    return [dx, dw, dr, db, None, dh0]


@vjp("GRU")
def gru(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    w: Value,
    r: Value,
    b: Value | None = None,
    lengths: Value | None = None,
    h0: Value | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> list[Value | None]:
    chosen = _activations("GRU", activations or ["Sigmoid", "Tanh"] * 2, 2, clip)

    def cell(d: int, r: Value, b: Value | None) -> _Cell:
        return _Gru(
            op,
            _parts(op, r, 3),
            None if b is None else _parts(op, b, 3),
            bool(linear_before_reset),
            *chosen[d],
        )

    dx, (dw, db, dr), (dh0,) = _gradients(op, dys, x, w, r, b, lengths, [h0], direction, layout, cell)
    return [dx, dw, dr, db, None, dh0]


@vjp("LSTM")
def lstm(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    w: Value,
    r: Value,
    b: Value | None = None,
    lengths: Value | None = None,
    h0: Value | None = None,
    c0: Value | None = None,
    p: Value | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> list[Value | None]:
    if input_forget:
        raise OnnxcamError("LSTM with input_forget has no gradient rule")
    chosen = _activations("LSTM", activations or ["Sigmoid", "Tanh", "Tanh"] * 2, 3, clip)

    def cell(d: int, r: Value, b: Value | None) -> _Cell:
        peepholes = None if p is None else _parts(op, op.Gather(p, np.int64(d), axis=0), 3)
        return _Lstm(op, r, b, peepholes, *chosen[d])

    dx, (dw, db, dr, *dp), (dh0, dc0) = _gradients(
        op, dys, x, w, r, b, lengths, [h0, c0], direction, layout, cell
    )
    return [dx, dw, dr, db, None, dh0, dc0, *dp]


def _activations(
    op_type: str, names: Sequence[str], count: int, clip: float | None
) -> list[list[_Activation]]:
    """Return the activation functions of each direction, `count` of them.

    Raises:
        OnnxcamError: there is no slope for one of them, or they are clipped.
    """
    if clip is not None:
        raise OnnxcamError(f"{op_type} with clip has no gradient rule")
    unknown = [name for name in names if name.lower() not in _ACTIVATIONS]
    if unknown:
        raise OnnxcamError(
            f"the gradient rule of {op_type} knows the activations Sigmoid, Tanh and Relu, not {unknown[0]}"
        )
    found = [_ACTIVATIONS[name.lower()] for name in names]
    return [found[i : i + count] for i in range(0, len(found), count)]


def _parts(op: Emitter, v: Value, count: int) -> Values:
    """Split weights or biases along their first axis into those of each gate."""
    return list(op.Split(v, axis=0, num_outputs=count, outputs=count))


def _stacked(op: Emitter, vs: Sequence[Value], axis: int) -> Value:
    wide = [op.Unsqueeze(v, [axis]) for v in vs]
    return wide[0] if len(wide) == 1 else op.Concat(*wide, axis=axis)


def _backwards(op: Emitter, v: Value) -> Value:
    """Reverse the first axis."""
    return op.Slice(v, [_LAST], [_FIRST], [0], [-1])


def _outer(op: Emitter, a: Value, b: Value) -> Value:
    """Sum the products of [T,N,A] and [T,N,B] to [A,B]."""
    return op.Gemm(op.Flatten(a, axis=2), op.Flatten(b, axis=2), transA=1)


@dataclasses.dataclass(frozen=True)
class _Rnn:
    """H = f(x + h R')."""

    op: Emitter
    r: Value
    b: Value | None
    f: _Activation

    def forward(self, states: Values, gates: Value) -> tuple[Values, Values]:
        (h,) = states
        new = self.f(self.op, self.op.Add(gates, self.op.Gemm(h, self.r, self.b, transB=1)))
        return [new], [h, new]

    def backward(self, dstates: Values, saved: Values) -> tuple[Values, Values]:
        dgates = self.f.slope(self.op, saved[1], dstates[0])
        return [self.op.MatMul(dgates, self.r)], [dgates, dgates]

    def weights(self, dgates: Value, saved: Values) -> Values:
        return [_outer(self.op, dgates, saved[0])]


@dataclasses.dataclass(frozen=True)
class _Gru:
    """H = (1 - z) n + z h, with the gates in the order z, r, n."""

    op: Emitter
    r: Values
    b: Values | None
    linear_before_reset: bool
    f: _Activation
    g: _Activation

    def forward(self, states: Values, gates: Value) -> tuple[Values, Values]:
        op, (h,) = self.op, states
        bz, br, bn = self.b or (None, None, None)
        xz, xr, xn = op.Split(gates, axis=1, num_outputs=3, outputs=3)
        z = self.f(op, op.Add(xz, op.Gemm(h, self.r[0], bz, transB=1)))
        r = self.f(op, op.Add(xr, op.Gemm(h, self.r[1], br, transB=1)))
        if self.linear_before_reset:
            linear = op.Gemm(h, self.r[2], bn, transB=1)
            n = self.g(op, op.Add(xn, op.Mul(r, linear)))
            last = linear
        else:
            last = op.Mul(r, h)
            n = self.g(op, op.Add(xn, op.Gemm(last, self.r[2], bn, transB=1)))
        return [op.Add(n, op.Mul(z, op.Sub(h, n)))], [h, z, r, n, last]

    def backward(self, dstates: Values, saved: Values) -> tuple[Values, Values]:
        op, (dh,), (h, z, r, n, last) = self.op, dstates, saved
        dn = self.g.slope(op, n, op.Mul(dh, op.Sub(1.0, z)))
        dz = self.f.slope(op, z, op.Mul(dh, op.Sub(h, n)))
        if self.linear_before_reset:
            dr = self.f.slope(op, r, op.Mul(dn, last))
            dlast = op.Mul(dn, r)
            through_n = op.MatMul(dlast, self.r[2])
        else:
            dlast = dn
            dreset = op.MatMul(dn, self.r[2])
            dr = self.f.slope(op, r, op.Mul(dreset, h))
            through_n = op.Mul(dreset, r)
        through_gates = op.Add(op.MatMul(dz, self.r[0]), op.MatMul(dr, self.r[1]))
        before = op.Add(op.Mul(dh, z), op.Add(through_n, through_gates))
        return [before], [op.Concat(dz, dr, dn, axis=1), op.Concat(dz, dr, dlast, axis=1)]

    def weights(self, dgates: Value, saved: Values) -> Values:
        op, (h, _, _, _, last) = self.op, saved
        if self.linear_before_reset:
            return [_outer(op, dgates, h)]
        dz, dr, dn = op.Split(dgates, axis=2, num_outputs=3, outputs=3)
        return [op.Concat(_outer(op, dz, h), _outer(op, dr, h), _outer(op, dn, last), axis=0)]


@dataclasses.dataclass(frozen=True)
class _Lstm:
    """C = f c + i g and H = o h(C), with the gates in the order i, o, f, g and the peepholes i, o, f."""

    op: Emitter
    r: Value
    b: Value | None
    peepholes: Values | None
    f: _Activation
    g: _Activation
    h: _Activation

    def forward(self, states: Values, gates: Value) -> tuple[Values, Values]:
        op, (hidden, c) = self.op, states
        gates = op.Add(gates, op.Gemm(hidden, self.r, self.b, transB=1))
        xi, xo, xf, xg = op.Split(gates, axis=1, num_outputs=4, outputs=4)
        if self.peepholes is not None:
            xi, xf = op.Add(xi, op.Mul(c, self.peepholes[0])), op.Add(xf, op.Mul(c, self.peepholes[2]))
        i, f, g = self.f(op, xi), self.f(op, xf), self.g(op, xg)
        new = op.Add(op.Mul(f, c), op.Mul(i, g))
        if self.peepholes is not None:
            xo = op.Add(xo, op.Mul(new, self.peepholes[1]))
        o, shown = self.f(op, xo), self.h(op, new)
        saved = [hidden, c, i, o, f, g, shown]
        return [op.Mul(o, shown), new], saved if self.peepholes is None else [*saved, new]

    def backward(self, dstates: Values, saved: Values) -> tuple[Values, Values]:
        op, (dh, dc), (_, c, i, o, f, g, shown) = self.op, dstates, saved[:7]
        do = self.f.slope(op, o, op.Mul(dh, shown))
        dc = op.Add(dc, self.h.slope(op, shown, op.Mul(dh, o)))
        if self.peepholes is not None:
            dc = op.Add(dc, op.Mul(do, self.peepholes[1]))
        di = self.f.slope(op, i, op.Mul(dc, g))
        df = self.f.slope(op, f, op.Mul(dc, c))
        dg = self.g.slope(op, g, op.Mul(dc, i))
        before = op.Mul(dc, f)
        if self.peepholes is not None:
            seen = op.Add(op.Mul(di, self.peepholes[0]), op.Mul(df, self.peepholes[2]))
            before = op.Add(before, seen)
        dgates = op.Concat(di, do, df, dg, axis=1)
        return [op.MatMul(dgates, self.r), before], [dgates, dgates]

    def weights(self, dgates: Value, saved: Values) -> Values:
        op = self.op
        dr = _outer(op, dgates, saved[0])
        if self.peepholes is None:
            return [dr]
        di, do, df, _ = op.Split(dgates, axis=2, num_outputs=4, outputs=4)
        seen = [op.Mul(di, saved[1]), op.Mul(do, saved[7]), op.Mul(df, saved[1])]
        return [dr, op.Concat(*[op.ReduceSum(v, [0, 1], keepdims=0) for v in seen], axis=0)]


def _gradients(
    op: Emitter,
    dys: Sequence[Value | None],
    x: Value,
    w: Value,
    r: Value,
    b: Value | None,
    lengths: Value | None,
    initial: Sequence[Value | None],
    direction: str,
    layout: int,
    cell: Callable[[int, Value, Value | None], _Cell],
) -> tuple[Value, Values, Values]:
    """What the three operators share: directions, layout, sequence lengths, products with the input.

    Args:
        op: where the nodes go.
        dys: gradients of Y and of the final states.
        x: [T,N,I], or [N,T,I] in layout 1.
        w: the weights of the input [D,G,I].
        r: the recurrent weights [D,G,H].
        b: the biases of both [D,2G].
        lengths: of each sequence [N]; the steps behind it do nothing.
        initial: the initial states; None is zero.
        direction: as in the operator.
        layout: as in the operator.
        cell: ``cell(d, r, b)`` makes the cell of direction d from its recurrent weights and biases.

    Returns:
        The gradients of x, of the weights (w, b and what `_Cell.weights` returns) and of the initial states.
    """

    def of(v: Value | None, d: int, axis: int) -> Value | None:
        return None if v is None else op.Gather(v, np.int64(d), axis=axis)

    x = op.Transpose(x, perm=[1, 0, 2]) if layout else x
    dy = op.Transpose(dys[0], perm=[1, 2, 0, 3]) if layout and dys[0] is not None else dys[0]
    dfinal = [*dys[1:], None, None][: len(initial)]
    mask = None
    if lengths is not None:
        column = op.Reshape(op.Cast(lengths, to=ir.DataType.INT64), [-1, 1])
        mask = op.Less(op.Reshape(positions(op, x, 0), [-1, 1, 1]), column)
    dxs: Values = []
    dweights: list[Values] = []
    dinitial: list[Values] = []
    for d, reverse in enumerate({"forward": [0], "reverse": [1], "bidirectional": [0, 1]}[direction]):
        wd, rd = op.Gather(w, np.int64(d), axis=0), op.Gather(r, np.int64(d), axis=0)
        gates, rb = op.MatMul(x, op.Transpose(wd, perm=[1, 0])), None
        if b is not None:
            wb, rb = _parts(op, op.Gather(b, np.int64(d), axis=0), 2)
            gates = op.Add(gates, wb)
        size = op.Concat(op.Shape(x, start=1, end=2), op.Shape(rd, start=1), axis=0)
        zero = op.Expand(op.CastLike(np.float32(0.0), x), size)
        states = [of(v, d, layout) or zero for v in initial]
        dstates = [of(v, d, layout) or zero for v in dfinal]
        step = cell(d, rd, rb)
        first, (dinput, drecurrent), saved = _through_time(
            op, step, gates, mask, states, of(dy, d, 1), dstates, bool(reverse)
        )
        in_time = dinput if reverse else _backwards(op, dinput)
        dxs.append(op.MatMul(in_time, wd))
        db = op.Concat(*[op.ReduceSum(v, [0, 1], keepdims=0) for v in (dinput, drecurrent)], axis=0)
        dweights.append([_outer(op, in_time, x), db, *step.weights(drecurrent, saved)])
        dinitial.append(first)
    dx = dxs[0] if len(dxs) == 1 else op.Add(*dxs)
    return (
        op.Transpose(dx, perm=[1, 0, 2]) if layout else dx,
        [_stacked(op, vs, 0) for vs in zip(*dweights, strict=True)],
        [_stacked(op, vs, layout) for vs in zip(*dinitial, strict=True)],
    )


def _through_time(
    op: Emitter,
    cell: _Cell,
    gates: Value,
    mask: Value | None,
    states: Values,
    dy: Value | None,
    dstates: Values,
    reverse: bool,
) -> tuple[Values, Values, Values]:
    """Run a cell over all steps, and its gradient back.

    Args:
        op: where the nodes go.
        cell: the cell.
        gates: the input's share of the gates [T,N,G].
        mask: which steps count [T,N,1]; None: all.
        states: the initial states.
        dy: the gradient of the hidden states [T,N,H].
        dstates: the gradients of the final states.
        reverse: whether the cell runs from the last step to the first.

    Returns:
        The gradients of the initial states; those of the gates, and what the cell saved, both in the
        opposite order to that in which the cell runs.
    """

    def forward(states: Values, elements: Values) -> tuple[Values, Values]:
        new, saved = cell.forward(states, elements[0])
        if mask is not None:
            new = [op.Where(elements[1], a, b) for a, b in zip(new, states, strict=True)]
        return new, saved

    def backward(dstates: Values, elements: Values) -> tuple[Values, Values]:
        step, rest = elements[: len(saved)], elements[len(saved) :]
        arriving = list(dstates)
        if dy is not None:
            arriving[0] = op.Add(arriving[0], rest[0])
        if mask is None:
            return cell.backward(arriving, step)
        before, dgates = cell.backward([op.Where(rest[-1], v, 0.0) for v in arriving], step)
        return [op.Where(rest[-1], a, b) for a, b in zip(before, dstates, strict=True)], dgates

    streams = [v for v in (gates, mask) if v is not None]
    _, saved = _scan(op, forward, states, [_backwards(op, v) for v in streams] if reverse else streams)
    saved = [_backwards(op, v) for v in saved]
    streams = [v for v in (dy, mask) if v is not None]
    streams = streams if reverse else [_backwards(op, v) for v in streams]
    first, dgates = _scan(op, backward, dstates, [*saved, *streams])
    return first, dgates, saved


def _scan(
    op: Emitter,
    step: Callable[[Values, Values], tuple[Values, Values]],
    states: Values,
    streams: Values,
) -> tuple[Values, Values]:
    """Emit a Scan over the first axis of `streams`.

    Args:
        op: where the nodes go.
        step: ``step(states, elements) -> (new states, outputs)`` emits its body.
        states: before the first step.
        streams: what the steps read, one element each.

    Returns:
        The states after the last step, and the outputs of all steps.
    """
    inner = [Value(name=op.fresh("state"), shape=_shape(v.shape), type=v.type) for v in states]
    elements = [
        Value(name=op.fresh("element"), shape=_shape(v.shape[1:] if v.shape else None), type=v.type)
        for v in streams
    ]
    body = ir.Graph([*inner, *elements], [], nodes=[], name=op.fresh("step"))
    with op.body(body):
        new, outputs = step(inner, elements)
        for value in [*new, *outputs]:
            producer = value.producer()
            own = producer is not None and producer.graph is body and value not in body.outputs
            body.outputs.append(value if own else op.Identity(value))
    found = op.Scan(*states, *streams, body=body, num_scan_inputs=len(streams), outputs=len(body.outputs))
    found = found if isinstance(found, tuple) else (found,)
    for value, one in zip(found, body.outputs, strict=True):
        value.type = one.type
    for value, one in zip(found[: len(states)], states, strict=True):
        value.shape = _shape(one.shape)
    for value, one in zip(found[len(states) :], body.outputs[len(states) :], strict=True):
        value.shape = None if one.shape is None else ir.Shape([None, *one.shape])
    return list(found[: len(states)]), list(found[len(states) :])


def _shape(sizes: Sequence[int | ir.SymbolicDim] | ir.Shape | None) -> ir.Shape | None:
    return None if sizes is None else ir.Shape(list(sizes))
