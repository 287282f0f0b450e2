"""The ONNX project's own node tests, each turned into a test of the operator's gradient rule.

Applicable is every node test of a single operator that has a rule and at least one floating-point
input and output; a test of an operator written out in others is none of its own. The gradient graph
is made and checked in float32, or in the dtype of the test where the operator has no float32, and
computed in double; the gradient of a random combination of the outputs is compared with central
differences, for each element of a small input and along random directions for a large one.
"""

import functools
import time
import warnings

import numpy as np
import onnx
import onnx_ir as ir
from onnx.backend.test import loader
from onnx.reference.ops import op_causal_conv_with_state

from onnxcam.backward import gradients
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import normalise
from onnxcam.vjp import RULES
from tests import checks
from tests.checks import reference
from tests.vjp import test_norm, test_pool, test_resize

SMALL = 12
"""Inputs of up to this many elements are checked element by element."""

DIRECTIONS = 2
"""Along so many random directions larger inputs are checked."""

STEP = 1e-6
TOLERANCE = 2e-6

FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)

REPAIRED = (test_norm, test_pool, test_resize)
"""They teach `reference` to compute in double what onnx.reference computes in float32 or wrongly."""

AT_A_KINK = {
    "test_elu_example": "x is 0",
    "test_gridsample_aligncorners_true": "grid points on elements",
    "test_gridsample_bilinear": "grid points on elements",
    "test_gridsample_bilinear_align_corners_1_additional_1": "grid points on elements",
    "test_gridsample_volumetric_bilinear_align_corners_0": "grid points on elements",
    "test_gridsample_volumetric_bilinear_align_corners_1": "grid points on elements",
    "test_hardmax_one_hot": "a tie",
    "test_leakyrelu_example": "x is 0",
    "test_maxpool_3d_dilations": "ties",
    "test_maxpool_3d_dilations_use_ref_impl": "ties",
    "test_reduce_min_default_axes_keepdims_example": "a tie",
    "test_selu_example": "x is 0",
    "test_thresholdedrelu_example": "x is the threshold",
}
"""Tests at a point without a derivative, and why: there the differences to both sides must disagree."""

EXCLUDED = {
    "test_acosh_example": "x is 1, where the slope is infinite",
    "test_batchnorm_epsilon_training_mode": "training mode is refused",
    "test_batchnorm_example_training_mode": "training mode is refused",
    "test_l2normalization_axis_0": "a vector of zeros, where the operator jumps",
    "test_maxunpool_export_with_output_shape": "the rule counts indices in the output, as onnxruntime does; "
    "onnx counts them in the smaller output that there would be without output_shape",
    "test_mod_float_edge_cases_fmod_0_float16": "infinities and values that are no numbers",
    "test_mod_float_edge_cases_fmod_0_float32": "infinities and values that are no numbers",
    "test_mod_float_edge_cases_fmod_0_float64": "infinities and values that are no numbers",
    "test_pow": "fractional powers of negative numbers are no numbers",
    "test_training_dropout": "training mode is refused",
    "test_training_dropout_default": "training mode is refused",
    "test_training_dropout_default_mask": "training mode is refused",
    "test_training_dropout_mask": "training mode is refused",
    "test_training_dropout_zero_ratio": "training mode is refused",
    "test_training_dropout_zero_ratio_mask": "training mode is refused",
}
"""Tests that are applicable but not run, and why."""


class CausalConvWithState(op_causal_conv_with_state.CausalConvWithState):
    """With SiLU in double; onnx.reference 1.23 computes it in float32."""

    def _run(self, *inputs, activation=None):
        y, state = super()._run(*inputs, activation="none")
        return y / (1 + np.exp(-y)) if activation in ("silu", "swish") else y, state


checks.NEW_OPS += [CausalConvWithState]


