#include "thriftattn/cache.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "attention/session.h"

namespace thriftattn::testing {
namespace {

struct Content {
  std::vector<float> k, v;
  bool operator==(const Content&) const = default;
};

Content read_all(const KvCache& cache, SeqId seq, const Shape& shape, int layer = 0) {
  const int64_t s = cache.length(seq, layer);
  Content content;
  content.k.resize(static_cast<size_t>(s * shape.h_kv * shape.d));
  content.v.resize(static_cast<size_t>(s * shape.h_kv * shape.d_v));
  EXPECT_OK(cache.read(seq, layer, 0, mutable_view(content.k.data(), s, shape.h_kv, shape.d),
                       mutable_view(content.v.data(), s, shape.h_kv, shape.d_v)));
  return content;
}

KvCache make(const CacheConfig& config) {
  auto cache = KvCache::create(config);
  EXPECT_TRUE(cache.ok()) << cache.status().message();
  return std::move(*cache);
}

CacheConfig config_of(const std::string& spec, const Shape& shape, int layers = 1) {
  return CacheConfig::for_method(method(spec), layers, shape.h_kv, shape.d, shape.d_v);
}

Status append(KvCache& cache, SeqId seq, const Tokens& tokens, int64_t first, int64_t count) {
  for (int layer = 0; layer < cache.config().layers; ++layer) {
    const Status status = cache.append(seq, layer, tokens.k_view(first, count), tokens.v_view(first, count), pool());
    if (!status.ok()) return status;
  }
  return {};
}

void settle(KvCache& cache, SeqId seq) {
  for (int layer = 0; layer < cache.config().layers; ++layer) EXPECT_OK(cache.settle(seq, layer));
}

// Largest difference of page `page` from the tokens, relative to the largest value: 0 in 16 bit (the tokens are exact
// there), some percent in FP4, about one percent in two planes.
double error_of_page(const KvCache& cache, SeqId seq, const Tokens& tokens, int64_t page) {
  const Shape& shape = tokens.shape;
  std::vector<float> k(static_cast<size_t>(64 * shape.h_kv * shape.d)),
      v(static_cast<size_t>(64 * shape.h_kv * shape.d_v));
  EXPECT_OK(cache.read(seq, 0, page * 64, mutable_view(k.data(), 64, shape.h_kv, shape.d),
                       mutable_view(v.data(), 64, shape.h_kv, shape.d_v)));
  double worst = 0, largest = 0;
  for (size_t i = 0; i < v.size(); ++i) {
    const float want = tokens.v[static_cast<size_t>(page) * v.size() + i];
    worst = std::max<double>(worst, std::fabs(v[i] - want));
    largest = std::max<double>(largest, std::fabs(want));
  }
  for (size_t i = 0; i < k.size(); ++i) {
    worst = std::max<double>(worst, std::fabs(k[i] - tokens.k[static_cast<size_t>(page) * k.size() + i]));
  }
  return worst / largest;
}

// Tokens whose values FP16 and BF16 hold exactly.
Tokens exact_tokens(const Shape& shape, int64_t s, uint32_t seed = 1) {
  Tokens tokens = attention_like(shape, s, seed);
  for (auto* x : {&tokens.k, &tokens.v}) {
    for (float& value : *x) value = std::round(value * 16) / 16;
  }
  return tokens;
}

TEST(Cache, EveryByteIsAccountedFor) {
  // 5 full pages and a tail of 20 tokens, 2 layers, 2 KV heads, d = d_v = 128.
  const Shape shape{4, 2, 128, 128};
  const Tokens tokens = attention_like(shape, 5 * 64 + 20);
  const int64_t heads = 2 * 2;
  const int64_t codes = 64 * 256 / 2;  // half a byte for each of K and V
  const int64_t nvfp4 = codes + 64 * 256 / 16, mxfp4 = codes + 64 * 256 / 32;
  const int64_t high = 2 * 64 * 256;  // 16 bit
  const int64_t facts = 16, mean = 2 * 128, min_max = 2 * mean, variance = 4 * 128;
  const struct {
    const char* spec;
    int64_t codes, residual, high_pages, summary;
  } rows[] = {
      {"fp16", 0, 0, 6, 0},
      {"topk", 0, 0, 6, facts + mean},
      {"quest", 0, 0, 6, facts + min_max},
      {"fp4", nvfp4, 0, 4, facts + mean},  // sink, two recent, tail
      {"fp4:centring=off", nvfp4, 0, 4, facts},
      {"fp4:format=mxfp4", mxfp4, 0, 4, facts + mean},
      {"fp4:recent=4", nvfp4, 0, 6, facts + mean},
      {"thrift", nvfp4, nvfp4, 4, facts + mean},
      {"thrift:force=sink:2", nvfp4, nvfp4, 5, facts + mean},
      {"thrift:policy=second_moment", nvfp4, nvfp4, 4, facts + mean + variance},
      {"thrift:storage=dual", nvfp4, 0, 6, facts + mean},
      {"thrift:storage=fp4_only", nvfp4, 0, 4, facts + mean},
  };
  for (const auto& row : rows) {
    KvCache cache = make(config_of(row.spec, shape, 2));
    const SeqId seq = cache.new_sequence();
    EXPECT_EQ(cache.bytes().total(), 0) << row.spec;
    ASSERT_OK(append(cache, seq, tokens, 0, tokens.s));
    EXPECT_EQ(cache.bytes().high, 6 * heads * high) << row.spec << ": until settle every new page has its 16-bit form";
    const int64_t peak = cache.bytes().total();
    settle(cache, seq);
    const MemoryUse use = cache.bytes();
    EXPECT_EQ(use.codes, 5 * heads * row.codes) << row.spec;
    EXPECT_EQ(use.residual, 5 * heads * row.residual) << row.spec;
    EXPECT_EQ(use.high, row.high_pages * heads * high) << row.spec;
    EXPECT_EQ(use.summaries, 5 * heads * row.summary) << row.spec;
    EXPECT_GT(use.tables, 0);
    EXPECT_LT(use.tables, 6 * heads * 32) << row.spec;
    EXPECT_EQ(use.total(), use.codes + use.residual + use.high + use.summaries + use.tables);
    EXPECT_EQ(cache.peak_bytes(), peak) << row.spec;
    EXPECT_GE(cache.reserved_bytes(), use.total());
    ASSERT_OK(cache.free(seq));
    EXPECT_EQ(cache.bytes().total(), 0) << row.spec;
    EXPECT_EQ(cache.peak_bytes(), peak) << row.spec;
  }
}

TEST(Cache, BitsPerElementAreTheDesigns) {
  const Shape shape{1, 1, 128, 128};
  const Tokens tokens = attention_like(shape, 64 * 40);
  const std::pair<const char*, double> rows[] = {{"thrift:storage=dual", 20.6}, {"thrift", 9.1}, {"fp4", 4.6}};
  for (const auto& [spec, bits] : rows) {
    KvCache cache = make(config_of(spec, shape));
    const SeqId seq = cache.new_sequence();
    ASSERT_OK(append(cache, seq, tokens, 0, tokens.s));
    settle(cache, seq);
    // The sink and the recent pages are a constant on top.
    const double window = method(spec).storage == Storage::dual ? 0 : 3 * 2 * 64 * 256;
    const double measured =
        8 * (static_cast<double>(cache.bytes().total()) - window) / static_cast<double>(tokens.s * 256);
    EXPECT_NEAR(measured, bits, 0.1) << spec;
  }
}

TEST(Cache, EachPageIsReadInTheBestFormStored) {
  const Tokens tokens = exact_tokens({2, 1, 64, 64}, 64 * 8 + 10);
  const auto errors = [&](const char* spec) {
    KvCache cache = make(config_of(spec, tokens.shape));
    const SeqId seq = cache.new_sequence();
    EXPECT_OK(append(cache, seq, tokens, 0, tokens.s));
    settle(cache, seq);
    std::vector<double> all;
    for (int64_t page = 0; page < 8; ++page) all.push_back(error_of_page(cache, seq, tokens, page));
    return all;
  };
  const auto fp4 = errors("fp4"), residual = errors("thrift"), dual = errors("thrift:storage=dual"),
             fp16 = errors("fp16");
  for (size_t page = 0; page < 8; ++page) {
    const bool window = page == 0 || page >= 6;
    EXPECT_EQ(fp16[page], 0) << page;
    EXPECT_EQ(dual[page], 0) << page;
    if (window) {
      EXPECT_EQ(fp4[page], 0) << page;
      EXPECT_EQ(residual[page], 0) << page;
    } else {
      EXPECT_GT(fp4[page], 0.01) << page;
      EXPECT_LT(fp4[page], 0.2) << page;
      EXPECT_GT(residual[page], 0) << page;
      EXPECT_LT(residual[page], fp4[page] / 3) << page;
    }
  }
}

TEST(Cache, TokenWiseEqualsBulkAppendBitForBit) {
  for (const char* spec : {"thrift", "fp4:format=mxfp4", "thrift:storage=dual,scales=4over6", "fp16"}) {
    const Tokens tokens = attention_like({4, 2, 64, 128}, 64 * 5 + 9);
    KvCache cache = make(config_of(spec, tokens.shape));
    const SeqId bulk = cache.new_sequence(), single = cache.new_sequence(), odd = cache.new_sequence();
    ASSERT_OK(append(cache, bulk, tokens, 0, tokens.s));
    settle(cache, bulk);
    for (int64_t t = 0; t < tokens.s; ++t) {
      ASSERT_OK(append(cache, single, tokens, t, 1));
      settle(cache, single);
    }
    for (int64_t t = 0; t < tokens.s; t += 100) {
      ASSERT_OK(append(cache, odd, tokens, t, std::min<int64_t>(100, tokens.s - t)));
      settle(cache, odd);
    }
    const Content content = read_all(cache, bulk, tokens.shape);
    EXPECT_TRUE(content == read_all(cache, single, tokens.shape)) << spec;
    EXPECT_TRUE(content == read_all(cache, odd, tokens.shape)) << spec;
  }
}

TEST(Cache, ReadsOtherTypesAndStrides) {
  const Tokens tokens = exact_tokens({1, 1, 64, 64}, 70);
  // The same keys as BF16, every second token row of a wider buffer.
  std::vector<uint16_t> wide(static_cast<size_t>(70 * 2 * 64), 0x7fc0);  // NaN between the rows
  for (int64_t t = 0; t < 70; ++t) {
    for (int64_t c = 0; c < 64; ++c) {
      const float value = tokens.k[static_cast<size_t>(t * 64 + c)];
      wide[static_cast<size_t>(t * 128 + c)] = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
    }
  }
  KvCache cache = make(config_of("fp16", tokens.shape));
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(cache.append(seq, 0, View{wide.data(), DType::bf16, 70, 1, 64, 128, 64}, tokens.v_view(0, 70), pool()));
  const Content content = read_all(cache, seq, tokens.shape);
  for (size_t i = 0; i < content.k.size(); ++i) {
    const float as_bf16 = std::bit_cast<float>(std::bit_cast<uint32_t>(tokens.k[i]) & 0xffff0000u);
    ASSERT_EQ(content.k[i], as_bf16) << i;
  }
  EXPECT_EQ(content.v, tokens.v);
}

TEST(Cache, RefusesWhatSixteenBitsCannotHoldAndAppendsNothing) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (DType high : {DType::f16, DType::bf16}) {
    for (const bool in_k : {true, false}) {
      for (float bad : {std::nanf(""), infinity, -infinity, 65520.0f, -1e6f, 3.4e38f}) {
        Tokens tokens = attention_like({4, 2, 64, 64}, 200);
        CacheConfig config = config_of("thrift", tokens.shape, 1);
        config.high_dtype = high;
        KvCache cache = make(config);
        const SeqId seq = cache.new_sequence();
        ASSERT_OK(append(cache, seq, tokens, 0, 70));
        const Content before = read_all(cache, seq, tokens.shape);
        const int64_t bytes = cache.bytes().total();
        (in_k ? tokens.k_at(150) : tokens.v_at(150))[64 + 3] = bad;  // head 1
        const Status status = append(cache, seq, tokens, 70, 130);
        const bool fits = high == DType::bf16 && std::fabs(bad) < 1e7f;
        ASSERT_EQ(status.ok(), fits) << bad << ": " << status.message();
        if (fits) continue;
        EXPECT_EQ(status.code(), Code::invalid_argument);
        for (const char* word : {"layer 0", "token 80", "head 1"}) {
          EXPECT_NE(status.message().find(word), std::string::npos) << status.message();
        }
        EXPECT_EQ(cache.length(seq), 70);
        EXPECT_EQ(cache.bytes().total(), bytes);
        EXPECT_TRUE(read_all(cache, seq, tokens.shape) == before);
      }
    }
  }
}

TEST(Cache, TheLargestHalfIsAccepted) {
  Tokens tokens = attention_like({1, 1, 64, 64}, 64);
  tokens.k[100] = 65504.0f;
  tokens.v[100] = -65519.0f;
  KvCache cache = make(config_of("thrift", tokens.shape));
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(append(cache, seq, tokens, 0, 64));
  const Content content = read_all(cache, seq, tokens.shape);
  EXPECT_EQ(content.k[100], 65504.0f);
  EXPECT_EQ(content.v[100], -65504.0f);
}

// What rounds to infinity is refused, the float before it is not.
TEST(Cache, TheLimitOfTheSixteenBitFormIsExact) {
  const std::pair<DType, float> limits[] = {{DType::f16, 65520.0f}, {DType::bf16, 0x1.ffp127f}};
  for (const auto& [high, beyond] : limits) {
    Tokens tokens = attention_like({1, 1, 64, 64}, 1);
    CacheConfig config = config_of("thrift", tokens.shape);
    config.high_dtype = high;
    KvCache cache = make(config);
    const SeqId seq = cache.new_sequence();
    tokens.k[3] = beyond;
    EXPECT_FALSE(append(cache, seq, tokens, 0, 1).ok());
    tokens.k[3] = std::nextafter(beyond, 0.0f);
    ASSERT_OK(append(cache, seq, tokens, 0, 1));
    EXPECT_TRUE(std::isfinite(read_all(cache, seq, tokens.shape).k[3]));
  }
}

TEST(Cache, RefusesWrongArguments) {
  const Tokens tokens = attention_like({2, 2, 64, 64}, 8);
  KvCache cache = make(config_of("thrift", tokens.shape));
  const SeqId seq = cache.new_sequence();
  const View k = tokens.k_view(0, 8), v = tokens.v_view(0, 8);
  const auto refused = [&](const Status& status, Code code) {
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_FALSE(status.message().empty());
    EXPECT_EQ(status.message().find('\n'), std::string::npos);
  };
  View wrong = k;
  wrong.channels = 32;
  refused(cache.append(seq, 0, wrong, v, pool()), Code::invalid_argument);
  wrong = k;
  wrong.heads = 1;
  refused(cache.append(seq, 0, wrong, v, pool()), Code::invalid_argument);
  refused(cache.append(seq, 0, k, tokens.v_view(0, 7), pool()), Code::invalid_argument);
  refused(cache.append(seq, 0, tokens.k_view(0, -1), tokens.v_view(0, -1), pool()), Code::invalid_argument);
  refused(cache.append(seq, 1, k, v, pool()), Code::invalid_argument);
  refused(cache.append(seq, -1, k, v, pool()), Code::invalid_argument);
  refused(cache.append(seq + 1, 0, k, v, pool()), Code::not_found);
  refused(cache.settle(seq + 1, 0), Code::not_found);
  refused(cache.settle(seq, 1), Code::invalid_argument);
  refused(cache.free(seq + 1), Code::not_found);
  refused(cache.fork(-1).status(), Code::not_found);
  refused(cache.truncate(seq, 1), Code::invalid_argument);
  refused(cache.truncate(seq, -1), Code::invalid_argument);
  EXPECT_EQ(cache.length(seq + 1), -1);
  EXPECT_EQ(cache.length(seq), 0);
  std::vector<float> out(64 * 2);
  for (const int64_t first : {int64_t{-1}, int64_t{0}, INT64_MAX - 1, INT64_MAX}) {
    const MutableView one = mutable_view(out.data(), 1, 2, 64);
    refused(cache.read(seq, 0, first, one, one), Code::invalid_argument);
  }
  ASSERT_OK(cache.free(seq));
  refused(cache.free(seq), Code::not_found);
  refused(cache.append(seq, 0, k, v, pool()), Code::not_found);
}

TEST(Cache, RefusesWrongConfigs) {
  const auto refused = [](auto change, const char* word) {
    CacheConfig config;
    change(config);
    const auto cache = KvCache::create(config);
    ASSERT_FALSE(cache.ok()) << word;
    EXPECT_NE(cache.status().message().find(word), std::string::npos) << cache.status().message();
  };
  ASSERT_TRUE(KvCache::create({}).ok());
  refused([](CacheConfig& c) { c.d = 100; }, "100");
  refused([](CacheConfig& c) { c.d_v = 272; }, "272");
  refused([](CacheConfig& c) { c.layers = 0; }, "0");
  refused([](CacheConfig& c) { c.h_kv = 0; }, "0");
  refused([](CacheConfig& c) { c.layers = c.h_kv = 1 << 11; }, "2048 layers of 2048 KV heads");
  refused([](CacheConfig& c) { c.high_dtype = DType::f32; }, "f32");
  refused([](CacheConfig& c) { c.storage = Storage::compact; }, "compact");
  refused([](CacheConfig& c) { c.storage = Storage::offload; }, "offload");
  refused([](CacheConfig& c) { c.recent = 1; }, "1");
  refused([](CacheConfig& c) { c.mean = false; }, "mean");
}

TEST(Cache, NothingIsAppendedBeyondTheLimit) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 64 * 20);
  CacheConfig config = config_of("thrift", tokens.shape);
  config.max_bytes = 150000;
  KvCache cache = make(config);
  const SeqId seq = cache.new_sequence();
  int64_t s = 0;
  Status status;
  while (s < tokens.s && (status = append(cache, seq, tokens, s, 32)).ok()) {
    settle(cache, seq);
    s += 32;
  }
  ASSERT_LT(s, tokens.s);
  ASSERT_GT(s, 64 * 4);
  EXPECT_EQ(status.code(), Code::out_of_memory);
  EXPECT_NE(status.message().find("150000"), std::string::npos) << status.message();
  EXPECT_EQ(cache.length(seq), s);
  EXPECT_LE(cache.peak_bytes(), 150000);
  const Content content = read_all(cache, seq, tokens.shape);
  const SeqId other = cache.new_sequence();
  EXPECT_FALSE(append(cache, other, tokens, 0, 64 * 4).ok());
  EXPECT_EQ(cache.length(other), 0);
  EXPECT_TRUE(content == read_all(cache, seq, tokens.shape));
  ASSERT_OK(cache.free(seq));
  EXPECT_OK(append(cache, other, tokens, 0, 64 * 4));
}

