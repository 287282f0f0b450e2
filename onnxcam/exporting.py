"""PyTorch module in, explained ONNX file out. The only part of onnxcam that imports torch."""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import logging
import math
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.reference
import onnx_ir as ir
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv_transpose
from onnx_ir.passes import common as passes

from onnxcam import layers, onnxfile
from onnxcam.attaching import attach, prepared
from onnxcam.card import Card
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.grid import CHANNELS_LAST, TOKENS, Grid

try:
    import torch
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules
except ModuleNotFoundError as missing:
    raise OnnxcamError(
        f"exporting from PyTorch needs {missing.name}; install it with: pip install 'onnxcam[export]'"
    ) from missing

OPSET = 18
"""What is written unless asked otherwise: runtimes know it best, and torch's exporter has no older one."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2}
"""Relative L2 distance from torch that the exported model may have, by the module's dtype."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_TRACED_ROWS, _CHECKED_ROWS = 3, 2
"""Different, so that a batch size that the export froze shows in the check."""

_DRAWS = 4
"""How many random batches the gradients may need to agree on one picture."""

_LARGEST_JUMP = 0.05
"""Where torch's own gradient varies more than this, agreement with it would say nothing."""

# BatchNormalization stays: folded into a Conv it would leave no value that is the Conv module's output.
_RULES = (
    rules.materialize_reshape_shape_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
)


def export(
    module: torch.nn.Module,
    example_inputs: "torch.Tensor | Sequence[torch.Tensor]",
    path: "str | os.PathLike[str] | None" = None,
    *,
    layer: str | Sequence[str] | None = None,
    method: str = "gradcam",
    target: str | None = None,
    evidence: str | None = None,
    fuse: str = "mean",
    smooth: Sequence[str] = (),
    compat: str = "paper",
    emit: Sequence[str] = ("cam", "heatmap"),
    class_input: str = "optional",
    embed_preprocess: bool = False,
    on_demand: bool = False,
    portable: bool = False,
    score: str = "before",
    labels: Sequence[str] | None = None,
    opset: int = OPSET,
    **preprocess: Any,
) -> ir.Model:
    """Export a PyTorch classifier to ONNX together with its class activation maps.

    The file's input is ``image``, its first output ``scores`` [N,classes]. Before anything is written, the
    scores, the activations of each layer and the gradient of the best class there are compared with torch's
    on random pictures. If the method looks at the picture itself, so does the check.

    Args:
        module: returns one tensor of class scores [N,classes]. It is exported in evaluation mode and comes
            back as it was.
        example_inputs: a tensor of the shape, dtype and device of the module's input, which is a picture
            [N,C,H,W] or [N,H,W,C]; the values do not matter, and N is left open. Or a tuple of that tensor.
        path: where to write the explained model; its folder must exist. None: only return it.
        layer: the activation to explain: the output of a submodule by its path, such as ``layer4`` or
            ``layer4.1.conv2`` (of its last call, if it is called more than once), or any name that `attach`
            takes. None: the last spatial feature map before the head. Or several of these.
        method: see `attach`, as are target, evidence, fuse, smooth, compat, emit, class_input,
            embed_preprocess, on_demand, portable, score, labels and preprocess.
        target: what is explained.
        evidence: what of the map is kept.
        fuse: how the maps of several layers are joined.
        smooth: ``augmentation``, ``eigen`` or both.
        compat: whose numbers the maps have.
        emit: outputs to add.
        class_input: ``optional`` or ``required``.
        embed_preprocess: let the model take the picture itself.
        on_demand: make maps only where they are asked for.
        portable: for runtimes other than onnxruntime.
        score: explain the score ``before`` or ``after`` the softmax.
        labels: class names by index.
        opset: of the model that is written, at least 18.
        preprocess: facts for the card.

    Returns:
        The explained model.

    Raises:
        OnnxcamError: torch cannot export the module, it is no classifier of pictures, the layer cannot be
            explained, or the exported model does not agree with torch.
    """
    if opset < onnxfile.OLDEST_OPSET:
        raise OnnxcamError(f"opset is {opset}; it must be at least {onnxfile.OLDEST_OPSET}")
    example = _picture(example_inputs)
    wanted = [layer] if isinstance(layer, str) else list(dict.fromkeys(layer or ()))
    parts = dict(module.named_modules())
    watched = [name for name in wanted if name and name in parts]
    with _quiet(), _evaluating(module):
        _run(module, _random(example, _CHECKED_ROWS), watched)
        program = _capture(module, _random(example, _TRACED_ROWS), watched, opset)
        model, values = _cleaned(program.model, len(watched), opset)
        known = dict(zip(watched, values, strict=True))
        sources = list(dict.fromkeys(known.get(name, name) for name in wanted))
        explained = attach(
            model,
            layer=None if layer is None else sources,
            method=method,
            target=target,
            evidence=evidence,
            fuse=fuse,
            smooth=smooth,
            compat=compat,
            emit=emit,
            class_input=class_input,
            embed_preprocess=embed_preprocess,
            on_demand=on_demand,
            portable=portable,
            score=score,
            labels=labels,
            **preprocess,
        )
        card = Card.from_metadata(explained.metadata_props)
        assert card is not None
        for source in sources or [card.layer]:
            # Whatever the method makes of them, the gradients behind it are those of gradcam.
            checked = attach(model, layer=source, emit=("activations", "gradients"), score=score)
            part = next((name for name in watched if known[name] == source), None)
            _verify(checked, model, module, program, part, example)
    if path is not None:
        onnxfile.save(explained, path)
    return explained


