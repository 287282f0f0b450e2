"""Checking an explained model that somebody else made: how its receiver comes to trust it.

What was added is taken off again, which leaves the original. That is explained anew, as the card says, and
compared; and the gradient it is explained with is compared with differences of the scores.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import Value
from PIL import Image

from onnxcam import layers, onnxfile, quantised
from onnxcam.attaching import OUTPUTS, PREFIX, attach, prepared
from onnxcam.backward import ancestors, path
from onnxcam.card import KEY, WANTED, Card, Preprocess
from onnxcam.dialects import DIALECTS
from onnxcam.differences import Doubles, Tail, off_kinks, rounds, slopes
from onnxcam.embedding import PICTURE
from onnxcam.emit import Emitter, all_values
from onnxcam.errors import OnnxcamError
from onnxcam.grid import Grid
from onnxcam.image import prepare
from onnxcam.sessions import provider_named, run, start
from onnxcam.subgraphs import bodies, branches, is_if, within
from onnxcam.targets import AGAINST, CLASS, MASK, RIVALS, SEED
from onnxcam.vjp import VARIANTS
from onnxcam.vjp.shapes import dims

SAME = 1e-5
"""Largest difference, over the largest value, at which outputs count as the original's.

``benchmarks/original_outputs.py`` finds up to 6e-7. This and the others are at least 20 times the last bit of
half precision, where that is what the numbers are.
"""

ALIKE = 1e-4
"""The same for maps. One onnxcam and one onnxruntime give the same bits; others may sum otherwise."""

NEAR = 1e-4
"""Largest relative distance of a gradient from the differences, on the better of the pictures.

``python -m benchmarks.verifying`` finds 2.2e-6 or less at 35 of 37 places, where every ReLU is on the same
side of its kink in float32 and in float64, and 4.5e-5 and 5.6e-4 at the others. Where that is so for no
picture, four times what the differences themselves change by is allowed, when the last bits of a float32
activation change.
"""

JUMPY = 0.02
"""If they change by more, nothing can be said."""

LEVEL = 1.5
"""Largest difference of a pixel, in levels of 255, from Pillow's preparation.