// The limit is of all that MemoryUse counts, tables included.
TEST(Cache, TheLimitIsReachedExactly) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 100);
  CacheConfig config = config_of("thrift", tokens.shape);
  const auto total_after = [&](int64_t max_bytes, bool fork, bool& ok) {
    config.max_bytes = max_bytes;
    KvCache cache = make(config);
    const SeqId seq = cache.new_sequence();
    ok = append(cache, seq, tokens, 0, 100).ok();
    if (ok && fork) ok = cache.fork(seq).ok();
    return cache.peak_bytes();
  };
  for (const bool fork : {false, true}) {
    bool ok = false;
    const int64_t total = total_after(0, fork, ok);
    ASSERT_TRUE(ok);
    EXPECT_EQ(total_after(total, fork, ok), total);
    EXPECT_TRUE(ok);
    EXPECT_LT(total_after(total - 1, fork, ok), total);
    EXPECT_FALSE(ok);
  }
}

TEST(Cache, ThePeakCountsATailCutOutOfASharedPage) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 128);
  KvCache cache = make(config_of("thrift", tokens.shape));
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(append(cache, seq, tokens, 0, 128));
  auto other = cache.fork(seq);
  ASSERT_TRUE(other.ok());
  const int64_t before = cache.bytes().total();
  ASSERT_OK(cache.truncate(*other, 100));
  EXPECT_GT(cache.bytes().total(), before);
  EXPECT_EQ(cache.peak_bytes(), cache.bytes().total());
}

