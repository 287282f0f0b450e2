import errno
import random
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxcam import onnxfile
from onnxcam.attaching import attach
from onnxcam.errors import OnnxcamError
from tests import graphs
from tests.checks import quiet, relative_error
from tests.graphs import build, explained, picture, run
from tests.test_models import MODELS

WIDE = graphs.DEEP.replace("T[6,4,3,3] v, T[6,5] fc", "T[40,4,3,3] v, T[40,5] fc")
"""A model with a weight of more than 1,024 elements, which may stay in a file of its own."""


def refused(path, message):
    with pytest.raises(OnnxcamError, match=message) as caught:
        attach(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


# What is no model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"This is a text.\n" * 50, "is not an ONNX file, or it is cut short"),
        (b'{"irVersion": 8, "graph": {}}', "is not an ONNX file, or it is cut short"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)), "is not an ONNX file, or it is cut short"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "is not an ONNX file, or it is cut short"),
        (b"PK\x03\x04" + bytes(64), "is not an ONNX file, or it is cut short"),
        (bytes(1000), "is not an ONNX file, or it is cut short"),
        (onnx.ModelProto().SerializeToString() or b"\x08\x08", "is not an ONNX file, or it is cut short"),
    ],
)
@pytest.mark.parametrize("name", ["m.onnx", "m.json", "m.txt", "m.onnxtxt", "m"])
def test_files_that_are_no_model(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)


def test_the_content_counts_and_not_the_name(tmp_path):
    onnx.save(build(graphs.LINEAR), tmp_path / "m.json", format="protobuf")
    attach(tmp_path / "m.json", tmp_path / "o.txt")
    assert onnx.load(tmp_path / "o.txt", format="protobuf").graph.name == "m"


def test_no_file_and_a_folder(tmp_path):
    refused(tmp_path / "missing.onnx", "does not exist")
    refused(tmp_path, "is a folder; give an .onnx file")
    refused(tmp_path / "missing" / "m.onnx", "does not exist")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    onnx.save(build(graphs.LINEAR), tmp_path / "m.onnx")
    monkeypatch.setattr(Path, "open", fail)
    refused(tmp_path / "m.onnx", "cannot be read: Permission denied")


def test_a_model_that_is_cut_short_anywhere(tmp_path):
    data = build(graphs.DEEP).SerializeToString()
    path = tmp_path / "m.onnx"
    for end in range(1, len(data), 7):
        path.write_bytes(data[:end])
        refused(path, "is not an ONNX file, or it is cut short")


def test_a_large_model_that_is_cut_short(tmp_path):
    data = (MODELS / "squeezenet1_1.onnx").read_bytes()
    path = tmp_path / "m.onnx"
    for end in np.linspace(1, len(data) - 1, 12).astype(int):
        path.write_bytes(data[:end])
        refused(path, "is not an ONNX file, or it is cut short")


def test_a_damaged_model_works_or_is_refused(tmp_path, capfd):
    data = build(graphs.LINEAR).SerializeToString()
    path = tmp_path / "m.onnx"
    rng = random.Random(0)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 10])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            attach(path)
        except OnnxcamError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 100
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"), "not valid: .*nowhere"),
        (
            lambda m: setattr(m.graph.node[1], "op_type", "Sigmoidal"),
            "not valid: No Op registered for Sigmoidal",
        ),
        (
            lambda m: setattr(m.opset_import[0], "version", 99),
            "is of opset 99; the installed onnx .* knows 1 to",
        ),
        (lambda m: setattr(m.opset_import[0], "domain", "com.example"), "is of opset 0; the installed onnx"),
        (lambda m: setattr(m, "ir_version", 99), "not valid: .*ir_version 99"),
        (lambda m: m.graph.node.insert(0, m.graph.node.pop(3)), "not valid: Nodes .* topologically sorted"),
        (
            lambda m: m.graph.node[0].attribute.append(helper.make_attribute("colour", 1)),
            "not valid: .*colour",
        ),
        (lambda m: m.graph.initializer[0].dims.__setitem__(1, 5), "shapes do not fit together|not valid"),
    ],
)
def test_models_that_break_a_rule(change, message):
    model = build(graphs.DEEP)
    change(model)
    with pytest.raises(OnnxcamError, match=message) as caught:
        attach(model)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_fit():
    model = build(graphs.DEEP.replace("T[N,5] scores", "T[N,7] scores"))
    with pytest.raises(OnnxcamError, match=r"shapes do not fit together: .*\(5\) vs \(7\)"):
        attach(model)