def load_module(spec: str, weights: "str | os.PathLike[str] | None" = None) -> torch.nn.Module:
    """Make a module from ``package.module:factory`` and load its weights.

    The factory, a function or a class, is called without arguments, except that what it calls ``weights``,
    ``weights_backbone`` or ``pretrained`` is turned off, so that it downloads nothing. Modules in the current
    folder are found too.

    Args:
        spec: such as ``torchvision.models:resnet18``.
        weights: a state dict, in safetensors if so named, otherwise as torch.save writes it. Code in it is
            never run. It may lie under the key ``state_dict`` or ``model``, and all keys may begin with
            ``module.``, as DataParallel writes them.

    Raises:
        OnnxcamError: there is no such factory, it makes no module, or the weights are not this module's.
    """
    with _quiet():
        module = _made(spec)
        if weights is None:
            return module
        state = _state(Path(weights))
        try:
            unfit = module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            raise OnnxcamError(f"{weights} does not fit {spec}: {(lines or [str(error)])[0]}") from error
    wrong = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", unfit.missing_keys), ("unexpected", unfit.unexpected_keys))
        if keys
    ]
    if wrong:
        raise OnnxcamError(f"{weights} does not fit {spec}: keys {', '.join(wrong)}")
    return module


def example(module: torch.nn.Module, channels: int, height: int, width: int) -> torch.Tensor:
    """Return a picture [1,C,H,W] of zeros, of the dtype and on the device of the module's weights."""
    picture = torch.zeros(1, channels, height, width)
    weights = next((p for p in module.parameters() if p.is_floating_point()), picture)
    return picture.to(weights)


# Running and capturing the module


@dataclasses.dataclass(frozen=True)
class _Values:
    """What the module returns, the layer's activations, and the scores before a final softmax."""

    scores: torch.Tensor
    activations: torch.Tensor
    logits: torch.Tensor


def _picture(example_inputs: "torch.Tensor | Sequence[torch.Tensor]") -> torch.Tensor:
    given = [example_inputs] if isinstance(example_inputs, torch.Tensor) else list(example_inputs)
    if len(given) != 1 or not isinstance(given[0], torch.Tensor):
        raise OnnxcamError(f"example_inputs must be one tensor, the picture; there are {len(given)} inputs")
    (picture,) = given
    if picture.ndim != 4 or picture.dtype not in TOLERANCE:
        raise OnnxcamError(
            f"the example input is {picture.dtype} {list(picture.shape)}; "
            f"it must be [N,C,H,W] of {', '.join(map(str, TOLERANCE))}"
        )
    return picture


