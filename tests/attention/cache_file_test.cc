// Saved sequences: what comes back is what was saved, and what was changed on the way is refused.
#include "attention/cache_file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "attention/cache_state.h"
#include "attention/session.h"

namespace thriftattn::testing {
namespace {

namespace fs = std::filesystem;

// A folder of its own for every test.
class CacheFile : public ::testing::Test {
 protected:
  CacheFile() {
    // Thousands of small files: in memory where that can be.
    const fs::path root = access("/dev/shm", W_OK) == 0 ? fs::path("/dev/shm") : fs::temp_directory_path();
    std::string name = root / "cache_file_XXXXXX";
    folder_ = mkdtemp(name.data());
  }
  ~CacheFile() override { fs::remove_all(folder_); }

  std::string path(const std::string& name = "saved") const { return folder_ / name; }
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_)) names.push_back(entry.path().filename());
    return names;
  }

  fs::path folder_;
};

std::vector<uint8_t> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_bytes(const std::string& path, const std::vector<uint8_t>& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(file.good());
}

KvCache make(const CacheConfig& config) {
  auto cache = KvCache::create(config);
  EXPECT_TRUE(cache.ok()) << cache.status().message();
  return std::move(*cache);
}

CacheConfig config_of(const std::string& spec, const Shape& shape, int layers = 2) {
  return CacheConfig::for_method(method(spec), layers, shape.h_kv, shape.d, shape.d_v);
}

// Appends tokens [first, first + count) to every layer, in steps, and settles.
void append(KvCache& cache, SeqId seq, const Tokens& tokens, int64_t first, int64_t count, int64_t step = 100) {
  for (const int64_t end = first + count; first < end; first += step)
    for (int layer = 0; layer < cache.config().layers; ++layer) {
      const int64_t n = std::min(step, end - first);
      ASSERT_OK(cache.append(seq, layer, tokens.k_view(first, n), tokens.v_view(first, n), pool()));
      ASSERT_OK(cache.settle(seq, layer));
    }
}

// out and lse of the last `rows` tokens of one layer.
std::vector<float> attend(const KvCache& cache, SeqId seq, const Method& m, const Tokens& tokens, int64_t rows,
                          Phase phase, int layer) {
  const Shape& shape = tokens.shape;
  Problem p;
  p.phase = phase;
  p.max_s_q = rows;
  p.max_s_kv = std::max<int64_t>(1, cache.length(seq));
  p.h_q = shape.h_q;
  p.h_kv = shape.h_kv;
  p.d = shape.d;
  p.d_v = shape.d_v;
  p.method = m;
  p.cache = cache.config();
  const auto planned = plan(p, Machine::here(2));
  EXPECT_TRUE(planned.ok()) << planned.status().message();
  auto workspace = Workspace::create(*planned);
  EXPECT_TRUE(workspace.ok());
  const auto n = static_cast<size_t>(rows * shape.h_q);
  std::vector<float> out(n * static_cast<size_t>(shape.d_v + 1), NAN);
  AttendArgs args;
  args.cache = &cache;
  args.layer = layer;
  args.seqs = {&seq, 1};
  args.s_q = {&rows, 1};
  args.q = tokens.q_view(cache.length(seq) - rows, rows);
  args.out = mutable_view(out.data(), rows, shape.h_q, shape.d_v);
  args.lse = out.data() + n * static_cast<size_t>(shape.d_v);
  EXPECT_OK(run(*planned, *workspace, pool(), args));
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](float x, float y) { return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y); });
}

