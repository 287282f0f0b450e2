"""Little nets for the sweep over the gradient rules, each with one operator between a few harmless ones."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime

PICTURE, CLASSES = (1, 3, 8, 10), 5

_OPSET, _IR_VERSION = 20, 10

NETS = {
    # element by element; p is r + 2, above zero
    "Neg": "y = Neg(r)",
    "Abs": "y = Abs(r)",
    "Reciprocal": "y = Reciprocal(p)",
    "Sqrt": "y = Sqrt(p)",
    "Exp": "y = Exp(r)",
    "Log": "y = Log(p)",
    "Erf": "y = Erf(r)",
    "Sin": "y = Sin(r)",
    "Cos": "y = Cos(r)",
    "Tan": "y = Tan(r)",
    "Asin": "y = Asin(r)",
    "Acos": "y = Acos(r)",
    "Atan": "y = Atan(r)",
    "Sinh": "y = Sinh(r)",
    "Cosh": "y = Cosh(r)",
    "Asinh": "y = Asinh(r)",
    "Acosh": "y = Acosh(p)",
    "Atanh": "y = Atanh(r)",
    "Add, broadcast": "y = Add(r, v)",
    "Sub of itself": "q = ReduceMean<keepdims=1>(r, plane) y = Sub(r, q)",
    "Mul, broadcast": "q = ReduceMean<keepdims=1>(r, plane) y = Mul(r, q)",
    "Div": "q = ReduceMean<keepdims=1>(p, plane) y = Div(r, q)",
    "Mod, fmod": "y = Mod<fmod=1>(p, v)",
    "Pow 2": "y = Pow(r, two)",
    "Pow": "y = Pow(p, v)",
    "Sum": "y = Sum(r, v, p)",
    "Mean": "y = Mean(r, v, p)",
    "Max": "y = Max(r, v)",
    "Min": "y = Min(r, v)",
    "Where": "q = Greater(r, v) y = Where(q, r, p)",
    "Cast": "q = Cast<to=11>(r) s = Mul(q, q) y = Cast<to=1>(s)",
    # activation functions
    "Relu": "y = Relu(r)",
    "LeakyRelu": "y = LeakyRelu(r)",
    "PRelu": "y = PRelu(r, v)",
    "ThresholdedRelu": "y = ThresholdedRelu<alpha=0.1>(r)",
    "Clip": "y = Clip(r, low, high)",
    "Shrink": "y = Shrink<lambd=0.1>(r)",
    "Sigmoid": "y = Sigmoid(r)",
    "Tanh": "y = Tanh(r)",
    "HardSigmoid": "y = HardSigmoid(r)",
    "HardSwish": "y = HardSwish(r)",
    "Elu": "y = Elu(r)",
    "Celu": "y = Celu(r)",
    "Selu": "y = Selu(r)",
    "Gelu": "y = Gelu(r)",
    "Gelu, tanh": 'y = Gelu<approximate="tanh">(r)',
    "Softplus": "y = Softplus(r)",
    "Softsign": "y = Softsign(r)",
    "Mish": "y = Mish(r)",
    "Softmax": "y = Softmax<axis=1>(r)",
    "LogSoftmax": "y = LogSoftmax<axis=1>(r)",
    # convolution
    "Conv": "y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(r, k)",
    "Conv, strides": "y = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(r, k)",
    "Conv, depthwise": "y = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2], group=4>(r, kd)",
    "Conv, dilations": "y = Conv<kernel_shape=[3,3], pads=[2,2,2,2], dilations=[2,2]>(r, k)",
    "Conv, group": "y = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=2>(r, kg)",
    "Conv, SAME_UPPER": 'y = Conv<kernel_shape=[3,3], auto_pad="SAME_UPPER", strides=[2,2]>(r, k)',
    "Conv, weights computed": "q = Tanh(k) y = Conv<kernel_shape=[3,3]>(r, q)",
    "ConvTranspose": "y = ConvTranspose<kernel_shape=[3,3], strides=[2,2]>(r, k)",
    "ConvTranspose, group": "y = ConvTranspose<kernel_shape=[3,3], strides=[2,2], group=2>(r, kg)",
    "ConvTranspose, pads": """y = ConvTranspose<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1],
        output_padding=[1,1]>(r, k)""",
    "ConvTranspose, output_shape": """y = ConvTranspose<kernel_shape=[3,3], strides=[2,2],
        output_shape=[16,20]>(r, k)""",
    "Col2Im": "q = Reshape(r, columns) y = Col2Im(q, image, block)",
    # pooling
    "MaxPool": "y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)",
    "MaxPool, overlapping": "y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r)",
    "MaxPool, ceil_mode": "y = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(r)",
    "MaxPool, strides 1": "y = MaxPool<kernel_shape=[3,3], strides=[1,1], pads=[1,1,1,1]>(r)",
    "MaxPool, large": "y = MaxPool<kernel_shape=[5,5], strides=[1,1], pads=[2,2,2,2]>(r)",
    "MaxPool, dilations": "y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(r)",
    "MaxPool, SAME_UPPER": 'y = MaxPool<kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER">(r)',
    "MaxPool, ties": "q = Relu(r) y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(q)",
    "AveragePool": "y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(r)",
    "AveragePool, pads": "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r)",
    "AveragePool, count_include_pad": """y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1],
        count_include_pad=1>(r)""",
    "LpPool": "y = LpPool<kernel_shape=[2,2], strides=[2,2]>(r)",
    "GlobalAveragePool": "q = GlobalAveragePool(r) y = Mul(q, q)",
    "GlobalMaxPool": "y = GlobalMaxPool(r)",
    "GlobalLpPool": "y = GlobalLpPool(r)",
    # normalisation
    "BatchNormalization": "y = BatchNormalization(r, c4, d4, d4, c4)",
    "LayerNormalization": "y = LayerNormalization<axis=3>(r, c10, d10)",
    "InstanceNormalization": "y = InstanceNormalization(r, c4, d4)",
    "LRN": "y = LRN<size=3>(r)",
    "LpNormalization": "y = LpNormalization<axis=1>(r)",
    "MeanVarianceNormalization": "y = MeanVarianceNormalization<axes=[2,3]>(r)",
    # reductions
    "ReduceSum": "y = ReduceSum(r, plane)",
    "ReduceMean": "y = ReduceMean(r, plane)",
    "ReduceMax": "y = ReduceMax(r, plane)",
    "ReduceMin": "y = ReduceMin(r, plane)",
    "ReduceL1": "y = ReduceL1(r, plane)",
    "ReduceL2": "y = ReduceL2(r, plane)",
    "ReduceSumSquare": "y = ReduceSumSquare(r, plane)",
    "ReduceLogSum": "y = ReduceLogSum(p, plane)",
    "ReduceLogSumExp": "y = ReduceLogSumExp(r, plane)",
    "ReduceProd": "y = ReduceProd(p, last)",
    "CumSum": "y = CumSum(r, axis3)",
    # products of matrices
    "MatMul": "y = MatMul(r, m)",
    "MatMul, square": "y = MatMul(r, m10)",
    "MatMul of itself": "q = Transpose<perm=[0,1,3,2]>(r) s = MatMul(r, q) y = Softmax(s)",
    "Gemm": "q = Flatten(r) y = Gemm<transB=1, alpha=0.5>(q, g, c6)",
    "Gemm, square": "q = Flatten<axis=3>(r) s = Gemm(q, m10) y = Reshape(s, whole)",
    "Einsum": 'y = Einsum<equation="nchw,wv->nchv">(r, m)',
    "Det": "q = Slice(r, zero, eight, last) y = Det(q)",
    # moving elements
    "Reshape": "q = Reshape(r, tokens) y = Softmax(q)",
    "Transpose": "q = Transpose<perm=[0,2,3,1]>(r) y = Softmax(q)",
    "Squeeze, Unsqueeze": "q = Unsqueeze(r, one) s = Squeeze(q, one) y = Softmax(s)",
    "Expand": "q = ReduceMean<keepdims=1>(r, last) y = Expand(q, whole)",
    "Tile": "y = Tile(r, repeats)",
    "Concat": "y = Concat<axis=1>(r, p)",
    "Split": "q, s = Split<axis=1, num_outputs=2>(r) y = Mul(q, s)",
    "Split, one read": "q, s = Split<axis=1, num_outputs=2>(r) y = Tanh(q)",
    "Pad": "y = Pad(r, pads)",
    "Pad, negative": "y = Pad(r, cuts)",
    "Pad, reflect": 'y = Pad<mode="reflect">(r, pads)',
    "Pad, edge": 'y = Pad<mode="edge">(r, pads)',
    "DepthToSpace": "y = DepthToSpace<blocksize=2>(r)",
    "DepthToSpace, CRD": 'y = DepthToSpace<blocksize=2, mode="CRD">(r)',
    "SpaceToDepth": "y = SpaceToDepth<blocksize=2>(r)",
    "Trilu": "y = Trilu<upper=0>(r)",
    "ReverseSequence": "y = ReverseSequence<batch_axis=0, time_axis=1>(r, three)",
    "CenterCropPad": "y = CenterCropPad<axes=[2,3]>(r, image)",
    # picking elements
    "Gather, one": "y = Gather<axis=1>(r, first)",
    "Gather": "y = Gather<axis=2>(r, several)",
    "Slice": "y = Slice(r, one, eight, last)",
    "Slice, steps": "y = Slice(r, one, eight, last, step2)",
    "Slice, backward": "y = Slice(r, eight, zero, last, step_1)",
    "GatherElements": "y = GatherElements<axis=3>(r, places)",
    "GatherND": "y = GatherND(r, coordinates)",
    "ScatterElements": "y = ScatterElements<axis=3>(r, places, us)",
    'ScatterElements, "add"': 'y = ScatterElements<axis=3, reduction="add">(r, places, us)',
    "ScatterND": "y = ScatterND(r, coordinates, un)",
    "Compress": "y = Compress<axis=3>(r, kept)",
    "TopK": "y, i = TopK<axis=3>(r, three)",
    # resampling
    "Resize, nearest": 'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric">(r, , scales)',
    "Resize, linear": 'y = Resize<mode="linear">(r, , scales)',
    "Resize, linear, sizes": 'y = Resize<mode="linear">(r, , , sizes)',
    "Resize, align_corners": """y = Resize<mode="linear", coordinate_transformation_mode="align_corners">
        (r, , scales)""",
    "Resize, cubic": 'y = Resize<mode="cubic">(r, , scales)',
    "Resize, antialias": 'y = Resize<mode="linear", antialias=1>(r, , , sizes)',
    "GridSample": "y = GridSample(r, grid)",
    # recurrent
    "RNN": "q = Reshape(r, sequence) y = RNN<hidden_size=3>(q, rw, rr)",
    "GRU": "q = Reshape(r, sequence) y = GRU<hidden_size=3>(q, gw, gr)",
    "LSTM": "q = Reshape(r, sequence) y = LSTM<hidden_size=3>(q, lw, lr)",
}  # fmt: skip
"""What makes y of r [1,4,8,10], by the operator and what is special about it."""

_RANDOM = {
    "w": (4, 3, 3, 3),
    "v": (4, 1, 1), "k": (4, 4, 3, 3), "kd": (4, 1, 3, 3), "kg": (4, 2, 3, 3), "d4": (4,), "d10": (10,),
    "m": (10, 6), "m10": (10, 10), "g": (6, 320), "c6": (6,), "us": (1, 4, 8, 3), "un": (2, 8, 10),
    "rw": (1, 3, 32), "rr": (1, 3, 3), "gw": (1, 9, 32), "gr": (1, 9, 3), "lw": (1, 12, 32), "lr": (1, 12, 3),
}  # fmt: skip

_GIVEN = {
    "two": np.float32(2), "low": np.float32(-0.3), "high": np.float32(0.5),
    "c4": np.linspace(0.5, 2, 4, dtype=np.float32), "c10": np.linspace(0.5, 2, 10, dtype=np.float32),
    "scales": np.array([1, 1, 2, 1.5], np.float32),
    "plane": [2, 3], "last": [3], "zero": [0], "one": [1], "eight": [8], "three": [3],
    "step2": [2], "step_1": [-1], "first": np.int64(1), "axis3": np.int64(3), "several": [1, 5, 1],
    "columns": [1, 4, 80], "image": [9, 11], "block": [2, 2], "tokens": [1, 4, 80], "whole": [1, 4, 8, 10],
    "sequence": [10, 1, 32], "repeats": [1, 2, 1, 3], "pads": [0, 0, 1, 2, 0, 0, 2, 1],
    "cuts": [0, 0, -1, 2, 0, 0, 2, -1], "sizes": [1, 4, 5, 7],
    "places": np.arange(96).reshape(1, 4, 8, 3) * 3 % 10, "coordinates": [[0, 1], [0, 3]],
    "kept": np.arange(10) % 3 == 0,
    "grid": np.random.default_rng(1).uniform(-1.1, 1.1, (1, 5, 6, 2)).astype(np.float32),
}  # fmt: skip


def net(name: str) -> onnx.ModelProto:
    """Build one of `NETS`: picture x [1,3,8,10], scores [1,5]."""
    model = onnx.parser.parse_model(f"""<ir_version: {_IR_VERSION}, opset_import: ["" : {_OPSET}]>
        net (float[1,3,8,10] x) => (scores) {{
            c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
            t = Tanh(c)
            u = Sigmoid(c)
            r = Mul(t, u)
            p = Add(r, two)
            {NETS[name]}
            f = Flatten(y)
            scores = MatMul(f, fc)
        }}""")
    nodes = model.graph.node
    if not any("p" in node.input for node in nodes):
        nodes.remove(next(node for node in nodes if "p" in node.output))
    rng = np.random.default_rng(0)
    made = {"", "x", "fc", *(out for node in nodes for out in node.output)}
    for key in dict.fromkeys(key for node in nodes for key in node.input if key not in made):
        array = np.asarray(_GIVEN[key] if key in _GIVEN else rng.standard_normal(_RANDOM[key]) * 0.2)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    model.graph.output[0].CopyFrom(onnx.helper.make_empty_tensor_value_info("f"))
    multiply = nodes.pop()
    session = onnxruntime.InferenceSession(model.SerializeToString())
    rows, width = session.run(["f"], {"x": np.zeros(PICTURE, np.float32)})[0].shape
    nodes.append(multiply)
    fc = rng.standard_normal((width, CLASSES)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(fc, "fc"))
    kind = onnx.TensorProto.FLOAT
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("scores", kind, [rows, CLASSES]))
    onnx.checker.check_model(model, full_check=True)
    return model