# External data


def save_external(model, path, **options):
    onnx.save(model, path, save_as_external_data=True, **{"size_threshold": 0, **options})
    return path


def relocate(path, **fields):
    """Rewrite the external fields of the largest weight of a saved model."""
    model = onnx.load(path, load_external_data=False)
    tensor = max(model.graph.initializer, key=lambda t: np.prod(t.dims))
    known = {e.key: e.value for e in tensor.external_data}
    del tensor.external_data[:]
    for key, value in {**known, **fields}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


@pytest.fixture
def external(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return save_external(build(WIDE), folder / "m.onnx", location="m.onnx.data")


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize("threshold", [0, 1024])
def test_external_data_in_and_out(tmp_path, one_file, threshold):
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    save_external(build(WIDE), path, all_tensors_to_one_file=one_file, size_threshold=threshold)
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    out = tmp_path / "out" / "o.onnx"
    out.parent.mkdir()
    attach(path, out, layer="r")
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before
    assert {p.name for p in out.parent.iterdir()} == {"o.onnx", "o.onnx.data"}
    assert out.stat().st_size < out.with_name("o.onnx.data").stat().st_size + 20_000
    onnx.checker.check_model(str(out), full_check=True)
    got = run(onnx.load(out), picture(2))
    wanted = run(ir.to_proto(attach(build(WIDE), layer="r")), picture(2))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)
    (tmp_path / "moved").mkdir()
    for file in out.parent.iterdir():
        file.rename(tmp_path / "moved" / file.name)
    graphs.onnxruntime.InferenceSession(str(tmp_path / "moved" / "o.onnx"), graphs.quiet())


def test_small_weights_outside_come_in(tmp_path):
    save_external(build(graphs.LINEAR), tmp_path / "m.onnx", location="m.onnx.data")
    attach(tmp_path / "m.onnx", tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx.data").exists()
    wanted = run(ir.to_proto(attach(build(graphs.LINEAR))), picture(2))
    np.testing.assert_array_equal(run(onnx.load(tmp_path / "o.onnx"), picture(2))["cam"], wanted["cam"])


def test_constants_in_nodes_and_subgraphs_outside_the_file(tmp_path):
    graph = WIDE.replace(
        "{\n",
        "{\n    k = Constant<value = T[2] {2.0, 3.0}>() k0 = ReduceMax<keepdims=0>(k) xk = Mul(x, k0)\n",
        1,
    )
    model = build(graph.replace("(x, w)", "(xk, w)"))
    model.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(np.array([2, 3], np.float32), "k"))
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    wanted = run(ir.to_proto(attach(model, layer="r")), picture(2))
    save_external(model, path, location="weights", convert_attribute=True)
    assert onnx.load(path, load_external_data=False).graph.node[0].attribute[0].t.external_data
    attach(path, tmp_path / "o.onnx", layer="r")
    for file in path.parent.iterdir():
        file.unlink()
    np.testing.assert_array_equal(run(onnx.load(tmp_path / "o.onnx"), picture(2))["cam"], wanted["cam"])


def test_missing_external_data(external):
    external.with_name("m.onnx.data").unlink()
    refused(external, "the file with its weights, m.onnx.data, is not beside it")


def test_external_data_that_cannot_be_read(external, monkeypatch):
    monkeypatch.setattr(onnxfile.os, "access", lambda *_: False)
    refused(external, "the file with its weights, m.onnx.data, cannot be read: no permission")