// `a` in `ca` and `b` in `cb` hold the same, and attention over them gives the same bits.
void expect_equal(const KvCache& ca, SeqId a, const KvCache& cb, SeqId b, const std::string& spec,
                  const Tokens& tokens) {
  ASSERT_EQ(ca.length(a), cb.length(b));
  const int64_t s = ca.length(a);
  const Shape& shape = tokens.shape;
  for (int layer = 0; layer < ca.config().layers; ++layer) {
    std::vector<float> k[2], v[2];
    for (int i = 0; i < 2; ++i) {
      k[i].resize(static_cast<size_t>(s * shape.h_kv * shape.d));
      v[i].resize(static_cast<size_t>(s * shape.h_kv * shape.d_v));
      ASSERT_OK((i ? cb : ca)
                    .read(i ? b : a, layer, 0, mutable_view(k[i].data(), s, shape.h_kv, shape.d),
                          mutable_view(v[i].data(), s, shape.h_kv, shape.d_v)));
    }
    EXPECT_TRUE(same_bits(k[0], k[1]) && same_bits(v[0], v[1])) << "layer " << layer;
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      if (s == 0) continue;
      const int64_t rows = std::min<int64_t>(s, phase == Phase::decode ? 3 : 130);
      // Where the policy does not prefill, the rest of the machinery still does.
      const Method m = method(phase == Phase::prefill ? spec + ",policy=block_mean" : spec);
      EXPECT_TRUE(same_bits(attend(ca, a, m, tokens, rows, phase, layer), attend(cb, b, m, tokens, rows, phase, layer)))
          << "layer " << layer << ", " << (phase == Phase::decode ? "decode" : "prefill");
    }
  }
}

constexpr const char* kStorages[] = {"high_only", "dual", "residual", "fp4_only"};

// What reads every storage: thrift where FP4 is kept, block top-k where it is not.
std::string spec_for(const std::string& storage) {
  return storage == "high_only" ? "topk:budget=0.3" : "thrift:budget=0.3,storage=" + storage;
}

TEST_F(CacheFile, ComesBackBitForBitInEveryForm) {
  for (const Shape& shape : {Shape{4, 2, 64, 64}, Shape{2, 1, 128, 64}, Shape{3, 3, 48, 80}})
    for (const std::string storage : kStorages)
      for (const std::string options : {"", ",format=mxfp4", ",centring=off", ",page_scale=off", ",scales=4over6"})
        for (const DType high : {DType::f16, DType::bf16}) {
          const std::string spec = spec_for(storage) + options;
          if (storage == "high_only" && !options.empty()) continue;
          if (shape.d != 64 && high == DType::bf16) continue;
          for (const int64_t s : {0, 1, 63, 64, 320, 321, 383}) {
            if (s != 383 && !options.empty()) continue;
            SCOPED_TRACE(spec + " d=" + std::to_string(shape.d) + " tokens " + std::to_string(s));
            const Tokens tokens = attention_like(shape, s + 200);
            CacheConfig config = config_of(spec, shape);
            config.high_dtype = high;
            config.mean = true;  // what the prefill of expect_equal ranks by
            KvCache cache = make(config), other = make(config);
            const SeqId seq = cache.new_sequence();
            append(cache, seq, tokens, 0, s);
            ASSERT_OK(cache.save(seq, path(), "some words"));
            std::string words;
            const auto loaded = other.load(path(), &words);
            ASSERT_TRUE(loaded.ok()) << loaded.status().message();
            EXPECT_EQ(words, "some words");
            expect_equal(cache, seq, other, *loaded, spec, tokens);
            EXPECT_EQ(other.bytes().total(), cache.bytes().total());
            const auto seen = inspect_saved(path());
            ASSERT_TRUE(seen.ok());
            EXPECT_EQ(seen->tokens, s);
            EXPECT_EQ(seen->config, config);
            EXPECT_EQ(seen->bytes.total(), cache.bytes().total());
            EXPECT_EQ(seen->file_bytes, static_cast<int64_t>(fs::file_size(path())));
            ASSERT_OK(other.save(*loaded, path("again"), words));
            EXPECT_EQ(bytes_of(path()), bytes_of(path("again")));
            // And what is done next has the same outcome.
            append(cache, seq, tokens, s, 200, 90);
            append(other, *loaded, tokens, s, 200, 90);
            expect_equal(cache, seq, other, *loaded, spec, tokens);
            EXPECT_EQ(other.bytes().total(), cache.bytes().total());
          }
        }
}