def test_node_tests():
    begin, passed, failures = time.time(), [], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = {case.name: case for case in loader.load_model_tests(kind="node")}
        applicable = [name for name, case in cases.items() if is_applicable(case)]
        for name in applicable:
            if name not in EXCLUDED:
                try:
                    check(cases[name])
                    passed.append(name)
                except Exception as error:
                    failures[name] = f"{type(error).__name__}: {error}"
    operators = {cases[name].model.graph.node[0].op_type for name in passed}
    print(
        f"\n{len(passed)} of {len(applicable)} applicable node tests pass, {len(AT_A_KINK)} of them "
        f"at a kink; {len(EXCLUDED)} are excluded; {len(operators)} operators, {time.time() - begin:.0f} s"
    )
    assert not (EXCLUDED | AT_A_KINK).keys() - set(applicable), "an exclusion names no applicable test"
    assert not failures, "\n".join(f"{name}: {message}" for name, message in sorted(failures.items()))


def is_applicable(case):
    graph = case.model.graph
    if len(graph.node) != 1 or not case.data_sets or case.name.endswith("_expanded"):
        return False
    (node,) = graph.node
    values = [*graph.input, *graph.output]
    if (node.domain, node.op_type) not in RULES or not all(v.type.HasField("tensor_type") for v in values):
        return False
    return any(is_float(v) for v in graph.input) and any(is_float(v) for v in graph.output)


def is_float(info):
    return info.type.tensor_type.elem_type in FLOATS


def check(case):
    rng = np.random.default_rng(0)
    (node,) = case.model.graph.node
    model = retyped(case.model, onnx.TensorProto.FLOAT)
    names = [v.name for v in model.graph.input]
    floats = [v.name for v in model.graph.input if is_float(v)]
    feeds = dict(zip(names, map(as_array, case.data_sets[0][0]), strict=True))
    feeds = {k: v.astype(np.float64) if k in floats else v for k, v in feeds.items()}
    if node.op_type in ("Cast", "CastLike"):
        feeds = {k: np.nan_to_num(v, nan=0.5, posinf=2.0, neginf=-2.0) for k, v in feeds.items()}
    forward = reference(in_double(model))
    outputs = [v.name for v in model.graph.output if is_float(v)]
    ys = dict(zip(outputs, forward.run(outputs, feeds), strict=True))
    seeds = {name: rng.standard_normal(np.shape(y)) for name, y in ys.items()}
    outputs, gradients = analytic(model, feeds, floats, outputs, seeds)
    schema = onnx.defs.get_schema(node.op_type, case.model.opset_import[0].version, node.domain)

    def score(changed):
        found = forward.run(outputs, {**feeds, **changed})
        return sum(float(np.sum(seeds[name] * y)) for name, y in zip(outputs, found, strict=True))

    here, kinks = score({}), 0
    for name, got in gradients.items():
        x = feeds[name]
        if got is None and not is_differentiable(schema, list(node.input).index(name)):
            continue
        got = np.zeros(x.shape) if got is None else got
        assert got.shape == x.shape, f"the gradient of {name} has shape {got.shape}, not {x.shape}"
        scale = max(np.sqrt(np.mean(np.square(got))) if got.size else 0.0, 1e-3)
        for direction in directions(x.shape, rng):
            ahead = (score({name: x + STEP * direction}) - here) / STEP
            behind = (here - score({name: x - STEP * direction})) / STEP
            want, have = (ahead + behind) / 2, float(np.sum(got * direction))
            allowed = TOLERANCE * scale * max(1.0, np.linalg.norm(direction))
            if abs(have - want) > allowed and case.name in AT_A_KINK and abs(ahead - behind) > 1000 * allowed:
                kinks += 1
                continue
            assert abs(have - want) <= allowed, f"input {name}: {have:.9g}, differences say {want:.9g}"
    assert kinks or case.name not in AT_A_KINK, "there is no kink here"


def is_differentiable(schema, index):
    category = schema.inputs[min(index, len(schema.inputs) - 1)].differentiation_category
    return category == onnx.defs.OpSchema.DifferentiationCategory.Differentiable