Pillow 13 resizes the columns first where older ones begin with the rows, so that a level may be the next one.
"""

_PICTURES = 2
_DIRECTIONS = 2
_NUDGES = 5
_SIZE = 224
"""Pixels, where neither the graph nor the card says how large a picture is."""

_OURS = f"{PREFIX}/"
_INPUTS = (PICTURE, CLASS, AGAINST, MASK, SEED, WANTED)
_OPTIONAL = (CLASS, AGAINST, MASK, WANTED)

Array: TypeAlias = "NDArray[Any]"
Verdict = tuple[bool | None, str]


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: whether it is as it should be; None: that is not to be judged, or could not be.
        text: the figures, or what is wrong.
    """

    name: str
    passed: bool | None
    text: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found in an explained model.

    Attributes:
        model: the file.
        title: what it explains, as far as the card says.
        checks: in order. If the graph is not valid, or the card wrong, that is the only one.
    """

    model: str
    title: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        marks = {True: "ok", False: "FAILED", None: "-"}
        lines = [f"  {marks[c.passed]:<6}  {c.name:<9}  {c.text}" for c in self.checks]
        return "\n".join([f"{self.model}: {self.title}", *lines])


def verify(path: "str | os.PathLike[str]", against: "str | os.PathLike[str] | None" = None) -> Report:
    """Check an explained model on random pictures, in onnxruntime on the CPU.

    - ``card``: it says what fits the graph.
    - ``graph``: it is valid ONNX and has the inputs and outputs of ``docs/format.md``.
    - ``picture``: where the file takes the picture itself, it prepares it as `onnxcam.image` does.
    - ``operators``: what was added are standard operators, and whatever else the original itself has.
    - ``original``: the outputs are those of the model `against`, and so are all weights and nodes; without
      it, the outputs are those of the file without what was added.
    - ``maps``: they are those that this onnxcam makes of the same model.
    - ``gradient``: that onnxcam's gradient g, of which the maps are made, is the derivative of the scores.
      What lies behind the activation A is run in float64, by ONNX's own reference evaluator: on both sides
      of A in random directions v, (y(A + hv) - y(A - hv)) / 2h should be <g,v>. With v normal of variance 1,
      the root mean square of what it is off, over the norm of g, estimates the relative distance of g from
      the derivative. h is so small, 1e-8 of A, that hardly any kink of a ReLU or a maximum lies between.
    - ``size``: what the explanation adds.

    Args:
        path: an explained model.
        against: the model that it was made from.

    Raises:
        OnnxcamError: a file cannot be read, `path` is not explained or `against` is, or onnxruntime is
            missing or cannot run the original.
    """
    model = onnxfile.load(path)
    if KEY not in model.metadata_props:
        raise OnnxcamError(f"{path} is not an explained model: it has no card. 'onnxcam attach' makes one")
    provider_named("cpu")
    plain = None if against is None else _as_attached(prepared(against))
    try:
        onnxfile.check(model)
    except OnnxcamError as error:
        return Report(os.fspath(path), "not valid ONNX", (Check("graph", False, _line(error)),))
    try:
        subject = _Subject.of(path, model, against, plain)
        card = Check("card", *_card(subject))
    except OnnxcamError as error:
        return Report(os.fspath(path), "not as onnxcam makes it", (Check("card", False, _line(error)),))
    if not card.passed:
        return Report(os.fspath(path), subject.card.title, (card,))
    if not np.isfinite(subject.scores).all():
        raise OnnxcamError(
            f"{path} gives random pictures scores that are not finite; nothing can be compared"
        )
    checks = (
        _checked(name, check, subject)
        for name, check in _CHECKS.items()
        if name != "picture" or subject.card.picture is not None
    )
    return Report(os.fspath(path), subject.card.title, (card, *checks))


@dataclasses.dataclass(frozen=True)
class _Subject:
    """An explained model taken apart.

    Attributes:
        path, model: the file.
        card: what it says about itself.
        original: the model without what was added.
        added: nodes of `model`, in order.
        fresh: `original` explained anew as the card says.
        against, plain: the model that it should have been made from, if one was given.
    """

    path: Path
    model: ir.Model
    card: Card
    original: ir.Model
    added: Sequence[ir.Node]
    fresh: ir.Model
    against: Path | None
    plain: ir.Model | None

    @classmethod
    def of(
        cls,
        path: "str | os.PathLike[str]",
        model: ir.Model,
        against: "str | os.PathLike[str] | None",
        plain: ir.Model | None,
    ) -> "_Subject":
        """Take a model apart.

        Raises:
            OnnxcamError: its card cannot be read, or does not fit the graph.
        """
        card = Card.from_metadata(model.metadata_props)
        assert card is not None
        original, added = _divided(model, card)
        emit = [kind for kind, name in OUTPUTS.items() if name in _names(model.graph.outputs)]
        optional = all(v.is_initializer() for v in model.graph.inputs if v.name in _OPTIONAL)
        fresh = attach(
            original,
            emit=emit,
            evidence=card.evidence,
            fuse=card.fuse,
            smooth=card.smooth or (),
            class_input="optional" if optional else "required",
            labels=card.labels,
            embed_preprocess=card.picture is not None,
            on_demand=bool(card.on_demand),
            portable=_single_class(model.graph.inputs),
            **_request(card),
            **{k: v for k, v in dataclasses.asdict(card.input).items() if k != "name"},
        )
        against = None if against is None else Path(against)
        return cls(Path(path), model, card, original, added, fresh, against, plain)

    @functools.cached_property
    def feeds(self) -> dict[str, Array]:
        """Random input for the file: noise, prepared as the card says where that is known."""
        return _noise(self.model, self.card)

    @functools.cached_property
    def pictures(self) -> dict[str, Array]:
        """The same for the original."""
        if self.card.picture is None:
            return self.feeds
        name = self.card.input.name
        try:
            graph = ir.convenience.extract(self.model.graph, [PICTURE], [name])
        except ValueError:
            raise OnnxcamError(f"{name!r} is made of something else than {PICTURE}") from None
        x = _run(
            ir.Model(graph, ir_version=self.model.ir_version),
            [name],
            {PICTURE: self.feeds[PICTURE]},
            self.path,
        )[0]
        return {name: x, **{k: v for k, v in self.feeds.items() if k != PICTURE}}

    @functools.cached_property
    def scores(self) -> Array:
        """The class scores of these pictures."""
        return _run(self.original, [self.card.scores], self.pictures, self.path)[0]

    @property
    def nodes(self) -> Iterator[ir.Node]:
        """Iterate over the added nodes and those inside of them."""
        for node in self.added:
            yield from within(node)


def _as_attached(model: ir.Model) -> ir.Model:
    """Bring a model that is prepared into the form in which `attach` leaves it."""
    op = Emitter(model.graph, model.graph.opset_imports[""], PREFIX)
    quantised.fold(op)
    op.remove_dead([])
    return model


def _single_class(inputs: Iterable[Value]) -> bool:
    """Whether one class can be asked for in a run: the file was attached for other runtimes."""
    return any(dims(value)[1] == 1 for value in inputs if value.name == CLASS)


def _request(card: Card) -> dict[str, Any]:
    """Arguments of `attach` for what is explained."""
    dialect = DIALECTS.get(card.compat or "paper")
    method = dialect.methods.get(card.method) if dialect else None
    return {
        "layer": None if method is not None and method.at_picture else card.layer.split(", "),
        "method": card.method,
        "target": card.target,
        "compat": card.compat or "paper",
        "score": card.score,
        "scores": card.scores,
    }


def _divided(model: ir.Model, card: Card) -> tuple[ir.Model, list[ir.Node]]:
    """Return the model without what was added, and the added nodes.

    Raises:
        OnnxcamError: an output of the original needs one of these.
    """
    ours = set(OUTPUTS.values())
    prepared = next((v for n in model.graph for v in n.outputs if v.name == card.input.name), None)
    if (card.picture is None) != (prepared is None):
        raise OnnxcamError(
            f"the card's picture is {card.picture!r}, but {card.input.name!r} is another kind of value"
        )
    stop = None if prepared is None else prepared.producer()
    needed = set(ancestors([v for v in model.graph.outputs if v.name not in ours], stop))
    explaining = set(ancestors([v for v in model.graph.outputs if v.name in ours]))
    added = [n for n in model.graph if (n.name or "").startswith(_OURS) or n in explaining - needed]
    for node in added:
        if node in needed:
            raise OnnxcamError(f"the added node {node.name!r} has influence on an output of the original")
    original = model.clone()
    graph = original.graph
    twins = dict(zip(model.graph, graph, strict=True))
    del original.metadata_props[KEY]
    if prepared is not None:
        _take_prepared(graph, card)
    graph.outputs[:] = [v for v in graph.outputs if v.name not in ours]
    _remove([twins[node] for node in added])
    _close_branches(graph)
    graph.inputs[:] = [v for v in graph.inputs if v.name not in _INPUTS]
    for value in list(graph.initializers.values()):
        if (value.name or "").startswith((_OURS, *_INPUTS)) and not value.uses():
            del graph.initializers[value.name]  # type: ignore[arg-type]
    return original, added


def _take_prepared(graph: ir.Graph, card: Card) -> None:
    """Put the input that the picture is prepared for in the place of the picture."""
    place = next((i for i, v in enumerate(graph.inputs) if v.name == card.picture), None)
    inner = next(v for node in graph for v in node.outputs if v.name == card.input.name)
    if place is None or inner.type is None or inner.shape is None or len(inner.shape) != 4:
        raise OnnxcamError(f"the graph makes no input {card.input.name!r} of a picture {card.picture!r}")
    sizes = [card.input.height, card.input.width]
    shape = [dims(inner)[1], *sizes] if card.input.layout == "NCHW" else [*sizes, dims(inner)[3]]
    given = Value(name=inner.name, type=inner.type, shape=ir.Shape([dims(graph.inputs[place])[0], *shape]))
    inner.replace_all_uses_with(given)
    inner.name = f"{_OURS}{inner.name}"
    graph.inputs[place] = given


def _remove(nodes: Sequence[ir.Node]) -> None:
    """Remove nodes that are read by no others, and what is inside of them."""
    for node in reversed(nodes):
        for body in bodies(node):
            body.outputs.clear()
            _remove(list(body))
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _close_branches(graph: ir.Graph) -> None:
    """Take off what branches were made to hand out."""
    for node in [node for node in graph.all_nodes() if is_if(node)]:
        kept = [value for value in node.outputs if not (value.name or "").startswith(_OURS)]
        for branch in branches(node):
            del branch.outputs[len(kept) :]
            _remove([n for n in branch if (n.name or "").startswith(_OURS)])
        node.resize_outputs(len(kept))


def _checked(name: str, check: "Callable[[_Subject], Verdict]", subject: _Subject) -> Check:
    try:
        return Check(name, *check(subject))
    except OnnxcamError as error:
        return Check(name, False, _line(error))


def _card(subject: _Subject) -> Verdict:
    found = Card.from_metadata(subject.fresh.metadata_props)
    assert found is not None
    card = subject.card
    for field in dataclasses.fields(Card):
        says, is_so = getattr(card, field.name), getattr(found, field.name)
        if says != is_so and field.name != "tool":
            return False, f"it says of {field.name}: {says!r}; the graph says {is_so!r}"
    return True, f"format {card.format}, written by {card.tool}; it fits the graph"


def _graph(subject: _Subject) -> Verdict:
    model, fresh = subject.model.graph, subject.fresh.graph
    for what, given, wanted in (
        ("inputs", model.inputs, fresh.inputs),
        ("outputs", model.outputs, fresh.outputs),
    ):
        if _names(given) != _names(wanted):
            return False, f"its {what} are {_listed(given)}; they should be {_listed(wanted)}"
        for has, should in zip(given, wanted, strict=True):
            if has.dtype != should.dtype or not _fits(has, should):
                return False, f"{has.name!r} is {_typed(has)}; it should be {_typed(should)}"
            if not _same_tensor(has.const_value, should.const_value):
                return False, f"the default of {has.name!r} is not the documented one"
    ours = [v for v in model.inputs if v.name in _INPUTS], [v for v in model.outputs if _is_ours(v)]
    return True, f"valid ONNX; {' in, '.join(map(_listed, ours))} out"


def _picture(subject: _Subject) -> Verdict:
    facts = subject.card.input
    scale, std = facts.scale, facts.std
    assert scale is not None and std is not None
    own = [prepare(Image.fromarray(photo), facts)[0] for photo in subject.feeds[PICTURE]]
    per_channel = np.reshape(std, (-1, 1, 1) if facts.layout == "NCHW" else (-1,))
    levels = np.abs(subject.pictures[facts.name] - np.concatenate(own)) * per_channel / abs(scale)
    text = f"{PICTURE} is prepared as the card says, within {levels.max():.2f} levels of 255 of Pillow"
    return bool(levels.max() < LEVEL), text


def _operators(subject: _Subject) -> Verdict:
    opset = subject.model.graph.opset_imports[""]
    own = {(n.domain, n.op_type) for n in subject.original.graph.all_nodes()}
    foreign = sorted({f"{domain}.{kind}" for domain, kind in own if domain})
    if subject.model.functions:
        return False, "it has functions of its own, which could stand for anything"
    for node in subject.nodes:
        standard = not node.domain and onnx.defs.has(node.op_type, max_inclusive_version=opset)
        if not standard and (node.domain, node.op_type) not in own:
            return False, f"the added node {node.name!r} is {node.domain or 'ai.onnx'}.{node.op_type}"
    kinds = len({node.op_type for node in subject.nodes})
    remark = f"; the original itself has {', '.join(foreign)}" if foreign else ""
    return True, f"{len(list(subject.nodes))} nodes added, of {kinds} operators of ai.onnx{remark}"


def _original(subject: _Subject) -> Verdict:
    like = subject.plain or subject.original
    what = str(subject.against) if subject.plain else "the file without what was added"
    if subject.plain is not None:
        different = _difference(subject.original, subject.plain)
        if different:
            return False, f"{different} is not that of {what}"
    names = _names(like.graph.outputs)
    if names != _names(v for v in subject.model.graph.outputs if not _is_ours(v)):
        return False, f"the outputs of {what} are {', '.join(names)}"
    wanted = _run(like, names, subject.pictures, what)
    required = [v for v in subject.model.graph.inputs if not v.is_initializer()]
    found = _run(subject.model, names, {**subject.feeds, **_asked(required, subject.scores)}, subject.path)
    off = _differences(names, found, wanted)
    for name, array in zip(names, wanted, strict=True):
        if not off[name] <= _allowed(SAME, array):
            return False, f"output {name!r} {_away(off[name])} that of {what}"
    equal = f"all nodes and {len(like.graph.initializers)} weights equal, " if subject.plain else ""
    return True, f"{equal}outputs {_closeness(off)} those of {what}"


def _difference(model: ir.Model, like: ir.Model) -> str | None:
    """Name the first weight or node of `like` that `model` does not have likewise."""
    for name, value in like.graph.initializers.items():
        found = model.graph.initializers.get(name)
        if found is None or not _same_tensor(found.const_value, value.const_value):
            return f"weight {name!r}"
    if len(model.graph) != len(like.graph):
        return "the number of nodes"
    for has, should in zip(model.graph, like.graph, strict=True):
        if _written(has) != _written(should):
            return f"node {should.name!r}"
    return None


def _same_tensor(a: "ir.TensorProtocol | None", b: "ir.TensorProtocol | None") -> bool:
    if a is None or b is None:
        return a is b
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def _written(node: ir.Node) -> bytes:
    """Write a node without what is only noted on it."""
    proto = ir.to_proto(node)
    _strip(proto)
    return proto.SerializeToString(deterministic=True)


def _strip(node: onnx.NodeProto) -> None:
    node.ClearField("doc_string")
    node.ClearField("metadata_props")
    for attribute in node.attribute:
        if attribute.HasField("g"):
            attribute.g.ClearField("value_info")
            for inner in attribute.g.node:
                _strip(inner)


def _maps(subject: _Subject) -> Verdict:
    names = _names(v for v in subject.model.graph.outputs if _is_ours(v))
    feeds = {**subject.feeds, **_asked(subject.model.graph.inputs, subject.scores)}
    session = start(subject.model, provider_named("cpu"), subject.path)
    found = run(session, names, feeds, subject.path)
    wanted = _run(subject.fresh, names, feeds, subject.path)
    off = _differences(names, found, wanted)
    for name, array in zip(names, wanted, strict=True):
        if not off[name] <= _allowed(ALIKE, array):
            return False, f"{name} {_away(off[name])} what this onnxcam makes of the model"
    if WANTED in feeds:
        unasked = run(session, names, {**feeds, WANTED: np.array(False)}, subject.path)
        made = [name for name, array in zip(names, unasked, strict=True) if array.size]
        if made:
            return False, f"{', '.join(made)} is made where {WANTED} is false"
    how = "by other nodes" if _difference(subject.model, subject.fresh) else "node for node"
    return True, f"{', '.join(names)} {_closeness(off)} what this onnxcam makes of the model, {how}"


def _gradient(subject: _Subject) -> Verdict:
    if not any("/gradient/" in (node.name or "") for node in subject.nodes):
        return None, f"{subject.card.method} has none"
    parts = [_derivative(subject, name) for name in subject.card.layer.split(", ")]
    judged = [passed for passed, _ in parts]
    return False if False in judged else None if None in judged else True, "; ".join(t for _, t in parts)


def _derivative(subject: _Subject, layer: str) -> Verdict:
    """Compare the gradient at one layer with differences of the scores."""
    request = _request(subject.card)
    model = subject.original.clone()
    if request["layer"] is not None:
        request["layer"] = layer
    if request["layer"] not in (None, subject.card.input.name):
        values = _run(_with_outputs(model.clone(), [layer]), [layer], subject.pictures, layer)
        request["layer"] = off_kinks(model, layer, values[0])
    backward = attach(
        model,
        emit=("activations", "gradients"),
        portable=_single_class(subject.model.graph.inputs),
        **request,
    )
    own = onnxfile.normalise(model)
    found, source, grid = _place(own, subject.card, request["layer"])
    reason = _why_no_derivative(subject.card, found.logits, source)
    if reason is not None:
        return None, f"at {layer} not compared: {reason}"
    try:
        tail = Tail(own, source, grid, found, subject.card.score == "after")
    except OnnxcamError as error:
        return None, f"at {layer} not compared: {error}"
    if not set(tail.reads) <= {value.name for value in all_values(backward.graph)}:
        return None, f"at {layer} not compared: what lies behind it also reads what is rounded"
    asked = _asked(backward.graph.inputs, subject.scores, by_rank=False)
    names = list(dict.fromkeys(["cam_activations", "cam_gradients", subject.card.scores, *tail.reads]))
    given = dict(
        zip(
            names,
            _run(_with_outputs(backward, names), names, {**subject.pictures, **asked}, layer),
            strict=True,
        )
    )
    at = given["cam_activations"].astype(np.float64)
    rng = np.random.default_rng(1)
    directions = [rng.standard_normal(at.shape) for _ in range(_DIRECTIONS)]
    try:
        explained, output = tail(at, given)
        off = _off(output, given[subject.card.scores].astype(np.float64))
        if not off <= _allowed(ALIKE, given[subject.card.scores]):
            return None, f"at {layer} not compared: ONNX's reference evaluator gives scores {off:.1e} off"
        weights = _weights(subject.card.target, asked, explained)
        g = given["cam_gradients"].astype(np.float64).reshape(*weights.shape[:2], *at.shape[1:])
        if not g.any() and not slopes(tail, at, given, weights, directions).any():
            return None, f"at {layer} not compared: it is zero on all random pictures"
        passed, text = _judged(
            g,
            at,
            directions,
            lambda near_by: slopes(tail, near_by, given, weights, directions),
            _allowed(NEAR, given["cam_gradients"]),
        )
    except OnnxcamError as error:
        return None, f"at {layer} not compared: {error}"
    return passed, f"at {layer} {text}"


def _place(model: ir.Model, card: Card, layer: str | None) -> tuple[layers.Scores, Value, Grid]:
    """Return the scores and the activation that are meant, and how the plane lies in the latter."""
    picture = layers.picture(model)
    found = layers.scores(model, card.scores, any_shape=card.target == "seed")
    if layer is None:
        rows = 2 if card.input.layout == "NCHW" else 1
        height, width = dims(picture)[rows : rows + 2]
        return found, picture, Grid(card.input.layout, height, width)
    located = layers.locate(model, layer, picture, found.logits)
    return found, located.value, located.grid


def _why_no_derivative(card: Card, logits: Value, source: Value) -> str | None:
    """Say why what the method goes by is not the derivative of the scores."""
    if rounds(logits, source):
        return "what is rounded in between has no derivative"
    rules = DIALECTS[card.compat or "paper"].method(card.method).rules
    if rules and any((node.domain, node.op_type) in VARIANTS[rules] for node in path(logits, source)):
        return f"{card.method} goes by another rule than the derivative's"
    return None


def _judged(
    g: Doubles,
    at: Doubles,
    directions: Sequence[Doubles],
    slope: Callable[[Doubles], Doubles],
    near: float,
) -> Verdict:
    """Judge the gradient at an activation by the derivatives along some directions.

    Args:
        g: the gradient [N,K,C,h,w].
        at: the activation [N,C,h,w].
        directions: D of them.
        slope: the derivatives [N,K,D] at an activation.
        near: how far the gradient may be from them in any case.
    """
    wanted = slope(at)
    has = np.stack([np.einsum("nkchw,nchw->nk", g, v) for v in directions], axis=-1)
    norm = np.sqrt((g**2).sum((2, 3, 4)))
    scale = np.where(norm > 0, norm, norm.max() or 1.0)[..., None]
    distances = np.nan_to_num(np.sqrt((((has - wanted) / scale) ** 2).mean((1, 2))), nan=np.inf)
    text = f"{distances.min():.1e} from differences of the scores"
    if distances.min() <= near:
        return True, text
    rng, jumps = np.random.default_rng(3), np.zeros(len(at))
    for _ in range(_NUDGES):
        nudged = at * (1 + 4 * np.finfo(np.float32).eps * rng.choice([-1, 1], at.shape))
        jumps = np.maximum(jumps, np.sqrt((((slope(nudged) - wanted) / scale) ** 2).mean((1, 2))))
    text += f"; where they jump by {jumps.max():.1e} if last bits change"
    if (distances <= np.where(jumps <= JUMPY, 4 * jumps, 0)).any():
        return True, text
    return (None, f"not judged: {text}") if (jumps > JUMPY).all() else (False, text)


def _weights(target: str | None, asked: Mapping[str, Array], scores: Array) -> Array:
    """Return the weight [N,K,...] of each of the scores [N,...] in the K sums that are explained."""
    if target == "seed":
        return asked[SEED][:, None]
    n, m = scores.shape[:2]
    mask = asked.get(MASK, np.ones((1, 1, 1)))
    totals = (scores.reshape(n, m, *scores.shape[2:] or (1, 1)) * mask[:, None]).sum((2, 3))
    one_hot, classes = np.eye(m), asked[CLASS]
    weights = one_hot[classes]
    if target == "contrast":
        weights = weights - one_hot[asked[AGAINST]]
    elif target == "rivals":
        own = np.take_along_axis(totals, classes, 1)[..., None]
        distance = np.where(weights > 0, np.inf, np.abs(totals[:, None] - own))
        weights = weights - one_hot[np.argsort(distance)[..., : min(RIVALS, m - 1)]].mean(2)
    return weights[..., None, None] * mask[:, None, None]


def _size(subject: _Subject) -> Verdict:
    size, rest = _bytes(subject.path, subject.model), ""
    if subject.against is not None and subject.plain is not None:
        rest = f", {size - _bytes(subject.against, subject.plain):+,} on the original"
    return None, f"{size:,} bytes{rest}"


_CHECKS: "dict[str, Callable[[_Subject], Verdict]]" = {
    "graph": _graph,
    "picture": _picture,
    "operators": _operators,
    "original": _original,
    "maps": _maps,
    "gradient": _gradient,
    "size": _size,
}


def _noise(model: ir.Model, card: Card) -> dict[str, Array]:
    """Random input for a model; other inputs than the picture's are zero."""
    feeds = {}
    for value in (v for v in model.graph.inputs if not v.is_initializer() and v.name not in _INPUTS[1:]):
        assert value.dtype is not None
        dtype = value.dtype.numpy()
        if value.name == card.picture:
            feeds[PICTURE] = _photos(dims(value)[0], card.input)
        elif value.name == card.input.name:
            feeds[card.input.name] = _prepared(dims(value), card.input).astype(dtype)
        else:
            feeds[value.name or ""] = np.zeros([d if isinstance(d, int) else 1 for d in dims(value)], dtype)
    return feeds