TEST_F(CacheFile, KeepsStorageByHeadAndSummaries) {
  const Shape shape{4, 2, 64, 64};
  const Tokens tokens = attention_like(shape, 400);
  CacheConfig config = config_of("thrift", shape);
  config.min_max = config.variance = true;
  config.storage_by_head = {Storage::high_only, Storage::dual, Storage::residual, Storage::fp4_only};
  KvCache cache = make(config), other = make(config);
  const SeqId seq = cache.new_sequence();
  append(cache, seq, tokens, 0, 400);
  ASSERT_OK(cache.save(seq, path()));
  const auto loaded = other.load(path());
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  ASSERT_OK(other.save(*loaded, path("again")));
  EXPECT_EQ(bytes_of(path()), bytes_of(path("again")));
  EXPECT_EQ(other.bytes().total(), cache.bytes().total());
  std::swap(config.storage_by_head[1], config.storage_by_head[2]);
  const auto refused = make(config).load(path());
  EXPECT_NE(refused.status().message().find("layer 0, KV head 1: dual"), std::string::npos)
      << refused.status().message();
}

TEST_F(CacheFile, TruncateIsExactAndRefusedWhereItWasBefore) {
  const Shape shape;
  const Tokens tokens = attention_like(shape, 800);
  for (const std::string storage : kStorages)
    for (const int64_t cut : {640, 600, 576, 300, 64, 10, 0}) {
      SCOPED_TRACE(storage + " to " + std::to_string(cut));
      const std::string spec = spec_for(storage);
      KvCache cache = make(config_of(spec, shape)), other = make(config_of(spec, shape));
      const SeqId seq = cache.new_sequence();
      append(cache, seq, tokens, 0, 700);
      ASSERT_OK(cache.save(seq, path()));
      auto loaded = other.load(path());
      ASSERT_TRUE(loaded.ok()) << loaded.status().message();
      const bool exact = cache.truncate(seq, cut).ok();
      EXPECT_EQ(other.truncate(*loaded, cut).ok(), exact);
      if (!exact) {
        ASSERT_OK(cache.truncate(seq, cut, true));
        ASSERT_OK(other.truncate(*loaded, cut, true));
      }
      // A truncated sequence is saved like any other.
      ASSERT_OK(cache.save(seq, path()));
      ASSERT_OK(other.free(*loaded));
      EXPECT_EQ(other.bytes().total(), 0);
      loaded = other.load(path());
      ASSERT_TRUE(loaded.ok()) << loaded.status().message();
      expect_equal(cache, seq, other, *loaded, spec, tokens);
      append(cache, seq, tokens, cut, 100);
      append(other, *loaded, tokens, cut, 100);
      expect_equal(cache, seq, other, *loaded, spec, tokens);
      EXPECT_EQ(other.bytes().total(), cache.bytes().total());
    }
}

// What a fork holds in 16 bit is stored for both, and so it is saved with either.
TEST_F(CacheFile, ForksAreSavedAsTheyAreRead) {
  const Shape shape;
  const Tokens tokens = attention_like(shape, 900);
  for (const std::string storage : kStorages) {
    SCOPED_TRACE(storage);
    const std::string spec = spec_for(storage);
    KvCache cache = make(config_of(spec, shape)), other = make(config_of(spec, shape));
    const SeqId seq = cache.new_sequence();
    append(cache, seq, tokens, 0, 410);
    const auto fork = cache.fork(seq);
    ASSERT_TRUE(fork.ok());
    append(cache, *fork, tokens, 410, 400);  // leaves the window that `seq` still holds
    for (const SeqId one : {seq, *fork}) {
      ASSERT_OK(cache.save(one, path()));
      const auto loaded = other.load(path());
      ASSERT_TRUE(loaded.ok()) << loaded.status().message();
      expect_equal(cache, one, other, *loaded, spec, tokens);
      for (const int64_t cut : {330, 384}) {
        const auto a = cache.fork(one), b = other.fork(*loaded);
        ASSERT_TRUE(a.ok() && b.ok());
        EXPECT_EQ(cache.truncate(*a, cut).ok(), other.truncate(*b, cut).ok()) << cut;
        ASSERT_OK(cache.free(*a));
        ASSERT_OK(other.free(*b));
      }
      ASSERT_OK(other.free(*loaded));
      EXPECT_EQ(other.bytes().total(), 0);
    }
  }
}