def _random(example: torch.Tensor, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((rows, *example.shape[1:]), generator=generator, dtype=torch.float64)
    return drawn.to(example)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch and its exporter warn, log and print away from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put the module and all in it into evaluation mode, and each back into its own."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        # TF32 would make torch's own numbers the less exact ones.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _watching(module: torch.nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Within the block `module` returns the scores and what each of its parts `layers` returned.

    The rest of the module gets a copy, so that an operation in place does not change what is returned here.
    """
    if not layers:
        yield
        return
    seen: dict[str, Any] = {}

    def keeper(name: str) -> Callable[[torch.nn.Module, Any, Any], Any]:
        def keep(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
            seen[name] = output
            return output.clone() if isinstance(output, torch.Tensor) else output

        return keep

    def extend(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        return output, *(seen.pop(name, None) for name in layers)

    handles = [module.get_submodule(name).register_forward_hook(keeper(name)) for name in layers]
    handles.append(module.register_forward_hook(extend))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(module: torch.nn.Module, x: torch.Tensor, layers: Sequence[str]) -> list[torch.Tensor]:
    """Run the module in torch; return its scores and the outputs of its parts, for autograd to go back.

    Raises:
        OnnxcamError: it fails, or it or a layer returns something else than a tensor.
    """
    # A copy, so that a module may change its input in place.
    x = x.detach().requires_grad_().clone()
    try:
        with torch.enable_grad(), _watching(module, layers):
            returned = module(x)
    except Exception as error:  # whatever the module raises
        raise OnnxcamError(f"the module fails on an input {list(x.shape)}: {_cause(error)}") from error
    scores, *outputs = returned if layers else [returned]
    if not isinstance(scores, torch.Tensor):
        raise OnnxcamError(
            f"the module returns a {type(scores).__name__}; it must return one tensor, the class scores"
        )
    for layer, output in zip(layers, outputs, strict=True):
        if output is None:
            raise OnnxcamError(f"the module does not run its part {layer!r} in evaluation mode")
        if not isinstance(output, torch.Tensor):
            raise OnnxcamError(
                f"layer {layer!r} returns a {type(output).__name__}, not one tensor; choose a part of it "
                "or the layer after it"
            )
    return [scores, *outputs]


def _capture(
    module: torch.nn.Module, x: torch.Tensor, layers: Sequence[str], opset: int
) -> torch.onnx.ONNXProgram:
    try:
        with _watching(module, layers):
            program = torch.onnx.export(
                module,
                (x,),
                dynamo=True,
                opset_version=opset,
                optimize=False,
                dynamic_shapes=({0: "N"},),
                verbose=False,
            )
    except Exception as error:  # torch's exporter passes on whatever it meets
        raise OnnxcamError(f"torch cannot export the module: {_cause(error)}") from error
    assert program is not None
    return program


def _cleaned(model: ir.Model, watched: int, opset: int) -> tuple[ir.Model, list[str]]:
    """Bring torch's model into its final form.

    Args:
        model: changed in place.
        watched: how many of its last outputs are layers to explain, and not its own.
        opset: which was asked for.

    Returns:
        The model, and the names of the values that are those layers.
    """
    optimizer.fold_constants(model, onnx_shape_inference=True)
    rewriter.rewrite(model, _RULES)
    passes.InlinePass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    graph = model.graph
    watching = [_original(graph.outputs.pop()) for _ in range(watched)][::-1]
    passes.RemoveUnusedNodesPass()(model)
    names = {v.name for v in (*graph.inputs, *graph.initializers.values())}
    names |= {v.name for node in graph.all_nodes() for v in node.outputs}
    for own, name in ((graph.inputs[0], "image"), (graph.outputs[0], "scores")):
        own.name = own.name if name in names else name
    batch = graph.inputs[0].shape[0] if graph.inputs[0].shape else None
    if isinstance(batch, int):
        raise OnnxcamError(
            f"the module works for a batch of {batch} only; it must take any number of pictures"
        )
    if graph.opset_imports[""] != opset:
        raise OnnxcamError(f"torch's exporter cannot write opset {opset}")
    _forget_machine(model)
    return model, [value.name or "" for value in watching]


def _original(value: ir.Value) -> ir.Value:
    """Return the value that `value` is a copy of."""
    while (node := value.producer()) is not None and node.op_type == "Identity":
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value


def _forget_machine(model: ir.Model) -> None:
    """Drop source lines and paths of the machine that made the model; keep each node's module path."""
    graph = model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in nodes for v in node.outputs)]
    holders: list[ir.Model | ir.Graph | ir.Value | ir.Node] = [model, graph, *values, *nodes]
    for holder in holders:
        holder.doc_string = None
        scopes = holder.metadata_props.get(_SCOPES) if isinstance(holder, ir.Node) else None
        holder.metadata_props.clear()
        # Sizes that torch reads between modules have a made-up scope.
        if scopes is not None and "_empty_nn_module_stack" not in scopes:
            holder.metadata_props[_SCOPES] = scopes


