"""What is explained: gradients of contrasts, rivals, seeds and masked sums against torch, in float64."""

import numpy as np
import pytest
import torch

from onnxcam.attaching import attach
from onnxcam.errors import OnnxcamError
from tests import graphs
from tests.checks import relative_error
from tests.graphs import build, explained, picture, rich_in_torch, run, weights_of

N = 3

# Scores for every place of a picture, as in segmentation.
DENSE = """(T[N,3,8,10] x) => (T[N,4,8,10] scores)
<T[5,3,3,3] w, T[4,5,1,1] v, float[4] up = {1, 1, 2, 2}>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(x, w)
    r = Tanh(c)
    d = Conv<kernel_shape=[1,1]>(r, v)
    scores = Resize<mode="linear">(d, , up)
}"""

# Boxes with scores, as in detection: [N,boxes,classes], and nothing that looks like class scores.
BOXES = """(T[N,3,8,10] x) => (T[N,20,4] boxes)
<T[5,3,3,3] w, T[4,5,1,1] v, int64[3] rows = {0, 4, 20}>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(x, w)
    r = Tanh(c)
    d = Conv<kernel_shape=[1,1]>(r, v)
    e = Reshape(d, rows)
    boxes = Transpose<perm=[0,2,1]>(e)
}"""


def dense_in_torch(x, w):
    r = torch.tanh(torch.nn.functional.conv2d(x, w["w"], padding=1, stride=2))
    d = torch.nn.functional.conv2d(r, w["v"])
    return r, d, torch.nn.functional.interpolate(d, scale_factor=2, mode="bilinear", align_corners=False)


def rich(**options):
    model = build(graphs.RICH, dtype="double", **graphs.RICH_WEIGHTS)
    x = picture(N, 3, 13, 14, dtype=np.float64)
    values = rich_in_torch(torch.tensor(x).requires_grad_(), weights_of(model))
    return explained(model, layer="m1", **options), x, values


def gradient(values, total):
    (found,) = torch.autograd.grad(total, values["m1"], retain_graph=True)
    return found.numpy()


def rows(got):
    """View cam_gradients [N*K,...] as [N,K,...]."""
    return got.reshape(N, -1, *got.shape[1:])


def test_contrast():
    model, x, values = rich(target="contrast")
    a, b = np.array([[0, 3], [1, 1], [4, 2]]), np.array([[1, 2], [0, 4], [3, 3]])
    got = rows(run(model, {"x": x, "cam_class": a, "cam_against": b}, by="ref")["cam_gradients"])
    for k in range(2):
        total = sum(values["scores"][i, a[i, k]] - values["scores"][i, b[i, k]] for i in range(N))
        assert relative_error(got[:, k], gradient(values, total)) <= 1e-9


def test_contrast_of_the_best_with_the_second_by_default():
    model, x, values = rich(target="contrast")
    first, second = values["scores"].topk(2, dim=1).values.unbind(1)
    got = rows(run(model, x, by="ref")["cam_gradients"])
    assert relative_error(got[:, 0], gradient(values, (first - second).sum())) <= 1e-9


def test_one_class_serves_all_contrasts_and_a_class_that_does_not_exist_none():
    model, x, values = rich(target="contrast")
    feeds = {"x": x, "cam_class": np.array([[0, 7, 1]]), "cam_against": np.array([[2]])}
    got = run(model, feeds, by="ref")
    assert np.isnan(got["cam"][:, 1]).all()
    assert not got["cam_heatmap"][:, 1].any()
    total = (values["scores"][:, 1] - values["scores"][:, 2]).sum()
    assert relative_error(rows(got["cam_gradients"])[:, 2], gradient(values, total)) <= 1e-9


def test_rivals_are_the_three_classes_of_the_nearest_scores():
    model, x, values = rich(target="rivals")
    classes = np.array([[0, -1], [2, 4], [1, -5]])
    got = rows(run(model, {"x": x, "cam_class": classes}, by="ref")["cam_gradients"])
    scores = values["scores"]
    for k in range(2):
        total = 0
        for i in range(N):
            order = torch.argsort(-scores[i])
            c = int(order[-1 - classes[i, k]]) if classes[i, k] < 0 else int(classes[i, k])
            others = [m for m in range(5) if m != c]
            nearest = sorted(others, key=lambda m, i=i, c=c: abs((scores[i, m] - scores[i, c]).item()))[:3]
            total = total + scores[i, c] - scores[i, nearest].mean()
        assert relative_error(got[:, k], gradient(values, total)) <= 1e-9


def test_fewer_classes_have_fewer_rivals():
    graph = graphs.LINEAR.replace("T[4,5]", "T[4,2]").replace("T[N,5]", "T[N,2]").replace("T[5]", "T[2]")
    model = explained(build(graph, dtype="double"), target="rivals")
    other = explained(build(graph, dtype="double"), target="contrast")
    x = picture(N, dtype=np.float64)
    want = run(other, {"x": x, "cam_class": np.array([[1]]), "cam_against": np.array([[0]])}, by="ref")
    got = run(model, {"x": x, "cam_class": np.array([[1]])}, by="ref")
    assert relative_error(got["cam_gradients"], want["cam_gradients"]) <= 1e-12


