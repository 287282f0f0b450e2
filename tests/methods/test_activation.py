"""Principal components against numpy's decompositions, in float32 as in a deployed model."""

import numpy as np
import pytest

from tests.graphs import build, explained, run

MAPS = """(float[N,{c},{h},{w}] x) => (float[N,3] scores) <float[{c},3] fc>
{{ p = GlobalAveragePool(x) f = Flatten(p) scores = MatMul(f, fc) }}"""


def cam(method, x, **options):
    c, h, w = x.shape[1:]
    proto = build(MAPS.format(c=c, h=h, w=w))
    added = explained(proto, method=method, layer="x", emit=("cam",), **options)
    return run(added, {"x": x.astype(np.float32), "cam_class": np.array([[1, 0]])})["cam"]


def with_spectrum(values, c, h, w, seed=0):
    """An activation [c,h,w] with the singular values `values`, as positions by channels."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((h * w, len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((c, len(values))))
    return ((left * values) @ right.T).T.reshape(c, h, w)


def projected(a):
    """By numpy's SVD in float64; the extreme of larger magnitude is positive."""
    rows = a.astype(np.float64).reshape(len(a), -1).T
    scores = rows @ np.linalg.svd(rows, full_matrices=False)[2][0]
    return np.sign(scores[np.abs(scores).argmax()]) * scores.reshape(a.shape[1:])


@pytest.mark.parametrize(("c", "h", "w"), [(64, 5, 7), (8, 12, 11), (35, 5, 7), (1, 4, 4), (5, 1, 2)])
def test_eigencam_against_svd(c, h, w):
    """More channels than positions, fewer, as many; measured: 2e-6 at most."""
    x = np.maximum(np.random.default_rng(0).standard_normal((2, c, h, w)), -0.3)
    got = cam("eigencam", x)
    for n in range(2):
        for k in range(2):
            np.testing.assert_allclose(got[n, k], projected(x[n]), rtol=0, atol=1e-5 * np.abs(got[n]).max())


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_eigencam_of_close_singular_values(ratio, scale):
    """Float32 rounds the Gram matrix, which leaves 1e-7 / (1 - ratio^2) of the second direction."""
    a = scale * with_spectrum([1, ratio, 0.3, 0.1], 20, 6, 7)
    got, wanted = cam("eigencam", a[None])[0, 0], projected(a)
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("method", ["eigencam", "kpcacam"])
def test_the_sign_is_that_of_the_largest_extreme(method):
    rng = np.random.default_rng(3)
    for seed in range(4):
        x = with_spectrum([1, 0.4, 0.2], 6, 4, 5, seed)
        if seed % 2:
            x[:, rng.integers(4), rng.integers(5)] *= -9
        got = cam(method, np.stack([x, -x]))
        assert got[0, 0].max() == np.abs(got[0, 0]).max()
        np.testing.assert_allclose(got[0], got[1], atol=1e-5 * np.abs(got).max())


@pytest.mark.parametrize("method", ["eigencam", "kpcacam", "fem"])
def test_what_does_not_vary_has_a_map_without_nan(method):
    for value in (0.0, 2.0):
        assert np.isfinite(cam(method, np.full((1, 3, 4, 5), value))).all()


def kernel_component(a):
    """By numpy's eigh in float64, with the eigenvalues."""
    rows = a.astype(np.float32).astype(np.float64).reshape(len(a), -1).T
    rows = rows - rows.mean(0)
    kernel = np.tanh(rows @ rows.T / len(a) + 1)
    centring = np.eye(len(kernel)) - 1 / len(kernel)
    values, vectors = np.linalg.eigh(centring @ kernel @ centring)
    scores = np.sqrt(values[-1]) * vectors[:, -1]
    return np.sign(scores[np.abs(scores).argmax()]) * scores.reshape(a.shape[1:]), values


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 50.0])
@pytest.mark.parametrize(("c", "h", "w"), [(8, 5, 6), (3, 7, 7), (64, 2, 6)])
def test_kpcacam_against_the_eigenvectors_of_the_centred_kernel(spread, c, h, w):
    """Up to spreads where every element of the kernel is -1 or 1."""
    x = spread * np.maximum(np.random.default_rng(1).standard_normal((1, c, h, w)), 0) ** 2
    wanted, _ = kernel_component(x[0])
    got = cam("kpcacam", x)[0, 0]
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_kpcacam_takes_the_largest_eigenvalue_not_one_that_is_larger_below_zero():
    """Six positions of five channels, found by a search for such a kernel."""
    positions = [
        [-0.5, -3.5, 0.5, -2.9, -0.4],
        [-2.6, 1.6, -1.9, -6.7, 4.4],
        [0.1, 3.5, 0.5, 1.3, -6.7],
        [5.9, -1.6, 2.0, -1.7, 5.0],
        [2.6, 4.8, -2.1, -1.1, 2.7],
        [0.5, 2.7, 4.3, -3.4, 1.3],
    ]
    x = np.array(positions).T.reshape(1, 5, 1, 6)
    wanted, values = kernel_component(x[0])
    assert values[0] < -1.2 * values[-1]
    got = cam("kpcacam", x)[0, 0]
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_kpcacam_is_that_of_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = np.random.default_rng(1).random((1, 6, 4, 5))
    rows = x[0].reshape(6, -1).T
    wanted = decomposition.KernelPCA(1, kernel="sigmoid").fit_transform(rows - rows.mean(0))[:, 0]
    wanted = np.sign(wanted[np.abs(wanted).argmax()]) * wanted.reshape(4, 5)
    np.testing.assert_allclose(cam("kpcacam", x)[0, 0], wanted, atol=1e-5)


def test_fem_by_hand():
    """One position of 16 is 10, the others 0: mean 0.625, deviation 2.42, so 1/16 of them are beyond 5.47."""
    x = np.zeros((1, 2, 4, 4))
    x[0, 0, 1, 2], x[0, 1, 3, 3] = 10, -10  # the second is never above its mean
    wanted = np.zeros((4, 4))
    wanted[1, 2] = 10 / 16
    np.testing.assert_allclose(cam("fem", x)[0, 1], wanted, atol=1e-6)