def directions(shape, rng):
    size = int(np.prod(shape))
    if size <= SMALL:
        return np.eye(size).reshape(size, *shape)
    return [rng.standard_normal(shape) for _ in range(DIRECTIONS)]


def as_array(data):
    return onnx.numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else np.asarray(data)


def retyped(model, dtype):
    """Return a copy whose floating-point inputs, outputs, casts and constants are of `dtype`."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    own.ir_version = max(own.ir_version, 8)
    for info in [*own.graph.input, *own.graph.output, *own.graph.value_info]:
        if is_float(info):
            info.type.tensor_type.elem_type = dtype
    retype_nodes(own.graph, dtype)
    return own


def retype_nodes(graph, dtype):
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    for tensor in graph.initializer:
        retype_tensor(tensor, dtype, kind)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                retype_tensor(attribute.t, dtype, kind)
            elif attribute.HasField("g"):
                retype_nodes(attribute.g, dtype)
            elif (
                attribute.name in ("to", "dtype", "softmax_precision", "output_dtype")
                and attribute.i in FLOATS
            ):
                attribute.i = dtype
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = attribute.floats if attribute.name == "value_floats" else attribute.f
                array = np.array(values, np.float32).astype(kind)
                attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array)))


def retype_tensor(tensor, dtype, kind):
    if tensor.data_type in FLOATS and tensor.data_type != dtype:
        array = onnx.numpy_helper.to_array(tensor).astype(kind)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def in_double(model):
    return retyped(model, onnx.TensorProto.DOUBLE)


def analytic(model, feeds, floats, outputs, seeds):
    """Return which outputs were differentiated, and the gradients of `floats`.

    A rule may ask for integer inputs that are constants, and know only the gradient of the first output.
    """
    refusal = None
    for chosen, constants in [(outputs, False), (outputs, True), (outputs[:1], False), (outputs[:1], True)]:
        try:
            return chosen, gradients_of(model, feeds, floats, chosen, seeds, constants)
        except OnnxcamError as error:
            refusal = refusal or error
    raise refusal


def gradients_of(model, feeds, floats, outputs, seeds, constants):
    own = onnx.ModelProto()
    own.CopyFrom(model)
    fixed = {name: v for name, v in feeds.items() if name not in floats} if constants else {}
    for info in list(own.graph.input):
        if info.name in fixed:
            own.graph.input.remove(info)
    own.graph.initializer.extend(onnx.numpy_helper.from_array(v, name) for name, v in fixed.items())
    normal = normalise(ir.from_proto(own))
    graph = normal.graph
    op = Emitter(graph, graph.opset_imports[""], "test")
    values = {v.name: v for v in [*graph.inputs, *(v for node in graph for v in node.outputs)]}
    terms = []
    for name in outputs:
        seed = ir.Value(name=f"seed/{name}", shape=ir.Shape(seeds[name].shape), type=values[name].type)
        graph.inputs.append(seed)
        terms.append(op.ReduceSum(op.Mul(values[name], seed), keepdims=0))
    total = functools.reduce(op.Add, terms)
    one = op.constant(np.array(1, total.dtype.numpy()))
    found = dict(zip(floats, gradients(op, {total: one}, [values[name] for name in floats]), strict=True))
    del graph.outputs[:]
    for name, dx in found.items():
        if dx is not None:
            result = op.Identity(dx)
            result.name = f"gradient/{name}"
            result.shape = values[name].shape
            graph.outputs.append(result)
    op.remove_dead([])
    asked, given = [v.name for v in graph.outputs], {v.name for v in graph.inputs}
    everything = {**feeds, **{f"seed/{name}": seeds[name] for name in outputs}}
    evaluator = reference(in_double(ir.to_proto(normal)))
    results = evaluator.run(asked, {k: v for k, v in everything.items() if k in given})
    by_name = dict(zip(asked, results, strict=True))
    return {name: by_name.get(f"gradient/{name}") for name in floats}