// --- fork
// -------------------------------------------------------------------------------------------------------------

class CacheFork : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Storages, CacheFork,
                         ::testing::Values("fp16", "thrift", "thrift:storage=dual", "thrift:storage=fp4_only"));

TEST_P(CacheFork, SharesFullPagesAndOwnsItsTail) {
  const Tokens tokens = attention_like({2, 2, 64, 64}, 64 * 4 + 30);
  KvCache cache = make(config_of(GetParam(), tokens.shape, 2));
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(append(cache, seq, tokens, 0, tokens.s));
  settle(cache, seq);
  const MemoryUse one = cache.bytes();
  const auto fork = cache.fork(seq);
  ASSERT_TRUE(fork.ok()) << fork.status().message();
  const MemoryUse two = cache.bytes();
  EXPECT_EQ(two.codes, one.codes);
  EXPECT_EQ(two.residual, one.residual);
  EXPECT_EQ(two.summaries, one.summaries);
  EXPECT_EQ(two.high - one.high, 2 * 2 * 2 * 64 * 128) << "one tail of two layers and heads";
  EXPECT_TRUE(read_all(cache, seq, tokens.shape, 1) == read_all(cache, *fork, tokens.shape, 1));
  ASSERT_OK(cache.free(seq));
  EXPECT_EQ(cache.bytes().codes, one.codes);
  EXPECT_EQ(cache.bytes().high, one.high);
  ASSERT_OK(cache.free(*fork));
  EXPECT_EQ(cache.bytes().total(), 0);
}

