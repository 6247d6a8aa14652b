import numpy as np
import pytest

import thriftattn as ta

torch = pytest.importorskip("torch")


def qkv(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, n, h, 64, generator=g).to(dtype) for n, h in ((20, 4), (200, 2), (200, 2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_in_torch_out(dtype):
    q, k, v = qkv(dtype)
    out, lse = ta.attention(q, k, v, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected = ta.attention(*(x.float().numpy() for x in (q, k, v)))
    np.testing.assert_allclose(out.float().numpy(), expected, atol={torch.float32: 0, torch.float16: 2e-3}.get(dtype, 2e-2))


def test_heads_first_views_are_read_in_place():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    assert torch.equal(ta.attention(q, k, v), ta.attention(*(x.contiguous() for x in (q, k, v))))


def test_out_is_the_callers_tensor():
    q, k, v = qkv(torch.bfloat16)
    out = torch.empty_like(q)
    assert ta.attention(q, k, v, out=out) is out and torch.equal(out, ta.attention(q, k, v))


def test_no_gradient_is_lost_silently():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="q requires grad"):
        ta.attention(q.requires_grad_(), k, v)
    with pytest.raises(TypeError, match="q is a Tensor"):
        ta.attention(q.detach().to("meta"), k, v)


def test_quantize_takes_bfloat16():
    x = torch.arange(-32, 32, dtype=torch.bfloat16).reshape(2, 32)
    codes, scales = ta.quantize(x)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 16) and scales.shape == (2, 2)
    assert (ta.dequantize(codes, scales) - x.float()).abs().max() <= 32 / 6
