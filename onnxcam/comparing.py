"""The maps of several methods for one picture, side by side: what a person chooses a method by."""

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcam import onnxfile
from onnxcam.card import Card
from onnxcam.dialects import DIALECTS
from onnxcam.errors import OnnxcamError
from onnxcam.methods import METHODS, named
from onnxcam.render import OPACITY, SMALLER, Row, comparison
from onnxcam.runtime import SHOWS, ClassRequest, Explainer, Explanation, as_picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What several methods make of one model and one picture.

    Attributes:
        explanations: those of the methods that can be applied, by method.
        reasons: why the others cannot, by method.
        seconds: how long the one run of each explained model took.
        methods: all of them, in the order asked for.
        title: names of the model and the picture.
    """

    explanations: dict[str, Explanation]
    reasons: dict[str, str]
    seconds: dict[str, float]
    methods: tuple[str, ...]
    title: str

    def sheet(self, opacity: float = OPACITY) -> "Image.Image":
        """Draw a row for each method, with the photo and a column for each class.

        Where some maps are signed and others not, the colour bar is that of the others and a signed one says
        what its colours mean.
        """
        kinds = {found.card.evidence for found in self.explanations.values()}
        evidence = kinds.pop() if len(kinds) == 1 else None
        rows = []
        for name in self.methods:
            if name in self.reasons:
                rows.append(Row(name, (), (), self.reasons[name]))
                continue
            found = self.explanations[name]
            photo, columns = found.columns(SMALLER, opacity)
            made = DIALECTS[found.card.compat or "paper"].methods[name]
            facts = [f"at {found.card.module or found.card.layer}", f"cost: {made.cost}"]
            if found.card.evidence != evidence:
                facts.append("red: for, blue: against")
            rows.append(Row(name, facts, columns))
        return comparison(photo, rows, f"{SHOWS[evidence]}{self.title}", evidence)


def compare(
    model: "str | os.PathLike[str]",
    image: "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]",
    methods: Sequence[str],
    classes: ClassRequest | Iterable[ClassRequest] = -1,
    *,
    layer: str | Sequence[str] | None = None,
    against: ClassRequest = -2,
    **options: Any,
) -> Comparison:
    """Explain one picture with several methods.

    Args:
        model: a plain ONNX classifier.
        image: a file, a Pillow image, or an array uint8 [H,W,3] (RGB) or [H,W] (grey).
        methods: keys of ``onnxcam.methods.METHODS``.
        classes: as in `onnxcam.Explainer`.
        layer: for those methods that do not look at the picture itself.
        against: as in `onnxcam.Explainer`, for the target ``contrast``.
        options: keyword arguments of `onnxcam.Explainer` other than the method.

    Raises:
        OnnxcamError: a method is unknown, the model is explained already, the picture cannot be read, or no
            method can be applied.
    """
    names = tuple(dict.fromkeys(methods))
    if not names:
        raise OnnxcamError(f"no method to compare is given; methods: {', '.join(METHODS)}")
    for name in names:
        named(name)
    card = Card.from_metadata(onnxfile.load(model).metadata_props)
    if card is not None:
        raise OnnxcamError(
            f"{model} is explained already, with {card.method} alone; give the original model, to which each "
            "method can be attached"
        )
    picture = as_picture(image)
    explanations, reasons, seconds = {}, {}, {}
    for name in names:
        try:
            where = None if METHODS[name].at_picture else layer
            explainer = Explainer(model, method=name, layer=where, pictures=1, **options)
            wanted = explainer.resolve(classes)
            start = time.perf_counter()
            explanations[name] = explainer(picture, wanted, against=against)
            seconds[name] = time.perf_counter() - start
        except OnnxcamError as error:
            reasons[name] = str(error)
    if not explanations:
        alike = len(set(reasons.values())) == 1
        raise OnnxcamError(
            reasons[names[0]] if alike else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )
    title = (
        f"{Path(model).name} on {Path(image).name if isinstance(image, str | os.PathLike) else 'a picture'}"
    )
    return Comparison(explanations, reasons, seconds, names, title)