TEST_P(CacheFork, BranchesGrowApartAsIfTheyHadNeverBeenOne) {
  const Shape shape{2, 1, 64, 64};
  const Tokens trunk = attention_like(shape, 64 * 3 + 30, 1), left = attention_like(shape, 300, 2),
               right = attention_like(shape, 300, 3);
  KvCache cache = make(config_of(GetParam(), shape));
  const SeqId a = cache.new_sequence();
  ASSERT_OK(append(cache, a, trunk, 0, trunk.s));
  settle(cache, a);
  const SeqId b = *cache.fork(a);
  for (int64_t t = 0; t < 300; t += 50) {  // interleaved
    ASSERT_OK(append(cache, a, left, t, 50));
    settle(cache, a);
    ASSERT_OK(append(cache, b, right, t, 50));
    settle(cache, b);
  }
  for (const auto& [seq, branch] : {std::pair{a, &left}, std::pair{b, &right}}) {
    KvCache alone = make(config_of(GetParam(), shape));
    const SeqId same = alone.new_sequence();
    ASSERT_OK(append(alone, same, trunk, 0, trunk.s));
    settle(alone, same);
    ASSERT_OK(append(alone, same, *branch, 0, 300));
    settle(alone, same);
    EXPECT_TRUE(read_all(cache, seq, shape) == read_all(alone, same, shape));
  }
  ASSERT_OK(cache.free(a));
  ASSERT_OK(cache.free(b));
  EXPECT_EQ(cache.bytes().total(), 0);
}

