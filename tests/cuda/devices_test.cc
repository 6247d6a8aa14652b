// Several GPUs: each is served by its index, whichever is the thread's current one, which stays what it was.
#include <string>
#include <utility>
#include <vector>

#include "core/device.h"
#include "cuda/session.h"

namespace thriftattn::testing {
namespace {

// A prompt, then decode steps, on one GPU while another is current; all that comes back.
std::vector<float> run_on(int device, int current, const Tokens& x) {
  const int64_t prompt = x.s - 2;
  const Shape& shape = x.shape;
  std::vector<float> all;
  const auto run = [&] {
    const cuda::CurrentDevice there(device);
    const Floats k(x.k, DType::f16), v(x.v, DType::f16), q(x.q, DType::f16);
    const int64_t n = x.s * shape.h_q * shape.d_v;
    const Floats out(n, DType::f32), lse(x.s * shape.h_q, DType::f32);
    const Floats codes(n / 8, DType::f32), scales(n / 64, DType::f32), back(n, DType::f32);
    const OwnStream stream;
    const cuda::CurrentDevice elsewhere(current);
    auto machine = cuda::machine(device);
    ASSERT_TRUE(machine.ok()) << machine.status().message();
    const Method m = method("thrift:budget=0.25");
    auto cache = cuda::Cache::create(CacheConfig::for_method(m, 1, shape.h_kv, shape.d, shape.d_v),
                                     {1, prompt, 0, prompt}, device);
    ASSERT_TRUE(cache.ok()) << cache.status().message();
    auto seq = cache->new_sequence(stream);
    ASSERT_TRUE(seq.ok()) << seq.status().message();
    ASSERT_OK(cache->grow({2, x.s, 0, prompt}, stream));
    ASSERT_OK(cache->reserve(*seq, x.s, stream));

    const auto step = [&](Phase phase, int64_t first, int64_t rows) {
      Problem p;
      p.phase = phase;
      p.max_s_q = rows;
      p.max_s_kv = x.s;
      p.h_q = shape.h_q;
      p.h_kv = shape.h_kv;
      p.d = shape.d;
      p.d_v = shape.d_v;
      p.method = m;
      p.cache = cache->config();
      auto planned = plan(p, *machine);
      ASSERT_TRUE(planned.ok()) << planned.status().message();
      auto workspace = cuda::Workspace::create(*planned, device);
      ASSERT_TRUE(workspace.ok()) << workspace.status().message();
      ASSERT_OK(cache->set_batch(std::vector<SeqId>{*seq}, std::vector<int64_t>{rows}, stream));
      ASSERT_OK(cache->begin_step(stream));
      ASSERT_OK(cache->append(0, k.view(x.s, shape.h_kv, shape.d).slice(first, rows),
                              v.view(x.s, shape.h_kv, shape.d_v).slice(first, rows), stream));
      cuda::AttendArgs args;
      args.cache = &*cache;
      args.q = q.view(x.s, shape.h_q, shape.d).slice(first, rows);
      args.out = out.mutable_view(x.s, shape.h_q, shape.d_v).slice(first, rows);
      args.lse = lse.f32() + first * shape.h_q;
      ASSERT_OK(cuda::run(*planned, *workspace, args, stream));
      ASSERT_OK(cache->end_step(stream));
      auto stats = cuda::stats(*planned, *workspace, *cache, stream);
      ASSERT_TRUE(stats.ok()) << stats.status().message();
    };
    step(Phase::prefill, 0, prompt);
    auto fork = cache->fork(*seq, stream);
    ASSERT_TRUE(fork.ok()) << fork.status().message();
    step(Phase::decode, prompt, 1);
    step(Phase::decode, prompt + 1, 1);
    ASSERT_OK(cache->truncate(*fork, prompt - 1, stream));

    std::vector<float> kept_k(x.k.size()), kept_v(x.v.size());
    ASSERT_OK(cache->download(*seq, 0, 0, mutable_view(kept_k.data(), x.s, shape.h_kv, shape.d),
                              mutable_view(kept_v.data(), x.s, shape.h_kv, shape.d_v), stream));
    auto* const code = reinterpret_cast<uint8_t*>(codes.f32());
    auto* const scale = reinterpret_cast<uint8_t*>(scales.f32());
    ASSERT_OK(cuda::quantize(out.f32(), DType::f32, n, Fp4Format::nvfp4, Scales::six, code, scale, device, stream));
    ASSERT_OK(cuda::dequantize(code, scale, n, Fp4Format::nvfp4, back.f32(), device, stream));
    stream.wait();
    for (const std::vector<float>& part : {out.get(), lse.get(), kept_k, kept_v, back.get()})
      all.insert(all.end(), part.begin(), part.end());
    int now = -1;
    EXPECT_CUDA(cudaGetDevice(&now));
    EXPECT_EQ(now, current);
  };
  run();
  return all;
}

TEST(GpuDevices, AreServedByIndexWhicheverIsCurrent) {
  SKIP_WITHOUT_GPU();
  int count = 0;
  ASSERT_CUDA(cudaGetDeviceCount(&count));
  if (count < 2) GTEST_SKIP() << "there are no two GPUs";
  const Tokens tokens = attention_like({8, 2, 64, 64}, 700);
  const std::vector<float> expected = run_on(0, 0, tokens);
  EXPECT_EQ(run_on(0, 1, tokens), expected);
  EXPECT_EQ(run_on(1, 0, tokens), expected);
  EXPECT_EQ(run_on(1, 1, tokens), expected);
}

}  // namespace
}  // namespace thriftattn::testing
