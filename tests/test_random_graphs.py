"""Gradients of random graphs, by central differences in float64 and by onnxruntime in float32.

With more examples than the tests have time for, and other ones each time:
``python -m tests.test_random_graphs 5000``.
"""

import collections
import dataclasses
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import onnxcam
from onnxcam.errors import OnnxcamError
from onnxcam.vjp import RULES
from tests.checks import quiet, reference, relative_error
from tests.random_graphs import classifiers, graphs, path

STEPS = (1e-5, 1e-6)
"""Of the differences."""

DOUBLE = 2e-7
"""Allowed error of a slope, of the gradient's norm; among 800 random examples the worst was 1.7e-8."""

SINGLE = 2e-4
"""Allowed error in onnxruntime, of the gradient's norm; among 800 random examples the worst was 1.9e-5."""

NOISE = 1e-2
"""Of the outputs' own size: a gradient whose norm is smaller is compared with that instead."""


@dataclasses.dataclass
class Tally:
    """What the examples came to."""

    examples: int = 0
    at_kinks: int = 0
    operators: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    double: float = 0.0
    single: float = 0.0

    def reached(self):
        return {name for domain, name in RULES if not domain} & set(self.operators)

    def __str__(self):
        return (
            f"{self.examples} graphs, {self.at_kinks} more at a kink; {len(self.reached())} operators with a "
            f"rule; the worst errors are {self.double:.1e} and, in onnxruntime, {self.single:.1e}"
        )


class AtAKink(Exception):  # noqa: N818
    """Where the slopes to both sides differ there is no gradient to compare with."""


def check(g, outputs, middle, tally):
    wrt = ["x", middle]
    seeds = {f"{name}_seed": g.random.standard_normal(g.arrays[name].shape) for name in outputs}
    feeds = {"x": g.arrays["x"], **seeds}
    size = NOISE * sum(np.abs(g.arrays[name] * feeds[f"{name}_seed"]).sum() for name in outputs)
    slopes = [slopes_of(g, outputs, seeds, name, size) for name in wrt]
    double = gradients(g, outputs, wrt, np.float64, feeds)
    single = gradients(g, outputs, wrt, np.float32, feeds)
    for name, got, in_ort, (directions, wanted) in zip(wrt, double, single, slopes, strict=True):
        found = np.array([np.sum(got * direction) for direction in directions])
        scale = max(np.linalg.norm(got), np.abs(wanted).max(), size, 1e-9)
        error, error_in_ort = np.abs(found - wanted).max() / scale, np.linalg.norm(in_ort - got) / scale
        assert error <= DOUBLE, f"{name}: {found}, differences say {wanted}"
        assert error_in_ort <= SINGLE, f"{name}: off by {error_in_ort:.2g} in onnxruntime"
        tally.double, tally.single = max(tally.double, error), max(tally.single, error_in_ort)
    tally.examples += 1
    between = {*path(g, outputs), *outputs}
    tally.operators.update({node.op_type for node in g.nodes if between.intersection(node.output)})


def slopes_of(g, outputs, seeds, source, size):
    """Two random directions in which `source` is moved, and the slopes of the seeded outputs along them."""
    run, here = reference(g.model(outputs, cut=source)).run, g.arrays[source]

    def score(at):
        ys = run(None, {"x": g.arrays["x"], source: at})
        return sum(float(np.sum(y * seed)) for y, seed in zip(ys, seeds.values(), strict=True))

    at_rest, directions, slopes = score(here), g.random.standard_normal((2, *here.shape)), []
    for direction in directions:
        ahead = np.array([(score(here + step * direction) - at_rest) / step for step in STEPS])
        behind = np.array([(at_rest - score(here - step * direction)) / step for step in STEPS])
        central, bend = (ahead + behind) / 2, np.abs(ahead - behind)
        # Where there is no kink, the slopes to both sides come nearer to each other as the step does.
        allowed = DOUBLE * max(abs(central[1]), size)
        if abs(central[0] - central[1]) > allowed or bend[1] > bend[0] / 2 + allowed:
            raise AtAKink
        slopes.append(central[1])
    return directions, np.array(slopes)


def gradients(g, outputs, wrt, dtype, feeds):
    """Gradients in the dtype: float64 by `reference`, float32 by onnxruntime."""
    proto = g.model(outputs, dtype=dtype, symbolic=True)
    try:
        model = ir.to_proto(onnxcam.gradient(proto, outputs, wrt))
    except OnnxcamError as error:
        if not str(error).startswith("no gradient reaches"):
            raise
        if len(wrt) == 1:
            return [np.zeros(g.arrays[wrt[0]].shape)]
        return [gradients(g, outputs, [name], dtype, feeds)[0] for name in wrt]
    given = {info.name for info in model.graph.input}
    feeds = {name: a.astype(dtype) for name, a in feeds.items() if name in given}
    session = reference(model) if dtype == np.float64 else in_onnxruntime(model)
    return session.run([f"{name}_gradient" for name in wrt], feeds)


def in_onnxruntime(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), quiet())


def explore(examples, **options):
    """Check random graphs and return what they came to."""
    tally = Tally()

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow], **options)
    @given(graphs())
    def every(case):
        try:
            check(*case, tally)
        except AtAKink:
            tally.at_kinks += 1
            assume(False)

    every()
    return tally


def test_gradients_of_random_graphs():
    tally = explore(120, derandomize=True)
    print(f"\n{tally}")
    assert tally.at_kinks <= 0.05 * tally.examples
    assert len(tally.reached()) >= 90


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=classifiers(), data=st.data())
def test_rows_of_random_classifiers(case, data):
    """The gradient of each class of each image, against the gradients of one class after another."""
    g, scores = case
    n, classes = g.arrays[scores].shape
    asked = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=2 * n, max_size=2 * n)))
    asked = asked.reshape(n, 2)
    wanted = [
        gradients(
            g, [scores], ["x"], np.float64, {"x": g.arrays["x"], f"{scores}_seed": np.eye(classes)[column]}
        )[0]
        for column in asked.T
    ]
    assume(np.abs(wanted).max() > 0)
    added = onnxcam.attach(g.model([scores], symbolic=True), layer="x", emit=["gradients"])
    feeds = {"x": g.arrays["x"], "cam_class": asked}
    (got,) = reference(ir.to_proto(added)).run(["cam_gradients"], feeds)
    assert relative_error(got, np.stack(wanted, 1).reshape(got.shape)) <= 1e-9


if __name__ == "__main__":
    print(explore(int(sys.argv[1])))
