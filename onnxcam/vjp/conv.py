"""Convolution, and the sliding window that pooling shares with it."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import constant_ints, dims, extent, is_constant, joined, pad_along, rank, reshape_like


@dataclasses.dataclass(frozen=True)
class Window:
    """A window that slides over the spatial axes; every field has one entry per spatial axis.

    Attributes:
        kernel, strides, dilations: in elements.
        begin, end: padding before and after the input, in elements; an int64 value where it depends on
            a size that is known only when the model runs.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: "list[int] | Value"
    end: "list[int] | Value"

    @classmethod
    def of(
        cls,
        op: Emitter,
        x: Value,
        y: Value,
        kernel: Sequence[int],
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        auto_pad: str,
    ) -> "Window":
        """Build the window from an operator's attributes, with `auto_pad` worked out."""
        n = len(kernel)
        steps, holes = list(strides or [1] * n), list(dilations or [1] * n)
        padding = list(pads or [0] * 2 * n)
        window = cls(list(kernel), steps, holes, padding[:n], padding[n:])
        if not auto_pad.startswith("SAME"):
            return window
        upper = auto_pad == "SAME_UPPER"
        totals = list(map(_same_padding, dims(x)[2:], dims(y)[2:], steps, window.extents()))
        if None not in totals:
            less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]  # type: ignore[operator]
            return dataclasses.replace(window, begin=less if upper else more, end=more if upper else less)
        reach = op.Add(op.Mul(op.Sub(op.Shape(y, start=2), 1), steps), window.extents())
        begin, end = _split(op, op.Sub(reach, op.Shape(x, start=2)), upper)
        return dataclasses.replace(window, begin=begin, end=end)

    def extents(self) -> list[int]:
        """Elements of the input that one window spans."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]


def _same_padding(size: object, out: object, step: int, extent: int) -> int | None:
    """The padding that auto_pad SAME adds along one axis, or None if that depends on the run."""
    if step == 1:
        return extent - 1
    if isinstance(size, int) and isinstance(out, int):
        return max((out - 1) * step + extent - size, 0)
    return None


def _split(op: Emitter, total: Value, upper: bool) -> tuple[Value, Value]:
    """Divide padding into what comes before and after; `upper`: the odd element comes after."""
    total = op.Max(total, 0)
    less = op.Div(total, 2)
    more = op.Sub(total, less)
    return (less, more) if upper else (more, less)


def _pad(op: Emitter, x: Value, begin: Value, end: Value) -> Value:
    """Put zeros around the spatial axes."""
    none = np.zeros(2, np.int64)
    return op.Pad(x, op.Concat(none, begin, none, end, axis=0))


def spread(op: Emitter, dy: Value, w: Value, x: Value, y: Value, window: Window, group: int = 1) -> Value:
    """Add each window's share of `dy`, weighted by `w`, onto the input elements that it covers.

    Args:
        dy: [N, M, *out]; its spatial size is that of `y`.
        w: [M, C/group, *kernel].
        x: only its spatial size is read, where that is not known beforehand.

    Returns:
        [N, C, *in], `in` being the spatial size of `x`.
    """
    if set(window.strides) == {1} and isinstance(window.begin, list) and isinstance(window.end, list):
        reach = [extent - 1 for extent in window.extents()]
        pads = [r - pad for r, pad in zip(2 * reach, window.begin + window.end, strict=True)]
        turned = _turned(op, w, group) if min(pads) >= 0 else None
        if turned is not None:
            # The same sums as ConvTranspose's, but by the runtime's fast convolutions.
            return op.Conv(
                dy,
                turned,
                kernel_shape=window.kernel,
                strides=window.strides,
                dilations=window.dilations,
                pads=pads,
                group=group,
            )
    sizes, outs = dims(x)[2:], dims(y)[2:]
    n = len(sizes)
    if not op.portable and all(isinstance(d, int) for d in [*sizes, *outs]):
        for form in (_spread_depthwise, _spread_in_blocks):
            dx = form(op, dy, w, sizes, outs, window, group)  # type: ignore[arg-type]
            if dx is not None:
                return dx
    common = {
        "kernel_shape": window.kernel,
        "strides": window.strides,
        "dilations": window.dilations,
        "group": group,
    }
    begin = window.begin
    if isinstance(begin, list) and all(isinstance(d, int) for d in [*sizes, *outs]):
        reach = [
            (out - 1) * step + extent - first  # type: ignore[operator]
            for out, step, extent, first in zip(outs, window.strides, window.extents(), begin, strict=True)
        ]
        surplus = [r - size for r, size in zip(reach, sizes, strict=True)]  # type: ignore[operator]
        dx = op.ConvTranspose(
            dy,
            w,
            pads=begin + [max(s, 0) for s in surplus],
            output_padding=[max(-s, 0) for s in surplus],
            **common,
        )
        # The largest of one element: it brings onnxruntime back to its layout of convolutions, which its
        # ConvTranspose leaves, and all sums with the result would.
        return dx if op.portable or n != 2 else op.MaxPool(dx, kernel_shape=[1] * n)
    fixed = isinstance(begin, list)
    widest = op.ConvTranspose(
        dy,
        w,
        pads=(begin if isinstance(begin, list) else [0] * n) + [0] * n,
        output_padding=[step - 1 for step in window.strides],
        **common,
    )
    length = op.Shape(x, start=2)
    spatial = list(range(2, 2 + n))
    if fixed:
        return op.Slice(widest, [0] * n, length, spatial)
    return op.Slice(widest, begin, op.Add(begin, length), spatial)


def _spread_depthwise(
    op: Emitter, dy: Value, w: Value, sizes: Sequence[int], outs: Sequence[int], window: Window, group: int
) -> Value | None:
    """`spread` with each channel for itself: a convolution of `dy` with zeros between its elements.

    onnxruntime 1.32 runs such a convolution blocked and on all cores, a ConvTranspose channel by channel.

    Returns:
        None where a channel reads others, or part of what this makes would have to be cut off.
    """
    if dims(w)[:2] != [group, 1] or not isinstance(window.begin, list):
        return None
    steps, reach = window.strides, [extent - 1 for extent in window.extents()]
    begin = [r - pad for r, pad in zip(reach, window.begin, strict=True)]
    end = [
        size - out * step + r - first
        for size, out, step, r, first in zip(sizes, outs, steps, reach, begin, strict=True)
    ]
    if min(begin + end) < 0:
        return None
    n = len(steps)
    repeated = op.Resize(
        dy,
        None,
        np.array([1, 1, *steps], np.float32),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    lit = [
        np.tile(np.eye(1, step, dtype=dy.dtype.numpy())[0], out)  # type: ignore[union-attr]
        for out, step in zip(outs, steps, strict=True)
    ]
    rows, *others = (
        np.reshape(v, [-1 if a == axis else 1 for a in range(2 + n)]) for axis, v in enumerate(lit, 2)
    )
    mask = functools.reduce(op.Mul, others, op.constant(rows))
    return op.Conv(
        op.Mul(repeated, mask),
        _turned(op, w, group),
        kernel_shape=window.kernel,
        strides=[1] * n,
        dilations=window.dilations,
        pads=begin + end,
        group=group,
    )


def _spread_in_blocks(
    op: Emitter, dy: Value, w: Value, sizes: Sequence[int], outs: Sequence[int], window: Window, group: int
) -> Value | None:
    """`spread` to the few channels of a picture: all elements of a block as channels, and DepthToSpace.

    A block is as large as the stride. With more channels onnxruntime's ConvTranspose is as fast.

    Returns:
        None where there are more channels, or the blocks do not fit.
    """
    made, read, *_ = dims(w)
    step = window.strides[0]
    square = len(sizes) == 2 and set(window.strides) == {step} and set(window.dilations) == {1}
    if not square or group != 1 or not isinstance(window.begin, list):
        return None
    if not isinstance(made, int) or not isinstance(read, int) or read > 4:
        return None
    reads = [_windows_of_block(*side, step) for side in zip(window.kernel, window.begin, strict=True)]
    before = [-first for first, _ in reads]
    after = [
        size // step - out + first + elements.shape[1] - 1
        for size, out, (first, elements) in zip(sizes, outs, reads, strict=True)
    ]
    if any(size % step for size in sizes) or min(before + after) < 0:
        return None
    (_, rows), (_, columns) = reads
    padded = op.Pad(w, [0, 0, 0, 0, 0, 0, 1, 1])
    picked = op.Gather(op.Gather(padded, rows, axis=2), columns, axis=4)
    turned = op.Transpose(picked, perm=[1, 2, 4, 0, 3, 5])  # [C, step, step, M, windows, windows]
    shape = [rows.shape[1], columns.shape[1]]
    kernel = op.Reshape(turned, [read * step * step, made, *shape])
    blocks = op.Conv(
        dy, kernel, kernel_shape=shape, strides=[1, 1], dilations=[1, 1], pads=before + after, group=1
    )
    return op.DepthToSpace(blocks, blocksize=step, mode="CRD")


def _windows_of_block(kernel: int, begin: int, step: int) -> "tuple[int, np.ndarray]":
    """Which windows along an axis cover a block of `step` elements, and with what elements of their kernels.

    Returns:
        The first window, counted from the one with the block's number, and the elements
        [step, windows]: `kernel` where a window does not cover the element of the block.
    """
    windows = np.arange(-((kernel - 1 - begin) // step), (begin + step - 1) // step + 1)
    elements = begin + np.arange(step)[:, None] - step * windows
    return int(windows[0]), np.where((elements < 0) | (elements >= kernel), kernel, elements)


def _turned(op: Emitter, w: Value, group: int) -> Value | None:
    """Exchange what [M, C/group, *kernel] reads and makes, in each group, and mirror the kernel.

    Constant weights are turned once, when a runtime loads the model; the file holds no copy of them.

    Returns:
        [C, M/group, *kernel], or None where the number of channels in a group is unknown.
    """
    made, read, *kernel = dims(w)
    axes = [axis for axis, length in enumerate(kernel, 2) if length != 1]
    mirrored = w
    if axes:
        ends = [np.iinfo(np.int64).min] * len(axes)
        mirrored = op.Slice(w, [-1] * len(axes), ends, axes, [-1] * len(axes))
    spatial = range(2, 2 + len(kernel))
    if group == 1:
        return op.Transpose(mirrored, perm=[1, 0, *spatial])
    if not isinstance(made, int) or not isinstance(read, int):
        return None
    if read == 1 and made == group:
        return mirrored
    split = op.Reshape(mirrored, [group, made // group, read, *kernel])
    swapped = op.Transpose(split, perm=[0, 2, 1, *(axis + 1 for axis in spatial)])
    return op.Reshape(swapped, [group * read, made // group, *kernel])


def kernel_size(kernel_shape: list[int] | None, w: Value) -> list[int]:
    kernel = kernel_shape or dims(w)[2:]
    if not all(isinstance(k, int) for k in kernel):
        raise OnnxcamError(f"the kernel size of the convolution with weights {w.name!r} is unknown")
    return kernel  # type: ignore[return-value]


def _bias(op: Emitter, dy: Value, b: Value | None) -> Value | None:
    if b is None or is_constant(b):
        return None
    return op.ReduceSum(dy, [0, *range(2, rank(dy))], keepdims=0)


@vjp("Conv")
def conv(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    w: Value,
    b: Value | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> tuple[Value, Value | None, Value | None]:
    window = Window.of(op, x, y, kernel_size(kernel_shape, w), strides, dilations, pads, auto_pad)
    dx = spread(op, dy, w, x, y, window, group)
    dw = None if is_constant(w) else _weights(op, dy, x, window, group)
    return dx, dw, _bias(op, dy, b)


def _weights(op: Emitter, dy: Value, x: Value, window: Window, group: int) -> Value:
    """The gradient of the weights: the input correlated with `dy`, batch and channels exchanged."""
    n = rank(x) - 2
    spatial = list(range(2, 2 + n))
    pads = [0] * 2 * n
    if isinstance(window.begin, list) and isinstance(window.end, list):
        pads = window.begin + window.end
    elif isinstance(window.begin, Value) and isinstance(window.end, Value):
        x = _pad(op, x, window.begin, window.end)
    # [N, C, *in] -> [C/group, group*N, *in]
    size = [extent(op, x, axis) for axis in spatial]
    split = op.Reshape(x, joined(op, [0, group, -1, *size]))
    moved = op.Transpose(split, perm=[2, 1, 0, *(s + 1 for s in spatial)])
    image = op.Reshape(moved, joined(op, [0, -1, *size]))
    kernel = op.Transpose(dy, perm=[1, 0, *spatial])
    reach = dims(kernel)[2:]
    found = op.Conv(
        image,
        kernel,
        kernel_shape=reach if all(isinstance(k, int) for k in reach) else None,
        strides=window.dilations,
        dilations=window.strides,
        pads=pads,
        group=group,
    )
    swapped = op.Transpose(found, perm=[1, 0, *spatial])
    return op.Slice(swapped, [0] * n, window.kernel, spatial)


@vjp("ConvTranspose")
def conv_transpose(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    w: Value,
    b: Value | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> tuple[Value, Value | None, Value | None]:
    """The convolution of `dy`, padded to its full length stride (in - 1) + extent, with the same weights."""
    kernel = kernel_size(kernel_shape, w)
    n = len(kernel)
    zeros = [0] * n
    extra = output_padding or zeros
    window = Window(kernel, strides or [1] * n, dilations or [1] * n, zeros, zeros)
    if output_shape:
        # What the full length has more than the output asked for is cut off as padding.
        full = op.Add(op.Mul(op.Sub(op.Shape(x, start=2), 1), window.strides), window.extents())
        missing = op.Sub(full, output_shape)
        begin, _ = _split(op, op.Add(missing, extra), auto_pad == "SAME_UPPER")
        image = _pad(op, dy, begin, op.Max(op.Sub(missing, begin), 0))
        padding = 2 * zeros
        exact = False
    else:
        padding = pads or 2 * zeros
        if auto_pad.startswith("SAME"):
            # The output is stride times as long as the input, or longer if the windows leave gaps.
            parts = zip(window.extents(), window.strides, extra, strict=True)
            totals = [max(extent - step + e, 0) for extent, step, e in parts]
            less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
            padding = less + more if auto_pad == "SAME_UPPER" else more + less
        end = [c - e for c, e in zip(padding[n:], extra, strict=True)]
        padding = padding[:n] + [max(e, 0) for e in end]
        window = dataclasses.replace(window, begin=padding[:n], end=padding[n:])
        image = dy
        exact = all(-e < step for e, step in zip(end, window.strides, strict=True))
    dx = op.Conv(
        image,
        w,
        kernel_shape=kernel,
        strides=window.strides,
        dilations=window.dilations,
        pads=padding,
        group=group,
    )
    if not exact:
        dx = op.Slice(dx, zeros, op.Shape(x, start=2), list(range(2, 2 + n)))
    dw = None if is_constant(w) else _weights(op, x, image, window, group)
    return dx, dw, _bias(op, dy, b)


@vjp("CausalConvWithState")
def causal_conv_with_state(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    w: Value,
    b: Value | None = None,
    past: Value | None = None,
    *,
    activation: str = "none",
) -> tuple[Value | None, ...]:
    """A convolution of each channel [N, C, length] over itself and the state before it (absent: zeros).

    The second output is the state after it: the last k - 1 elements of the two joined.
    """
    (k,) = kernel_size(None, w)[-1:]
    channels = dims(w)[0]
    if not isinstance(channels, int):
        raise OnnxcamError(f"the number of channels of the convolution with weights {w.name!r} is unknown")
    dy, dstate = (*dys, None)[:2]
    joined_x = pad_along(op, x, [k - 1, 0], [2]) if past is None else op.Concat(past, x, axis=2)
    window = Window([k], [1], [1], [0], [0])
    djoined, dw, db = None, None, None
    if dy is not None:
        if activation != "none":
            before = op.Conv(
                joined_x, w, b, kernel_shape=[k], strides=[1], dilations=[1], pads=[0, 0], group=channels
            )
            gate = op.Sigmoid(before)
            dy = op.Mul(dy, op.Mul(gate, op.Add(op.Mul(before, op.Sub(1.0, gate)), 1.0)))
        djoined = spread(op, dy, w, joined_x, ys[0], window, channels)
        dw = None if is_constant(w) else _weights(op, dy, joined_x, window, channels)
        db = _bias(op, dy, b)
    if dstate is not None:
        after = op.Concat(op.Shape(x, start=2), np.zeros(1, np.int64), axis=0)
        later = pad_along(op, dstate, after, [2])
        djoined = later if djoined is None else op.Add(djoined, later)
    assert djoined is not None
    dx = op.Slice(djoined, [k - 1], [np.iinfo(np.int64).max], [2])
    return dx, dw, db, None if past is None else op.Slice(djoined, [0], [k - 1], [2])


@vjp("Col2Im")
def col2im(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    image_shape: Value,
    block_shape: Value,
    *,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Value:
    """Cut the blocks out again, by a convolution with one kernel for each element of a block."""
    block = constant_ints(block_shape, "the block shape of a Col2Im")
    assert block is not None
    n = len(block)
    elements = int(np.prod(block))
    kernel = np.eye(elements, dtype=x.dtype.numpy()).reshape(elements, 1, *block)  # type: ignore[union-attr]
    blocks = op.Conv(
        planes(op, dy, y),
        kernel,
        kernel_shape=block,
        strides=strides or [1] * n,
        dilations=dilations or [1] * n,
        pads=pads or [0] * 2 * n,
    )
    return reshape_like(op, blocks, x)


def planes(op: Emitter, dy: Value, y: Value) -> Value:
    """View `dy` [N, C, *out], whose spatial size is that of `y`, as [N*C, 1, *out]."""
    return op.Reshape(dy, joined(op, [-1, 1, *(extent(op, y, axis) for axis in range(2, rank(y)))]))
