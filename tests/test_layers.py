import ast

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcam import layers
from onnxcam.attaching import attach, prepared
from onnxcam.errors import OnnxcamError
from tests import graphs
from tests.graphs import build, explained, picture, run
from tests.test_models import MODELS

CONV = "Conv<kernel_shape=[3,3], pads=[1,1,1,1]>"
WEIGHTS = """<T[4,3,3,3] w, T[4,4,3,3] v, T[4,4,1,1] u, T[5,4,1,1] k, T[4,5] fc, T[320,6] flat, T[6,5] fc2,
 T[5] b, T[4] s, T[4] m, T[4] q, int64[2] plane = {2, 3}, int64[2] to = {0, -1}>"""
BODY = f"c = {CONV}(x, w) r = Relu(c) "
END = " p = GlobalAveragePool({}) f = Flatten(p) scores = MatMul(f, fc)"
HEADS = {
    "GAP, Flatten, Gemm": (BODY + "p = GlobalAveragePool(r) f = Flatten(p) scores = Gemm(f, fc, b)", "r"),
    "mean, MatMul, Add": (
        BODY + "p = ReduceMean<keepdims=0>(r, plane) z = MatMul(p, fc) scores = Add(z, b)",
        "r",
    ),
    "reshape": (BODY + "p = GlobalAveragePool(r) f = Reshape(p, to) scores = MatMul(f, fc)", "r"),
    "1x1 convolution, pooling": (
        BODY + "d = Conv(r, k) e = Relu(d) p = GlobalAveragePool(e) f = Flatten(p) scores = Softmax(f)",
        "r",
    ),
    "pooling, 1x1 convolution": (BODY + "p = GlobalAveragePool(r) k1 = Conv(p, k) scores = Flatten(k1)", "r"),
    "pooling over the kernel": (
        BODY + "p = AveragePool<kernel_shape=[8,10]>(r) f = Flatten(p) scores = MatMul(f, fc)",
        "r",
    ),
    "flattened map": (BODY + "f = Flatten(r) g = MatMul(f, flat) h = Relu(g) scores = MatMul(h, fc2)", "r"),
    "max-pooled, flattened map": (
        BODY + f"d = {CONV}(r, v) y = Identity(d) f = Flatten(y) g = MatMul(f, flat) scores = MatMul(g, fc2)",
        "y",
    ),
    "squeeze and excitation": (
        BODY + "g = GlobalAveragePool(r) e = Conv(g, u) i = Sigmoid(e) o = Mul(r, i)" + END.format("o"),
        "o",
    ),
    "normalised after pooling": (
        BODY
        + """p = GlobalAveragePool(r) n = BatchNormalization(p, s, m, m, q) f = Flatten(n)
        scores = MatMul(f, fc)""",
        "r",
    ),
    "hidden layer in the head": (
        BODY
        + "p = GlobalAveragePool(r) e = Conv(p, u) h = HardSwish(e) f = Flatten(h) scores = MatMul(f, fc)",
        "r",
    ),
    "residual": (BODY + f"d = {CONV}(r, v) e = Relu(d) o = Add(e, r)" + END.format("o"), "o"),
    "dropout": (BODY + "y = Dropout(r)" + END.format("y"), "y"),
}


def head(name, size="8,10"):
    return build(f"(T[N,3,{size}] x) => (T[N,5] scores) {WEIGHTS} {{ {HEADS[name][0]} }}", q=np.ones(4))


def parts(model, scores=None):
    model = prepared(model)
    picture = layers.picture(model)
    return model, picture, layers.scores(model, scores)


def default(model):
    _, source, found = parts(model)
    return layers.default(layers.explainable(source, found.logits), source, found.logits).name


@pytest.mark.parametrize("name", HEADS)
def test_the_default_is_the_last_map_before_the_head(name):
    assert default(head(name)) == HEADS[name][1]


@pytest.mark.parametrize("name", [n for n in HEADS if "kernel" not in n and "flattened" not in n])
def test_the_default_at_a_size_that_is_not_known(name):
    assert default(head(name, "H,W")) == HEADS[name][1]


@pytest.mark.parametrize(
    ("name", "layer", "operator"),
    [
        ("efficientnet_lite0.onnx", "hardtanh_32", "Clip"),
        ("pp_lcnet_orientation.onnx", "p2o.pd_op.hardswish.26.0", "HardSwish"),
        ("squeezenet1_1.onnx", "fire9/concat", "Concat"),
    ],
)
def test_the_default_of_real_models(name, layer, operator):
    _, source, found = parts(MODELS / name)
    listed = layers.explainable(source, found.logits)
    chosen = layers.default(listed, source, found.logits)
    assert (chosen.name, chosen.operator) == (layer, operator)
    assert chosen.shape[2:] in ([7, 7], [13, 13])
    assert len({each.name for each in listed}) == len(listed)