def test_a_folder_in_place_of_external_data(external):
    external.with_name("m.onnx.data").unlink()
    external.with_name("m.onnx.data").mkdir()
    refused(external, "is not beside it")


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "sub/../../secret", "sub/../m.onnx.data", "", None, ".."]
)
def test_external_data_outside_the_folder(external, location):
    external.parent.with_name("secret").write_bytes(bytes(100_000))
    relocate(external, location=location)
    refused(
        external,
        f"the weights 'v' point to {location or ''!r}, outside the model's folder".replace("..", r"\.\."),
    )


def test_external_data_in_a_subfolder(external):
    (external.parent / "sub").mkdir()
    external.with_name("m.onnx.data").rename(external.parent / "sub" / "data")
    model = onnx.load(external, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "sub/data"
    external.write_bytes(model.SerializeToString())
    assert attach(external)


def as_hugging_face_keeps_it(external):
    """Move a model and its weights to files named by their content and leave links in their place."""
    blobs = external.parent.with_name("blobs")
    blobs.mkdir()
    for file, name in ((external, "0f3a"), (external.with_name("m.onnx.data"), "9c41")):
        file.rename(blobs / name)
        file.symlink_to(f"../blobs/{name}")


def test_a_model_in_hugging_faces_cache(external, tmp_path):
    before = run(ir.to_proto(attach(build(WIDE), layer="r")), picture(1))
    as_hugging_face_keeps_it(external)
    kept = files(tmp_path / "blobs")
    out = tmp_path / "out" / "o.onnx"
    out.parent.mkdir()
    attach(external, out, layer="r")
    assert {p.name: p.is_symlink() for p in out.parent.iterdir()} == {"o.onnx": False, "o.onnx.data": False}
    assert files(tmp_path / "blobs") == kept
    session = onnxruntime.InferenceSession(str(out), graphs.quiet())
    found = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, {"x": picture(1)}), strict=True)
    )
    for name, value in before.items():
        np.testing.assert_array_equal(found[name], value)


def test_weights_behind_a_link_are_not_overwritten(external, tmp_path):
    as_hugging_face_keeps_it(external)
    kept = files(tmp_path / "blobs")
    (tmp_path / "9c41").symlink_to("blobs/9c41")
    for name in ("blobs/9c41", "9c41"):
        with pytest.raises(OnnxcamError, match="holds the weights of the model being read"):
            attach(external, tmp_path / name)
    assert files(tmp_path / "blobs") == kept


def test_a_folder_that_is_a_link_out_of_the_models(external):
    relocate(external, location="sub/m.onnx.data")
    elsewhere = external.parent.with_name("elsewhere")
    elsewhere.mkdir()
    external.with_name("m.onnx.data").rename(elsewhere / "m.onnx.data")
    (external.parent / "sub").symlink_to(elsewhere)
    (external.parent / "m.onnx.data").symlink_to(elsewhere / "m.onnx.data")
    refused(external, "outside the model's folder")


def test_a_link_to_nothing(external):
    external.with_name("m.onnx.data").unlink()
    external.with_name("m.onnx.data").symlink_to("gone")
    refused(external, "is not beside it")


@pytest.mark.parametrize("graph", [graphs.LINEAR, WIDE])
def test_a_symbolic_link_within_the_folder(tmp_path, graph):
    save_external(build(graph), tmp_path / "m.onnx", location="data")
    (tmp_path / "data").rename(tmp_path / "other")
    (tmp_path / "data").symlink_to("other")
    attach(tmp_path / "m.onnx", tmp_path / "o.onnx")
    wanted = run(ir.to_proto(attach(build(graph))), picture(1))
    np.testing.assert_array_equal(run(onnx.load(tmp_path / "o.onnx"), picture(1))["cam"], wanted["cam"])


def test_a_hard_link(external):
    external.parent.with_name("secret").hardlink_to(external.with_name("m.onnx.data"))
    refused(external, "is a hard link, which onnx refuses; copy it")


def test_links_to_the_whole_model(external, tmp_path):
    (tmp_path / "link.onnx").symlink_to(external)
    assert attach(tmp_path / "link.onnx")