TEST_F(CacheFile, EqualSequencesGiveEqualFiles) {
  const Shape shape;
  const Tokens tokens = attention_like(shape, 300), others = attention_like(shape, 300, 2);
  for (const std::string storage : kStorages) {
    KvCache fresh = make(config_of(spec_for(storage), shape)), used = make(config_of(spec_for(storage), shape));
    const SeqId a = fresh.new_sequence(), dirty = used.new_sequence();
    append(used, dirty, others, 0, 300);  // leaves its values in the records that come next
    ASSERT_OK(used.free(dirty));
    const SeqId b = used.new_sequence();
    append(fresh, a, tokens, 0, 150);
    append(used, b, tokens, 0, 150);
    ASSERT_OK(fresh.save(a, path("a")));
    ASSERT_OK(used.save(b, path("b")));
    EXPECT_EQ(bytes_of(path("a")), bytes_of(path("b"))) << storage;
  }
}

// A small file with every form, and the cache that it fits.
class Damaged : public CacheFile {
 protected:
  Damaged() : tokens_(attention_like(shape_, 200)), config_(config_of("thrift", shape_, 1)) {
    config_.recent = 2;
    config_.sink = 0;  // so that one page has left its window
    KvCache cache = make(config_);
    const SeqId seq = cache.new_sequence();
    append(cache, seq, tokens_, 0, 195);
    EXPECT_OK(cache.save(seq, path(), "words"));
    good_ = bytes_of(path());
  }

  const Shape shape_{1, 1, 16, 16};
  const Tokens tokens_;
  CacheConfig config_;
  std::vector<uint8_t> good_;
};

TEST_F(Damaged, EveryFlippedByteIsRefusedAndLeavesNothingBehind) {
  KvCache cache = make(config_);
  const SeqId there = cache.new_sequence();
  append(cache, there, tokens_, 0, 10);
  const int64_t before = cache.bytes().total(), peak = cache.peak_bytes();
  std::mt19937 random(1);
  for (size_t i = 0; i < good_.size(); ++i) {
    std::vector<uint8_t> bad = good_;
    bad[i] ^= static_cast<uint8_t>(1u << random() % 8);
    write_bytes(path(), bad);
    const auto loaded = cache.load(path());
    ASSERT_FALSE(loaded.ok()) << "byte " << i;
    const Code code = loaded.status().code();
    ASSERT_TRUE(code == Code::data_loss || (i < 12 && (code == Code::invalid_argument || code == Code::unsupported)))
        << "byte " << i << ": " << loaded.status().message();
    ASSERT_EQ(cache.bytes().total(), before);
  }
  EXPECT_EQ(cache.peak_bytes(), peak);
  EXPECT_EQ(cache.new_sequence(), there + 1);
  write_bytes(path(), good_);
  EXPECT_OK(cache.load(path()).status());
}

TEST_F(Damaged, EveryCutAndEveryTailIsRefused) {
  KvCache cache = make(config_);
  for (size_t n = 0; n < good_.size(); n += n < 600 ? 1 : 7) {
    write_bytes(path(), {good_.begin(), good_.begin() + static_cast<int64_t>(n)});
    const auto loaded = cache.load(path());
    ASSERT_EQ(loaded.status().code(), Code::data_loss) << n << " bytes: " << loaded.status().message();
    ASSERT_EQ(inspect_saved(path()).status().code(), Code::data_loss);
  }
  std::vector<uint8_t> longer = good_;
  longer.push_back(0);
  write_bytes(path(), longer);
  EXPECT_EQ(cache.load(path()).status().code(), Code::data_loss);
  EXPECT_EQ(cache.bytes().total(), 0);
}

