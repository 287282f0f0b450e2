"""Running an explained model on pictures with onnxruntime."""

import dataclasses
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnxcam.card import WANTED, Card, Preprocess
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.image import Viewport, check_facts, open_image, prepare, seen, upright
from onnxcam.render import OPACITY, PANEL, Column, overlay, panel
from onnxcam.sessions import Plan, in_parallel, open_file, provider_named, run, start

SHOWS = {
    None: "",
    "for": "For the class: ",
    "against": "Against the class: ",
    "both": "For and against the class: ",
    "counterfactual": "Counterfactual, against the class: ",
}
"""What the maps show, by the card's evidence: the start of a title, so that no narrow picture cuts it off."""

MANY_RUNS = (
    "ablationcam", "reciprocam", "scorecam", "sscam", "iscam", "smoothgradcam++", "integratedgradients",
    "smoothgrad",
)  # fmt: skip
"""Methods that run the model, or much of it, many times for one map."""

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}

Floats = NDArray[np.float32]
ClassRequest = int | str


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A class and its score.

    Attributes:
        index: the class index.
        label: its name, or the index as text if the model has no labels.
        score: probability, 0 to 1: the model's own if it ends in one, else the softmax of its scores.
    """

    index: int
    label: str
    score: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a model gave a picture its classes.

    Attributes:
        image: the picture, upright RGB.
        viewport: the part of the picture that the model saw.
        predictions: the five best classes (all, if there are fewer), best first.
        classes: the K classes explained.
        cam: float32 [K,h,w], the method's maps at the layer's resolution, unscaled.
        heatmap: float32 [K,H,W] at the model's input size, or at the picture's where the model takes that
            itself; each scaled to [0,1], or to [-1,1] where it holds evidence against the class.
        card: what the model says about itself.
        model: the model's file name.
        provider: name of the provider that ran it.
        name: the picture's file name, or None if it was given in memory.
        against: the class that each is compared with, where the target is ``contrast``.
    """

    image: Image.Image
    viewport: Viewport
    predictions: tuple[Prediction, ...]
    classes: tuple[Prediction, ...]
    cam: Floats
    heatmap: Floats
    card: Card
    model: str
    provider: str
    name: str | None
    against: Prediction | None = None

    def overlay(self, k: int = 0, opacity: float = OPACITY) -> Image.Image:
        """Return the picture with the map of the k-th class over it, at the picture's own size.

        Evidence against the class is blue, see `onnxcam.render.overlay`.

        Args:
            k: position in `classes`.
            opacity: of the map where it is strongest, 0 to 1.
        """
        heat, seen = self.heat(k)
        return overlay(self.image, heat, seen, opacity, self.card.evidence)

    def heat(self, k: int = 0) -> "tuple[Floats, NDArray[np.bool_]]":
        """Return the k-th heat map over the picture, as `onnxcam.image.Viewport.to_picture` does.

        Args:
            k: position in `classes`.
        """
        heat, seen = self._covers.to_picture(self.heatmap[k])
        return heat, seen if self.card.picture is None else self.viewport.seen()

    @property
    def _covers(self) -> Viewport:
        """The part of the picture that `heatmap` covers."""
        return self.viewport if self.card.picture is None else self.viewport.whole()

    def panel(self, opacity: float = OPACITY) -> Image.Image:
        """Return one picture of the photo and, for each class, the map over it, label and score."""
        photo, columns = self.columns(PANEL, opacity)
        return panel(photo, columns, f"{SHOWS[self.card.evidence]}{self.card.title}", self.card.evidence)

    def columns(self, size: tuple[int, int], opacity: float = OPACITY) -> tuple[Image.Image, list[Column]]:
        """Return the photo and its overlays, no larger than `size`, with what stands beneath each."""
        photo = self.image.copy()
        photo.thumbnail(size, Image.Resampling.LANCZOS)
        small = dataclasses.replace(self, image=photo, viewport=self.viewport.scaled(*photo.size))
        columns = []
        for k, c in enumerate(self.classes):
            notes = [f"compared with {self.against.label}"] if self.against else []
            note = " · ".join([*notes, *filter(None, [self.remark(k)])])
            columns.append(Column(small.overlay(k, opacity), c.label, c.score, note))
        return photo, columns

    def note(self, k: int) -> str | None:
        """Name what is odd about the k-th map.

        Returns:
            ``not finite``, ``flat``, ``all zero`` or ``all negative`` (nothing is above zero; said of maps
            that may be positive). None: nothing is.
        """
        cam = self.cam[k]
        if not np.isfinite(cam).all():
            return "not finite"
        if cam.min() == cam.max():
            return "all zero" if cam.max() == 0 else "flat"
        return "all negative" if cam.max() <= 0 and self.card.evidence != "against" else None

    def remark(self, k: int) -> str:
        """Say the same of the k-th map in words for a person; empty if nothing is odd."""
        note = self.note(k)
        if note in ("all zero", "all negative"):
            sides = {"against": "against", "counterfactual": "against", "both": "for or against"}
            side = "for" if note == "all negative" else sides.get(self.card.evidence or "", "for")
            return f"the map is {note}: nothing speaks {side} the class"
        return f"the map is {note}" if note else ""

    def peak(self, k: int) -> tuple[int, int] | None:
        """Return the pixel (x, y) of the picture where the k-th map is strongest; None if it is nowhere."""
        heat = np.abs(self.heatmap[k])
        if self.note(k) in ("not finite", "flat") or not heat.any():
            return None
        row, column = np.unravel_index(int(heat.argmax()), heat.shape)
        x, y = self._covers.to_pixel(float(row), float(column), heat.shape)
        return min(max(int(x), 0), self.image.width - 1), min(max(int(y), 0), self.image.height - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the arrays as plain values for JSON; numbers that are not finite become None."""
        return {
            "image": self.name,
            "predictions": [dataclasses.asdict(p) for p in self.predictions],
            "explanations": [
                {
                    "class": c.index,
                    "label": c.label,
                    "score": c.score,
                    "method": self.card.method,
                    "layer": self.card.layer,
                    "evidence": self.card.evidence,
                    "target": self.card.target or "class",
                    "against": self.against and self.against.index,
                    "minimum": _finite(self.cam[k].min()),
                    "maximum": _finite(self.cam[k].max()),
                    "peak": peak and list(peak),
                    "note": self.note(k),
                }
                for k, c in enumerate(self.classes)
                for peak in [self.peak(k)]
            ],
            "model": self.model,
            "provider": self.provider,
        }


class Explainer:
    """Explains pictures with one model::

        explanation = Explainer("explained.onnx")("photo.jpg", classes=["top2", "espresso"])
        explanation.overlay().save("why.png")

    A model that is explained already needs neither onnx nor torch; a plain one is attached in memory first.
    """

    def __init__(
        self,
        model: "str | os.PathLike[str]",
        *,
        provider: str = "cpu",
        labels: Sequence[str] | None = None,
        preprocess: Mapping[str, Any] | None = None,
        layer: str | Sequence[str] | None = None,
        method: str | None = None,
        evidence: str | None = None,
        fuse: str | None = None,
        smooth: Sequence[str] | None = None,
        compat: str | None = None,
        target: str | None = None,
        score: str | None = None,
        scores: str | None = None,
        pictures: int | None = None,
    ) -> None:
        """Open the model.

        Args:
            model: an ONNX file, explained or plain.
            provider: ``cpu`` or ``cuda``.
            labels: class names by index, in place of those on the card.
            preprocess: fields of `onnxcam.card.Preprocess`, in place of those on the card.
            layer, method, evidence, fuse, smooth, compat, target, score, scores: for a plain model, as in
                `onnxcam.attach`.
            pictures: how many will come, if that is known. For up to 5 the model opens in half the time and
                half the memory, but each picture takes longer on a CPU, up to twice as long: onnxruntime
                leaves out its blocked layout of convolutions, into which it copies all weights (not for the
                methods of `MANY_RUNS`, where one picture is work enough). `many` explains more than one at
                the same time, on one core each at best, which is faster for all together and slower for
                each. Maps differ by rounding.

        Raises:
            OnnxcamError: the file is no usable model, the provider is not available, an option does not
                fit an explained model, or neither the card nor `preprocess` says how a picture is prepared.
        """
        self.path = Path(model)
        self.provider = provider_named(provider)
        given = {name: value for name, value in (preprocess or {}).items() if value is not None}
        asked = {
            "layer": layer,
            "method": method,
            "evidence": evidence,
            "fuse": fuse,
            "smooth": smooth,
            "compat": compat,
            "target": target,
            "score": score,
            "scores": scores,
        }
        options = {name: value for name, value in asked.items() if value is not None}
        plan = Plan.of(pictures)
        self._at_once = plan.at_once
        self._session = open_file(self.path, self.provider, plan)
        card = Card.from_metadata(self._session.get_modelmeta().custom_metadata_map)
        many_runs = (method if card is None else card.method) in MANY_RUNS
        suited = dataclasses.replace(plan, blocked=plan.blocked or many_runs)
        if card is None:
            self._session = _attached(self.path, self.provider, suited, {**options, **given})
            card = Card.from_metadata(self._session.get_modelmeta().custom_metadata_map)
            assert card is not None
        else:
            if suited != plan:
                self._session = open_file(self.path, self.provider, suited)
            _check_asked(self.path, card, options)
        self.card = dataclasses.replace(
            card,
            input=_replaced(card.input, given),
            labels=tuple(labels) if labels is not None else card.labels,
        )
        if card.picture is not None and given:
            raise OnnxcamError(
                f"{self.path} prepares the picture itself, as its card says; to change {sorted(given)[0]}, "
                "attach to the original model again"
            )
        check_facts(self.card.input)
        inputs = {i.name: i for i in self._session.get_inputs()}
        outputs = {output.name: output for output in self._session.get_outputs()}
        lacking = [name for name in (card.scores, "cam", "cam_heatmap") if name not in outputs]
        takes = card.picture or card.input.name
        if takes not in inputs or lacking:
            what = f"output {lacking[0]!r}" if lacking else f"input {takes!r}"
            raise OnnxcamError(f"{self.path} has no {what}; attach again with --emit cam,heatmap")
        picture, shape = inputs[takes], outputs[card.scores].shape
        if card.picture is None and picture.type not in _DTYPES:
            raise OnnxcamError(f"{self.path} takes {picture.type}; onnxcam feeds {', '.join(_DTYPES)}")
        self._rows = picture.shape[0] if isinstance(picture.shape[0], int) else 1
        if card.picture is None:
            self._check_channels(picture.shape[1 if card.input.layout == "NCHW" else 3])
        self.target = card.target or "class"
        self._seed_shape = list(inputs["cam_seed"].shape[1:]) if "cam_seed" in inputs else None
        inputs |= {i.name: i for i in self._session.get_overridable_initializers()}
        self._mask_shape = list(shape[2:]) if "cam_mask" in inputs else None
        self._dtypes = {name: _DTYPES.get(i.type) for name, i in inputs.items()}
        self._one_class = "cam_class" in inputs and inputs["cam_class"].shape[1] == 1
        self._count = shape[1] if isinstance(shape[1], int) else len(self.card.labels or ()) or None
        self._check_labels(self._count)

    def __call__(
        self,
        image: "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]",
        classes: ClassRequest | Iterable[ClassRequest] = -1,
        *,
        against: ClassRequest = -2,
        seed: "NDArray[np.floating[Any]] | None" = None,
        mask: "NDArray[Any] | None" = None,
    ) -> Explanation:
        """Explain one picture.

        Args:
            image: a file, a Pillow image, or an array uint8 [H,W,3] (RGB) or [H,W] (grey).
            classes: see `resolve`. The target ``seed`` has none: what is explained then has index -1.
            against: the class that each is compared with, where the target is ``contrast``.
            seed: the weight of each score, of the shape of one picture's scores; needed where the target is
                ``seed``, and only there.
            mask: the weight of each place [H,W] of dense scores; all alike by default.

        Raises:
            OnnxcamError: the picture cannot be read, a class does not exist or is compared with itself, what
                is given does not fit the target or the scores, or the model cannot be run.
        """
        self._check_given(classes, against, seed, mask)
        wanted = self.resolve(classes)
        (other,) = self.resolve(against) if self.target == "contrast" else (None,)
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        picture = as_picture(image)
        x, viewport = self._fed(picture)
        feeds: dict[str, NDArray[Any]] = {
            self.card.picture or self.card.input.name: np.repeat(x, self._rows, axis=0)
        }
        if self.card.on_demand:
            feeds[WANTED] = np.array(True)
        if seed is None:
            feeds["cam_class"] = np.array([wanted], np.int64)
        else:
            weights = np.asarray(seed, self._dtypes["cam_seed"])
            feeds["cam_seed"] = np.repeat(weights[None], self._rows, axis=0)
        if other is not None:
            feeds["cam_against"] = np.array([[other]], np.int64)
        if self._mask_shape is not None:
            feeds["cam_mask"] = (
                np.ones((1, 1, 1), self._dtypes["cam_mask"])
                if mask is None
                else mask[None].astype(self._dtypes["cam_mask"])
            )
        scores, cam, heatmap = self._run(feeds, wanted if seed is None and self._one_class else None)
        if seed is not None:
            return self._of_a_seed(picture, viewport, scores[0], seed, cam, heatmap, name)
        flat = _of_classes(scores[0].astype(np.float64), mask)
        self._check_range(wanted, flat.size)
        self._check_labels(flat.size)
        order = np.argsort(-flat, kind="stable")
        shown = flat if self.card.scores_are == "probabilities" else _softmax(flat)
        if np.isnan(shown).any():
            raise OnnxcamError(
                f"{self.path} gives {name or 'the picture'} scores that are not finite; "
                "check how the picture is prepared (scale, mean, std)"
            )
        resolved = [int(order[-1 - c]) if c < 0 else c for c in wanted]
        once = [k for k, index in enumerate(resolved) if resolved.index(index) == k]
        rival = None
        if other is not None:
            rival = self._prediction(int(order[-1 - other]) if other < 0 else other, shown)
            if rival.index in resolved:
                raise OnnxcamError(f"class {rival.label!r} is compared with itself; choose another --against")
        return Explanation(
            image=picture,
            viewport=viewport,
            predictions=tuple(self._prediction(int(i), shown) for i in order[:5]),
            classes=tuple(self._prediction(resolved[k], shown) for k in once),
            cam=cam[0, once],
            heatmap=heatmap[0, once],
            card=self.card,
            model=os.fspath(self.path),
            provider=self.provider,
            name=name,
            against=rival,
        )

    def many(
        self,
        images: "Iterable[str | os.PathLike[str] | Image.Image | NDArray[np.uint8]]",
        *args: Any,
        **given: Any,
    ) -> Iterator[Explanation]:
        """Explain pictures in order, several at a time: one is read while the model runs on another.

        It is faster where the explainer was told how many `pictures` will come.

        Args:
            images: as for one picture.
            args, given: the further arguments for one picture, the same for all.

        Raises:
            OnnxcamError: as for one picture, when its turn comes.
        """
        for done in self.in_parallel(lambda image: self(image, *args, **given), images):
            yield done.result()

    def in_parallel(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator["Future[Any]"]:
        """Yield ``function(item)``, which may call this explainer, as futures, in order.

        Those of the next items are computed meanwhile; whatever is not yielded when the caller stops is not
        begun any more.
        """
        return in_parallel(function, items, self._at_once)

    def _run(self, feeds: Mapping[str, NDArray[Any]], one_by_one: Sequence[int] | None) -> list[NDArray[Any]]:
        """Return scores, maps and heat maps; the maps of all classes, even if a run takes one only."""
        names = [self.card.scores, "cam", "cam_heatmap"]
        if one_by_one is None:
            return run(self._session, names, feeds, self.path)
        asked = [{**feeds, "cam_class": np.array([[index]], np.int64)} for index in one_by_one]
        found = [run(self._session, names, each, self.path) for each in asked]
        scores, *maps = zip(*found, strict=True)
        return [scores[0], *(np.concatenate(parts, axis=1) for parts in maps)]

    def _fed(self, picture: Image.Image) -> "tuple[NDArray[Any], Viewport]":
        """Return what the model takes for a picture, and the part of the picture that it sees."""
        facts = self.card.input
        if self.card.picture is None:
            x, viewport = prepare(picture, facts)
            return x.astype(self._dtypes[facts.name]), viewport
        assert facts.width and facts.height
        return np.asarray(picture)[None], seen(picture.size, facts.width, facts.height, facts.shorter_edge)

    def _of_a_seed(
        self,
        picture: Image.Image,
        viewport: Viewport,
        scores: NDArray[Any],
        seed: "NDArray[np.floating[Any]]",
        cam: Floats,
        heatmap: Floats,
        name: str | None,
    ) -> Explanation:
        return Explanation(
            image=picture,
            viewport=viewport,
            predictions=(),
            classes=(Prediction(-1, "weighted sum of scores", float((scores * seed).sum())),),
            cam=cam[0],
            heatmap=heatmap[0],
            card=self.card,
            model=os.fspath(self.path),
            provider=self.provider,
            name=name,
        )

    def _check_given(
        self, classes: Any, against: ClassRequest, seed: "NDArray[Any] | None", mask: "NDArray[Any] | None"
    ) -> None:
        """See that what is given fits the target and the scores."""
        if seed is None and self.target == "seed":
            raise OnnxcamError(f"{self.path} explains the target seed: the weight of each score is needed")
        if seed is not None and self.target != "seed":
            raise OnnxcamError(f"{self.path} explains the target {self.target}, which takes no seed")
        if seed is not None and classes not in (-1, [-1]):
            raise OnnxcamError(f"{self.path} explains the target seed, a sum over all classes; give none")
        _check_shape("seed", seed, self._seed_shape, "the scores of one picture are")
        _check_shape("mask", mask, self._mask_shape, "the places that have scores are")
        if against != -2 and self.target != "contrast":
            raise OnnxcamError(f"{self.path} explains the target {self.target}, which compares no classes")
        if mask is not None and self._mask_shape is None:
            raise OnnxcamError(f"{self.path} has no dense scores to put a mask over")

    def resolve(self, classes: ClassRequest | Iterable[ClassRequest]) -> list[int]:
        """Turn what a person asks for into class indices or ranks.

        Args:
            classes: one or several of: a class index; -1 for the best class, -2 for the second, and so
                on; a label, in upper or lower case; ``topN`` for the N best.

        Raises:
            OnnxcamError: a class does not exist.
        """
        requests = classes if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]
        wanted = [index for request in requests for index in self._indices(request)]
        if not wanted:
            raise OnnxcamError("no class to explain is given")
        self._check_range(wanted, self._count)
        return wanted

    def _indices(self, request: ClassRequest) -> list[int]:
        if not isinstance(request, str):
            try:
                return [operator.index(request)]
            except TypeError:
                raise OnnxcamError(f"class {request!r} is neither an index nor a label") from None
        top = re.fullmatch(r"top([1-9]\d{0,5})", request, re.IGNORECASE)
        return [-1 - rank for rank in range(int(top[1]))] if top else [self._labelled(request.strip())]

    def _labelled(self, text: str) -> int:
        """Read `text` as an index if it is one that exists, otherwise as a label."""
        if not text:
            raise OnnxcamError("a class is empty; give an index, a label or top3")
        labels = self.card.labels or ()
        try:
            number = int(text)
        except ValueError:
            pass
        else:
            if text not in labels or self._count is None or -self._count <= number < self._count:
                return number
        found = [i for i, label in enumerate(labels) if label.casefold() == text.casefold()]
        if len(found) == 1:
            return found[0]
        if found:
            raise OnnxcamError(
                f"{len(found)} classes are called {text!r}; give an index: {', '.join(map(str, found))}"
            )
        if not labels:
            raise OnnxcamError(
                f"the model has no labels, so {text!r} is unknown; give a class index or --labels"
            )
        raise OnnxcamError(f"no class is called {text!r}{suggest(text, labels)}")

    def _check_range(self, wanted: Sequence[int], count: int | None) -> None:
        for index in wanted:
            if count is not None and not -count <= index < count:
                raise OnnxcamError(
                    f"class {index} is out of range: the model has {count} classes "
                    f"(0 to {count - 1}, or -1 to -{count} by rank)"
                )

    def _check_channels(self, channels: object) -> None:
        color = self.card.input.color
        if color is not None and isinstance(channels, int) and channels != self.card.input.channels:
            raise OnnxcamError(f"color is {color}, but the model's input has {channels} channels")

    def _check_labels(self, count: int | None) -> None:
        if self.card.labels is not None and count not in (None, len(self.card.labels)):
            raise OnnxcamError(f"there are {len(self.card.labels)} labels for {count} classes")

    def _prediction(self, index: int, shown: NDArray[np.float64]) -> Prediction:
        label = self.card.labels[index] if self.card.labels is not None else str(index)
        return Prediction(index, label, float(shown[index]))


def as_picture(image: "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]") -> Image.Image:
    """Return the upright RGB picture that a file, a Pillow image or an array stands for.

    Raises:
        OnnxcamError: it cannot be read, or is none of these.
    """
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    try:
        if isinstance(image, Image.Image):
            return upright(image)
        array = np.asarray(image)
        if array.dtype == np.uint8 and array.size and (array.ndim == 2 or array.shape[2:] == (3,)):
            return upright(Image.fromarray(array))
    except OSError as error:  # a Pillow image reads its file only now
        raise OnnxcamError(f"the picture cannot be read: {error}") from error
    raise OnnxcamError(
        f"a picture must be a file, a Pillow image or an array uint8 [H,W,3] or [H,W], "
        f"not {array.dtype} {list(array.shape)}"
    )


def _attached(path: Path, provider: str, plan: Plan, options: Mapping[str, Any]) -> Any:
    """Attach a plain model in memory and open a session on it."""
    from onnxcam.attaching import attach

    return start(attach(path, **options), provider, f"{path} with its maps", plan)


def _of_classes(scores: NDArray[np.float64], mask: "NDArray[Any] | None") -> NDArray[np.float64]:
    """Return one score for each class: dense ones [M,H,W] are averaged over the mask."""
    if scores.ndim < 3 or scores.shape[1:] == (1, 1):
        return scores.reshape(-1)
    weight = np.ones(scores.shape[1:]) if mask is None else np.asarray(mask, np.float64)
    averages: NDArray[np.float64] = (scores * weight).sum((1, 2)) / (weight.sum() or 1.0)
    return averages


def _check_shape(what: str, given: "NDArray[Any] | None", known: Sequence[Any] | None, are: str) -> None:
    """See that an array has the sizes of the graph, as far as that says any."""
    if given is None or known is None:
        return
    fits = len(given.shape) == len(known)
    if not fits or any(isinstance(k, int) and k != g for k, g in zip(known, given.shape, strict=True)):
        has, wants = (",".join(map(str, shape)) for shape in (given.shape, known))
        raise OnnxcamError(f"the {what} is [{has}], but {are} [{wants}]")


def _replaced(preprocess: Preprocess, given: dict[str, Any]) -> Preprocess:
    for name in ("height", "width", "layout"):
        known = getattr(preprocess, name)
        if known is not None and given.get(name, known) != known:
            raise OnnxcamError(f"{name} is given as {given[name]}, but the model's input has {known}")
    for name in ("mean", "std"):
        if name in given:
            given[name] = tuple(float(value) for value in given[name])
    return dataclasses.replace(preprocess, **given)


def _check_asked(path: Path, card: Card, options: Mapping[str, Any]) -> None:
    """See that an explained model is what is asked for.

    Raises:
        OnnxcamError: its card says otherwise.
    """
    for name, value in options.items():
        known = getattr(card, name)
        if name == "layer" and not isinstance(value, str):
            value = ", ".join(dict.fromkeys(value))
        elif name == "smooth":
            value, known = (", ".join(sorted(names)) for names in (value, known or ()))
        elif name == "compat":
            known = known or "paper"
        elif name == "target":
            known = known or "class"
        if known != value and not (name == "layer" and value == card.module):
            how = f"with {name} {known!r} instead of {value!r}" if known else f"without {name} {value!r}"
            raise OnnxcamError(
                f"{path} is explained already, {how}; attach to the original model for another"
            )


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    result: NDArray[np.float64] = powers / powers.sum()
    return result


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
