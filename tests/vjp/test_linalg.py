import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcam.errors import OnnxcamError
from tests.checks import check_vjp

RNG = np.random.default_rng(2)


def normal(*shape):
    return RNG.standard_normal(shape)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 5)),
        ((4,), (4,)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((4,), (2, 4, 5)),
        ((2, 3, 4), (4,)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((1, 3, 4), (2, 4, 5)),
        ((2, 6, 3, 4), (1, 1, 4, 5)),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_matmul(a, b, symbolic):
    check_vjp("MatMul", [normal(*a), normal(*b)], against=torch.matmul, symbolic=symbolic)


@pytest.mark.parametrize("weight", [0, 1])
def test_matmul_of_a_weight(weight):
    check_vjp("MatMul", [normal(2, 3, 4), normal(2, 4, 5)], against=torch.matmul, constant=[weight])


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c", [None, (), (1,), (5,), (1, 5), (3, 1), (3, 5)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_gemm(trans_a, trans_b, c, symbolic):
    def gemm(a, b, c=None):
        product = 0.5 * (a.T if trans_a else a) @ (b.T if trans_b else b)
        return product if c is None else product + 1.5 * c

    a = normal(4, 3) if trans_a else normal(3, 4)
    b = normal(5, 4) if trans_b else normal(4, 5)
    check_vjp(
        "Gemm",
        [a, b] if c is None else [a, b, normal(*c)],
        against=gemm,
        symbolic=symbolic,
        alpha=0.5,
        beta=1.5,
        transA=trans_a,
        transB=trans_b,
    )


@pytest.mark.parametrize("weights", [[0], [1], [2], [1, 2]])
def test_gemm_of_weights_with_defaults(weights):
    check_vjp(
        "Gemm",
        [normal(3, 4), normal(4, 5), normal(5)],
        against=lambda a, b, c: a @ b + c,
        constant=weights,
    )


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(3, 4), (4, 5)]),
        ("ij,jk", [(3, 4), (4, 5)]),
        ("bhqd,bhkd->bhqk", [(2, 2, 3, 4), (2, 2, 5, 4)]),
        ("nchw,kc->nkhw", [(2, 3, 2, 4), (5, 3)]),
        ("ij->ji", [(3, 4)]),
        ("ij->", [(3, 4)]),
        ("ij->j", [(3, 4)]),
        ("ba", [(3, 4)]),
        ("i,i->", [(4,), (4,)]),
        ("i,i", [(4,), (4,)]),
        ("i,j->ij", [(4,), (3,)]),
        (",ij->ij", [(), (3, 4)]),
        ("ii->i", [(4, 4)]),
        ("ii->", [(4, 4)]),
        ("ii", [(4, 4)]),
        ("iij->ji", [(3, 3, 2)]),
        ("iji,j->ij", [(3, 2, 3), (2,)]),
        ("iii,i->", [(3, 3, 3), (3,)]),
        ("iijj->ij", [(3, 3, 2, 2)]),
        ("ij,k->i", [(3, 4), (2,)]),
        ("i,ij,jk,k->i", [(3,), (3, 4), (4, 2), (2,)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)]),
        ("...ij,...jk->...ik", [(6, 1, 3, 4), (1, 2, 4, 5)]),
        ("...ij,jk->...ik", [(2, 3, 4), (4, 5)]),
        ("...,...->...", [(2, 3), (1, 3)]),
        ("...i->...", [(2, 3, 4)]),
        ("i...->i...", [(3, 2, 2)]),
        ("i...,...j->ij...", [(3, 2), (2, 4)]),
        ("...ii->...i", [(2, 3, 3)]),
        ("b...", [(2, 3)]),
        ("Ab,bC->CA", [(2, 3), (3, 4)]),
        ("i j , j k -> i k", [(3, 4), (4, 5)]),
        ("ij,jk->ik", [(3, 1), (1, 5)]),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_einsum(equation, shapes, symbolic):
    check_vjp("Einsum", [normal(*shape) for shape in shapes], equation=equation, symbolic=symbolic)


