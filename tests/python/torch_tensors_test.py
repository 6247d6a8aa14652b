import os
import resource

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


def test_bfloat16_of_any_framework_comes_back_as_bfloat16():
    class Foreign:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **kwargs):
            return self.tensor.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    q, k, v = qkv(torch.bfloat16)
    out = torch.from_dlpack(ta.attention(*map(Foreign, (q, k, v))))
    assert out.dtype == torch.bfloat16 and torch.equal(out, ta.attention(q, k, v))


def test_heads_first_views_are_read_in_place(device):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(device=device))
    assert torch.equal(ta.attention(q, k, v), ta.attention(*(x.contiguous() for x in (q, k, v))))


def test_out_is_the_callers_tensor(device):
    q, k, v = qkv(torch.bfloat16, device)
    out = torch.empty_like(q)
    assert ta.attention(q, k, v, out=out) is out and torch.equal(out, ta.attention(q, k, v))


def test_gpu_work_goes_to_the_current_stream_or_the_one_given():
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
    expected = [*ta.attention(*tensors, return_lse=True), *ta.quantize(tensors[1])]
    expected.append(ta.dequantize(*expected[2:]))
    for _ in range(20):  # JAX takes some memory as it is and copies other
        q, k, v = (jax.device_put(x.cpu().numpy(), where) for x in tensors)
        results = [*ta.attention(q, k, v, return_lse=True), *ta.quantize(k)]
        results.append(ta.dequantize(*results[2:]))
        for ours, theirs in zip(results, expected):
            assert isinstance(ours, jax.Array) and ours.devices() == {where}
            np.testing.assert_array_equal(np.asarray(ours), theirs.cpu().numpy())
    outs = []
    for put in (lambda x: x, lambda x: jax.device_put(x.cpu().numpy(), where)):  # of JAX, nothing outlives its call
        cache = ta.KvCache("thrift", h_kv=2, d=64, device=device)
        seqs = [cache.new_sequence() for _ in range(2)]
        q, k, v = tensors
        for _ in range(3):
            cache.append(seqs, put(k), put(v))
            out = cache.attend(seqs, put(q), phase="prefill")
        outs.append(np.asarray(out) if isinstance(out, jax.Array) else out.cpu().numpy())
    np.testing.assert_array_equal(*outs)


def test_every_gpu_is_served_and_the_current_one_stays():
    if len(ta.gpus()) < 2 or torch.cuda.device_count() < 2:
        pytest.skip("there are no two GPUs")
    results = []
    for i, current in ((0, 0), (0, 1), (1, 0), (1, 1)):
        torch.cuda.set_device(current)
        q, k, v = qkv(torch.float16, f"cuda:{i}")
        cache = ta.KvCache("thrift", h_kv=2, d=64, device=f"cuda:{i}")  # grows
        seqs = [cache.new_sequence() for _ in range(2)]
        cache.append(seqs, k, v)
        outs = [ta.attention(q, k, v), cache.attend(seqs, q, phase="prefill"), *ta.quantize(k), ta.dequantize(*ta.quantize(k))]
        fork = cache.fork(seqs[1])
        cache.append([fork], k[:1, :1], v[:1, :1])
        outs.append(cache.attend([fork], q[:1, :1]))
        assert torch.cuda.current_device() == current and all(out.device.index == i for out in outs)
        results.append([out.cpu() for out in outs])
    torch.cuda.set_device(0)
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))
    with pytest.raises(ValueError, match="q is on cuda:1, k on cuda:0"):
        ta.attention(q, k.to("cuda:0"), v)
    with pytest.raises(ValueError, match="k is on cuda:0, the cache on cuda:1"):
        cache.append(seqs, k.to("cuda:0"), v)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="others take memory of the GPU meanwhile")
def test_ten_thousand_gpu_calls_leak_nothing():
    if not ta.gpus() or not torch.cuda.is_available():
        pytest.skip("no GPU, or a build without CUDA")
    q, k, v = (x[:, :70] for x in qkv(torch.float16, "cuda"))

    def calls(n):
        for _ in range(n):
            ta.attention(q, k, v, return_lse=True)  # makes a cache and gives it back
            ta.dequantize(*ta.quantize(k))
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    free, host = calls(1000)
    free_after, host_after = calls(10_000)
    assert free_after >= free, f"{free - free_after} bytes of the GPU are gone"
    assert host_after - host < 4096, f"{host_after - host} KiB more"


def test_no_gradient_is_lost_silently():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="q requires grad"):
        ta.attention(q.requires_grad_(), k, v)
    with pytest.raises(TypeError, match="q is a Tensor"):
        ta.attention(q.detach().to("meta"), k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_takes_every_type_where_it_lies(device, dtype):
    x = torch.arange(-32, 32).to(device, dtype).reshape(2, 32)
    codes, scales = ta.quantize(x)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 16) and scales.shape == (2, 2)
    back = ta.dequantize(codes, scales)
    assert codes.device == scales.device == back.device == x.device and (back - x.float()).abs().max() <= 32 / 6
    for ours, theirs in zip((codes, scales), ta.quantize(x.cpu().float())):
        assert torch.equal(ours.cpu(), theirs)
    half = torch.cat([x, x], -1)[:, ::2].contiguous()[:, :16]  # rows with gaps between them
    assert torch.equal(ta.dequantize(*ta.quantize(half)), ta.dequantize(*ta.quantize(half.clone())))


def test_gpu_codes_are_made_on_the_current_stream():
    if not ta.gpus() or not torch.cuda.is_available():
        pytest.skip("no GPU, or a build without CUDA")
    x = torch.randn(64, 4096, device="cuda")
    expected = ta.dequantize(*ta.quantize(x))
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = ta.dequantize(*ta.quantize(late))
    side.synchronize()
    assert torch.equal(got, expected)
    codes, scales = ta.quantize(x)
    with pytest.raises(ValueError, match="scales is on cpu, codes on cuda:0"):
        ta.dequantize(codes, scales.cpu())


def test_quantize_names_what_does_not_fit():
    x = torch.zeros(3, 40)
    with pytest.raises(ValueError, match="x has 40 elements on its last axis: nvfp4 takes multiples of 16"):
        ta.quantize(x)
    codes, scales = ta.quantize(x[:, :32].contiguous())
    with pytest.raises(ValueError, match=r"scales is \[3, 1\], expected \[3, 2\]"):
        ta.dequantize(codes, scales[:, :1])
    with pytest.raises(TypeError, match="codes is of float32"):
        ta.dequantize(x, scales)