# Checking the result against torch


def _verify(
    explained: ir.Model,
    model: ir.Model,
    module: torch.nn.Module,
    program: torch.onnx.ONNXProgram,
    watched: str | None,
    example: torch.Tensor,
) -> None:
    """Compare scores, activations and gradients with torch's on random pictures.

    A gradient jumps where a Relu's input crosses zero or another element becomes a window's maximum. What
    crosses by the last bit alone lies on one side in torch and on the other elsewhere, and in deep networks
    there is hardly a picture without such an element. So the gradients must agree on one picture of several:
    within the tolerance, or as well as torch agrees with itself when the picture's last bits change.

    Args:
        explained: has the outputs ``cam_activations`` and ``cam_gradients``.
        model: what it was made from.
        module: the module, in evaluation mode.
        program: what torch captured.
        watched: the submodule whose output is the layer, if it is one.
        example: a picture.

    Raises:
        OnnxcamError: they do not agree.
    """
    card = Card.from_metadata(explained.metadata_props)
    assert card is not None
    plain = prepared(model)
    picture, found = layers.picture(plain), layers.scores(plain)
    grid = layers.find(plain, card.layer, picture, found.logits).grid
    source = None if card.layer == picture.name else card.layer
    logits = None if found.logits is found.output or card.score == "after" else found.logits.name

    def in_torch(x: torch.Tensor) -> _Values:
        if watched is not None and logits is None:
            scores, activations = _run(module, x, [watched])
            return _Values(scores, activations, scores)
        return _run_program(program, x, source, logits)

    allowed = TOLERANCE[example.dtype]
    off, jump, own = 0.0, math.inf, 0.0
    with _onnx_runner(explained, example.dtype) as run:
        for draw in range(_DRAWS):
            x = _random(example, _CHECKED_ROWS, draw)
            values = in_torch(x)
            classes = values.scores.detach().flatten(1).argmax(1, keepdim=True)
            gradient = _planes(grid, _gradient(values, classes, card))
            want = values.scores, _planes(grid, values.activations), gradient
            scores, activations, gradients = (
                _relative_errors(g, w) for g, w in zip(run(x, classes), want, strict=True)
            )
            off, jump = max(off, *scores, *activations), min(jump, *gradients)
            if off > allowed:
                break
            if jump <= allowed:
                return
            nudged = in_torch(x * (1 + 4 * torch.finfo(x.dtype).eps * _random(x, len(x), -1).sign()))
            noise = _relative_errors(_array(_planes(grid, _gradient(nudged, classes, card))), gradient)
            if any(e <= 2 * n <= _LARGEST_JUMP for e, n in zip(gradients, noise, strict=True)):
                return
            own = max(own, *noise)
    raise OnnxcamError(
        f"the exported model does not agree with torch: scores and activations are off by up to {off:.2g}, "
        f"gradients by at least {jump:.2g}, where {allowed:g} is allowed and torch's own vary by {own:.2g}"
    )


