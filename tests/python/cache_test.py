import numpy as np
import pytest

import thriftattn as ta

rng = np.random.default_rng(11)
H_Q, H_KV, D = 4, 2, 32


def kv(n, b=1):
    return tuple(rng.standard_normal((b, n, H_KV, D)).astype(np.float32) for _ in range(2))


def rows(n=1, b=1):
    return rng.standard_normal((b, n, H_Q, D)).astype(np.float32)


def filled(n, method="thrift", **kwargs):
    cache = ta.KvCache(method, h_kv=H_KV, d=D, **kwargs)
    seq = cache.new_sequence()
    k, v = kv(n)
    cache.append([seq], k, v)
    cache.settle([seq])
    return cache, seq, k, v


def test_steps_are_attention_over_all_that_was_appended():
    cache, seq, k, v = filled(300, "fp16")
    for n in (1, 5, 16):
        more_k, more_v = kv(n)
        k, v = np.concatenate([k, more_k], 1), np.concatenate([v, more_v], 1)
        cache.append([seq], more_k, more_v)
        q = rows(n)
        np.testing.assert_allclose(
            cache.attend([seq], q), ta.attention(q, k, v, method="fp16", phase="decode"), atol=1e-6
        )
    assert cache.length(seq) == 322


def test_sequences_of_different_lengths_share_a_step():
    cache = ta.KvCache("thrift", h_kv=H_KV, d=D)
    seqs = [cache.new_sequence() for _ in range(3)]
    for seq, n in zip(seqs, (10, 200, 500)):
        cache.append([seq], *kv(n))
        cache.settle([seq])
    cache.append(seqs, *kv(1, b=3))
    q = rows(b=3)
    together = cache.attend(seqs, q)
    for i, seq in enumerate(seqs):
        np.testing.assert_allclose(cache.attend([seq], q[i : i + 1]), together[i : i + 1], atol=1e-6)


def test_a_fork_goes_its_own_way_and_shares_full_pages():
    cache, seq, _, _ = filled(640 + 20)
    alone = cache.bytes().total
    other = cache.fork(seq)
    assert cache.bytes().total - alone < alone / 4
    q = rows()
    np.testing.assert_array_equal(cache.attend([seq], q), cache.attend([other], q))
    cache.append([other], *kv(1))
    assert cache.length(other) == cache.length(seq) + 1
    assert np.abs(cache.attend([seq], q) - cache.attend([other], q)).max() > 0
    cache.free(other)
    with pytest.raises(ValueError, match="does not exist"):
        cache.length(other)


def test_truncate_is_exact_or_refused():
    cache, seq, k, v = filled(640)
    cache.truncate(seq, 600)
    fresh = ta.KvCache("thrift", h_kv=H_KV, d=D)
    same = fresh.new_sequence()
    fresh.append([same], k[:, :600], v[:, :600])
    fresh.settle([same])
    q = rows()
    np.testing.assert_array_equal(cache.attend([seq], q), fresh.attend([same], q))
    with pytest.raises(NotImplementedError, match="lossy"):
        cache.truncate(seq, 330)
    cache.truncate(seq, 330, lossy=True)
    assert cache.length(seq) == 330


def test_a_saved_sequence_goes_on_bit_for_bit(tmp_path):
    cache, seq, _, _ = filled(700)
    path = tmp_path / "saved"
    cache.save(seq, path, b"what it was")
    other = ta.KvCache("thrift", h_kv=H_KV, d=D)
    loaded, metadata = other.load(path)
    assert metadata == b"what it was" and other.length(loaded) == 700
    q, more = rows(), kv(1)
    for c, s in ((cache, seq), (other, loaded)):
        c.append([s], *more)
    np.testing.assert_array_equal(cache.attend([seq], q), other.attend([loaded], q))
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="storage"):
        ta.KvCache("fp16", h_kv=H_KV, d=D).load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError):
        other.load(path)


def test_bytes_say_what_is_kept_and_max_bytes_bounds_it():
    cache, seq, _, _ = filled(4096)
    use = cache.bytes()
    assert use.total == use.codes + use.residual + use.high + use.summaries + use.tables
    assert use.total < 4096 * H_KV * 2 * D * 2 and cache.peak_bytes() >= use.total
    cache.free(seq)
    assert cache.bytes().total == 0
    small = ta.KvCache("thrift", h_kv=H_KV, d=D, max_bytes=100_000)
    seq = small.new_sequence()
    with pytest.raises(MemoryError, match="at most 100000"):
        small.append([seq], *kv(4096))
    assert small.length(seq) == 0


def test_read_gives_the_best_form_stored():
    cache, seq, k, v = filled(640, "fp16")
    got_k, got_v = cache.read(seq, first=10, tokens=600)
    np.testing.assert_array_equal(got_k, k[0, 10:610].astype(np.float16))
    np.testing.assert_array_equal(got_v, v[0, 10:610].astype(np.float16))
    cache, seq, k, _ = filled(640)
    error = np.abs(cache.read(seq, tokens=640)[0] - k[0])
    assert error[:64].max() < 2e-3 < error[64:512].max() < 0.1


def test_layers_and_methods_are_checked():
    cache = ta.KvCache("thrift", h_kv=H_KV, d=D, layers=2)
    seq = cache.new_sequence()
    cache.append([seq], *kv(100), layer=0)
    assert cache.length(seq, layer=0) == 100 and cache.length(seq) == 0
    with pytest.raises(ValueError, match="layer 2"):
        cache.append([seq], *kv(1), layer=2)
    with pytest.raises(ValueError, match="layer 7"):
        cache.length(seq, layer=7)
    with pytest.raises(ValueError, match="layer -1"):
        cache.length(seq, layer=-1)
    with pytest.raises(ValueError, match="storage"):
        cache.attend([seq], rows(), method="paper")
    with pytest.raises(ValueError, match="q has 2 sequences"):
        cache.attend([seq], rows(b=2))
    with pytest.raises(ValueError, match="multiple|not supported"):
        ta.KvCache("thrift", h_kv=H_KV, d=20)