TEST_F(Damaged, ThePageIsNamed) {
  std::vector<uint8_t> bad = good_;
  bad[bad.size() - 20] ^= 1;  // of the tail
  write_bytes(path(), bad);
  const auto loaded = make(config_).load(path());
  EXPECT_NE(loaded.status().message().find("layer 0, page 3, KV head 0"), std::string::npos)
      << loaded.status().message();
}

// Headers with a right checksum that lie: each field replaced by values that hurt.
TEST_F(Damaged, LyingHeadersAreRefused) {
  KvCache cache = make(config_);
  uint64_t header = 0;
  std::memcpy(&header, &good_[16], sizeof(header));
  for (size_t at = 8; at + 8 < header; ++at)
    for (const uint64_t lie : {uint64_t{0}, uint64_t{1} << 62, ~uint64_t{0}, uint64_t{1} << 31, uint64_t{0x7fffffff},
                               uint64_t{200}, uint64_t{0x4040404040404040}}) {
      for (const size_t size : {1, 4, 8}) {
        std::vector<uint8_t> bad = good_;
        std::memcpy(&bad[at], &lie, size);
        if (bad == good_) continue;
        reseal(bad);
        write_bytes(path(), bad);
        const auto seen = inspect_saved(path());
        const auto loaded = cache.load(path());
        // The metadata may be anything; a length may be another one that needs the same pages.
        if (!loaded.ok()) continue;
        EXPECT_TRUE(seen.ok());
        EXPECT_TRUE(seen->metadata != "words" || seen->tokens != 195 || at >= header - 16)
            << "offset " << at << ", " << size << " bytes of " << lie;
        ASSERT_OK(cache.free(*loaded));
      }
    }
  EXPECT_EQ(cache.bytes().total(), 0);
}

// With right checksums, the values of the records may be anything: attention may give NaN, and nothing worse.
TEST_F(Damaged, AnyValuesCanBeAttendedTo) {
  uint64_t header = 0;
  std::memcpy(&header, &good_[16], sizeof(header));
  std::mt19937 random(2);
  int loads = 0;
  for (int i = 0; i < 200; ++i) {
    std::vector<uint8_t> bad = good_;
    for (int n = 0; n < 1 << (i % 12); ++n)
      bad[header + random() % (bad.size() - header)] = static_cast<uint8_t>(i % 3 ? random() : 0xff);
    reseal(bad);
    write_bytes(path(), bad);
    KvCache cache = make(config_);
    const auto loaded = cache.load(path());
    if (!loaded.ok()) continue;
    ++loads;
    for (const char* spec : {"thrift:budget=0.5", "fp4", "thrift:budget=mass:0.9", "thrift:budget=tolerance:1e-3"})
      attend(cache, *loaded, method(spec), tokens_, 3, Phase::decode, 0);
    attend(cache, *loaded, method("thrift:budget=0.5,policy=block_mean"), tokens_, 100, Phase::prefill, 0);
  }
  EXPECT_GT(loads, 50);
}

// Ranking many pages whose scores are NaN must stay within them, too.
TEST_F(Damaged, PagesWithoutAScoreAreRankedLast) {
  const Tokens tokens = attention_like(shape_, 64 * 90);
  config_.min_max = config_.variance = true;
  KvCache cache = make(config_);
  const SeqId seq = cache.new_sequence();
  append(cache, seq, tokens, 0, tokens.s, 640);
  ASSERT_OK(cache.save(seq, path()));
  ASSERT_OK(cache.free(seq));
  const std::vector<uint8_t> good = bytes_of(path());
  uint64_t header = 0;
  std::memcpy(&header, &good[16], sizeof(header));
  std::mt19937 random(3);
  int loads = 0;
  for (int i = 0; i < 40; ++i) {
    std::vector<uint8_t> bad = good;
    for (int n = 0; n < 40 << (i % 4); ++n) {  // runs of NaN, in whichever form they fall
      const size_t at = header + random() % (bad.size() - header - 64);
      std::fill_n(bad.begin() + static_cast<int64_t>(at), 64, uint8_t{0x7f});
    }
    reseal(bad);
    write_bytes(path(), bad);
    const auto loaded = cache.load(path());
    if (!loaded.ok()) continue;
    ++loads;
    for (const char* policy : {"block_mean", "quest", "second_moment", "fp4_mass"})
      for (const char* budget : {"0.3", "mass:0.9", "tolerance:1e-3"})
        attend(cache, *loaded, method(std::string("thrift:policy=") + policy + ",budget=" + budget), tokens, 2,
               Phase::decode, 0);
    ASSERT_OK(cache.free(*loaded));
  }
  EXPECT_GT(loads, 0);
}

