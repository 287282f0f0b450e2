"""How the tests look at gradients: against torch or central differences, in float64, and in onnxruntime."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference.op_run import OpRun

from onnxcam.backward import gradients
from onnxcam.differences import Erf, Gelu
from onnxcam.emit import Emitter
from onnxcam.onnxfile import check, normalise
from onnxcam.vjp import RULES, Rule

RNG_SEED = 0
ONE_NODE = "node"


class ConvTranspose(OpRun):
    """torch's, cut to the output's size; onnx.reference 1.23 is wrong about groups and output_shape."""

    def _run(self, x, w, b=None, group=None, output_shape=None, auto_pad=None, **attributes):
        n = x.ndim - 2
        strides, extra = attributes["strides"] or [1] * n, attributes["output_padding"] or [0] * n
        dilations, pads = attributes["dilations"] or [1] * n, attributes["pads"] or [0] * 2 * n
        full = getattr(torch.nn.functional, f"conv_transpose{n}d")(
            *(torch.tensor(v.copy()) for v in (x, w)), None, strides, 0, 0, group, dilations
        ).numpy()
        for axis, step in enumerate(strides):
            begin = pads[axis]
            length = full.shape[2 + axis] + extra[axis]
            out = length - begin - pads[n + axis]
            if output_shape or auto_pad.startswith("SAME"):
                wanted = output_shape[axis] if output_shape else x.shape[2 + axis] * step
                total = max(length - wanted, 0)
                begin = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
                out = wanted if output_shape else length - total
            rest = [(0, 0)] * full.ndim
            rest[2 + axis] = (0, max(begin + out - full.shape[2 + axis], 0))
            full = np.pad(full, rest).take(range(begin, begin + out), axis=2 + axis)
        return (full if b is None else full + b.reshape(-1, *[1] * n),)


class HardSwish(OpRun):
    """x clip(x/6 + 1/2, 0, 1); onnx.reference goes through 1/6 in float32."""

    def _run(self, x):
        return ((x * np.clip(x / 6 + 0.5, 0, 1)).astype(x.dtype),)


NEW_OPS: list[type[OpRun]] = [HardSwish, ConvTranspose, Erf, Gelu]
"""What `reference` computes by our own classes; a test module of another domain's operators adds to it."""


def reference(model: onnx.ModelProto) -> onnx.reference.ReferenceEvaluator:
    """Return ONNX's reference evaluator for `model`; it computes in the dtype of its inputs."""
    return onnx.reference.ReferenceEvaluator(model, new_ops=NEW_OPS)


