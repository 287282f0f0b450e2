"""The noise: as numpy computes it, the same everywhere, and statistically what it claims to be."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcam.emit import Emitter
from onnxcam.methods.noise import normal_noise
from tests.graphs import runner

PRIME = 46337


def normal(number, shape):
    """Field `number` of `shape`, by 32-bit integers, in which nothing may overflow, and numpy's float64."""

    def fifth_power(x):
        square = x * x % PRIME
        return square * square % PRIME * x % PRIME

    places = np.arange(np.prod(shape), dtype=np.int32)
    key = fifth_power(np.int32(37871 * number + 1) % PRIME)
    shift = fifth_power((42381 * (places // PRIME) + key) % PRIME)
    uniform = []
    for multiplier in (23832, 45010):
        mixed = fifth_power((fifth_power((multiplier * (places % PRIME) + 1) % PRIME) + shift) % PRIME)
        uniform.append((fifth_power((multiplier * mixed + key) % PRIME) + 0.5) / PRIME)
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return (radius * np.cos(angle)).reshape(shape)


def model_of(shape, dtype, symbolic=False):
    """A graph that computes the field with a given number, of `shape` or the shape of another input."""
    like = ir.Value(name="like", shape=ir.Shape(["N", "C", "H", "W"]), type=ir.TensorType(dtype))
    number = ir.Value(name="number", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    inputs = [number, like] if symbolic else [number]
    graph = ir.Graph(inputs, [], nodes=[], name="noise", opset_imports={"": 18})
    op = Emitter(graph, 18, "test")
    size = op.Shape(like, start=1) if symbolic else list(shape)
    graph.outputs.append(normal_noise(op, size, dtype)(number))
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


def fields(count, shape, by="ort", dtype=ir.DataType.DOUBLE, symbolic=False):
    run = runner(model_of(shape, dtype, symbolic), by)
    like = {"like": np.zeros((2, *shape), dtype.numpy())} if symbolic else {}
    return np.stack([run(None, {"number": np.array(i), **like})[0][0] for i in range(count)])


@pytest.mark.parametrize("by", ["ort", "ref"])
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("DOUBLE", 1e-14), ("FLOAT", 1e-6), ("FLOAT16", 2e-3)])
def test_the_same_as_numpys(by, symbolic, dtype, tolerance):
    got = fields(3, (3, 4, 5), by, ir.DataType[dtype], symbolic)
    assert got.dtype == ir.DataType[dtype].numpy()
    wanted = np.stack([normal(i, (3, 4, 5)) for i in range(3)])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=5 * tolerance)


def test_a_field_of_more_than_one_block():
    shape = (3, 160, 200)
    np.testing.assert_allclose(fields(1, shape)[0], normal(0, shape), rtol=0, atol=5e-14)
    beside = (normal(0, shape).ravel()[PRIME:] * normal(0, shape).ravel()[:-PRIME]).mean()
    assert abs(beside) <= 5 / np.sqrt(np.prod(shape) - PRIME)


def test_moments_and_correlations():
    """Of 36 fields of 3 x 64 x 64: all within 5 deviations of what independent normal numbers give."""
    drawn = fields(36, (3, 64, 64))
    flat, n = drawn.reshape(36, -1), drawn[0].size
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moments = (flat**power).mean(1)
        assert np.abs(moments - mean).max() <= 5 * np.sqrt(variance / n), power
    between = np.corrcoef(flat)[np.triu_indices(36, 1)]
    assert np.abs(between).max() <= 5 / np.sqrt(n)
    assert np.abs(np.corrcoef(flat**2)[np.triu_indices(36, 1)]).max() <= 5 / np.sqrt(n)
    for channel, row, column in ((0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (0, 0, 2), (0, 7, 3)):
        moved = np.roll(drawn, (channel, row, column), (1, 2, 3))
        beside = (drawn * moved).reshape(36, -1).mean(1)
        assert np.abs(beside).max() <= 5 / np.sqrt(n), (channel, row, column)
        assert abs(beside.mean()) <= 5 / np.sqrt(36 * n)
    mean = flat.mean(0) * 6
    assert abs(mean.std() - 1) <= 5 / np.sqrt(2 * n)
    assert 4 < np.abs(drawn).max() < 4.79


def test_bits_are_uniform():
    """The share of numbers in each of 64 equally likely intervals of the normal distribution."""
    from statistics import NormalDist

    drawn = fields(8, (3, 64, 64)).reshape(-1)
    edges = [NormalDist().inv_cdf(i / 64) for i in range(1, 64)]
    counts = np.bincount(np.searchsorted(edges, drawn), minlength=64)
    expected = drawn.size / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 63) <= 5 * np.sqrt(2 * 63)
