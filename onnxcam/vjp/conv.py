"""Convolution, and the sliding window that pooling shares with it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import dims, is_constant, rank


@dataclasses.dataclass(frozen=True)
class Window:
    """A window that slides over the spatial axes; every field has one entry per spatial axis.

    Attributes:
        kernel, strides, dilations: in elements.
        begin, end: padding before and after the input, in elements.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]

    @classmethod
    def of(
        cls,
        x: Value,
        y: Value,
        kernel: Sequence[int],
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        auto_pad: str,
    ) -> "Window":
        """Build the window from an operator's attributes, with `auto_pad` worked out.

        Raises:
            OnnxcamError: `auto_pad` depends on a size that is known only when the model runs.
        """
        n = len(kernel)
        steps, holes = list(strides or [1] * n), list(dilations or [1] * n)
        begin, end = list((pads or [0] * 2 * n)[:n]), list((pads or [0] * 2 * n)[n:])
        if auto_pad.startswith("SAME"):
            for i, (size, out) in enumerate(zip(dims(x)[2:], dims(y)[2:], strict=True)):
                extent = holes[i] * (kernel[i] - 1) + 1
                if steps[i] == 1:
                    total = extent - 1
                elif isinstance(size, int) and isinstance(out, int):
                    total = max((out - 1) * steps[i] + extent - size, 0)
                else:
                    raise OnnxcamError(
                        f"auto_pad {auto_pad} with a stride needs a fixed image size (value {x.name!r})"
                    )
                begin[i] = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
                end[i] = total - begin[i]
        return cls(list(kernel), steps, holes, begin, end)

    def extents(self) -> list[int]:
        """Elements of the input that one window spans."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]


def spread(op: Emitter, dy: Value, w: Value, x: Value, y: Value, window: Window, group: int = 1) -> Value:
    """Add each window's share of `dy`, weighted by `w`, onto the input elements that it covers.

    Args:
        dy: [N, M, *out]; its spatial size is that of `y`.
        w: [M, C/group, *kernel].
        x: only its spatial size is read, where that is not known beforehand.

    Returns:
        [N, C, *in], `in` being the spatial size of `x`.
    """
    sizes, outs = dims(x)[2:], dims(y)[2:]
    common = {
        "kernel_shape": window.kernel,
        "strides": window.strides,
        "dilations": window.dilations,
        "group": group,
    }
    if all(isinstance(d, int) for d in [*sizes, *outs]):
        reach = [
            (out - 1) * step + extent - begin  # type: ignore[operator]
            for out, step, extent, begin in zip(
                outs, window.strides, window.extents(), window.begin, strict=True
            )
        ]
        surplus = [r - size for r, size in zip(reach, sizes, strict=True)]  # type: ignore[operator]
        return op.ConvTranspose(
            dy,
            w,
            pads=window.begin + [max(s, 0) for s in surplus],
            output_padding=[max(-s, 0) for s in surplus],
            **common,
        )
    widest = op.ConvTranspose(
        dy,
        w,
        pads=window.begin + [0] * len(sizes),
        output_padding=[step - 1 for step in window.strides],
        **common,
    )
    spatial = list(range(2, rank(x)))
    return op.Slice(widest, [0] * len(spatial), op.Shape(x, start=2), spatial)


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
    kernel = kernel_shape or dims(w)[2:]
    if not all(isinstance(k, int) for k in kernel):
        raise OnnxcamError(f"the kernel size of a Conv (weights {w.name!r}) is unknown")
    window = Window.of(x, y, kernel, strides, dilations, pads, auto_pad)  # type: ignore[arg-type]
    dx = spread(op, dy, w, x, y, window, group)
    dw = None if is_constant(w) else _weights(op, dy, x, window, group)
    db = None if b is None or is_constant(b) else op.ReduceSum(dy, [0, *range(2, rank(x))], keepdims=0)
    return dx, dw, db


def _weights(op: Emitter, dy: Value, x: Value, window: Window, group: int) -> Value:
    """The gradient of the weights: the input correlated with `dy`, batch and channels exchanged."""
    n = rank(x) - 2
    spatial = list(range(2, 2 + n))
    # [N, C, *in] -> [C/group, group*N, *in]
    size = op.Shape(x, start=2)
    split = op.Reshape(x, op.Concat(np.array([0, group, -1]), size, axis=0))
    moved = op.Transpose(split, perm=[2, 1, 0, *(s + 1 for s in spatial)])
    image = op.Reshape(moved, op.Concat(np.array([0, -1]), size, axis=0))
    kernel = op.Transpose(dy, perm=[1, 0, *spatial])
    found = op.Conv(
        image,
        kernel,
        strides=window.dilations,
        dilations=window.strides,
        pads=window.begin + window.end,
        group=group,
    )
    swapped = op.Transpose(found, perm=[1, 0, *spatial])
    return op.Slice(swapped, [0] * n, window.kernel, spatial)