@pytest.mark.parametrize("keep", [0, 1, 1000, 5999])
def test_short_external_data(external, keep):
    data = external.with_name("m.onnx.data")
    data.write_bytes(data.read_bytes()[:keep])
    refused(external, "the file with its weights, m.onnx.data, is cut short")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": None, "offset": 5000}, "is cut short"),
        ({"offset": 10**12}, "is cut short"),
        ({"offset": -8}, "the weights 'v' are damaged: 5760 bytes at -8"),
        ({"length": 100}, "the weights 'v' are damaged: 100 bytes at"),
        ({"length": "many"}, "the weights 'v' are damaged: .*'many'"),
        ({"offset": "0x10"}, "the weights 'v' are damaged"),
        ({"location": "a\0b"}, "the weights 'v' are damaged: embedded null"),
    ],
)
def test_damaged_places_of_external_data(external, fields, message):
    relocate(external, **fields)
    refused(external, message)


def test_external_data_of_no_stated_length(external):
    relocate(external, length=None)
    wanted = run(ir.to_proto(attach(build(WIDE))), picture(1))
    attach(external, external.with_name("o.onnx"))
    np.testing.assert_array_equal(
        run(onnx.load(external.with_name("o.onnx")), picture(1))["cam"], wanted["cam"]
    )


# Saving


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_leaves_nothing(external, monkeypatch, at):
    """Whichever of the two files cannot be put in its place."""
    before, calls, replace = files(external.parent), [], Path.replace

    def fail(self, target):
        calls.append(target)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OnnxcamError, match=r"o\.onnx cannot be written: No space left on device"):
        attach(external, external.with_name("o.onnx"))
    assert files(external.parent) == before


