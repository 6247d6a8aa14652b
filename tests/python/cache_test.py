import numpy as np
import pytest

import thriftattn as ta

rng = np.random.default_rng(11)
H_Q, H_KV, D = 4, 2, 32


def kv(n, b=1):
    return tuple(rng.standard_normal((b, n, H_KV, D)).astype(np.float32) for _ in range(2))


def rows(n=1, b=1):
    return rng.standard_normal((b, n, H_Q, D)).astype(np.float32)


class Cache(ta.KvCache):
    """A KvCache of arrays of the CPU, wherever it is."""

    def __init__(self, place, method="thrift", **kwargs):
        super().__init__(method, h_kv=H_KV, d=D, device=place.device, **kwargs)
        self.place = place

    def append(self, seqs, k, v, **kwargs):
        super().append(seqs, self.place.put(k), self.place.put(v), **kwargs)

    def attend(self, seqs, q, **kwargs):
        return self.place.get(super().attend(seqs, self.place.put(q), **kwargs))


def filled(place, n, method="thrift", **kwargs):
    cache = Cache(place, method, **kwargs)
    seq = cache.new_sequence()
    k, v = kv(n)
    cache.append([seq], k, v)
    cache.settle([seq])
    return cache, seq, k, v


def test_steps_are_attention_over_all_that_was_appended(place):
    cache, seq, k, v = filled(place, 300, "fp16")
    for n in (1, 5, 16):
        more_k, more_v = kv(n)
        k, v = np.concatenate([k, more_k], 1), np.concatenate([v, more_v], 1)
        cache.append([seq], more_k, more_v)
        q = rows(n)
        np.testing.assert_allclose(
            cache.attend([seq], q), ta.attention(q, k, v, method="fp16", phase="decode"), atol=place.tolerance(1e-6)
        )
    assert cache.length(seq) == 322


def test_sequences_of_different_lengths_share_a_step(place):
    cache = Cache(place)
    seqs = [cache.new_sequence() for _ in range(3)]
    for seq, n in zip(seqs, (10, 200, 500)):
        cache.append([seq], *kv(n))
        cache.settle([seq])
    cache.append(seqs, *kv(1, b=3))
    q = rows(b=3)
    together = cache.attend(seqs, q)
    for i, seq in enumerate(seqs):
        np.testing.assert_allclose(cache.attend([seq], q[i : i + 1]), together[i : i + 1], atol=place.tolerance(1e-6))


def test_a_prefill_of_several_sequences_is_one_of_each(place):
    cache = Cache(place)
    k, v = kv(3000, b=2)
    q = rows(3000, b=2)
    seqs = [cache.new_sequence() for _ in range(4)]
    cache.append(seqs[:2], k, v)
    together = cache.attend(seqs[:2], q.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3), phase="prefill")
    for i in range(2):
        cache.append(seqs[2 + i : 3 + i], k[i : i + 1], v[i : i + 1])
        alone = cache.attend(seqs[2 + i : 3 + i], q[i : i + 1], phase="prefill")
        np.testing.assert_array_equal(alone, together[i : i + 1])


def test_a_cache_grows_and_is_what_a_large_one_is(place):
    grown, large = Cache(place, layers=2), Cache(place, layers=2, max_sequences=9, max_tokens=3000, max_step=1500)
    for cache in (grown, large):
        cache.seqs = [cache.new_sequence() for _ in range(9)]
    for n in (70, 1, 1500, 3, 1200):
        (k, v), q = kv(n, b=9), rows(min(n, 16), b=9)
        for layer in range(2):
            outs = []
            for cache in (grown, large):
                cache.append(cache.seqs, k, v, layer=layer)
                outs.append(cache.attend(cache.seqs, q, layer=layer))
            np.testing.assert_allclose(*outs, atol=place.tolerance(0))
    assert grown.length(grown.seqs[8]) == 2774 and grown.bytes().codes == large.bytes().codes


def test_a_fork_goes_its_own_way_and_shares_full_pages(place):
    cache, seq, _, _ = filled(place, 640 + 20)
    alone = cache.bytes()
    other = cache.fork(seq)
    assert cache.bytes().codes - alone.codes <= alone.codes / 10
    q = rows()
    np.testing.assert_array_equal(cache.attend([seq], q), cache.attend([other], q))
    cache.append([other], *kv(1))
    assert cache.length(other) == cache.length(seq) + 1
    assert np.abs(cache.attend([seq], q) - cache.attend([other], q)).max() > 0
    cache.free(other)
    with pytest.raises(ValueError, match="does not exist"):
        cache.length(other)


