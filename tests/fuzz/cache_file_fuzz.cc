// Saved sequences: the input is a file with its checksums put right, loaded into a cache of the config that it names
// and attended to. The first inputs are made here, because they follow the library's formats.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "attention/cache_file.h"
#include "thriftattn/attention.h"
#include "thriftattn/cache.h"

namespace thriftattn {
namespace {

constexpr int64_t kTokens = 200;  // of the first inputs: three full pages, of which one has left the window, and a tail

ThreadPool& pool() {
  static ThreadPool one(1);
  return one;
}

std::string memory_file() {
  static const int file = memfd_create("saved", 0);
  return "/proc/self/fd/" + std::to_string(file);
}

void require(bool good) {
  if (!good) std::abort();
}

// A small sequence of every storage, format and high type, as a file.
std::vector<uint8_t> sample(unsigned which) {
  static constexpr Storage kStorages[] = {Storage::high_only, Storage::dual, Storage::residual, Storage::fp4_only};
  CacheConfig config;
  config.h_kv = 1;
  config.d = config.d_v = 16;
  config.storage = kStorages[which % 4];
  config.format = which & 4 ? Fp4Format::mxfp4 : Fp4Format::nvfp4;
  config.high_dtype = which & 8 ? DType::bf16 : DType::f16;
  config.min_max = config.variance = true;
  config.sink = 0;
  auto cache = KvCache::create(config);
  require(cache.ok());
  std::vector<float> x(kTokens * 16);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * i % 101) / 50 - 1;
  const SeqId seq = cache->new_sequence();
  const View rows = view(x.data(), kTokens, 1, 16);
  require(cache->append(seq, 0, rows, rows, pool()).ok() && cache->settle(seq, 0).ok());
  const std::string path = "/tmp/cache_file_fuzz." + std::to_string(getpid());
  require(cache->save(seq, path, "metadata").ok());
  std::ifstream file(path, std::ios::binary);
  std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), {}};
  unlink(path.c_str());
  return bytes;
}

// Attends once under every policy and phase that the cache serves.
void attend(const KvCache& cache, SeqId seq) {
  const CacheConfig& c = cache.config();
  static const char* const kMethods[] = {
      "thrift:policy=block_mean,budget=0.5", "thrift:policy=quest,budget=mass:0.5",
      "thrift:policy=fp4_mass,budget=0.5",   "thrift:policy=second_moment,budget=tolerance:0.01",
      "thrift:policy=oracle,budget=top_k:1", "thrift:policy=fp4_mass,budget=0.5,arithmetic=mma4",
  };
  std::vector<float> q(static_cast<size_t>(2 * c.h_kv * c.d), 0.5f), out(static_cast<size_t>(2 * c.h_kv * c.d_v));
  for (const char* spec : kMethods)
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      Problem p;
      p.phase = phase;
      p.max_s_q = 2;
      p.max_s_kv = cache.length(seq);
      p.h_q = p.h_kv = c.h_kv;
      p.d = c.d;
      p.d_v = c.d_v;
      p.method = *parse_method(spec);
      p.method.storage = c.storage;
      p.method.format = c.format;
      p.method.scales = c.scales;
      p.method.centring = c.centring;
      p.method.page_scale = c.page_scale;
      if (c.storage == Storage::high_only) p.method.rest = Tier::none;
      p.cache = c;
      p.stats = true;
      const auto planned = plan(p, Machine::here(1));
      if (!planned.ok()) continue;
      auto workspace = Workspace::create(*planned);
      if (!workspace.ok()) continue;
      const int64_t rows = 2;
      Stats stats;
      AttendArgs args;
      args.cache = &cache;
      args.seqs = {&seq, 1};
      args.s_q = {&rows, 1};
      args.q = view(q.data(), rows, c.h_kv, c.d);
      args.out = mutable_view(out.data(), rows, c.h_kv, c.d_v);
      args.stats = &stats;
      (void)run(*planned, *workspace, pool(), args);
    }
}

}  // namespace
}  // namespace thriftattn

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

// Begins with a sample where there is nothing to begin with, and changes the header as often as the pages behind it.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  if (size < 64) {
    const auto bytes = thriftattn::sample(seed);
    if (bytes.size() > max_size) return size;
    std::copy(bytes.begin(), bytes.end(), data);
    return bytes.size();
  }
  const size_t header = std::min<size_t>(size, 160);
  if (seed % 4 == 0) return LLVMFuzzerMutate(data, size, max_size);
  if (seed % 4 == 1) {  // of the same length, so that what follows stays where it is
    std::vector<uint8_t> part(data, data + header);
    LLVMFuzzerMutate(part.data(), header, header);
    std::copy(part.begin(), part.end(), data);
    return size;
  }
  std::vector<uint8_t> part(data + header, data + size);
  if (!part.empty()) LLVMFuzzerMutate(part.data(), part.size(), part.size());
  std::copy(part.begin(), part.end(), data + header);
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace thriftattn;
  std::vector<uint8_t> bytes(data, data + size);
  reseal(bytes);
  const std::string path = memory_file();
  {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  const auto seen = inspect_saved(path);
  CacheConfig config;
  if (seen.ok()) config = seen->config;
  auto cache = KvCache::create(config);
  require(cache.ok());
  const auto seq = cache->load(path);
  if (!seq.ok()) {
    require(cache->bytes().total() == 0);
    return 0;
  }
  require(seen.ok() && cache->length(*seq) == seen->tokens);
  if (seen->config.layers <= 4 && seen->config.h_kv <= 8) attend(*cache, *seq);
  (void)cache->truncate(*seq, seen->tokens / 2, true);
  require(cache->free(*seq).ok() && cache->bytes().total() == 0);
  return 0;
}
