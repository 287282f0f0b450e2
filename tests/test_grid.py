"""Transformers: which tokens are the picture's, which layers have a gradient, and that against torch."""

import warnings

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import onnxcam
from onnxcam import layers, onnxfile
from onnxcam.attaching import attach
from onnxcam.backward import path
from onnxcam.errors import OnnxcamError
from onnxcam.grid import Grid
from tests.checks import quiet, relative_error
from tests.graphs import build, picture, run

HEIGHT, WIDTH, PATCH, CHANNELS = 16, 24, 4, 12
GRID = (HEIGHT // PATCH, WIDTH // PATCH)


class Block(torch.nn.Module):
    """A transformer's block: attention and a perceptron, each behind a normalisation."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(CHANNELS), torch.nn.LayerNorm(CHANNELS)
        self.q, self.k, self.v, self.proj = (torch.nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(CHANNELS, 20), torch.nn.GELU(), torch.nn.Linear(20, CHANNELS)
        )

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(torch.nn.Module):
    """`before` and `after` extra tokens around those of the picture; the head reads `pool`."""

    def __init__(self, before, after, pool):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.before = torch.nn.Parameter(torch.randn(1, before, CHANNELS)) if before else None
        self.after = torch.nn.Parameter(torch.randn(1, after, CHANNELS)) if after else None
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.norm, self.head, self.pool = (
            torch.nn.LayerNorm(CHANNELS),
            torch.nn.Linear(CHANNELS, 5),
            pool,
        )

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        parts = [p.expand(len(x), -1, -1) for p in (self.before,) if p is not None] + [x]
        parts += [p.expand(len(x), -1, -1) for p in (self.after,) if p is not None]
        x = torch.cat(parts, 1) if len(parts) > 1 else x
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.pool == "first":
            x = x[:, 0]
        elif self.pool == "last":
            x = x[:, -1]
        else:
            x = x.mean(1)
        return self.head(x)


class ChannelsLast(torch.nn.Module):
    """Maps [N,h,w,C] normalised and mixed along their last axis, as in Swin and ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.norm, self.mlp = torch.nn.LayerNorm(CHANNELS), torch.nn.Linear(CHANNELS, CHANNELS)
        self.last, self.head = torch.nn.LayerNorm(CHANNELS), torch.nn.Linear(CHANNELS, 5)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + torch.nn.functional.gelu(self.mlp(self.norm(x)))
        return self.head(self.last(x).mean((1, 2)))


NETS = {
    "class token": (lambda: Transformer(1, 0, "first"), "blocks.1.norm1", Grid("NTC", *GRID, 1)),
    "class and register tokens": (
        lambda: Transformer(5, 0, "first"),
        "blocks.1.norm1",
        Grid("NTC", *GRID, 5),
    ),
    "class token at the end": (lambda: Transformer(0, 1, "last"), "blocks.1.norm1", Grid("NTC", *GRID, 0)),
    "mean of all tokens": (lambda: Transformer(0, 0, "mean"), "norm", Grid("NTC", *GRID, 0)),
    "channels last": (ChannelsLast, "last", Grid("NHWC", *GRID)),
}


@pytest.fixture(scope="module", params=NETS)
def exported(request, tmp_path_factory):
    make, module, grid = NETS[request.param]
    torch.manual_seed(0)
    net = make().eval()
    file = tmp_path_factory.mktemp("grid") / "net.onnx"
    x = torch.randn(2, 3, HEIGHT, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (x,), file, dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=({0: "N"},)
        )
    return net, file, module, grid, x


def in_planes(array, grid):
    """Turn [N,T,C] or [N,h,w,C] into [N,C,h,w] with numpy."""
    if grid.order == "NTC":
        h, w = GRID
        array = array[:, grid.first : grid.first + h * w].reshape(len(array), h, w, -1)
    return np.moveaxis(array, -1, 1)


def test_default_layer_and_its_grid(exported):
    _, file, module, grid, _ = exported
    model = onnxfile.normalise(onnxfile.load(file))
    source, logits = layers.picture(model), layers.scores(model).logits
    found = layers.default(layers.explainable(source, logits), source, logits)
    assert (found.module, found.grid) == (module, grid)


def test_gradients_and_map_against_torch(exported):
    net, file, module, grid, x = exported
    explained = file.with_name("explained.onnx")
    attach(file, explained, emit=["cam", "activations", "gradients"])
    session = onnxruntime.InferenceSession(explained, quiet())
    classes = np.array([[3, 1], [0, 4]])
    cam, a, g = session.run(
        ["cam", "cam_activations", "cam_gradients"], {"x": x.numpy(), "cam_class": classes}
    )
    kept = []
    hook = net.get_submodule(module).register_forward_hook(lambda _, __, y: kept.append(y))
    scores = net(x)
    hook.remove()
    assert relative_error(a, in_planes(kept[0].detach().numpy(), grid)) < 1e-5
    for n in range(2):
        for k in range(2):
            (whole,) = torch.autograd.grad(scores[n, classes[n, k]], kept[0], retain_graph=True)
            expected = in_planes(whole.numpy(), grid)[n]
            assert np.abs(expected).max() > 1e-4
            assert relative_error(g[2 * n + k], expected) < 1e-4
            weights = expected.mean((1, 2), keepdims=True)
            by_hand = np.maximum((weights * a[n]).sum(0), 0)
            np.testing.assert_allclose(cam[n, k], by_hand, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_layers_that_no_gradient_reaches_are_marked_and_are_truly_zero(exported):
    net, file, _, _, x = exported
    model = onnxfile.normalise(onnxfile.load(file))
    source, logits = layers.picture(model), layers.scores(model).logits
    found = layers.explainable(source, logits)
    marked = {layer.module for layer in found if layer.unreached and layer.module}
    assert ("blocks.1.norm2" in marked) == (getattr(net, "pool", "mean") != "mean")
    for layer in found:
        if layer.module is None or layer.operator != "LayerNormalization":
            continue
        kept = []
        hook = net.get_submodule(layer.module).register_forward_hook(
            lambda _, __, y, kept=kept: kept.append(y)
        )
        scores = net(x)
        hook.remove()
        (g,) = torch.autograd.grad(scores.sum(), kept[0])
        assert (np.abs(in_planes(g.numpy(), layer.grid)).max() == 0) == layer.unreached, layer.module


def test_a_layer_that_no_gradient_reaches_is_refused_with_one_that_works(exported):
    _, file, module, grid, _ = exported
    model = onnxfile.normalise(onnxfile.load(file))
    source, logits = layers.picture(model), layers.scores(model).logits
    listed = layers.explainable(source, logits)
    default = layers.default(listed, source, logits)
    for layer in listed:
        if layer.unreached:
            with pytest.raises(OnnxcamError, match=f"choose an earlier layer, such as '{default.name}'"):
                attach(file, layer=layer.name)
            break
    else:
        assert module in ("norm", "last"), grid


def test_everything_flows_through_the_residual_stream(exported):
    from onnxcam.grid import bottlenecks

    net, file, *_ = exported
    model = onnxfile.normalise(onnxfile.load(file))
    source, logits = layers.picture(model), layers.scores(model).logits
    modules = {layers.module_path(v.producer()) for v in bottlenecks(path(logits, source), logits)}
    inner = {"blocks.0.norm1", "blocks.0.q", "blocks.0.mlp.0"} if hasattr(net, "blocks") else {"norm", "mlp"}
    assert {"head"} <= modules
    assert not inner & modules


# As the end of XCiT: the class token alone is changed, beside the others as they are, and read in the end.
CLASS_ATTENTION = """(T[N,3,6,6] x) => (T[N,4] scores)
<T[8,3,2,2] embed, T[1,1,8] token, T[8] scale, T[8] shift, T[8,8] mix, T[8,4] fc, int64[3] rows = {0, 8, 9},
 int64[1] zero = {0}, int64[1] one = {1}, int64[1] end = {99}, int64 first = {0}, int64[3] shape = {-1, 1, 8}>
{
    e = Conv<kernel_shape=[2,2], strides=[2,2]>(x, embed)
    r = Reshape(e, rows)
    t = Transpose<perm=[0,2,1]>(r)
    n = Shape<start=0, end=1>(x)
    s = Concat<axis=0>(n, one, one)
    c = Expand(token, s)
    tokens = Concat<axis=1>(c, t)
    made = LayerNormalization(tokens, scale, shift)
    m = ReduceMean<keepdims=1>(made, one)
    attended = MatMul(m, mix)
    others = Slice(made, one, end, one)
    both = Concat<axis=1>(attended, others)
    sum = Add(tokens, both)
    normed = LayerNormalization(sum, scale, shift)
    read = Gather<axis=1>(normed, first)
    scores = MatMul(read, fc)
}"""


def test_tokens_put_beside_the_one_that_is_read_get_no_gradient():
    own = onnxfile.normalise(ir.from_proto(build(CLASS_ATTENTION)))
    source, logits = layers.picture(own), layers.scores(own).logits
    found = layers.explainable(source, logits)
    unreached = {layer.name for layer in found if layer.unreached}
    assert {"others", "both", "sum", "normed"} <= unreached
    assert not {"tokens", "made", "t"} & unreached
    assert layers.default(found, source, logits).name == "made"
    model = ir.to_proto(onnxcam.gradient(build(CLASS_ATTENTION, dtype="double"), "scores", ["both", "made"]))
    seed = np.eye(4)[:2]
    got = run(model, {"x": picture(2, 3, 6, 6, dtype=np.float64), "scores_seed": seed}, by="ref")
    assert not got["both_gradient"][:, 1:].any()
    assert np.abs(got["made_gradient"][:, 1:]).min() > 0
