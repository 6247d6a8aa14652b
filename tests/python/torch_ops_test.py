import pytest

torch = pytest.importorskip("torch")

import thriftattn as ta  # noqa: E402
import thriftattn.torch  # noqa: E402

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(9)


def normal(*shape):
    return torch.randn(*shape, generator=generator)


def qkv(device, s_q=20, s_kv=200, d_v=32):
    return [x.to(device) for x in (normal(2, s_q, 4, 64), normal(2, s_kv, 2, 64), normal(2, s_kv, 2, d_v))]


def test_the_operators_keep_pytorchs_rules(device):
    torch.library.opcheck(torch.ops.thriftattn.attention, (*qkv(device),), {"window": 50})


def test_a_graph_stays_whole(device):
    def block(q, k, v):
        out, lse = torch.ops.thriftattn.attention(2 * q, k, v, method="thrift", softcap=30.0)
        return out.flatten(2) + lse.sum(-1, keepdim=True)

    q, k, v = qkv(device)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(q, k, v), block(q, k, v))


def test_steps_of_a_cache_in_a_whole_graph(device):
    def block(cache, seqs, q, k, v):
        first = torch.ops.thriftattn.step(cache, seqs, q, k, v, window=100)
        return first + torch.ops.thriftattn.step(cache, seqs, q, k, v, window=100).tanh()  # a step more, not the same

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    caches = [ta.KvCache("thrift", h_kv=2, d=64, device=device) for _ in range(2)]
    for cache in caches:
        for _ in range(2):
            cache.new_sequence()
    states = [thriftattn.torch.state(cache) for cache in caches]
    for s in (16, 1, 1):
        q, k, v = (normal(2, s, heads, 64).to(device) for heads in (4, 2, 2))
        a = compiled(states[0], [0, 1], q, k, v)
        b = block(states[1], [0, 1], q, k, v)
        torch.testing.assert_close(a, b)
    assert caches[0].length(1) == caches[1].length(1) == 18 + 18
    assert states[0][1] == states[1][1] == 6


def test_a_step_that_is_refused_appends_nothing():
    cache = ta.KvCache("thrift", h_kv=2, d=64)
    state, seq = thriftattn.torch.state(cache), cache.new_sequence()
    k = normal(1, 2, 2, 64)
    for q in (normal(1, 2, 4, 32), normal(1, 3, 4, 64), normal(2, 4, 64)):
        with pytest.raises(ValueError, match="expected"):
            torch.ops.thriftattn.step(state, [seq], q, k, k)
    assert cache.length(seq) == 0


def test_a_cache_that_is_gone_is_named():
    state = thriftattn.torch.state(ta.KvCache("thrift", h_kv=2, d=64))
    with pytest.raises(ValueError, match="does not live"):
        torch.ops.thriftattn.step(state, [0], *(normal(1, 1, h, 64) for h in (4, 2, 2)))