TEST_P(CacheFork, TheSlowerBranchKeepsIts16BitPagesUntilItSettles) {
  const Tokens tokens = exact_tokens({2, 1, 64, 64}, 64 * 12);
  KvCache cache = make(config_of(GetParam(), tokens.shape));
  const SeqId a = cache.new_sequence();
  ASSERT_OK(append(cache, a, tokens, 0, 64 * 5));
  settle(cache, a);
  const SeqId b = *cache.fork(a);
  ASSERT_OK(append(cache, a, tokens, 64 * 5, 64 * 7));
  settle(cache, a);
  for (int64_t page : {0, 3, 4}) EXPECT_EQ(error_of_page(cache, b, tokens, page), 0) << page;
  ASSERT_OK(cache.truncate(a, 64 * 2 + 10, true));  // lossy: drops pages whose 16-bit form b still has
  for (int64_t page : {0, 3, 4}) EXPECT_EQ(error_of_page(cache, b, tokens, page), 0) << page;
  ASSERT_OK(cache.free(a));
  for (int64_t page : {0, 3, 4}) EXPECT_EQ(error_of_page(cache, b, tokens, page), 0) << page;
  ASSERT_OK(cache.free(b));
  EXPECT_EQ(cache.bytes().total(), 0);
}

TEST(Cache, ALossyTruncateOfTheLargestValuesIsFinite) {
  Tokens tokens = attention_like({2, 1, 64, 64}, 64 * 12);
  for (std::vector<float>* values : {&tokens.k, &tokens.v})
    for (float& x : *values) x = std::clamp(x * 60000, -65504.0f, 65504.0f);
  for (const char* spec : {"thrift", "fp4", "fp4:centring=on"}) {
    KvCache cache = make(config_of(spec, tokens.shape));
    const SeqId seq = cache.new_sequence();
    ASSERT_OK(append(cache, seq, tokens, 0, tokens.s));
    settle(cache, seq);
    ASSERT_OK(cache.truncate(seq, 64 * 4 + 50, true));
    const Content content = read_all(cache, seq, tokens.shape);
    for (const std::vector<float>* values : {&content.k, &content.v})
      for (const float x : *values) ASSERT_TRUE(std::isfinite(x)) << spec;
  }
}