TEST_F(Damaged, PageScalesBeyondTheirRangeAreRefused) {
  uint64_t header = 0;
  std::memcpy(&header, &good_[16], sizeof(header));
  const int64_t plane = make(config_).state().layout.fp4_bytes;
  std::vector<uint8_t> bad = good_;
  bad[header + 2 * static_cast<size_t>(plane)] = 101;  // the first page keeps both planes and a summary
  reseal(bad);
  write_bytes(path(), bad);
  const auto loaded = make(config_).load(path());
  EXPECT_EQ(loaded.status().code(), Code::data_loss);
  EXPECT_NE(loaded.status().message().find("page scale"), std::string::npos) << loaded.status().message();
}

TEST_F(Damaged, OtherConfigsAreNamed) {
  const auto message = [&](auto change) {
    CacheConfig config = config_;
    change(config);
    const auto loaded = make(config).load(path());
    EXPECT_EQ(loaded.status().code(), Code::invalid_argument);
    return loaded.status().message();
  };
  const auto has = [](const std::string& text, const std::string& words) {
    EXPECT_NE(text.find(words), std::string::npos) << text;
  };
  has(message([](CacheConfig& c) { c.layers = 2; }), "layers 1, this cache has 2");
  has(message([](CacheConfig& c) { c.h_kv = 3; }), "h_kv 1, this cache has 3");
  has(message([](CacheConfig& c) { c.d = 32; }), "d 16, this cache has 32");
  has(message([](CacheConfig& c) { c.high_dtype = DType::bf16; }), "high_dtype f16, this cache has bf16");
  has(message([](CacheConfig& c) { c.storage = Storage::dual; }), "storage residual, this cache has dual");
  has(message([](CacheConfig& c) { c.format = Fp4Format::mxfp4; }), "format nvfp4, this cache has mxfp4");
  has(message([](CacheConfig& c) { c.scales = Scales::four_over_six; }), "scales 6, this cache has 4over6");
  has(message([](CacheConfig& c) { c.variance = true; }), "variance false, this cache has true");
  has(message([](CacheConfig& c) { c.recent = 5; }), "recent 2, this cache has 5");
}

TEST_F(Damaged, TheLimitOfTheCacheIsKept) {
  const auto seen = inspect_saved(path());
  ASSERT_TRUE(seen.ok());
  config_.max_bytes = seen->bytes.total();
  KvCache cache = make(config_);
  const auto first = cache.load(path());
  ASSERT_TRUE(first.ok()) << first.status().message();
  EXPECT_EQ(cache.load(path()).status().code(), Code::out_of_memory);
  EXPECT_EQ(cache.bytes().total(), config_.max_bytes);
  ASSERT_OK(cache.free(*first));
  EXPECT_EQ(cache.bytes().total(), 0);
}

