// Sequences between a GPU and the CPU's cache, and through it to files and back: every byte is kept.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cuda/caches.h"

namespace thriftattn::testing {
namespace {

class CudaTransfer : public CudaCache {
 protected:
  static std::string file(const char* name) {
    return ::testing::TempDir() + "thriftattn_" + name + "_" + std::to_string(::getpid());
  }
  static std::vector<char> bytes_of(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
};

// A GPU's sequence in a file: the bytes that the CPU's cache writes of the same tokens. Loaded and uploaded to another
// cache, it goes on.
void expect_saved_alike(Twins& twins, size_t i, const std::string& path, cudaStream_t stream, const std::string& what) {
  const CacheConfig& config = twins.gpu().config();
  auto host = KvCache::create(config), again = KvCache::create(config);
  auto other = cuda::Cache::create(config, {1, 1000, 0, 100}, 0);
  ASSERT_TRUE(host.ok() && again.ok() && other.ok());
  const auto copy = twins.gpu().download(twins.seq(i), *host, stream);
  ASSERT_TRUE(copy.ok()) << copy.status().message();
  EXPECT_EQ(host->length(*copy), twins.length(i)) << what;
  ASSERT_OK(host->save(*copy, path + ".gpu"));
  ASSERT_OK(twins.cpu().save(twins.twin(i), path + ".cpu"));
  const auto loaded = again->load(path + ".gpu");
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  const auto seq = other->upload(*again, *loaded, stream);
  ASSERT_TRUE(seq.ok()) << seq.status().message();
  expect_equal(*other, *seq, twins.cpu(), twins.twin(i), stream, what);
}

TEST_F(CudaTransfer, SavesWhatTheCpuSaves) {
  const std::string path = file("saved");
  const auto check = [&](Twins& twins, size_t i, const std::string& what) {
    expect_saved_alike(twins, i, path, stream, what);
    const std::vector<char> gpu = bytes_of(path + ".gpu"), cpu = bytes_of(path + ".cpu");
    EXPECT_FALSE(gpu.empty());
    EXPECT_TRUE(gpu == cpu) << what << ": " << gpu.size() << " and " << cpu.size() << " bytes";
  };
  for (const Storage storage : kStorages)
    for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4}) {
      const std::string what = to_string(storage) + " " + to_string(format);
      CacheConfig config = config_of(storage, 48, 32, 2);
      config.format = format;
      config.min_max = config.variance = format == Fp4Format::mxfp4;
      config.sink = 2;
      Twins twins(config, {3, 1000, 0, 400}, stream);
      twins.start();
      check(twins, 0, what + ", empty");
      twins.append(0, 0, 13);
      check(twins, 0, what + ", a tail");
      twins.append(0, 20, 64 - 13);
      check(twins, 0, what + ", a page");
      twins.append(0, 100, 400);
      twins.append(0, 10, 130);
      check(twins, 0, what + ", long");
      twins.fork(0);
      twins.append(1, 300, 70);
      check(twins, 0, what + ", forked");
      check(twins, 1, what + ", the fork");
      twins.cut(0, twins.length(0) - 40);
      check(twins, 0, what + ", cut");
      if (HasFailure()) break;
    }
  for (const char* end : {".gpu", ".cpu"}) ::unlink((path + end).c_str());
}

TEST_F(CudaTransfer, RefusesWithBothCachesAsTheyWere) {
  const CacheConfig config = config_of(Storage::residual, 32, 32, 2);
  Twins twins(config, {2, 500, 0, 300}, stream);
  twins.start();
  twins.append(0, 0, 300);
  const auto refused = [&](CacheConfig other, SeqId seq, Code code, const char* word) {
    auto host = KvCache::create(other);
    ASSERT_TRUE(host.ok());
    const auto copy = twins.gpu().download(seq, *host, stream);
    EXPECT_EQ(copy.status().code(), code) << copy.status().message();
    EXPECT_NE(copy.status().message().find(word), std::string::npos) << copy.status().message();
    EXPECT_EQ(host->bytes().total(), 0);
    EXPECT_EQ(host->peak_bytes(), 0);
    EXPECT_EQ(host->new_sequence(), 0) << "none is left behind";
  };
  CacheConfig other = config;
  other.centring = false;
  refused(other, twins.seq(0), Code::invalid_argument, "same configuration");
  other = config;
  other.max_bytes = 10000;
  refused(other, twins.seq(0), Code::out_of_memory, "of at most 10000");
  refused(config, 7, Code::not_found, "sequence 7");
  auto host = KvCache::create(config);
  auto small = cuda::Cache::create(config, {1, 200, 0, 100}, 0);
  ASSERT_TRUE(host.ok() && small.ok());
  EXPECT_FALSE(small->upload(twins.cpu(), twins.twin(0), stream).ok()) << "300 tokens do not fit";
  EXPECT_TRUE(small->new_sequence(stream).ok()) << "none is left behind";
  ASSERT_OK(twins.gpu().set_batch(std::vector<SeqId>{twins.seq(0)}, std::vector<int64_t>{1}, stream));
  ASSERT_OK(twins.gpu().begin_step(stream));
  EXPECT_EQ(twins.gpu().download(twins.seq(0), *host, stream).status().code(), Code::invalid_argument);
}

}  // namespace
}  // namespace thriftattn::testing