def test_own_seed():
    model, x, values = rich(target="seed")
    seed = np.random.default_rng(0).standard_normal((N, 5))
    got = run(model, {"x": x, "cam_seed": seed}, by="ref")
    assert got["cam"].shape[:2] == (N, 1)
    want = gradient(values, (values["scores"] * torch.tensor(seed)).sum())
    assert relative_error(got["cam_gradients"], want) <= 1e-9
    assert "cam_class" not in {value.name for value in model.graph.input}


@pytest.mark.parametrize("masked", [False, True])
def test_dense_scores_are_summed_over_the_mask(masked):
    proto = build(DENSE, dtype="double")
    model = explained(proto, layer="r", scores="scores")
    x = picture(N, dtype=np.float64)
    r, _, scores = dense_in_torch(
        torch.tensor(x).requires_grad_(), {k: torch.tensor(v) for k, v in weights_of(proto).items()}
    )
    mask = np.random.default_rng(1).random((N, 8, 10)) if masked else np.ones((1, 1, 1))
    totals = (scores * torch.tensor(mask)[:, None]).sum((2, 3))
    classes = np.array([[0, -1], [3, -2], [2, 2]])
    feeds = {"x": x, "cam_class": classes, **({"cam_mask": mask} if masked else {})}
    got = rows(run(model, feeds, by="ref")["cam_gradients"])
    for k in range(2):
        chosen = [
            totals[i].sort(descending=True).values[-1 - c] if c < 0 else totals[i, c]
            for i, c in enumerate(classes[:, k])
        ]
        (want,) = torch.autograd.grad(sum(chosen), r, retain_graph=True)
        assert relative_error(got[:, k], want.numpy()) <= 1e-7  # ONNX holds the scales of Resize in float32
    single = explained(build(DENSE), layer="r", scores="scores")
    by_ort = run(single, {n: v.astype(np.float32) if v.dtype == np.float64 else v for n, v in feeds.items()})
    assert relative_error(rows(by_ort["cam_gradients"]), got) <= 1e-5


@pytest.mark.parametrize(("graph", "name"), [(DENSE, "scores"), (BOXES, "boxes")])
def test_a_seed_for_any_shape(graph, name):
    proto = build(graph, dtype="double")
    model = explained(proto, layer="r", target="seed", scores=None if graph is BOXES else name)
    x = picture(N, dtype=np.float64)
    r, d, scores = dense_in_torch(
        torch.tensor(x).requires_grad_(), {k: torch.tensor(v) for k, v in weights_of(proto).items()}
    )
    output = scores if graph is DENSE else d.reshape(N, 4, 20).transpose(1, 2)
    seed = np.random.default_rng(2).standard_normal(tuple(output.shape))
    (want,) = torch.autograd.grad((output * torch.tensor(seed)).sum(), r)
    got = run(model, {"x": x, "cam_seed": seed}, by="ref")["cam_gradients"]
    assert relative_error(got, want.numpy()) <= 1e-7


def test_bad_targets_are_one_clear_line():
    plain = build(graphs.LINEAR)
    with pytest.raises(
        OnnxcamError, match=r"target is 'classes'; it must be one of class, contrast, rivals, seed"
    ):
        attach(plain, target="classes")
    with pytest.raises(
        OnnxcamError, match=r"output 'boxes' is \[N,20,4\]; class scores are .* --target seed"
    ):
        attach(build(BOXES), scores="boxes")
    one = graphs.LINEAR.replace("T[4,5]", "T[4,1]").replace("T[N,5]", "T[N,1]").replace("T[5]", "T[1]")
    with pytest.raises(OnnxcamError, match="the only class has no rivals"):
        attach(build(one), target="rivals")
    whole = build(
        graphs.LINEAR.replace("=> (T[N,5] scores)", "=> (T[N,5] scores, int64[2] size)").replace(
            "{\n", "{\n    size = Shape<start=2>(x)\n", 1
        )
    )
    with pytest.raises(OnnxcamError, match="output 'size' is no floating-point value"):
        attach(whole, scores="size")


def test_finercam_is_gradcam_of_the_rivals():
    proto, x = build(graphs.DEEP, dtype="double"), picture(N, dtype=np.float64)
    one, other = (
        run(explained(proto, **o), x, by="ref") for o in ({"method": "finercam"}, {"target": "rivals"})
    )
    np.testing.assert_array_equal(one["cam"], other["cam"])
    assert one["cam"].max() > 0
    with pytest.raises(OnnxcamError, match="finercam explains the target rivals, not contrast; use gradcam"):
        attach(proto, method="finercam", target="contrast")
