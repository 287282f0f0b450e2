"""docs/runtimes.md."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LIMIT = 1e-3
"""The largest relative difference from onnxruntime that counts as agreement."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a runtime made of a file.

    Attributes:
        differences: of each output, the largest difference from onnxruntime's relative to the largest value.
        refused: what the runtime said where it made nothing.
    """

    differences: dict[str, float] | None = None
    refused: str | None = None

    def worst(self, *names: str) -> float:
        """The largest of some differences, of all without names; infinite where it refused."""
        if self.differences is None:
            return math.inf
        return max(self.differences[name] for name in names or self.differences)

    @property
    def agrees(self) -> bool:
        """Whether it is what onnxruntime makes of it."""
        return self.worst() <= LIMIT

    @property
    def word(self) -> str:
        """What it is where it does not agree."""
        return "refused" if self.refused is not None else "wrong"


_NOT_TRIED = "not tried"


class _Notes:
    """Footnotes, each text once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, text: str) -> str:
        # Which node it was is no matter here.
        text = re.sub(r"cam/[\w+]+/", "cam/.../", re.sub(r"Scan_\d+", "Scan", text))
        text = re.sub(r"\(\d\d+\)|#\d+", "(n)", text)
        return f"[{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def lines(self) -> Iterable[str]:
        return (f"{number}. `{text.replace('`', '')}`" for text, number in self._numbers.items())


def page(
    runtimes: Mapping[str, str],
    versions: Mapping[str, str],
    models: Sequence[Mapping[str, Any]],
    rules: Sequence[Mapping[str, Any]],
    ort: Mapping[str, Any],
) -> str:
    """Return the page.

    Args:
        runtimes: what each is called.
        versions: of each, and of onnxruntime.
        models: ``case``, ``portable``, ``plain`` and ``findings`` by runtime.
        rules: ``net`` and ``findings`` by runtime and form (plain, default, portable).
        ort: of the conversion: ``difference``, ``size`` and ``operators``.
    """
    notes = _Notes()
    return "\n".join([
        _INTRODUCTION.format(onnxruntime=versions["onnxruntime"]),
        *_summary(runtimes, versions, models, rules),
        _MODELS,
        *_models(runtimes, models, notes),
        "",
        *notes.lines(),
        "",
        *_rules(runtimes, rules),
        "",
        _ORT.format(version=versions["onnxruntime"], percent=round(100 * ort["size"]), **ort),
        "```",
        *ort["operators"],
        "```",
        "",
    ])  # fmt: skip


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def _summary(
    runtimes: Mapping[str, str],
    versions: Mapping[str, str],
    models: Sequence[Mapping[str, Any]],
    rules: Sequence[Mapping[str, Any]],
) -> Iterable[str]:
    def models_of(name: str, portable: bool) -> str:
        rows = [row for row in models if row["portable"] == portable and name in row["plain"]]
        rows = [row for row in rows if name in row["findings"] and row["plain"][name].agrees]
        good = [row["findings"][name] for row in rows if row["findings"][name].agrees]
        largest = max((finding.worst() for finding in good), default=math.nan)
        return f"{len(good)} of {len(rows)}, to {largest:.0e}" if good else f"0 of {len(rows)}"

    def rules_of(name: str, form: str) -> str:
        rows = [row["findings"][name] for row in rules if name in row["findings"]]
        rows = [row for row in rows if row["plain"].agrees]
        return f"{sum(row[form].agrees for row in rows)} of {len(rows)}"

    header = ["runtime", "version", "models", "portable models", "rules", "portable rules"]
    yield from _table(
        header,
        (
            [
                title, versions[name], models_of(name, False), models_of(name, True),
                rules_of(name, "default"), rules_of(name, "portable"),
            ]
            for name, title in runtimes.items()
        ),
    )  # fmt: skip


def _models(runtimes: Mapping[str, str], models: Sequence[Mapping[str, Any]], notes: _Notes) -> Iterable[str]:
    def cell(row: Mapping[str, Any], name: str) -> str:
        if name not in row["findings"] or name not in row["plain"]:
            return _NOT_TRIED
        finding = row["findings"][name]
        if not row["plain"][name].agrees:
            plain = row["plain"][name]
            return f"not the model {notes(plain.refused)}" if plain.refused else "not the model"
        if finding.refused is not None:
            return f"refused {notes(finding.refused)}"
        return f"{finding.worst():.0e}" if finding.agrees else f"**{finding.worst():.0e}**"

    rows = [
        [
            row["case"].model.replace("_", r"\_"),
            row["case"].what,
            "portable" if row["portable"] else "default",
            *(cell(row, name) for name in runtimes),
        ]
        for row in models
    ]
    return _table(["model", "explained by", "form", *runtimes.values()], rows)


