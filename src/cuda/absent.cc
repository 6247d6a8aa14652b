// What a build without CUDA says of it.
#include "cuda/backend.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {
namespace {

constexpr const char* kAbsent = "this build of thriftattn has no CUDA backend: it is made where nvcc is found";

Status absent() { return unsupported(kAbsent); }

}  // namespace

struct Cache::State {};
struct Workspace::State {};

std::string refusal(const Problem&, const Machine&) { return kAbsent; }
void plan(const Machine&, Plan&) {}

Result<std::vector<Gpu>> gpus() { return absent(); }
Result<Machine> machine(int) { return absent(); }

Cache::Cache(std::unique_ptr<State> state) : state_(std::move(state)) {}
Cache::Cache(Cache&&) noexcept = default;
Cache& Cache::operator=(Cache&&) noexcept = default;
Cache::~Cache() = default;
Result<Cache> Cache::create(const CacheConfig&, const CacheSize&, int) { return absent(); }

// No Cache and no Workspace can be made, so what follows is never called.
const CacheConfig& Cache::config() const {
  static const CacheConfig none;
  return none;
}
const CacheSize& Cache::size() const {
  static const CacheSize none;
  return none;
}
int Cache::device() const { return -1; }
Result<SeqId> Cache::new_sequence(Stream) { return absent(); }
Status Cache::reserve(SeqId, int64_t, Stream) { return absent(); }
Status Cache::free(SeqId, Stream) { return absent(); }
Result<SeqId> Cache::fork(SeqId, Stream) { return absent(); }
Status Cache::truncate(SeqId, int64_t, Stream) { return absent(); }
Status Cache::grow(const CacheSize&, Stream) { return absent(); }
Status Cache::set_batch(std::span<const SeqId>, std::span<const int64_t>, Stream) { return absent(); }
Status Cache::begin_step(Stream) { return absent(); }
Status Cache::append(int, const View&, const View&, Stream) { return absent(); }
Status Cache::end_step(Stream) { return absent(); }
Result<SeqId> Cache::upload(const KvCache&, SeqId, Stream) { return absent(); }
Result<SeqId> Cache::download(SeqId, KvCache&, Stream) const { return absent(); }
Status Cache::download(SeqId, int, int64_t, const MutableView&, const MutableView&, Stream) const { return absent(); }
Result<int64_t> Cache::length(SeqId, Stream) const { return absent(); }
Result<Faults> Cache::faults(Stream, bool) { return absent(); }
MemoryUse Cache::bytes() const { return {}; }
int64_t Cache::reserved_bytes() const { return 0; }

Workspace::Workspace(std::unique_ptr<State> state) : state_(std::move(state)) {}
Workspace::Workspace(Workspace&&) noexcept = default;
Workspace& Workspace::operator=(Workspace&&) noexcept = default;
Workspace::~Workspace() = default;
Result<Workspace> Workspace::create(const Plan&, int) { return absent(); }
int64_t Workspace::bytes() const { return 0; }

Status run(const Plan&, Workspace&, const AttendArgs&, Stream) { return absent(); }
Status give_selection(const Plan&, Workspace&, const Cache&, const Selection*, Stream) { return absent(); }
Result<Stats> stats(const Plan&, const Workspace&, const Cache&, Stream) { return absent(); }

Status quantize(const void*, DType, int64_t, Fp4Format, Scales, uint8_t*, uint8_t*, int, Stream) { return absent(); }
Status dequantize(const uint8_t*, const uint8_t*, int64_t, Fp4Format, float*, int, Stream) { return absent(); }

}  // namespace thriftattn::cuda