def test_truncate_is_exact_or_refused(place):
    cache, seq, k, v = filled(place, 640)
    cache.truncate(seq, 600)
    fresh = Cache(place)
    same = fresh.new_sequence()
    fresh.append([same], k[:, :600], v[:, :600])
    fresh.settle([same])
    q = rows()
    np.testing.assert_array_equal(cache.attend([seq], q), fresh.attend([same], q))
    with pytest.raises(NotImplementedError):
        cache.truncate(seq, 330)
    assert cache.length(seq) == 600
    if not place.on_gpu:
        cache.truncate(seq, 330, lossy=True)
        assert cache.length(seq) == 330


def test_a_saved_sequence_goes_on_bit_for_bit(place, tmp_path):
    cache, seq, _, _ = filled(place, 700)
    path = tmp_path / "saved"
    cache.save(seq, path, b"what it was")
    other = Cache(place)
    loaded, metadata = other.load(path)
    assert metadata == b"what it was" and other.length(loaded) == 700
    q, more = rows(), kv(1)
    for c, s in ((cache, seq), (other, loaded)):
        c.append([s], *more)
    np.testing.assert_array_equal(cache.attend([seq], q), other.attend([loaded], q))
    with pytest.raises(ValueError, match="NUL"):
        cache.save(seq, f"{path}\0x")
    with pytest.raises(TypeError):
        cache.save(seq, 7)
    with pytest.raises(TypeError, match="method"):
        cache.attend([seq], rows(), method=5)
    with pytest.raises(TypeError, match="layer"):
        cache.length(seq, layer="x")
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="storage"):
        Cache(place, "fp16").load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError):
        other.load(path)


def test_a_file_saved_on_one_device_is_read_on_another(place, tmp_path):
    cache, seq, _, _ = filled(place, 700)
    cache.save(seq, tmp_path / "saved")
    on_the_cpu = ta.KvCache("thrift", h_kv=H_KV, d=D)
    loaded, _ = on_the_cpu.load(tmp_path / "saved")
    for ours, theirs in zip(cache.read(seq, tokens=700), on_the_cpu.read(loaded, tokens=700)):
        np.testing.assert_array_equal(ours, theirs)
    q = rows()
    np.testing.assert_allclose(cache.attend([seq], q), on_the_cpu.attend([loaded], q), atol=place.tolerance(0))


def test_bytes_say_what_is_kept_and_max_bytes_bounds_it(place):
    cache, seq, _, _ = filled(place, 4096)
    use = cache.bytes()
    assert use.total == use.codes + use.residual + use.high + use.summaries + use.tables
    assert use.codes + use.residual < 4096 * H_KV * 2 * D * 2 * 0.6 and cache.peak_bytes() >= use.total
    assert cache.reserved_bytes() >= use.total
    cache.free(seq)
    assert cache.bytes().total == 0
    small = Cache(place, max_bytes=1_000_000)
    seq = small.new_sequence()
    with pytest.raises(MemoryError, match="at most 1000000"):
        small.append([seq], *kv(8192))
    assert small.length(seq) == 0


def test_read_gives_the_best_form_stored(place):
    cache, seq, k, v = filled(place, 640, "fp16")
    got_k, got_v = cache.read(seq, first=10, tokens=600)
    np.testing.assert_array_equal(got_k, k[0, 10:610].astype(np.float16))
    np.testing.assert_array_equal(got_v, v[0, 10:610].astype(np.float16))
    cache, seq, k, _ = filled(place, 640)
    error = np.abs(cache.read(seq, tokens=640)[0] - k[0])
    assert error[:64].max() < 2e-3 < error[64:512].max() < 0.1


def test_what_is_not_finite_is_refused_or_found(place):
    cache, seq, k, v = filled(place, 100)
    k = k.copy()
    k[0, 7, 1, 3] = np.nan
    if place.on_gpu:
        cache.append([seq], k, v)
        with pytest.raises(ValueError, match="NaN"):
            cache.check()
        assert np.isnan(cache.attend([seq], rows())).any()
    else:
        with pytest.raises(ValueError, match="k"):
            cache.append([seq], k, v)
    cache.check()
    with pytest.raises(ValueError, match="NaN|65504"):
        ta.attention(*map(place.put, (rows(), k, v)))


def test_layers_and_methods_are_checked(place):
    cache = Cache(place, layers=2)
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
        ta.KvCache("thrift", h_kv=H_KV, d=20, device=place.device)