def check_vjp(
    op_type: str,
    inputs: Sequence["np.ndarray | None"],
    *,
    against: "Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] | None" = None,
    wrt: "Sequence[int] | None" = None,
    constant: Sequence[int] = (),
    outputs: Sequence[int] = (0,),
    count: int = 1,
    opset: int = 20,
    domain: str = "",
    rtol: "float | None" = None,
    ort: bool = True,
    ort_rtol: float = 1e-4,
    ort_opset: "int | None" = None,
    symbolic: bool = False,
    rules: "Mapping[tuple[str, str], Rule]" = RULES,
    **attributes: object,
) -> None:
    """Compare a rule's gradients with torch autograd (`against`) or, without it, with central differences.

    Both in float64, through ``onnx.reference``; then once more in float32 through onnxruntime.

    Args:
        op_type: the operator.
        inputs: its inputs in order; floating-point ones are differentiated. None: left out.
        against: ``f(*tensors)`` computes the same outputs in torch.
        wrt: inputs to differentiate; all floating-point ones that are not `constant` by default.
        constant: inputs that are initializers of the model instead of inputs.
        outputs: which of the node's outputs the gradient comes from.
        count: how many outputs the node has.
        opset: of the model.
        domain: of the operator.
        rtol: allowed relative error, 1e-9 against torch and 1e-6 against differences by default.
        ort: whether onnxruntime can run the operator.
        ort_rtol: allowed relative error there.
        ort_opset: of the float32 model, where onnxruntime does not know `opset`.
        symbolic: declare every dimension of every input as unknown until the run.
        rules: of the operators.
        attributes: of the node.
    """
    rng = np.random.default_rng(RNG_SEED)
    arrays = [None if a is None else np.asarray(a) for a in inputs]
    floats = [i for i, a in enumerate(arrays) if a is not None and a.dtype.kind == "f" and i not in constant]
    wrt = floats if wrt is None else list(wrt)
    arrays = [a if a is None or a.dtype.kind != "f" else a.astype(np.float64) for a in arrays]

    def build(dtype: type, differentiate: bool, opset: int = opset) -> onnx.ModelProto:
        asked = wrt if differentiate else []
        return _one_node_model(
            op_type, arrays, dtype, asked, constant, outputs, count, opset, domain, symbolic, attributes,
            [np.ndim(y) for y in ys] if differentiate else (), rules,
        )  # fmt: skip

    feeds = {f"x{i}": a for i, a in enumerate(arrays) if a is not None and i not in constant}
    forward = reference(build(np.float64, False))
    ys = forward.run([f"y{k}" for k in outputs], feeds)
    seeds = {f"seed{k}": rng.standard_normal(np.shape(y)) for k, y in zip(outputs, ys, strict=True)}
    if against is not None:
        expected = _by_torch(against, arrays, wrt, seeds, outputs, ys)
    else:
        expected = _by_differences(forward, feeds, wrt, seeds, outputs)
    tolerance = rtol if rtol is not None else 1e-9 if against is not None else 1e-6
    names = [f"dx{i}" for i in wrt]
    double = reference(build(np.float64, True)).run(names, {**feeds, **seeds})
    for i, got, want in zip(wrt, double, expected, strict=True):
        _assert_close(got, want, tolerance, f"{op_type} input {i}, float64")
    if ort:
        session = onnxruntime.InferenceSession(
            build(np.float32, True, ort_opset or opset).SerializeToString(), quiet()
        )
        given = {i.name for i in session.get_inputs()}
        single = {
            k: v.astype(np.float32) if v.dtype.kind == "f" else v
            for k, v in {**feeds, **seeds}.items()
            if k in given
        }
        for i, got, want in zip(wrt, session.run(names, single), expected, strict=True):
            _assert_close(got, want, ort_rtol, f"{op_type} input {i}, onnxruntime float32")


def gradients_in(
    dtype: type,
    op_type: str,
    inputs: Sequence[np.ndarray],
    seed: np.ndarray,
    opset: int = 20,
    **attributes: object,
) -> list[np.ndarray]:
    """Return a rule's gradients of all inputs for a given `seed`, in `dtype` by ``onnx.reference``."""
    model = _one_node_model(
        op_type, inputs, dtype, range(len(inputs)), (), (0,), 1, opset, "", False, attributes
    )
    feeds = {f"x{i}": np.asarray(a).astype(dtype) for i, a in enumerate(inputs)}
    names = [f"dx{i}" for i in range(len(inputs))]
    return reference(model).run(names, {**feeds, "seed0": np.asarray(seed).astype(dtype)})


def dtypes_of_gradients(
    op_type: str, shapes: Sequence[tuple[int, ...]], dtype: str, opset: int, **attributes: object
) -> set[str]:
    """Return the dtypes of a rule's gradients where all inputs are of `dtype`; onnx checks the graph."""
    inputs = [np.zeros(shape) for shape in shapes]
    narrow = ir.DataType[dtype.upper()].numpy()
    model = _one_node_model(
        op_type, inputs, narrow, range(len(inputs)), (), (0,), 1, opset, "", False, attributes
    )
    found = [output for output in model.graph.output if output.name.startswith("dx")]
    return {ir.DataType(output.type.tensor_type.elem_type).name.lower() for output in found}