TEST_F(Damaged, WhatIsNoSavedSequenceIsNamed) {
  KvCache cache = make(config_);
  const auto expect = [&](const std::string& name, Code code, const std::string& words) {
    for (const Status& status : {cache.load(name).status(), inspect_saved(name).status()}) {
      EXPECT_EQ(status.code(), code) << status.message();
      EXPECT_NE(status.message().find(words), std::string::npos) << status.message();
      EXPECT_EQ(status.message().find('\n'), std::string::npos);
    }
  };
  write_bytes(path("empty"), {});
  write_bytes(path("text"), std::vector<uint8_t>(1000, 'x'));
  ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600), 0);
  expect(path("missing"), Code::not_found, "no such file");
  expect(path("empty"), Code::data_loss, "is empty");
  expect(path("text"), Code::invalid_argument, "not a saved sequence");
  expect(folder_, Code::invalid_argument, "a directory");
  expect(path("fifo"), Code::invalid_argument, "not a regular file");
  std::vector<uint8_t> later = good_;
  later[8] = 2;
  write_bytes(path("later"), later);
  expect(path("later"), Code::unsupported, "version 2 is not supported: 1 is");
}

TEST_F(Damaged, SavingIsRefusedInTheMiddleOfAStepAndForNoSequence) {
  config_.layers = 2;
  KvCache cache = make(config_);
  EXPECT_EQ(cache.save(0, path()).code(), Code::not_found);
  const SeqId seq = cache.new_sequence();
  ASSERT_OK(cache.append(seq, 0, tokens_.k_view(0, 5), tokens_.v_view(0, 5), pool()));
  EXPECT_EQ(cache.save(seq, path()).code(), Code::invalid_argument);
  EXPECT_EQ(bytes_of(path()), good_);
}

TEST_F(Damaged, WhatCannotBeWrittenLeavesTheOldFile) {
  KvCache cache = make(config_);
  const SeqId seq = cache.new_sequence();
  append(cache, seq, tokens_, 0, 200);
  EXPECT_EQ(cache.save(seq, folder_).code(), Code::invalid_argument);
  EXPECT_EQ(cache.save(seq, "").code(), Code::invalid_argument);
  EXPECT_EQ(cache.save(seq, "/dev/null").code(), Code::invalid_argument);
  EXPECT_EQ(cache.save(seq, path("no/such/folder")).code(), Code::io);

  // A file that may not grow to its size, like one on a full disk.
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit, small;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  small = limit;
  small.rlim_cur = 5000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const Status full = cache.save(seq, path());
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(full.code(), Code::io);
  EXPECT_NE(full.message().find(path() + ": cannot write: File too large"), std::string::npos) << full.message();
  EXPECT_EQ(files(), std::vector<std::string>{"saved"});
  EXPECT_EQ(bytes_of(path()), good_);
}

TEST_F(Damaged, ASavedFileKeepsItsPlaceItsPermissionsAndALongName) {
  KvCache cache = make(config_);
  const SeqId seq = cache.new_sequence();
  append(cache, seq, tokens_, 0, 200);
  const std::string link = path("link"), name(250, 'n');
  ASSERT_EQ(symlink("saved", link.c_str()), 0);
  ASSERT_EQ(chmod(path().c_str(), 0600), 0);
  ASSERT_OK(cache.save(seq, link));
  ASSERT_OK(cache.save(seq, path(name)));
  struct stat there;
  ASSERT_EQ(lstat(link.c_str(), &there), 0);
  EXPECT_TRUE(S_ISLNK(there.st_mode)) << "replaced";
  ASSERT_EQ(stat(path().c_str(), &there), 0);
  EXPECT_EQ(there.st_mode & 0777, 0600u);
  EXPECT_EQ(bytes_of(path()), bytes_of(path(name)));
  EXPECT_EQ(files().size(), 3u);
}

TEST_F(Damaged, ANewFileHasTheModeThatTheUmaskSays) {
  KvCache cache = make(config_);
  const SeqId seq = cache.new_sequence();
  for (const mode_t mask : {022, 077}) {
    const mode_t before = umask(mask);
    ASSERT_OK(cache.save(seq, path()));
    umask(before);
    struct stat there;
    ASSERT_EQ(stat(path().c_str(), &there), 0);
    EXPECT_EQ(there.st_mode & 0777, 0666 & ~mask);
  }
  EXPECT_EQ(files(), std::vector<std::string>{"saved"});
}

}  // namespace
}  // namespace thriftattn::testing