def test_einsum_of_a_letter_that_is_broadcast():
    # onnx 1.23 infers the size 1 for j, and onnxruntime believes it.
    check_vjp("Einsum", [normal(3, 1), normal(3, 4)], equation="ij,ij->ij", ort=False)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_einsum_of_any_equation(data):
    sizes = dict(zip("abcd", (2, 3, 1, 4), strict=True))
    terms = data.draw(st.lists(st.text("abcd", min_size=0, max_size=3), min_size=1, max_size=3))
    letters = sorted(set("".join(terms)))
    out = "".join(data.draw(st.permutations(letters))[: data.draw(st.integers(0, len(letters)))])
    arrays = [normal(*(sizes[k] for k in term)) for term in terms]
    equation = f"{','.join(terms)}->{out}"
    check_vjp("Einsum", arrays, equation=equation, symbolic=data.draw(st.booleans()), ort=False)


@pytest.mark.parametrize("weight", [0, 1])
def test_einsum_of_a_weight(weight):
    check_vjp("Einsum", [normal(2, 3), normal(3, 4)], constant=[weight], equation="ij,jk->ik")


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (2, 3, 3), (2, 2, 4, 4)])
def test_det(shape):
    check_vjp("Det", [normal(*shape)], against=torch.linalg.det)


def test_det_of_a_singular_matrix():
    x = normal(3, 3)
    x[2] = x[0] + x[1]
    check_vjp("Det", [x])


def test_det_refuses_an_unknown_size():
    with pytest.raises(OnnxcamError, match="the size of the matrices of a Det"):
        check_vjp("Det", [normal(3, 3)], symbolic=True)


