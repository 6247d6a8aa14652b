#include "rates.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <new>

#include "model/linear.h"
#include "system.h"

namespace thriftattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

double nanoseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
}

// 64 bytes that the compiler loads in as many pieces as the instruction set of the function needs.
using Wide [[gnu::vector_size(64), gnu::aligned(8), gnu::may_alias]] = uint64_t;

[[gnu::always_inline]] inline uint64_t sum_of(const uint64_t* p, int64_t words) {
  Wide sum[4] = {};
  for (int64_t w = 0; w + 32 <= words; w += 32) {
    for (int k = 0; k < 4; ++k) sum[k] += *reinterpret_cast<const Wide*>(p + w + 8 * k);
  }
  uint64_t total = 0;
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 8; ++i) total += sum[k][i];
  }
  return total;
}

using Sum = uint64_t (*)(const uint64_t*, int64_t);
uint64_t sum_plain(const uint64_t* p, int64_t words) { return sum_of(p, words); }
#if defined(__x86_64__)
[[gnu::target("avx2")]] uint64_t sum_avx2(const uint64_t* p, int64_t words) { return sum_of(p, words); }
[[gnu::target("avx512f")]] uint64_t sum_avx512(const uint64_t* p, int64_t words) { return sum_of(p, words); }
#endif

// Which width reads fastest differs between processors.
std::vector<Sum> sums() {
  std::vector<Sum> out = {sum_plain};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) out.push_back(sum_avx2);
  if (__builtin_cpu_supports("avx512f")) out.push_back(sum_avx512);
#endif
  return out;
}

constexpr int kPiecesPerThread = 64;  // so that no thread waits long for the last one

// Reads words [0, words) of `buffer` on all threads; GB/s.
double read_once(ThreadPool* pool, const uint64_t* buffer, int64_t words, Sum sum, uint64_t* total) {
  const int64_t tasks = kPiecesPerThread * pool->size(), piece = words / tasks;
  std::vector<uint64_t> found(tasks);
  const auto begin = Clock::now();
  pool->parallel_for(tasks, [&](int64_t i, int) { found[i] = sum(buffer + i * piece, piece); });
  const double rate = static_cast<double>(piece * tasks * 8) / nanoseconds_since(begin);
  for (const uint64_t f : found) *total += f;
  return rate;
}

}  // namespace

Result<double> read_rate(ThreadPool* pool, int64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return Status(Code::out_of_memory, fmt::format("no {} bytes left to measure reading with", bytes));
  }
  const auto unmap = [bytes](uint64_t* p) { munmap(p, bytes); };
  const std::unique_ptr<uint64_t, decltype(unmap)> buffer(static_cast<uint64_t*>(memory), unmap);
  // Small pages cost a fifth of the rate on some machines; where the system has no huge ones, they are what there is.
  madvise(memory, bytes, MADV_HUGEPAGE);
  const int64_t words = bytes / 8, tasks = kPiecesPerThread * pool->size(), piece = words / tasks;
  pool->parallel_for(tasks, [&](int64_t i, int) { std::fill_n(buffer.get() + i * piece, piece, 1); });
  double best = 0;
  uint64_t total = 0;
  for (int rep = 0; rep < 3; ++rep) {
    for (const Sum sum : sums()) best = std::max(best, read_once(pool, buffer.get(), words, sum, &total));
  }
  if (total == 0) return data_loss("the buffer to measure reading with lost its content");
  return best;
}

Result<double> matrix_rate(ThreadPool* pool, model::Compute compute) {
  const int64_t n = 2048, rows = 1024;
  const std::vector<float> w(n * n, 0.5f), x(rows * n, 0.25f);
  model::Tensor tensor;
  tensor.name = "bench";
  tensor.dtype_name = "F32";
  tensor.shape = {n, n};
  tensor.data = reinterpret_cast<const unsigned char*>(w.data());
  tensor.bytes = n * n * 4;
  THRIFTATTN_ASSIGN_OR_RETURN(product, model::Linear::create({&tensor, 1}, {}, compute, *pool));
  std::vector<float> y(rows * n);
  double best = 0;
  for (int rep = 0; rep < 5; ++rep) {
    const auto begin = Clock::now();
    THRIFTATTN_RETURN_IF_ERROR(product.apply(x.data(), rows, y.data(), *pool));
    best = std::max(best, 2.0 * static_cast<double>(rows * n * n) / nanoseconds_since(begin));
  }
  return best;
}

Result<Eviction> Eviction::create(ThreadPool* pool, int64_t bytes) {
  Eviction out;
  out.pool_ = pool;
  try {
    out.buffer_.assign(bytes / 8, 1);
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, fmt::format("no {} bytes left to empty the caches with", bytes));
  }
  return out;
}

void Eviction::run() {
  uint64_t total = 0;
  read_once(pool_, buffer_.data(), static_cast<int64_t>(buffer_.size()), sum_plain, &total);
  buffer_[0] = total | 1;  // the sum is used: no compiler may leave the reading out
}

Rates::Rates(ThreadPool* pool, model::Compute compute)
    : pool_(pool), compute_(compute), read_bytes_(std::min(int64_t{2} << 30, memory().available / 4)) {}

Status Rates::measure() {
  THRIFTATTN_ASSIGN_OR_RETURN(read, read_rate(pool_, read_bytes_));
  THRIFTATTN_ASSIGN_OR_RETURN(matrix, matrix_rate(pool_, compute_));
  read_.push_back(read);
  matrix_.push_back(matrix);
  return {};
}

}  // namespace thriftattn::cli