@pytest.mark.parametrize("large", [False, True])
def test_a_failure_while_writing_leaves_what_was_there(external, monkeypatch, large):
    out = external.with_name("o.onnx")
    attach(external if large else build(graphs.LINEAR), out)
    before = files(external.parent)

    def fail(model, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(OnnxcamError, match="cannot be written: No space left"):
        attach(external, out, layer="r")
    assert files(external.parent) == before


def test_outputs_that_cannot_be_written(tmp_path):
    model = build(graphs.LINEAR)
    with pytest.raises(OnnxcamError, match="cannot be written: No such file or directory"):
        attach(model, tmp_path / "missing" / "o.onnx")
    with pytest.raises(OnnxcamError, match="is a folder; give the name of the file to write"):
        attach(model, tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OnnxcamError, match="cannot be written: Not a directory"):
        attach(model, tmp_path / "file" / "o.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def test_a_file_that_exists_is_replaced(tmp_path):
    (tmp_path / "o.onnx").write_bytes(b"old")
    attach(build(graphs.LINEAR), tmp_path / "o.onnx")
    onnx.checker.check_model(str(tmp_path / "o.onnx"))
    assert {p.name for p in tmp_path.iterdir()} == {"o.onnx"}


@pytest.mark.parametrize("data", ["o.onnx.data", "o.onnx"])
def test_weights_of_the_model_being_read_are_not_overwritten(tmp_path, data):
    path = save_external(build(WIDE), tmp_path / "m.onnx", location=data)
    before = files(tmp_path)
    with pytest.raises(
        OnnxcamError, match=f"{data} holds the weights of the model being read; choose another"
    ):
        attach(path, tmp_path / "o.onnx")
    assert files(tmp_path) == before


# Older models


def test_weights_that_ir_version_3_lists_as_inputs():
    for opset in (8, 18):
        model = build(graphs.LINEAR, opset=opset, ir_version=3)
        for weight in model.graph.initializer:
            model.graph.input.append(
                helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
            )
        added = explained(model)
        assert [i.name for i in added.graph.input] == ["x", "cam_class"]
        assert added.ir_version >= 4
        wanted = run(explained(build(graphs.LINEAR)), picture(2))
        for name, value in run(added, picture(2)).items():
            assert relative_error(value, wanted[name]) <= 1e-6


@pytest.mark.parametrize("opset", [11, 18])
def test_weights_that_the_author_lists_as_inputs_stay_inputs(opset):
    graph = """(T[N,3,8,10] x, T[4,5] fc) => (T[N,5] scores) <T[4,3,3,3] w>
    { c = Conv(x, w) p = GlobalAveragePool(c) f = Flatten(p) scores = MatMul(f, fc) }"""
    model = build(graph, opset=opset)
    fc = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(fc, "fc"))
    added = explained(model)
    assert [i.name for i in added.graph.input] == ["x", "fc", "cam_class"]
    feeds = {"x": picture(2), "cam_class": np.array([[1, 4]])}
    usual, doubled = run(added, feeds), run(added, {**feeds, "fc": 2 * fc})
    np.testing.assert_allclose(doubled["scores"], 2 * usual["scores"], rtol=1e-5)
    np.testing.assert_allclose(doubled["cam_gradients"], 2 * usual["cam_gradients"], rtol=1e-5)


WEIGHTS = """<T[4,3,3,3] w, T[4] s, T[4] m, T[4] q, T[4,1,1] slope, T zero = {0.0}, T two = {2.0},
 T low = {-0.5}, T high = {0.5}, T[4] scales = {1.0, 1.0, 2.0, 1.5}, T[4] fewer = {1.0, 1.0, 0.5, 0.7},
 T[8] roi = {0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0}, int64[8] pads = {0, 0, 1, 2, 0, 0, 0, 3},
 int64[4] shape = {0, 4, -1, 10}, int64[4] ones = {1, 1, 1, 1},
 int64[3] order = {2, 0, 1}, int64[2] parts = {1, 3}>"""
MEANS = """t = ReduceMean<axes=[{0}], keepdims=1>(c) u = Squeeze<axes=[{0}]>(t)
 v = Unsqueeze<axes=[{0}]>(u) y = Add(c, v)"""
OLD = {
    "BatchNormalization": ((7, 9, 13, 14, 15), "y = BatchNormalization<epsilon=0.1>(c, s, m, m, q)"),
    "MaxPool": ((7, 8, 10, 11, 12), "y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(c)"),
    "MaxPool, ceil": ((10, 11, 12), "y = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(c)"),
    "MaxPool, same": ((7, 9, 11), 'y = MaxPool<kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER">(c)'),
    "AveragePool": (
        (7, 10, 11),
        "y = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0], count_include_pad=1>(c)",
    ),
    "Pad": ((7, 9), 'y = Pad<pads=[0,0,1,2,0,0,0,3], mode="constant", value=0.5>(c)'),
    "Pad, reflect": ((7, 9), 'y = Pad<pads=[0,0,1,2,0,0,0,3], mode="reflect">(c)'),
    "Pad, input": ((11, 13), "y = Pad(c, pads)"),
    "Clip": ((7, 9), "y = Clip<min=-0.5, max=0.5>(c)"),
    "Clip, input": ((11, 12, 13), "y = Clip(c, low, high)"),
    "Upsample": ((9,), "y = Upsample(c, scales)"),
    "Upsample, linear": ((9,), 'y = Upsample<mode="linear">(c, scales)'),
    "Upsample, attribute": ((7, 8), 'y = Upsample<mode="linear", scales=[1.0,1.0,2.0,1.5]>(c)'),
    "Resize": ((10,), "y = Resize(c, scales)"),
    "Resize, linear": ((10,), 'y = Resize<mode="linear">(c, scales)'),
    "Resize, smaller": ((10,), "y = Resize(c, fewer)"),
    "Resize, linear, smaller": ((10,), 'y = Resize<mode="linear">(c, fewer)'),
    "Resize, half-pixel": (
        (11, 13),
        'y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(c, roi, scales)',
    ),
    "ReduceMean, Squeeze, Unsqueeze": ((7, 9, 11, 12), MEANS.format("2,3")),
    "negative axes": ((11, 12), MEANS.format("-2,-1")),
    "ReduceMax": ((7, 11, 12, 13), "t = ReduceMax<axes=[2,3], keepdims=1>(c) y = Add(c, t)"),
    "ReduceSum": ((7, 11), "t = ReduceSum<axes=[2,3], keepdims=1>(c) y = Add(c, t)"),
    "ReduceL2": ((7, 11, 13, 17), "t = ReduceL2<axes=[1], keepdims=1>(c) y = Add(c, t)"),
    "Softmax": ((7, 11, 12), "y = Softmax<axis=1>(c)"),
    "Softmax, default": ((7, 11), "y = Softmax(c)"),
    "Softmax, last": ((7, 11, 12), "y = Softmax<axis=3>(c)"),
    "LogSoftmax": ((7, 11), "y = LogSoftmax<axis=1>(c)"),
    "Split": ((7, 11), "t, u = Split<axis=1, split=[1,3]>(c) y = Concat<axis=1>(u, t)"),
    "Split, equal": ((7, 13), "t, u = Split<axis=1>(c) y = Concat<axis=1>(u, t)"),
    "Split, input": ((13,), "t, u = Split<axis=1>(c, parts) y = Concat<axis=1>(u, t)"),
    "Slice": ((7, 9), "y = Slice<axes=[2,3], starts=[1,0], ends=[7,-1]>(c)"),
    "Dropout": ((7, 10), "y = Dropout<ratio=0.3>(c)"),
    "Dropout, input": ((12, 13), "y = Dropout(c)"),
    "PRelu": ((7, 9), "y = PRelu(c, slope)"),
    "LRN": ((7, 13), "y = LRN<size=3>(c)"),
    "HardSigmoid": ((9, 13), "t = HardSigmoid<alpha=0.1667, beta=0.5>(c) y = Mul(t, c)"),
    "HardSwish": ((14,), "y = HardSwish(c)"),
    "InstanceNormalization": ((7, 13), "y = InstanceNormalization(c, s, m)"),
    "Shape, Reshape": ((7, 13, 15), "t = Shape(c) u = Reshape(c, shape) y = Reshape(u, t)"),
    "Cast, Where": (
        (9, 13),
        "t = Greater(c, zero) u = Where(t, c, zero) v = Cast<to=11>(u) y = Cast<to=1>(v)",
    ),
    "Pow": ((7, 12, 13), "t = Abs(c) y = Pow(t, two)"),
    "Constant": ((7, 11, 12), "t = Constant<value = T {3.0}>() y = Add(c, t)"),
    "Expand, Tile, Gather": ((8, 13), "t = Expand(c, ones) u = Tile(t, ones) y = Gather<axis=1>(u, order)"),
    "Sum, Max, Concat": ((7, 8, 13), "t = Sum(c, c) u = Max(t, c) y = Concat<axis=1>(u, c)"),
}  # fmt: skip


def old(name, opset):
    graph = f"""(T[N,3,8,10] x) => (T[N,C,H,W] y) {WEIGHTS}
    {{ c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w) {OLD[name][1]} }}"""
    model = build(graph, opset=opset, ir_version=4, q=np.ones(4))
    read = {i for node in model.graph.node for i in node.input}
    unread = [i for i in model.graph.initializer if i.name not in read]
    for weight in unread:
        model.graph.initializer.remove(weight)
    return model


@pytest.mark.parametrize(("name", "opset"), [(name, opset) for name in OLD for opset in OLD[name][0]])
def test_conversion_keeps_values_and_names(name, opset):
    model = old(name, opset)
    for index, node in enumerate(model.graph.node):
        node.name = f"/features/features.{index}/{node.op_type}"
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", f"features.{index}", "op"]))
    own = onnxfile.normalise(ir.from_proto(model))
    assert own.graph.opset_imports[""] == onnxfile.OLDEST_OPSET
    converted = ir.to_proto(own)
    onnx.checker.check_model(converted, full_check=True)
    x = picture(2)
    wanted, got = run(model, x)["y"], run(converted, x)["y"]
    assert got.shape == wanted.shape
    assert relative_error(got, wanted) <= 1e-6
    before = {o: n for n in model.graph.node for o in n.output}
    after = {o: n for n in converted.graph.node for o in n.output}
    assert before.keys() <= after.keys()
    for output, node in before.items():
        if "Softmax" not in node.op_type:  # becomes Flatten, Softmax, Reshape
            assert after[output].name == node.name
        assert list(after[output].metadata_props) == list(node.metadata_props)


OLD_NET = """(T[N,3,8,10] x) => (T[N,5{}] scores)
<T[6,3,3,3] w, T[6] s, T[6] m, T[6] q, T[6,5] fc, T[5,6,1,1] k>
{{
    pad = Pad<pads=[0,0,1,1,0,0,1,1], mode="constant">(x)
    c = Conv<kernel_shape=[3,3]>(pad, w)
    n = BatchNormalization(c, s, m, m, q)
    r = Clip<min=0.0, max=6.0>(n)
    mp = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    up = Upsample<mode="linear", scales=[1.0,1.0,2.0,2.0]>(mp)
    p = ReduceMean<axes=[2,3], keepdims=1>(up)
    {}
}}"""
ENDS = {
    "matrix": ("", "f = Squeeze<axes=[2,3]>(p) logits = MatMul(f, fc) scores = Softmax(logits)"),
    "convolution": (",1,1", "logits = Conv(p, k) scores = Softmax<axis=1>(logits)"),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_old_model_is_explained_like_a_new_one(end):
    old_model = build(OLD_NET.format(*ENDS[end]), opset=7, ir_version=4, q=np.ones(6))
    new = (
        OLD_NET.format(*ENDS[end])
        .replace(
            "T[6,3,3,3] w",
            """int64[8] pads = {0,0,1,1,0,0,1,1}, int64[2] plane = {2,3}, T zero = {0.0}, T six = {6.0},
            T[4] scales = {1.0,1.0,2.0,2.0}, T[6,3,3,3] w""",
        )
        .replace('Pad<pads=[0,0,1,1,0,0,1,1], mode="constant">(x)', "Pad(x, pads)")
        .replace("Clip<min=0.0, max=6.0>(n)", "Clip(n, zero, six)")
        .replace(
            'Upsample<mode="linear", scales=[1.0,1.0,2.0,2.0]>(mp)',
            'Resize<mode="linear", coordinate_transformation_mode="asymmetric">(mp, , scales)',
        )
        .replace("ReduceMean<axes=[2,3], keepdims=1>(up)", "ReduceMean(up, plane)")
        .replace("Squeeze<axes=[2,3]>(p)", "Squeeze(p, plane)")
        .replace("Softmax(logits)", "Softmax<axis=1>(logits)")
    )
    new_model = build(new, q=np.ones(6))
    for weight in new_model.graph.initializer:
        for same in old_model.graph.initializer:
            if same.name == weight.name:
                same.CopyFrom(weight)
    for score in ("before", "after"):
        feeds = {"x": picture(2), "cam_class": np.array([[0, 3]])}
        got = run(explained(old_model, layer="r", score=score), feeds)
        wanted = run(explained(new_model, layer="r", score=score), feeds)
        for name, value in wanted.items():
            assert relative_error(got[name], value) <= 1e-5, name


def test_a_model_of_opset_18_or_newer_is_left_as_it_is():
    for opset in (18, 19, 21, 23):
        own = onnxfile.normalise(ir.from_proto(build(graphs.DEEP, opset=opset)))
        assert own.graph.opset_imports[""] == opset
        assert [n.op_type for n in own.graph] == [n.op_type for n in build(graphs.DEEP).graph.node]


def test_a_model_that_onnx_cannot_convert():
    graph = '(T[N,3,8,10] x) => (T[N,240] scores) { y = Cast<to="FLOAT">(x) scores = Flatten(y) }'
    with pytest.raises(
        OnnxcamError, match=r"cannot convert the model from opset 5 to 18: No Adapter .* for Cast"
    ):
        attach(build(graph, opset=5, ir_version=3), layer="x")


def test_the_domain_can_be_called_by_its_long_name():
    model = build(graphs.DEEP)
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"
    added = explained(model)
    assert {i.domain for i in added.opset_import} == {""}
    np.testing.assert_array_equal(
        run(added, picture(1))["cam"], run(explained(build(graphs.DEEP)), picture(1))["cam"]
    )


def test_functions_are_inlined():
    model = build(graphs.DEEP)
    body = [helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Mul", ["a", "s"], ["b"])]
    imports = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("local", "Silu", ["a"], ["b"], body, imports))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Silu", "local"
    added = explained(model, layer="c")
    assert not added.functions
    assert {n.domain for n in added.graph.node} == {""}
    wanted = graphs.DEEP.replace("r = Sigmoid(c)", "s0 = Sigmoid(c) r = Mul(c, s0)")
    got, wanted = run(added, picture(2)), run(explained(build(wanted), layer="c"), picture(2))
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)


def test_constants_are_noted_on_values():
    graph = """(T[N,4,8,10] x) => (T[N,5] scores) <T[320,5] fc, int64[1] minus = {-1}, int64 two = {2}>
    { s = Shape<start=1>(x) p = ReduceProd<keepdims=1>(s) i = Concat<axis=0>(minus, p)
      n = Shape(x) h = Gather(n, two)
      r = Reshape(x, i) scores = MatMul(r, fc) }"""
    own = onnxfile.normalise(ir.from_proto(build(graph)))
    noted = {v.name: v.const_value for n in own.graph for v in n.outputs}
    assert noted["s"].numpy().tolist() == [4, 8, 10]
    assert noted["p"].numpy().tolist() == [320]
    assert noted["i"].numpy().tolist() == [-1, 320]
    assert noted["n"] is None
    assert noted["r"] is None
    assert [n.op_type for n in own.graph] == [
        "Shape",
        "ReduceProd",
        "Concat",
        "Shape",
        "Gather",
        "Reshape",
        "MatMul",
    ]
    assert ir.to_proto(own).graph.node[0].op_type == "Shape"


def test_nodes_without_names_get_one_that_is_free():
    model = build(graphs.DEEP)
    model.graph.node[3].name = "Sigmoid_1"
    own = onnxfile.normalise(ir.from_proto(model))
    names = [n.name for n in own.graph]
    assert names == [
        "Conv_0",
        "Sigmoid_1_",
        "Conv_2",
        "Sigmoid_1",
        "GlobalAveragePool_4",
        "Flatten_5",
        "MatMul_6",
    ]


def test_weights_that_no_single_file_can_hold_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxfile, "_ONE_FILE", 1000)
    attach(build(WIDE), tmp_path / "o.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"o.onnx", "o.onnx.data"}
    wanted = run(ir.to_proto(attach(build(WIDE))), picture(1))
    np.testing.assert_array_equal(run(onnx.load(tmp_path / "o.onnx"), picture(1))["cam"], wanted["cam"])


def test_large_weights_are_handed_to_no_tool(monkeypatch):
    """The checker, shape inference and the converter see models of any size without their weights."""
    seen = []
    check = onnx.checker.check_model
    monkeypatch.setattr(
        onnx.checker, "check_model", lambda m, **k: (seen.append(m.ByteSize()), check(m, **k))
    )
    model = build(WIDE.replace("T[40,5]", "T[40,5000]").replace("T[N,5]", "T[N,5000]"))
    attach(model)
    assert len(seen) == 2
    assert max(seen) < 30_000 < model.ByteSize()


def test_a_file_that_onnxruntime_laid_out_for_one_processor(tmp_path):
    path, options = tmp_path / "laid_out.onnx", quiet()
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(build(graphs.DEEP).SerializeToString(), options)
    if not any("nchwc" in node.domain or "nhwc" in node.domain for node in onnx.load(path).graph.node):
        pytest.skip("onnxruntime has no layout of its own for this processor")
    with pytest.raises(
        OnnxcamError, match=r"for one kind of processor .* up to ORT_ENABLE_EXTENDED only"
    ) as caught:
        attach(path)
    assert "\n" not in str(caught.value)