TEST(Cache, ForkInTheMiddleOfAStepIsRefused) {
  const Tokens tokens = attention_like({1, 1, 64, 64}, 10);
  KvCache cache = make(config_of("thrift", tokens.shape, 2));
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(cache.append(seq, 0, tokens.k_view(0, 10), tokens.v_view(0, 10), pool()));
  EXPECT_EQ(cache.length(seq), 0);
  EXPECT_EQ(cache.length(seq, 0), 10);
  EXPECT_EQ(cache.fork(seq).status().code(), Code::invalid_argument);
}

// --- truncate
// ---------------------------------------------------------------------------------------------------------

TEST_P(CacheFork, TruncateThenAppendEqualsNeverHavingHadTheTokens) {
  const Shape shape{2, 2, 64, 64};
  const Tokens tokens = exact_tokens(shape, 64 * 6 + 20, 1), other = exact_tokens(shape, 64 * 3, 2);
  // Into the tail, onto page borders, into the last two full pages, into the sink page, to nothing.
  for (int64_t cut : {64 * 6 + 5, 64 * 6, 64 * 5 + 1, 64 * 4 + 63, 64 * 4, 64 * 2, 33, 0}) {
    KvCache cache = make(config_of(GetParam(), shape));
    const SeqId seq = cache.new_sequence();
    ASSERT_OK(append(cache, seq, tokens, 0, tokens.s));
    settle(cache, seq);
    const SeqId fork = *cache.fork(seq);
    const Content forked = read_all(cache, fork, shape);
    ASSERT_OK(cache.truncate(seq, cut));
    EXPECT_EQ(cache.length(seq), cut);
    ASSERT_OK(append(cache, seq, other, 0, other.s));
    settle(cache, seq);

    KvCache fresh = make(config_of(GetParam(), shape));
    const SeqId same = fresh.new_sequence();
    ASSERT_OK(append(fresh, same, tokens, 0, cut));
    settle(fresh, same);
    ASSERT_OK(append(fresh, same, other, 0, other.s));
    settle(fresh, same);
    EXPECT_TRUE(read_all(cache, fork, shape) == forked) << cut;
    ASSERT_OK(cache.free(fork));  // its 16-bit window would serve the reads below
    EXPECT_TRUE(read_all(cache, seq, shape) == read_all(fresh, same, shape)) << cut;
    EXPECT_EQ(cache.bytes().total(), fresh.bytes().total()) << cut;
  }
}