def _rules(runtimes: Mapping[str, str], rules: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    def cell(findings: Mapping[str, Finding] | None) -> str:
        if findings is None:
            return _NOT_TRIED
        if not findings["plain"].agrees:
            return "not the operator"
        if findings["portable"].agrees:
            return "" if findings["default"].agrees else f"portable ({findings['default'].word})"
        return findings["portable"].word

    cells = {row["net"]: [cell(row["findings"].get(name)) for name in runtimes] for row in rules}
    troubled = {name: row for name, row in cells.items() if any(cell not in ("", _NOT_TRIED) for cell in row)}
    fine = [name for name in cells if name not in troubled]
    yield _RULES.format(count=len(cells))
    yield from _table(["net", *runtimes.values()], ([name, *row] for name, row in troubled.items()))
    yield ""
    yield f"Right in both forms wherever it was tried ({len(fine)}): {'; '.join(fine)}."


_INTRODUCTION = """# Other runtimes

Written by `make runtimes`: explained models and gradient rules in runtimes other than onnxruntime
{onnxruntime} for Python, with which everything here is compared. What fails stands here as it is.

To explain in them:

- Attach with `--class-input required`. OpenVINO, tract and OpenCV take an input that has a default for a
  constant, and onnxruntime-web refuses to be given another value.
- Attach with `--portable`, for all but onnxruntime-web, whose wasm provider never needs it and WebGPU for
  max pools. A run then explains one class (`cam_class` is `[N,1]`), because most of these runtimes do not
  run a Scan as ONNX defines it; what a method does for each of up to 64 channels or samples is written
  out, and refused for more. MaxPool's gradient does without the Indices, square weights are copied
  before a gradient reads them, and the steps of Relu and the like are comparisons, not steep HardSigmoids,
  whose slope 2^100 no float16 holds: also what to attach before a tool turns the file into float16.
  `onnxcam.Explainer` runs such a model once for each class.
  `onnxcam.gradient` takes `portable=True` too.
- tract and OpenCV want the sizes of all inputs as numbers: fix them before attaching, with `python -m
  onnxruntime.tools.make_dynamic_shape_fixed --dim_param N --dim_value 1 model.onnx fixed.onnx`.
- OpenVINO computes in bfloat16 where the processor can: `compile_model(path, "CPU",
  {{"INFERENCE_PRECISION_HINT": "f32"}})` for maps like onnxruntime's.
- OpenCV: the new engine, `cv2.dnn.readNetFromONNX(path, cv2.dnn.ENGINE_NEW)`.

Of the models (of `models/`, and small ones with random weights) and of the nets of one operator each,
those that the runtime can run before anything is added to them, and of those how many are right when it
is (within 1e-3; `to`: the largest difference among these). WebGPU is that of headless Chromium on the
software adapter SwiftShader, which takes up to a minute for a file: what `make runtimes` has not come to
yet is `not tried`. For the reference evaluator the models of a real size are too slow.
"""

_MODELS = """
## Models

The largest difference of any output (the scores, `cam`, `cam_heatmap`), relative to the output's largest
value; in bold beyond 1e-3. The default form has an open batch and explains two classes; the portable form
has a batch of one and explains one. `not the model`: the classifier itself is refused or wrong. A model
that takes the picture itself rounds it to whole numbers, as Pillow does, and a pixel may round the other
way elsewhere.
"""

_RULES = """## Gradient rules

{count} nets of one operator each (`benchmarks/runtimes/nets.py`), their gradient by `onnxcam.gradient`.
An empty cell: right in both forms. `portable (...)`: right in the portable form, and what the default one
is. `wrong`, `refused`: so in both. `not the operator`: the net is wrong or refused before there is a
gradient.
"""

_ORT = """## The format .ort, and a reduced onnxruntime

    python -m onnxruntime.tools.convert_onnx_models_to_ort explained.onnx --optimization_style Fixed

of onnxruntime {version} converts an explained model as any other. The explained SqueezeNet becomes
`explained.ort`, of {percent} % of the size, and its maps differ by {difference:.0e} from those of the
.onnx file. The card stays in it: `onnxcam run explained.ort photo.jpg` works. Beside it the tool writes
`explained.required_operators.config`, what a reduced build (`build.sh --minimal_build
--include_ops_by_config`) must have:
"""