def quiet() -> onnxruntime.SessionOptions:
    """Session options that keep warnings out of the test output, and the tests to one core each."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the L2 norm of the difference over that of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))


def _one_node_model(
    op_type,
    arrays,
    dtype,
    wrt,
    constant,
    outputs,
    count,
    opset,
    domain,
    symbolic,
    attributes,
    ranks=(),
    rules=RULES,
):
    arrays = [a if a is None or a.dtype.kind != "f" else a.astype(dtype) for a in arrays]
    names = ["" if a is None else f"x{i}" for i, a in enumerate(arrays)]
    node = onnx.helper.make_node(
        op_type, names, [f"y{k}" for k in range(count)], ONE_NODE, domain=domain, **attributes
    )
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [
            onnx.helper.make_tensor_value_info(
                f"x{i}",
                onnx.helper.np_dtype_to_tensor_dtype(a.dtype),
                [f"d{i}_{j}" for j in range(a.ndim)] if symbolic else a.shape,
            )
            for i, a in enumerate(arrays)
            if a is not None and i not in constant
        ],
        [onnx.helper.make_empty_tensor_value_info(f"y{k}") for k in outputs],
        [onnx.numpy_helper.from_array(arrays[i], f"x{i}") for i in constant],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    if domain:
        imports.append(onnx.helper.make_opsetid(domain, 1))
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    if not wrt:
        return model
    del model.graph.output[:]  # their types, which onnx would ask for, are known only to inference
    own = normalise(ir.from_proto(model))
    values = {v.name: v for n in own.graph for v in n.outputs} | {v.name: v for v in own.graph.inputs}
    op = Emitter(own.graph, opset, "test")
    totals: dict[str, ir.Value] = {}
    for position, k in enumerate(outputs):
        y = values[f"y{k}"]
        seed = ir.Value(
            name=f"seed{k}",
            shape=ir.Shape([None] * ranks[position]) if y.shape is None else y.shape,
            type=ir.TensorType(y.dtype or ir.DataType.from_numpy(np.dtype(dtype))),
        )
        own.graph.inputs.append(seed)
        for i, dx in zip(wrt, gradients(op, {y: seed}, [values[f"x{i}"] for i in wrt], rules), strict=True):
            assert dx is not None, f"no gradient reaches input {i} from output {k}"
            name = f"dx{i}"
            totals[name] = dx if name not in totals else op.Add(totals[name], dx)
    for name, value in totals.items():
        result = op.Identity(value)
        result.name = name
        result.shape = values["x" + name.removeprefix("dx")].shape
        own.graph.outputs.append(result)
    op.remove_dead([])
    for node in op.nodes:
        # onnxruntime-web asks for all of these. Weights of unknown size have no kernel_shape to write.
        if node.op_type in ("Conv", "ConvTranspose"):
            missing = {"strides", "dilations", "kernel_shape"} - node.attributes.keys()
            assert missing <= ({"kernel_shape"} if symbolic else set()), f"{node.name} lacks {missing}"
            assert node.attributes.keys() & {"pads", "auto_pad"}, node.name
    check(own)
    return ir.to_proto(own)


def _by_torch(against, arrays, wrt, seeds, outputs, ys):
    tensors = [None if a is None else torch.tensor(a, requires_grad=i in wrt) for i, a in enumerate(arrays)]
    found = against(*tensors)
    found = found if isinstance(found, tuple) else (found,)
    total = torch.zeros((), dtype=torch.float64)
    for k, y in zip(outputs, ys, strict=True):
        assert tuple(found[k].shape) == np.shape(y), (found[k].shape, np.shape(y))
        np.testing.assert_allclose(
            found[k].detach().numpy(), y, rtol=1e-6, atol=1e-9, err_msg="the forward differs"
        )
        total = total + (found[k] * torch.tensor(seeds[f"seed{k}"])).sum()
    total.backward()
    return [np.zeros(t.shape) if t.grad is None else t.grad.numpy() for t in (tensors[i] for i in wrt)]


def _by_differences(forward, feeds, wrt, seeds, outputs):
    def total(changed):
        ys = forward.run([f"y{k}" for k in outputs], changed)
        return sum(float(np.sum(y * seeds[f"seed{k}"])) for k, y in zip(outputs, ys, strict=True))

    results = []
    for i in wrt:
        x = feeds[f"x{i}"]
        found = np.zeros(x.shape)
        for at in itertools.product(*map(range, x.shape)):
            step = 1e-6 * max(1.0, abs(x[at]))
            up, down = x.copy(), x.copy()
            up[at] += step
            down[at] -= step
            rise = total({**feeds, f"x{i}": up}) - total({**feeds, f"x{i}": down})
            found[at] = rise / (up[at] - down[at])
        results.append(found)
    return results


def _assert_close(got, want, rtol, what):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    scale = max(np.abs(want).max(initial=0.0), 1e-12 if rtol < 1e-8 else 1e-6)
    worst = np.abs(got - want).max(initial=0.0)
    assert worst <= rtol * scale, f"{what}: off by {worst:.3g} of {scale:.3g}"