def _run_program(
    program: torch.onnx.ONNXProgram, x: torch.Tensor, source: str | None, logits: str | None
) -> _Values:
    """Run what torch captured; every value has the name there that it has in the model.

    Args:
        program: what torch captured.
        x: pictures.
        source: the layer; None: the pictures themselves.
        logits: the scores before the softmax that the module ends in; None: it ends in none.

    Raises:
        OnnxcamError: the captured program has no such value.
    """
    captured = program.exported_program
    assert captured is not None
    layer = source or str(captured.graph_signature.user_inputs[0])
    taps = _Taps(captured, layer, logits)
    missing = {layer, logits or layer} - {node.name for node in captured.graph.nodes}
    if missing:
        known = [node.name for node in captured.graph.nodes]
        raise OnnxcamError(
            f"{missing.pop()!r} is a step within an operator of torch, which has no gradient there to check "
            f"against; choose the output of a whole one{suggest(layer, known)}"
        )
    try:
        with torch.enable_grad():
            returned = taps.run(x.clone())
    except Exception as error:  # whatever its operators raise
        raise OnnxcamError(
            f"what torch captured fails on an input {list(x.shape)}: {_cause(error)}"
        ) from error
    scores = returned if isinstance(returned, torch.Tensor) else returned[0]
    return _Values(scores, taps.values[layer], taps.values[logits] if logits else scores)


class _Taps(torch.fx.Interpreter):
    """Runs a captured program, keeps values of it, and cuts autograd's way back at one of them."""

    def __init__(self, program: torch.export.ExportedProgram, source: str, *others: str | None) -> None:
        super().__init__(program.module())
        self.values: dict[str, torch.Tensor] = {}
        self._source = source
        self._wanted = (source, *others)

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.name == self._source:
            result = result.detach().requires_grad_()
        if n.name in self._wanted:
            self.values[n.name] = result
        return result


def _gradient(values: _Values, classes: torch.Tensor, card: Card) -> torch.Tensor:
    scores = (values.logits if card.score == "before" else values.scores).flatten(1)
    if card.score == "after" and card.scores_are == "logits":
        scores = scores.softmax(1)
    found = None
    if scores.requires_grad and values.activations.requires_grad:
        total = scores.gather(1, classes).sum()
        (found,) = torch.autograd.grad(total, values.activations, allow_unused=True)
    if found is None:
        raise OnnxcamError(
            f"torch finds no gradient at layer {card.layer!r}: does forward() use detach() or no_grad()?"
        )
    return found


def _planes(grid: Grid, x: torch.Tensor) -> torch.Tensor:
    """View an activation or its gradient as [N,C,h,w]."""
    if grid.order == CHANNELS_LAST:
        return x.permute(0, 3, 1, 2)
    if grid.order == TOKENS:
        assert isinstance(grid.height, int) and isinstance(grid.width, int)
        tokens = x[:, grid.first : grid.first + grid.height * grid.width]
        return tokens.transpose(1, 2).reshape(*x.shape[::2], grid.height, grid.width)
    return x


@contextlib.contextmanager
def _onnx_runner(
    model: ir.Model, dtype: torch.dtype
) -> Iterator[Callable[[torch.Tensor, torch.Tensor], list[np.ndarray]]]:
    """Give a function that runs a model: a picture and classes in; scores, activations and gradients out."""
    image, classes, scores = (v.name or "" for v in (*model.graph.inputs, model.graph.outputs[0]))
    outputs = [scores, "cam_activations", "cam_gradients"]
    with tempfile.TemporaryDirectory(prefix="onnxcam-") as folder:
        path = Path(folder) / "model.onnx"
        onnxfile.save(model, path)
        try:
            run = _runtime(path, dtype)
            yield lambda x, wanted: run(outputs, {image: _array(x), classes: _array(wanted)})
        except OnnxcamError:
            raise
        except Exception as error:  # onnxruntime makes none of its exceptions public
            raise OnnxcamError(f"the exported model does not run: {_cause(error)}") from error