TEST(Cache, TruncateIntoAnEncodedPageIsExactOrRefusedUnlessLossy) {
  const Tokens tokens = exact_tokens({2, 1, 64, 64}, 64 * 8);
  KvCache cache = make(config_of("thrift", tokens.shape));
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(append(cache, seq, tokens, 0, tokens.s));
  settle(cache, seq);
  const Content before = read_all(cache, seq, tokens.shape);
  const Status status = cache.truncate(seq, 64 * 3 + 7);
  EXPECT_EQ(status.code(), Code::unsupported);
  for (const char* word : {"199", "page 3", "lossy"}) {
    EXPECT_NE(status.message().find(word), std::string::npos) << status.message();
  }
  EXPECT_EQ(cache.length(seq), 64 * 8);
  EXPECT_TRUE(read_all(cache, seq, tokens.shape) == before);
  ASSERT_OK(cache.truncate(seq, 64 * 3 + 7, true));
  EXPECT_EQ(cache.length(seq), 199);
  const Content after = read_all(cache, seq, tokens.shape);
  for (size_t i = 0; i < after.v.size(); ++i) ASSERT_NEAR(after.v[i], before.v[i], 0.01) << i;  // 16-bit rounding
  ASSERT_OK(append(cache, seq, tokens, 199, 64));
  EXPECT_EQ(cache.length(seq), 263);
}