def test_explainable_layers_are_listed_in_order():
    _, source, found = parts(build(graphs.RICH, **graphs.RICH_WEIGHTS))
    listed = layers.explainable(source, found.logits)
    names = ["c1", "n1", "r1", "m1", "c2", "h2", "c3", "s3", "h3", "cat", "a", "se", "res", "r6"]
    assert sorted(each.name for each in listed) == sorted(names)
    positions = [each.name for each in listed]
    for before, after in (
        ("c1", "n1"),
        ("m1", "c2"),
        ("c3", "h3"),
        ("s3", "h3"),
        ("cat", "a"),
        ("a", "se"),
        ("se", "res"),
    ):
        assert positions.index(before) < positions.index(after)
    assert listed[0].shape == ["N", 8, 13, 14]
    assert (listed[0].operator, listed[0].node, listed[0].module) == ("Conv", "Conv_0", None)


# The way a layer is called


def with_names(names, **metadata):
    model = build(graphs.DEEP)
    for node, name in zip(model.graph.node, names, strict=False):
        node.name = name
    for node, scope in zip(model.graph.node, metadata.get("scopes", []), strict=False):
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scope))
    return model


def found(model, name):
    model, source, scores = parts(model)
    return layers.find(model, name, source, scores.logits)


TORCHSCRIPT = [
    "/stem/Conv",
    "/layer1/layer1.0/act/Sigmoid",
    "/layer4/layer4.0/downsample/downsample.0/Conv",
    "/layer4/layer4.0/Relu",
]
DYNAMO = [
    ["", "stem", "conv2d"],
    ["", "layer1", "layer1.0", "layer1.0.act", "sigmoid"],
    ["", "layer4", "layer4.0", "layer4.0.downsample", "layer4.0.downsample.0", "conv2d_1"],
    ["", "layer4", "layer4.0", "relu"],
    ["", "mean"],
]


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize(
    ("name", "value", "module"),
    [
        ("stem", "c", "stem"),
        ("layer1", "r", "layer1.0.act"),
        ("layer1.0", "r", "layer1.0.act"),
        ("layer1.0.act", "r", "layer1.0.act"),
        ("layer4.0.downsample.0", "d", "layer4.0.downsample.0"),
        ("layer4.0.downsample", "d", "layer4.0.downsample.0"),
        ("layer4.0", "s", "layer4.0"),
        ("layer4", "s", "layer4.0"),
        ("r", "r", "layer1.0.act"),
    ],
)
def test_module_paths(exporter, name, value, module):
    model = with_names(TORCHSCRIPT) if exporter == "torchscript" else with_names([], scopes=DYNAMO)
    layer = found(model, name)
    assert (layer.name, layer.module) == (value, module)


def test_a_module_of_several_outputs_is_refused():
    model = build(
        f"""(T[N,3,8,10] x) => (T[N,5] scores) {WEIGHTS}
        {{ c = {CONV}(x, w) r = Relu(c) o = Sigmoid(c) y = Mul(r, o) {END.format("y")} }}"""
    )
    for node in list(model.graph.node)[1:3]:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'gate', 'of']")
    with pytest.raises(OnnxcamError, match="module 'gate' gives several values; name one of them: 'r', 'o'"):
        attach(model, layer="gate")


def test_a_value_that_does_not_begin_with_the_batch_is_no_map():
    model = build(
        f"""(T[N,3,8,10] x) => (T[N,5] scores) {WEIGHTS}
        {{ c = {CONV}(x, w) t = Transpose<perm=[2,0,1,3]>(c) r = Relu(t) y = Transpose<perm=[1,2,0,3]>(r)
        {END.format("y")} }}"""
    )
    with pytest.raises(OnnxcamError, match=r"layer 'r' is \[8,N,4,10\]; a map needs"):
        attach(model, layer="r")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/blocks/blocks.0/blocks.0.0/conv_pw/Conv", "blocks.0.0.conv_pw"),
        ("/features/features.12/features.12.1/Relu", "features.12.1"),
        ("/list.0/downsample/downsample.0/Conv", "list.0.downsample.0"),
        ("/layer1/layer10/Conv", "layer1.layer10"),
        ("/ReduceMean", None),
        ("Conv_7", None),
        ("a/b/Conv", None),
        ("", None),
    ],
)
def test_module_paths_in_the_names_of_torchs_torchscript_exporter(name, path):
    assert layers.module_path(ir.Node("", "Conv", [], name=name)) == path


