import os

import numpy as np
import pytest

import thriftattn as ta

torch = pytest.importorskip("torch")


def qkv(dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, n, h, 64, generator=g).to(dtype).to(device) for n, h in ((20, 4), (200, 2), (200, 2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_in_torch_out(device, dtype):
    q, k, v = qkv(dtype, device)
    out, lse = ta.attention(q, k, v, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.device == lse.device == q.device
    expected = ta.attention(*(x.float().cpu().numpy() for x in (q, k, v)))
    on_the_cpu = {torch.float32: 0, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(out.float().cpu(), expected, atol=on_the_cpu if device == "cpu" else max(on_the_cpu, 3e-3))


def test_heads_first_views_are_read_in_place(device):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(device=device))
    assert torch.equal(ta.attention(q, k, v), ta.attention(*(x.contiguous() for x in (q, k, v))))


def test_out_is_the_callers_tensor(device):
    q, k, v = qkv(torch.bfloat16, device)
    out = torch.empty_like(q)
    assert ta.attention(q, k, v, out=out) is out and torch.equal(out, ta.attention(q, k, v))


def test_work_goes_to_the_current_stream_or_the_one_given():
    if not ta.gpus() or not torch.cuda.is_available():
        pytest.skip("no GPU, or a build without CUDA")
    cache = ta.KvCache("thrift", h_kv=2, d=64, device="cuda:0", max_sequences=4, max_tokens=4096)
    q, k, v = qkv(torch.float16, "cuda")
    seqs = [[cache.new_sequence() for _ in range(2)] for _ in range(2)]
    cache.append(seqs[0], k, v)
    expected = cache.attend(seqs[0], q, phase="prefill")
    side = torch.cuda.Stream()
    for given in (False, True):  # tensors become what they are after a wait, on the same stream
        late = [torch.zeros_like(x) for x in (q, k, v)]
        out = torch.zeros_like(expected)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for x, y in zip(late, (q, k, v)):
                x.copy_(y)
            if not given:
                cache.append(seqs[1], *late[1:])
                cache.attend(seqs[1], late[0], phase="prefill", out=out)
        if given:
            cache.truncate(seqs[1][0], 0), cache.truncate(seqs[1][1], 0)
            cache.append(seqs[1], *late[1:], stream=side)
            cache.attend(seqs[1], late[0], phase="prefill", out=out, stream=side.cuda_stream)
        side.synchronize()
        assert torch.equal(out, expected)
    with pytest.raises(TypeError, match="stream: None, the address"):
        cache.attend(seqs[1], q, stream="side")


def test_jax_arrays_come_and_go(device):
    jax = pytest.importorskip("jax")
    try:
        where = jax.devices("cpu" if device == "cpu" else "cuda")[0]
    except RuntimeError:
        pytest.skip("JAX has no such device")
    tensors = qkv(device=device)
    out, lse = ta.attention(*(jax.device_put(x.cpu().numpy(), where) for x in tensors), return_lse=True)
    assert isinstance(out, jax.Array) and out.devices() == {where}
    expected = ta.attention(*tensors, return_lse=True)
    for ours, theirs in zip((out, lse), expected):
        np.testing.assert_array_equal(np.asarray(ours), theirs.cpu().numpy())


def test_every_gpu_is_served():
    if len(ta.gpus()) < 2 or torch.cuda.device_count() < 2:
        pytest.skip("there are no two GPUs")
    outs = [ta.attention(*qkv(device=f"cuda:{i}")) for i in range(2)]
    assert outs[1].device.index == 1 and torch.equal(outs[0].cpu(), outs[1].cpu())
    q, k, v = qkv(device="cuda:0")
    with pytest.raises(ValueError, match="q is on cuda:0, k on cuda:1"):
        ta.attention(q, k.to("cuda:1"), v)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="others take memory of the GPU meanwhile")
def test_a_hundred_gpu_calls_leak_nothing():
    if not ta.gpus() or not torch.cuda.is_available():
        pytest.skip("no GPU, or a build without CUDA")
    q, k, v = qkv(torch.float16, "cuda")

    def calls(n):
        for _ in range(n):
            ta.attention(q, k, v, return_lse=True)
        return torch.cuda.mem_get_info()[0]

    before = calls(20)
    assert calls(100) >= before


def test_no_gradient_is_lost_silently():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="q requires grad"):
        ta.attention(q.requires_grad_(), k, v)
    with pytest.raises(TypeError, match="q is a Tensor"):
        ta.attention(q.detach().to("meta"), k, v)


def test_quantize_says_where_it_works(device):
    if device != "cpu":
        with pytest.raises(ValueError, match="x is on cuda:0: tensors in the CPU's memory"):
            ta.quantize(torch.zeros(32, device=device))


def test_quantize_takes_bfloat16():
    x = torch.arange(-32, 32, dtype=torch.bfloat16).reshape(2, 32)
    codes, scales = ta.quantize(x)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 16) and scales.shape == (2, 2)
    assert (ta.dequantize(codes, scales) - x.float()).abs().max() <= 32 / 6