def _photos(batch: int | str | None, facts: Preprocess) -> Array:
    """Photos of another size and aspect than the model sees."""
    assert facts.height and facts.width
    size = (facts.height + facts.height // 4, facts.width + facts.width // 2)
    number = batch if isinstance(batch, int) else _PICTURES
    return np.random.default_rng(0).integers(0, 256, (number, *size, 3), np.uint8)


def _prepared(shape: Sequence[Any], facts: Preprocess) -> Array:
    rng = np.random.default_rng(0)
    channels_last = facts.layout == "NHWC"
    order = (0, 1, 2, 3) if channels_last else (0, 2, 3, 1)
    n, h, w, c = (shape[i] if isinstance(shape[i], int) else None for i in order)
    sizes = (n or _PICTURES, h or facts.height or _SIZE, w or facts.width or _SIZE, c or facts.channels)
    if facts.scale is not None and facts.mean is not None and facts.std is not None:
        x = (rng.integers(0, 256, sizes) * facts.scale - facts.mean) / facts.std
    else:
        x = rng.standard_normal(sizes)
    return x if channels_last else np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _asked(inputs: Iterable[Value], scores: Array, by_rank: bool = True) -> dict[str, Array]:
    """What is asked of an explained model, for those of its inputs that ask."""
    rng = np.random.default_rng(2)
    n, m = len(scores), scores.shape[1] if scores.ndim > 1 else 1
    best = scores.reshape(n, m, -1).mean(2).argmax(1)
    if by_rank:
        classes, against = np.array([[-1, rng.integers(m), m]] * n), np.full((n, 1), -2)
    else:
        others = (best[:, None] + 1 + rng.integers(max(m - 1, 1), size=(n, 2))) % m
        classes, against = np.column_stack([best, others[:, 0]]), others[:, 1:]
    inputs = list(inputs)
    if _single_class(inputs):
        classes = classes[:, :1]
    given = {
        CLASS: classes.astype(np.int64),
        AGAINST: against.astype(np.int64),
        MASK: rng.uniform(size=(n, *scores.shape[2:])).astype(scores.dtype),
        WANTED: np.array(True),
        SEED: rng.standard_normal(scores.shape).astype(scores.dtype),
    }
    return {v.name: given[v.name] for v in inputs if v.name in given}


def _run(model: ir.Model, names: Sequence[str], feeds: Mapping[str, Array], what: object) -> list[Array]:
    return run(start(model, provider_named("cpu"), what), names, feeds, what)


def _differences(names: Sequence[str], found: Sequence[Array], wanted: Sequence[Array]) -> dict[str, float]:
    return {name: _off(a, b) for name, a, b in zip(names, found, wanted, strict=True)}


def _off(found: Array, wanted: Array) -> float:
    """Largest difference over the largest value; infinite where the shapes or what is not finite differ."""
    if found.shape != wanted.shape or found.dtype.kind != wanted.dtype.kind:
        return math.inf
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf
    difference = np.abs(a[finite] - b[finite]).max(initial=0.0)
    return float(difference / (np.abs(b[finite]).max(initial=0.0) or 1.0))


def _closeness(off: Mapping[str, float]) -> str:
    worst = max(off.values(), default=0.0)
    return f"within {worst:.1e} of" if worst else "identical to"


def _away(off: float) -> str:
    return f"is {off:.1e} off" if math.isfinite(off) else "differs in shape, or in what is not finite, from"


def _allowed(tolerance: float, array: Array) -> float:
    """What numbers of this type may be off: the last bits of half precision, a level of a picture."""
    if array.dtype.kind != "f":
        return max(tolerance, 1 / 255)
    return max(tolerance, 20 * float(np.finfo(array.dtype).eps))


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Make values of a model its outputs, behind those that it has."""
    values = {value.name: value for value in all_values(model.graph)}
    known = _names(model.graph.outputs)
    model.graph.outputs.extend(values[name] for name in names if name not in known)
    return model


def _bytes(path: Path, model: ir.Model) -> int:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return path.stat().st_size + sum(t.nbytes for t in tensors if isinstance(t, ir.ExternalTensor))


def _is_ours(value: Value) -> bool:
    return value.name in OUTPUTS.values()


def _names(values: Iterable[Value]) -> list[str]:
    return [value.name or "" for value in values]


def _listed(values: Iterable[Value]) -> str:
    return ", ".join(_names(values)) or "nothing"


def _typed(value: Value) -> str:
    shape = "?" if value.shape is None else ",".join("?" if d is None else str(d) for d in dims(value))
    return f"{value.dtype.name.lower() if value.dtype else 'of no type'} [{shape}]"


def _fits(has: Value, should: Value) -> bool:
    """Whether the shapes of two values do not contradict each other."""
    if has.shape is None or should.shape is None:
        return has.shape is None and should.shape is None
    pairs = list(zip(dims(has), dims(should), strict=False))
    known = all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    return len(dims(has)) == len(dims(should)) and known


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