@pytest.mark.parametrize("scopes", ["['', 'relu']", "['relu']", "[]", "not a list", "{'a': 1}", "['a', '"])
def test_scopes_without_a_module(scopes):
    node = ir.Node("", "Relu", [], name="/layer/Relu", metadata_props={"pkg.torch.onnx.name_scopes": scopes})
    assert layers.module_path(node) is None
    if scopes.startswith("['',"):
        ast.literal_eval(scopes)


def test_a_module_whose_normalisation_was_folded_is_found_by_its_weights():
    model = with_names([], scopes=[["", "layer1", "layer1.bn1", "batch_norm"]])
    for node in model.graph.node:
        node.input[:] = ["layer1.conv1.weight" if name == "w" else name for name in node.input]
    next(i for i in model.graph.initializer if i.name == "w").name = "layer1.conv1.weight"
    assert found(model, "layer1.conv1").name == "c"
    assert found(model, "layer1.bn1").name == "c"


def test_a_node_name_and_a_value_name():
    model = with_names(["first", "r"])  # the node called "r" computes the value "r"
    model.graph.node[0].name = "s"
    assert found(model, "s").name == "s", "a value comes before a node of the same name"
    assert found(with_names(["first"]), "first").name == "c"
    assert found(build(graphs.DEEP), "x").operator == "Input"


def test_the_layer_is_the_one_whose_activations_are_emitted():
    model = with_names(TORCHSCRIPT)
    got = run(explained(model, layer="layer4.0.downsample"), picture(1))
    assert got["cam_activations"].shape == (1, 6, 4, 5)
    assert got["cam_activations"].min() < 0, "before the Relu"


