"""Doing the same for each of many: a Scan whose body a Python function emits, or that body repeated."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError

_MOST_WRITTEN_OUT = 64


def each(op: Emitter, items: Sequence[Value], function: Callable[..., Sequence[Value]]) -> list[Value]:
    """Emit what computes ``function(*entries)`` for the entries of `items` along axis 0, in turn.

    That is a Scan, unless there is a single entry or the emitter is to be portable. Whatever its body reads
    of the graph around it is read in place and never repeated.

    Args:
        op: where the nodes go; what `function` emits goes into the body.
        items: values of equal size along axis 0.
        function: takes one entry of each item and returns values.

    Returns:
        The results, each stacked along a new axis 0.

    Raises:
        OnnxcamError: it would have to be written out, and there are too many entries or unknown ones.
    """
    count = items[0].shape[0] if items[0].shape is not None else None
    if count == 1 or op.portable:
        if not isinstance(count, int) or count > _MOST_WRITTEN_OUT:
            many = count if isinstance(count, int) else "an unknown number of"
            raise OnnxcamError(
                f"this method runs a part of the model {many} times, and a portable model has no loop; "
                f"up to {_MOST_WRITTEN_OUT} are written out. Choose another method, or leave portable out"
            )
        return _written_out(op, items, function, count)
    entries = [
        Value(name=op.fresh("entry"), shape=ir.Shape(list(item.shape)[1:]), type=item.type)  # type: ignore[arg-type]
        for item in items
    ]
    body = ir.Graph(entries, [], nodes=[], name=op.fresh("body"))
    with op.body(body):
        results = []
        for value in function(*entries):
            producer = value.producer()
            inside = producer is not None and producer.graph is body and value not in results
            results.append(value if inside else op.Identity(value))
    _own_weights(op, body)
    body.outputs.extend(results)
    stacked = op.node("Scan", *items, outputs=len(results), body=body, num_scan_inputs=len(items))
    stacked = [stacked] if len(results) == 1 else list(stacked)
    for whole, part in zip(stacked, results, strict=True):
        whole.type = part.type
        if part.shape is not None:
            whole.shape = ir.Shape([count, *part.shape])
    return stacked


def _own_weights(op: Emitter, body: ir.Graph) -> None:
    """Read the weights of convolutions by way of a Concat of one, which onnxruntime works out beforehand.

    Then they are constants of the body, as onnxruntime's blocked layout of convolutions wants them.
    """
    own: dict[Value, Value] = {}
    for node in [node for node in body if node.op_type == "Conv"]:
        for index, value in enumerate(node.inputs):
            if index == 0 or value is None or not value.is_initializer():
                continue
            if value not in own:
                with op.before(node):
                    own[value] = op.Concat(value, axis=0)
            node.replace_input_with(index, own[value])


def _written_out(
    op: Emitter, items: Sequence[Value], function: Callable[..., Sequence[Value]], count: int
) -> list[Value]:
    """Emit the parts for all entries one after the other, and stack their results."""
    rounds = [function(*(op.Gather(item, np.int64(i), axis=0) for item in items)) for i in range(count)]
    stacks = [[op.Unsqueeze(value, [0]) for value in results] for results in zip(*rounds, strict=True)]
    return [parts[0] if count == 1 else op.Concat(*parts, axis=0) for parts in stacks]