def _runtime(path: Path, dtype: torch.dtype) -> Callable[[list[str], dict[str, np.ndarray]], Any]:
    """Return what runs the model: onnxruntime if installed, otherwise ONNX's reference evaluator."""
    # onnxruntime has hardly a kernel for other types on a CPU.
    if dtype == torch.float32 and importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run
    return onnx.reference.ReferenceEvaluator(str(path), new_ops=[ConvTranspose]).run


class ConvTranspose(OpRun):
    """onnx.reference's own, group by group: in onnx 1.23 it slices the weights of groups wrongly."""

    def _run(self, x: Any, w: Any, b: Any = None, group: int = 1, **options: Any) -> Any:
        xs, ws = np.split(x, group, axis=1), np.split(w, group)
        bs = [None] * group if b is None else np.split(b, group)
        plain: Any = op_conv_transpose.ConvTranspose._run
        parts = [plain(self, *part, group=1, **options)[0] for part in zip(xs, ws, bs, strict=True)]
        return (np.concatenate(parts, axis=1),)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _relative_errors(got: np.ndarray, want: torch.Tensor) -> list[float]:
    """Return the distance of each row of `got` from that of `want`, over the norm of the latter."""
    expected = _array(want)
    if got.shape != expected.shape:
        return [math.inf]
    errors = []
    for g, w in zip(got.astype(np.float64), expected.astype(np.float64), strict=True):
        distance = float(np.linalg.norm(g - w))
        errors.append(distance and distance / max(float(np.linalg.norm(w)), 1e-300))
    return [math.inf if math.isnan(error) else error for error in errors]


def _cause(error: BaseException) -> str:
    """Return the first line of the error that `error` came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# Making a module


def _made(spec: str) -> torch.nn.Module:
    where, colon, name = spec.partition(":")
    if not (where and colon and name):
        raise OnnxcamError(
            f"{spec!r} names no module; write PACKAGE.MODULE:FACTORY, as in torchvision.models:resnet18"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory: Any = importlib.import_module(where)
        for part in name.split("."):
            if not hasattr(factory, part):
                raise OnnxcamError(f"{where} has no {name!r}{suggest(part, dir(factory))}")
            factory = getattr(factory, part)
        if not callable(factory):
            raise OnnxcamError(f"{spec} is not a function or a class that makes a module")
        made = factory(**_nothing_to_download(factory))
    except OnnxcamError:
        raise
    except Exception as error:  # whatever the imported code raises
        raise OnnxcamError(f"{spec} cannot be made: {_cause(error)}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(made, torch.nn.Module):
        raise OnnxcamError(f"{spec} makes a {type(made).__name__}, not a torch.nn.Module")
    return made


def _nothing_to_download(factory: Any) -> dict[str, Any]:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    off = {"weights": None, "weights_backbone": None, "pretrained": False}
    return {name: value for name, value in off.items() if name in parameters}


def _state(path: Path) -> Mapping[str, torch.Tensor]:
    """Read a state dict without running code that may be in it."""
    try:
        state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except FileNotFoundError:
        raise OnnxcamError(f"{path} does not exist") from None
    except OSError as error:
        raise OnnxcamError(f"{path} cannot be read: {error.strerror or error}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise OnnxcamError(f"{path} holds no state dict: save module.state_dict()")
    prefix = "module."
    if state and all(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise OnnxcamError(
            f"{path} holds more than weights, and onnxcam runs no code from it: save module.state_dict()"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise OnnxcamError(f"{path} is not a file of weights: {_cause(error)}") from error


def _read_safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise OnnxcamError(
            f"reading {path} needs safetensors; install it with: pip install 'onnxcam[export]'"
        ) from None
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise OnnxcamError(f"{path} is not a safetensors file: {_cause(error)}") from error