def sdpa(q, k, v, mask=None, **options):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **options)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("opset", [23, 24])
def test_attention(symbolic, kv_heads, scale, causal, opset):
    def attention(q, k, v):
        return sdpa(q, k, v, is_causal=bool(causal), scale=scale, enable_gqa=True)

    options = {} if scale is None else {"scale": scale}
    check_vjp(
        "Attention",
        [normal(2, 4, 3, 5), normal(2, kv_heads, 6, 5), normal(2, kv_heads, 6, 2)],
        against=attention,
        opset=opset,
        symbolic=symbolic,
        is_causal=causal,
        **options,
    )


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_rows(symbolic, kv_heads):
    def split(x, heads):
        return x.unflatten(2, (heads, -1)).transpose(1, 2)

    def attention(q, k, v):
        return (
            sdpa(split(q, 4), split(k, kv_heads), split(v, kv_heads), enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        )

    check_vjp(
        "Attention",
        [normal(2, 3, 20), normal(2, 6, 5 * kv_heads), normal(2, 6, 2 * kv_heads)],
        against=attention,
        opset=23,
        symbolic=symbolic,
        ort=not symbolic,  # onnx 1.23 infers a width of 0 for Y where that of V is unknown
        q_num_heads=4,
        kv_num_heads=kv_heads,
    )


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("mask", [(6,), (3, 6), (1, 3, 6), (4, 1, 6), (2, 1, 3, 6), (2, 4, 3, 6), (3, 1)])
@pytest.mark.parametrize("is_bool", [False, True])
def test_attention_mask(symbolic, mask, is_bool):
    inputs = [normal(2, 4, 3, 5), normal(2, 4, 6, 5), normal(2, 4, 6, 2), normal(*mask)]
    if is_bool:
        inputs[3] = inputs[3] > -0.8
        inputs[3][..., 0] = True
    # onnxruntime 1.32 takes fewer shapes of masks than ONNX describes.
    check_vjp("Attention", inputs, opset=24, symbolic=symbolic, ort=len(mask) > 1 and mask[-2:] == (3, 6))


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("is_bool", [False, True])
def test_attention_mask_that_is_shorter_than_the_keys(symbolic, is_bool):
    mask = normal(2, 1, 3, 4)
    inputs = [normal(2, 4, 3, 5), normal(2, 4, 6, 5), normal(2, 4, 6, 2), mask > 0 if is_bool else mask]
    check_vjp("Attention", inputs, opset=24, symbolic=symbolic, ort=False)


def test_attention_row_without_keys():
    mask = np.ones((3, 6), bool)
    mask[1] = False
    check_vjp("Attention", [normal(1, 2, 3, 4), normal(1, 2, 6, 4), normal(1, 2, 6, 2), mask], opset=24)


@pytest.mark.parametrize("softcap", [0.7, 3.0])
def test_attention_softcap(softcap):
    check_vjp(
        "Attention",
        [normal(1, 2, 3, 4), normal(1, 2, 6, 4), normal(1, 2, 6, 2), normal(3, 6)],
        opset=24,
        softcap=softcap,
        is_causal=1,
    )


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_valid_keys(causal):
    inputs = [normal(2, 2, 3, 4), normal(2, 2, 6, 4), normal(2, 2, 6, 2), None, None, None, np.array([5, 3])]
    check_vjp("Attention", inputs, opset=24, is_causal=causal, ort=causal == 0)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("window", [(1, -1), (-1, 1), (2, 0), (0, 2)])
def test_attention_window(causal, window):
    inputs = [normal(1, 2, 4, 4), normal(1, 2, 6, 4), normal(1, 2, 6, 2)]
    left, right = window
    check_vjp(
        "Attention",
        inputs,
        opset=25,
        is_causal=causal,
        left_window_size=left,
        right_window_size=right,
        ort=False,
    )


def test_attention_softmax_precision():
    check_vjp("Attention", [normal(1, 2, 3, 4)] * 3, opset=23, softmax_precision=11)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("symbolic", [False, True])
def test_attention_past_keys(kv_heads, causal, symbolic):
    def attention(q, k, v, _, past_k, past_v):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        mask = torch.ones(3, 7, dtype=torch.bool).tril(5) if causal else None
        return sdpa(q, k, v, mask, enable_gqa=True)

    shape = (2, kv_heads, 2, 4)
    past = normal(2, kv_heads, 5, 4)
    inputs = [normal(2, 4, 3, 4), normal(*shape), normal(*shape), None, past, normal(*past.shape)]
    check_vjp("Attention", inputs, against=attention, opset=24, count=3, symbolic=symbolic, is_causal=causal)


def test_attention_refuses_other_outputs():
    with pytest.raises(OnnxcamError, match="only for the first output of Attention"):
        check_vjp("Attention", [normal(1, 2, 3, 4)] * 3, count=4, outputs=[3], opset=23)


def dft(x, n, axis, inverse, onesided):
    z = torch.view_as_complex(x) if x.shape[-1] == 2 else x[..., 0]
    if onesided and inverse:
        return torch.fft.irfft(z, n, axis)[..., None]
    transform = torch.fft.rfft if onesided else torch.fft.ifft if inverse else torch.fft.fft
    return torch.view_as_real(transform(z, n, axis).resolve_conj())


@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("inverse", [0, 1])
@pytest.mark.parametrize("length", [None, 4, 7])
@pytest.mark.parametrize("opset", [18, 20])
def test_dft(axis, parts, inverse, length, opset):
    for symbolic in (False, True):
        _check_dft((3, 5, 6, parts), length, axis, inverse, 0, opset, symbolic)


@pytest.mark.parametrize("inverse", [0, 1])
@pytest.mark.parametrize("length", [None, 4, 7, 8, 9])
@pytest.mark.parametrize("opset", [18, 20])
def test_dft_onesided(inverse, length, opset):
    for symbolic in (False, True):
        _check_dft((3, 5, 2 if inverse else 1), length, 1, inverse, 1, opset, symbolic)


def _check_dft(shape, length, axis, inverse, onesided, opset, symbolic):
    inputs = [normal(*shape), None if length is None else np.array(length)]
    attributes = {"inverse": inverse, "onesided": onesided}
    if opset >= 20:
        inputs.append(np.array(axis))
    else:
        attributes["axis"] = axis

    def against(x, *_):
        return dft(x, length, axis % len(shape), inverse, onesided)

    constant = [i for i in range(1, len(inputs)) if inputs[i] is not None]
    check_vjp("DFT", inputs, against=against, constant=constant, opset=opset, symbolic=symbolic, **attributes)


def test_dft_default_axis():
    x = normal(2, 3, 4, 1)
    check_vjp("DFT", [x], against=lambda x: dft(x, None, 1, 0, 0), opset=18)
    check_vjp("DFT", [x], against=lambda x: dft(x, None, 2, 0, 0), opset=20)


def test_dft_refuses_an_axis_known_only_at_run_time():
    with pytest.raises(OnnxcamError, match="the axis of a DFT"):
        check_vjp("DFT", [normal(2, 3, 1), None, np.array(1)])