TEST(Cache, ARefusedTruncateNamesALengthThatIsExact) {
  const Tokens tokens = exact_tokens({2, 1, 64, 64}, 64 * 10);
  KvCache cache = make(config_of("thrift", tokens.shape));
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(append(cache, seq, tokens, 0, tokens.s));
  settle(cache, seq);
  ASSERT_OK(cache.truncate(seq, 64 * 6));  // drops the pages that the window held
  ASSERT_OK(append(cache, seq, tokens, 64 * 6, 64));
  settle(cache, seq);
  const Status refused = cache.truncate(seq, 64 * 5 + 7);
  EXPECT_EQ(refused.code(), Code::unsupported);
  EXPECT_NE(refused.message().find("lengths from 384 on"), std::string::npos) << refused.message();
  EXPECT_OK(cache.truncate(seq, 64 * 6 + 7));
}

TEST(Cache, TruncateEndsAStepThatOnlySomeLayersTook) {
  const Tokens tokens = exact_tokens({1, 1, 64, 64}, 200);
  KvCache cache = make(config_of("thrift", tokens.shape, 2));
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(append(cache, seq, tokens, 0, 100));
  settle(cache, seq);
  ASSERT_OK(cache.append(seq, 0, tokens.k_view(100, 100), tokens.v_view(100, 100), pool()));
  ASSERT_OK(cache.truncate(seq, 100));
  EXPECT_EQ(cache.length(seq, 0), 100);
  ASSERT_OK(append(cache, seq, tokens, 100, 100));
  settle(cache, seq);
  KvCache fresh = make(config_of("thrift", tokens.shape, 2));
  const SeqId same = fresh.new_sequence();
  ASSERT_OK(append(fresh, same, tokens, 0, 200));
  settle(fresh, same);
  for (int layer : {0, 1}) {
    EXPECT_TRUE(read_all(cache, seq, tokens.shape, layer) == read_all(fresh, same, tokens.shape, layer)) << layer;
  }
  EXPECT_EQ(cache.bytes().total(), fresh.bytes().total());
}

TEST(Cache, FreedPagesAreUsedAgain) {
  const Tokens tokens = attention_like({1, 1, 64, 64}, 64 * 4);
  KvCache cache = make(config_of("thrift", tokens.shape));
  int64_t reserved = 0;
  for (int round = 0; round < 20; ++round) {
    const SeqId seq = cache.new_sequence();
    ASSERT_OK(append(cache, seq, tokens, 0, tokens.s));
    settle(cache, seq);
    if (round == 0) reserved = cache.reserved_bytes();
    ASSERT_OK(cache.free(seq));
  }
  EXPECT_EQ(cache.reserved_bytes(), reserved);
}

}  // namespace
}  // namespace thriftattn::testing
