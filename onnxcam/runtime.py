"""Running an explained model on pictures with onnxruntime."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnxcam.card import Card, Preprocess
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.image import Viewport, open_image, prepare, to_rgb
from onnxcam.render import Column, overlay, panel

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""onnxruntime's name of each provider."""

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
        heatmap: float32 [K,H,W] at the model's input size, each scaled to [0,1].
        card: what the model says about itself.
        model: the model's file name, or None if it was given in memory.
        provider: name of the provider that ran it.
        name: the picture's file name, or None if it was given in memory.
    """

    image: Image.Image
    viewport: Viewport
    predictions: tuple[Prediction, ...]
    classes: tuple[Prediction, ...]
    cam: Floats
    heatmap: Floats
    card: Card
    model: str | None
    provider: str
    name: str | None

    def overlay(self, k: int = 0, opacity: float = 0.5) -> Image.Image:
        """Return the picture with the map of the k-th class over it, at the picture's own size.

        Args:
            k: position in `classes`.
            opacity: of the map where it is highest, 0 to 1.
        """
        heat, seen = self.viewport.to_picture(self.heatmap[k])
        return overlay(self.image, heat, seen, opacity)

    def panel(self, opacity: float = 0.5) -> Image.Image:
        """Return one picture of the photo and, for each class, the map over it, label and score."""
        columns = [
            Column(self.overlay(k, opacity), c.label, c.score, self.note(k) or "")
            for k, c in enumerate(self.classes)
        ]
        return panel(self.image, columns, f"{self.card.method} at {self.card.module or self.card.layer}")

    def note(self, k: int) -> str | None:
        """Say why the k-th map shows nothing: ``not finite``, ``all zero`` or ``flat``; None if it does."""
        cam = self.cam[k]
        if not np.isfinite(cam).all():
            return "not finite"
        if cam.min() == cam.max():
            return "all zero" if cam.max() == 0 else "flat"
        return None

    def peak(self, k: int) -> tuple[int, int]:
        """Return the pixel (x, y) of the picture where the k-th map is highest."""
        heat = self.heatmap[k]
        row, column = np.unravel_index(int(heat.argmax()), heat.shape)
        x, y = self.viewport.to_pixel(float(row), float(column), heat.shape)
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
                    "minimum": _finite(self.cam[k].min()),
                    "maximum": _finite(self.cam[k].max()),
                    "peak": None if self.note(k) else list(self.peak(k)),
                    "note": self.note(k),
                }
                for k, c in enumerate(self.classes)
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
        **attach_options: Any,
    ) -> None:
        """Open the model.

        Args:
            model: an ONNX file, explained or plain.
            provider: ``cpu`` or ``cuda``.
            labels: class names by index, in place of those on the card.
            preprocess: fields of `onnxcam.card.Preprocess`, in place of those on the card.
            attach_options: for a plain model, as in `onnxcam.attach`: layer, method, score, scores.

        Raises:
            OnnxcamError: the file is no usable model, the provider is not available, or an option does
                not fit an explained model.
        """
        self.path = Path(model)
        self.provider = _provider(provider)
        given = {name: value for name, value in (preprocess or {}).items() if value is not None}
        options = {name: value for name, value in attach_options.items() if value is not None}
        self._session = _open(self.path, self.provider)
        card = Card.from_metadata(self._session.get_modelmeta().custom_metadata_map)
        if card is None:
            self._session = _attached(self.path, self.provider, {**options, **given})
            card = Card.from_metadata(self._session.get_modelmeta().custom_metadata_map)
            assert card is not None
        else:
            for name, value in options.items():
                if getattr(card, name) != value and not (name == "layer" and value == card.module):
                    raise OnnxcamError(
                        f"{self.path} is explained already, with {name} {getattr(card, name)!r} "
                        f"instead of {value!r}; attach to the original model for another"
                    )
        self.card = dataclasses.replace(
            card,
            input=_replaced(card.input, given),
            labels=tuple(labels) if labels is not None else card.labels,
        )
        inputs = {i.name: i for i in self._session.get_inputs()}
        outputs = {output.name: output for output in self._session.get_outputs()}
        lacking = [name for name in (card.scores, "cam", "cam_heatmap") if name not in outputs]
        if card.input.name not in inputs or lacking:
            what = f"output {lacking[0]!r}" if lacking else f"input {card.input.name!r}"
            raise OnnxcamError(f"{self.path} has no {what}; attach again with --emit cam,heatmap")
        self._dtype = _DTYPES[inputs[card.input.name].type]
        size = outputs[card.scores].shape[1]
        self._count = size if isinstance(size, int) else None
        if self.card.labels is not None and self._count not in (None, len(self.card.labels)):
            raise OnnxcamError(f"there are {len(self.card.labels)} labels for {self._count} classes")

    def __call__(
        self,
        image: "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]",
        classes: ClassRequest | Sequence[ClassRequest] = -1,
    ) -> Explanation:
        """Explain one picture.

        Args:
            image: a file, a Pillow image, or an array uint8 [H,W,3] (RGB) or [H,W] (grey).
            classes: one or several of: a class index; -1 for the best class, -2 for the second, and so
                on; a label; ``topN`` for the N best.

        Raises:
            OnnxcamError: the picture cannot be read, a class does not exist, or a fact for preparing the
                picture is missing.
        """
        name = None
        if isinstance(image, str | os.PathLike):
            name = os.fspath(image)
            picture = open_image(image)
        else:
            picture = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))
        x, viewport = prepare(picture, self.card.input)
        requests = [classes] if isinstance(classes, int | str) else list(classes)
        wanted = [index for request in requests for index in self._indices(request)]
        if not wanted:
            raise OnnxcamError("no class to explain is given")
        scores, cam, heatmap = self._run(x.astype(self._dtype), np.array([wanted], np.int64))
        flat = scores.reshape(-1).astype(np.float64)
        self._check_range(wanted, flat.size)
        order = np.argsort(-flat, kind="stable")
        shown = flat if self.card.scores_are == "probabilities" else _softmax(flat)
        resolved = [int(order[-1 - c]) if c < 0 else c for c in wanted]
        once = [k for k, index in enumerate(resolved) if resolved.index(index) == k]
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
        )

    def _run(self, x: NDArray[Any], classes: NDArray[np.int64]) -> list[NDArray[Any]]:
        feeds = {self.card.input.name: x, "cam_class": classes}
        try:
            result: list[NDArray[Any]] = self._session.run([self.card.scores, "cam", "cam_heatmap"], feeds)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise OnnxcamError(f"onnxruntime cannot run {self.path}: {_first_line(error)}") from error
        return result

    def _indices(self, request: ClassRequest) -> list[int]:
        """Turn what a person asks for into class indices or ranks (-1 for the best)."""
        if isinstance(request, str):
            count = request.lower().removeprefix("top")
            if count != request.lower() and count.isdecimal() and int(count) > 0:
                self._check_range([-int(count)], self._count)
                return [-1 - rank for rank in range(int(count))]
            return [self._labelled(request)]
        self._check_range([int(request)], self._count)
        return [int(request)]

    def _labelled(self, text: str) -> int:
        """Read `text` as an index if it is one that exists, otherwise as a label."""
        labels = self.card.labels or ()
        try:
            number = int(text)
        except ValueError:
            pass
        else:
            if text not in labels or self._count is None or -self._count <= number < self._count:
                self._check_range([number], self._count)
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

    def _prediction(self, index: int, shown: NDArray[np.float64]) -> Prediction:
        label = self.card.labels[index] if self.card.labels is not None else str(index)
        return Prediction(index, label, float(shown[index]))


def _provider(name: str) -> str:
    """Return onnxruntime's name of the provider.

    Raises:
        OnnxcamError: onnxruntime is not installed, or does not have the provider.
    """
    try:
        import onnxruntime
    except ImportError:
        raise OnnxcamError(
            "onnxruntime is not installed; install it with: pip install 'onnxcam[cpu]' (or 'onnxcam[gpu]')"
        ) from None
    available = [short for short, long in PROVIDERS.items() if long in onnxruntime.get_available_providers()]
    if name not in available:
        hint = "; for CUDA: pip uninstall onnxruntime && pip install 'onnxcam[gpu]'" if name == "cuda" else ""
        raise OnnxcamError(
            f"provider {name!r} is not available; this onnxruntime has: {', '.join(available)}{hint}"
        )
    return PROVIDERS[name]


def _session(model: "str | bytes", provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # The default of cam_class is meant to be overridden; onnxruntime warns of every such initializer.
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    if provider not in session.get_providers():
        raise OnnxcamError(
            f"onnxruntime has {provider} but cannot start it here; check the driver and CUDA libraries, "
            f"or choose another provider (running: {', '.join(session.get_providers())})"
        )
    return session


def _open(path: Path, provider: str) -> Any:
    """Open a session on a model file, with onnxcam's own words for what is wrong with the file."""
    try:
        return _session(os.fspath(path), provider)
    except OnnxcamError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base class
        from onnxcam import onnxfile

        onnxfile.load(path)
        raise OnnxcamError(f"onnxruntime cannot load {path}: {_first_line(error)}") from error


def _attached(path: Path, provider: str, options: Mapping[str, Any]) -> Any:
    """Attach a plain model in memory and open a session on it."""
    import tempfile

    from onnxcam import onnxfile
    from onnxcam.attaching import attach

    model = attach(path, **options)
    with tempfile.TemporaryDirectory(prefix="onnxcam-") as folder:
        explained = Path(folder) / "explained.onnx"
        onnxfile.save(model, explained)
        return _session(os.fspath(explained), provider)


def _replaced(preprocess: Preprocess, given: Mapping[str, Any]) -> Preprocess:
    for name in ("height", "width"):
        known = getattr(preprocess, name)
        if known is not None and given.get(name, known) != known:
            raise OnnxcamError(
                f"{name} is given as {given[name]}, but the model's input is {known} pixels there"
            )
    return dataclasses.replace(preprocess, **given)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    result: NDArray[np.float64] = powers / powers.sum()
    return result


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
