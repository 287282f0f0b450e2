"""Doing the same for each of many: a Scan whose body a Python function emits."""

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter


def each(op: Emitter, items: Sequence[Value], function: Callable[..., Sequence[Value]]) -> list[Value]:
    """Emit a Scan that computes ``function(*entries)`` for the entries of `items` along axis 0, in turn.

    Whatever the body reads of the graph around it is read in place and never repeated.

    Args:
        op: where the nodes go; what `function` emits goes into the body.
        items: values of equal size along axis 0.
        function: takes one entry of each item and returns values.

    Returns:
        The results, each stacked along a new axis 0.
    """
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
    body.outputs.extend(results)
    stacked = op.node("Scan", *items, outputs=len(results), body=body, num_scan_inputs=len(items))
    stacked = [stacked] if len(results) == 1 else list(stacked)
    for whole, part in zip(stacked, results, strict=True):
        whole.type = part.type
        if part.shape is not None:
            count = items[0].shape[0] if items[0].shape is not None else None
            whole.shape = ir.Shape([count, *part.shape])
    return stacked