SIDE = """(T[N,3,8,10] x) => (T[N,5] scores, T[N,4,8,10] side)
<T[4,3,3,3] w, T[4,5] fc, T[1,4,8,10] table, T[1,5,8,10] wide, int64[4] unit = {-1, 5, 1, 1}>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    logits = MatMul(f, fc)
    q = Softmax(logits)
    scores = Identity(q)
    plane = Reshape(scores, unit)
    late = Mul(plane, wide)
    side = Mul(r, table)
    still = Mul(table, table)
    sh = Shape(x)
    h = Cast<to=1>(sh)
    ha = ReduceSum(h)
    hm = Mul(table, ha)
}"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("late", "layer 'late' comes after the scores; choose one before them"),
        ("logits", "layer 'logits' comes after the scores"),
        ("scores", "layer 'scores' comes after the scores"),
        ("side", "layer 'side' does not influence the scores"),
        ("still", "layer 'still' does not depend on the picture"),
        ("hm", "layer 'hm' does not depend on the picture"),
        ("p", r"layer 'p' is \[N,4,1,1\]; a map needs an activation"),
        ("f", r"layer 'f' is \[N,4\]; a map needs"),
        ("sh", "layer 'sh' does not depend on the picture"),
        ("w", "no layer 'w'; 'onnxcam layers' lists"),
        ("lates", r"no layer 'lates' \(did you mean 'late'"),
        ("Relu1", r"no layer 'Relu1' \(did you mean 'Relu_1'"),
        ("", "no layer ''"),
    ],
)
def test_layers_that_cannot_be_explained(name, message):
    with pytest.raises(OnnxcamError, match=message) as caught:
        attach(build(SIDE), layer=name)
    assert "\n" not in str(caught.value)


def test_near_module_paths_are_suggested():
    with pytest.raises(OnnxcamError, match=r"\(did you mean 'layer4.0.downsample.0'"):
        attach(with_names(TORCHSCRIPT), layer="layer4.0.downsampl.0")


def test_no_map_at_all():
    model = build(
        "(T[N,3,8,10] x) => (T[N,5] scores) <T[240,5] fc> { f = Flatten(x) scores = MatMul(f, fc) }"
    )
    with pytest.raises(OnnxcamError, match=r"no feature map .* before its scores; name a layer with --layer"):
        attach(model)
    assert attach(model, layer="x")


# The picture and the scores


def inputs(text, outputs="T[N,5] scores"):
    return build(
        f"""({text}) => ({outputs}) <T[4,3,3,3] w, T[4,5] fc>
        {{ c = Conv(x, w) p = GlobalAveragePool(c) f = Flatten(p) scores = MatMul(f, fc) }}"""
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "T[N,3,8,10] x, T[N,1,8,10] mask",
            r"2 image-like inputs \('x', 'mask'\); onnxcam explains models with exactly one",
        ),
        ("uint8[N,3,8,10] x", r"no image-like input .*its inputs: 'x' \[N,3,8,10\]"),
        ("T[3,8] x", r"no image-like input .*its inputs: 'x' \[3,8\]"),
    ],
)
def test_the_wrong_number_of_pictures(text, message):
    model = build(
        f"({text}) => (T[N,5] scores) <T[N2,5] z> {{ scores = Identity(z) }}".replace(
            "<T[N2,5] z>", "<T[2,5] z>"
        )
    )
    with pytest.raises(OnnxcamError, match=message):
        attach(model)


def test_other_inputs_do_not_matter():
    model = inputs("T[N,3,8,10] x, T[N,7] meta, int64[1] flag")
    assert parts(model)[1].name == "x"


def several(*outputs):
    body = """{ c = Conv(x, w) p = GlobalAveragePool(c) f = Flatten(p) scores = MatMul(f, fc)
        more = MatMul(f, fc)
        top, which = TopK(scores, two) map = Identity(c) flat = ReduceSum<keepdims=0>(f, two) }"""
    return build(
        f"(T[N,3,8,10] x) => ({', '.join(outputs)}) <T[4,3,3,3] w, T[4,5] fc, int64[1] two = {{1}}> {body}"
    )


SCORES, MORE, MAP, WHICH, FLAT = (
    "T[N,5] scores",
    "T[N,5] more",
    "T[N,4,6,8] map",
    "int64[N,1] which",
    "T[N] flat",
)


def test_the_only_output_that_can_be_scores_is_taken():
    assert parts(several(MAP, WHICH, SCORES, FLAT))[2].output.name == "scores"


@pytest.mark.parametrize(
    ("outputs", "name", "message"),
    [
        (
            (SCORES, MORE),
            None,
            r"several outputs that could be class scores .*; choose one with --scores. .*'more' \[N,5\]",
        ),
        (
            (MAP, FLAT),
            None,
            r"no output of class scores \[N,classes\]. Its outputs: 'map' \[N,4,6,8\], 'flat' \[N\]",
        ),
        ((WHICH,), None, "no output of class scores"),
        (
            (SCORES, MORE),
            "score",
            r"no output 'score' \(did you mean 'scores' or 'more'\?\); it has: scores, more",
        ),
        ((SCORES, FLAT), "flat", r"output 'flat' is \[N\]; class scores are \[N,classes\], .*--target seed"),
    ],
)
def test_scores_that_cannot_be_found(outputs, name, message):
    with pytest.raises(OnnxcamError, match=message):
        attach(several(*outputs), scores=name)


def test_the_output_that_was_named_is_explained():
    model = explained(several(SCORES, MORE), scores="more", layer="c")
    assert [o.name for o in model.graph.output][:2] == ["scores", "more"]
    assert '"scores": "more"' in model.metadata_props[0].value


# CAM


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("GAP, Flatten, Gemm", "r", None),
        ("mean, MatMul, Add", "r", None),
        ("reshape", "r", None),
        ("1x1 convolution, pooling", "r", None),
        ("pooling, 1x1 convolution", "r", None),
        ("pooling over the kernel", "r", None),
        ("dropout", "r", None),
        ("GAP, Flatten, Gemm", "c", r"node 'Relu_1' \(Relu\) lies between"),
        ("flattened map", "r", "2 weighted layers lie between"),
        ("squeeze and excitation", "r", r"node 'Sigmoid_4' \(Sigmoid\) lies between"),
        ("normalised after pooling", "r", r"node 'BatchNormalization_3' \(BatchNormalization\) lies between"),
        ("hidden layer in the head", "r", r"node 'HardSwish_4' \(HardSwish\) lies between"),
        ("residual", "r", "node 'Conv_2' is a convolution wider than 1x1"),
    ],
)
def test_which_heads_have_a_class_activation_map(name, layer, reason):
    model = head(name)
    if reason is None:
        got = run(
            explained(model, layer=layer, method="cam"), {"x": picture(2), "cam_class": np.array([[0, 3]])}
        )
        weights = graphs.weights_of(model)
        w = weights["fc"].T if "1x1" not in name else weights["k"][:, :, 0, 0]
        wanted = np.einsum("kc,nchw->nkhw", w[[0, 3]], got["cam_activations"])
        np.testing.assert_allclose(got["cam"], wanted, atol=1e-5)
    else:
        with pytest.raises(OnnxcamError, match=f"cam needs a head that .*{reason}.*; use gradcam"):
            attach(model, layer=layer, method="cam")


def test_an_operator_of_another_domain_in_the_way():
    model = build(graphs.DEEP)
    model.graph.node[1].domain = "custom"
    model.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    with pytest.raises(
        OnnxcamError, match=r"no gradient rule for the operator custom.Sigmoid \(node 'Sigmoid_1'\)"
    ):
        attach(model)
    with pytest.raises(OnnxcamError, match="layer 's' is of unknown shape"):
        attach(model, layer="s")
