#include "bench_gpu.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "bench_kernels.h"
#include "bench_problem.h"
#include "core/device.h"
#include "format/page_layout.h"
#include "format/rows.h"
#include "input.h"
#include "progress.h"
#include "report.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cli {
namespace {

using cuda::check;
using cuda::DeviceMemory;
using Json = nlohmann::ordered_json;

constexpr int64_t kStagedTokens = 65536;  // of all sequences, appended at once while a cache is filled
constexpr int kSingles = 21;              // calls between events
constexpr int64_t kReadBytes = int64_t{2} << 30;

#define RETURN_IF_CUDA_ERROR(call) THRIFTATTN_RETURN_IF_ERROR(check((call), #call))

class Event {
 public:
  Event() { cudaEventCreate(&event_); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// A stream, and the two ways to time what is launched on it.
class Timer {
 public:
  Timer() { cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking); }
  ~Timer() { cudaStreamDestroy(stream_); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  cudaStream_t stream() const { return stream_; }

  // Milliseconds between two events around work().
  template <class Work>
  Result<double> between_events(Work work) {
    RETURN_IF_CUDA_ERROR(cudaEventRecord(begin_, stream_));
    THRIFTATTN_RETURN_IF_ERROR(work());
    RETURN_IF_CUDA_ERROR(cudaEventRecord(end_, stream_));
    RETURN_IF_CUDA_ERROR(cudaEventSynchronize(end_));
    float ms = 0;
    RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&ms, begin_, end_));
    return static_cast<double>(ms);
  }

  // work() captured in a graph and launched `reps` times after a first one that is not counted.
  template <class Work>
  Result<std::vector<double>> of_graph(int reps, Work work) {
    RETURN_IF_CUDA_ERROR(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    const Status captured = work();
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
    THRIFTATTN_RETURN_IF_ERROR(captured);
    RETURN_IF_CUDA_ERROR(ended);
    cudaGraphExec_t exec = nullptr;
    const cudaError_t made = cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphDestroy(graph);
    RETURN_IF_CUDA_ERROR(made);
    std::vector<double> times;
    Status status;
    for (int rep = 0; rep <= reps && status.ok(); ++rep) {
      const auto ms = between_events([&] { return check(cudaGraphLaunch(exec, stream_), "cudaGraphLaunch"); });
      status = ms.status();
      if (ms.ok() && rep > 0) times.push_back(*ms);
    }
    cudaGraphExecDestroy(exec);
    THRIFTATTN_RETURN_IF_ERROR(status);
    return times;
  }

 private:
  cudaStream_t stream_ = nullptr;
  Event begin_, end_;
};

// What the GPU gives to code that reads, or copies, and does nothing else, in GB/s. Samples differ by where the driver
// puts a buffer; the best is what rows are compared with.
struct Bandwidth {
  std::vector<double> read, copy;

  double best_read() const { return *std::max_element(read.begin(), read.end()); }
  double best_copy() const { return *std::max_element(copy.begin(), copy.end()); }

  Status measure(Timer* timer, const Gpu& gpu) {
    THRIFTATTN_ASSIGN_OR_RETURN(data, DeviceMemory::take(kReadBytes, gpu.index, "a buffer to read"));
    THRIFTATTN_ASSIGN_OR_RETURN(other, DeviceMemory::take(kReadBytes, gpu.index, "a buffer to copy to"));
    RETURN_IF_CUDA_ERROR(cudaMemsetAsync(data.data(), 1, kReadBytes, timer->stream()));
    const auto best = [&](auto work) -> Result<double> {
      double ms = INFINITY;
      for (int rep = 0; rep < 5; ++rep) {
        THRIFTATTN_ASSIGN_OR_RETURN(one, timer->between_events(work));
        ms = std::min(ms, one);
      }
      return static_cast<double>(kReadBytes) / ms / 1e6;
    };
    double most = 0;
    for (const int blocks_per_sm : {4, 8, 16}) {
      THRIFTATTN_ASSIGN_OR_RETURN(rate, best([&] {
                                    return check(
                                        launch_read(data.data(), kReadBytes, reinterpret_cast<uint32_t*>(other.data()),
                                                    blocks_per_sm * gpu.multiprocessors, timer->stream()),
                                        "launch_read");
                                  }));
      most = std::max(most, rate);
    }
    read.push_back(most);
    THRIFTATTN_ASSIGN_OR_RETURN(copied, best([&] {
                                  return check(cudaMemcpyAsync(other.data(), data.data(), kReadBytes,
                                                               cudaMemcpyDeviceToDevice, timer->stream()),
                                               "cudaMemcpyAsync");
                                }));
    copy.push_back(2 * copied);  // read and written
    return {};
  }
};

// What all rows of a run share.
struct GpuBench {
  const BenchOptions& options;
  Machine machine;
  ThreadPool* pool;
  Progress* progress;
  Timer* timer;
  Inputs inputs;
  DeviceMemory table;

  const Gpu& gpu() const { return *machine.gpu; }
  double cold_bytes() const { return 4.0 * static_cast<double>(gpu().l2_bytes); }
};

class GpuRow {
 public:
  static Result<GpuRow> create(GpuBench* bench, const Method& method, int64_t s_kv) {
    const BenchOptions& o = bench->options;
    GpuRow made(bench, BenchProblem(&o, method, s_kv));
    if (made.is("rank"))
      return invalid_argument("--phase rank: on a GPU phase decode times each step with and without its choice");
    Problem& problem = made.problem_.problem;
    THRIFTATTN_ASSIGN_OR_RETURN(first, plan(problem, bench->machine));
    const PageLayout layout =
        page_layout(o.d, o.d, problem.cache.format, problem.cache.mean, problem.cache.min_max, problem.cache.variance);
    const Storage storage = problem.cache.storage;
    const bool fp4 = storage != Storage::high_only, high = storage == Storage::high_only || storage == Storage::dual;
    const auto of_page = [](bool has, int64_t bytes) { return static_cast<double>(has ? bytes : 0); };
    const double pages = static_cast<double>(std::max<int64_t>(1, s_kv / kPageTokens)) * o.batch * o.h_kv;
    const double stored =
        pages * (of_page(fp4, layout.fp4_bytes) + of_page(storage == Storage::residual, layout.fp4_bytes) +
                 of_page(high, layout.high_bytes) + of_page(true, layout.summary_bytes));
    const Method& m = first.problem.method;
    const double share = m.rest == Tier::none ? 0.05 : 1;  // of the pages that a call reads, about
    const double read = pages * share * static_cast<double>(m.rest == Tier::fp4 ? layout.fp4_bytes : layout.high_bytes);
    const double room = 0.75 * static_cast<double>(bench->gpu().memory_bytes) - 3.0 * kReadBytes;
    const double wanted = std::min(std::ceil(bench->cold_bytes() / read), std::floor(room / stored));
    problem.cache.layers = made.is("append") ? 1 : static_cast<int>(std::clamp(wanted, 1.0, 64.0));
    THRIFTATTN_ASSIGN_OR_RETURN(chosen, plan(problem, bench->machine));
    problem = chosen.problem;
    Timing& row = made.problem_.row;
    row.target = chosen.target;
    row.layers = problem.cache.layers;
    made.plan_ = std::move(chosen);
    return made;
  }

  const Timing& timing() const { return problem_.row; }
  const Plan& plan_used() const { return plan_; }
  double single() const { return single_; }
  std::optional<double> given() const { return given_.empty() ? std::nullopt : std::optional(median(given_)); }

  // One round: fills, checks and times; all memory is given back.
  Status measure() {
    const BenchOptions& o = bench_->options;
    Timing& row = problem_.row;
    bench_->progress->begin(fmt::format("{}, {} tokens, batch {}", row.method, row.s_kv, o.batch));
    THRIFTATTN_RETURN_IF_ERROR(is("append") ? measure_appends() : measure_calls());
    row.median = median(times_);
    row.least = *std::min_element(times_.begin(), times_.end());
    row.most = *std::max_element(times_.begin(), times_.end());
    workspace_.reset();
    cache_.reset();
    return {};
  }

 private:
  GpuRow(GpuBench* bench, BenchProblem problem) : bench_(bench), problem_(std::move(problem)) {}
  bool is(const char* phase) const { return problem_.is(phase); }
  int layers() const { return problem_.problem.cache.layers; }
  cudaStream_t stream() const { return bench_->timer->stream(); }

  View rows_view(const DeviceMemory& from, int64_t offset, int64_t tokens) const {
    const BenchOptions& o = bench_->options;
    return {from.data() + offset, DType::f16, tokens, o.h_kv, o.d, int64_t{o.h_kv} * o.d, o.d};
  }

  // A cache whose sequences hold `tokens` tokens in every layer, and room for keys and values of a step.
  Status fill(int64_t tokens, int64_t step_bytes) {
    const BenchOptions& o = bench_->options;
    const int64_t chunk = std::clamp<int64_t>(kStagedTokens / o.batch, 1, std::max<int64_t>(tokens, 1));
    cuda::CacheSize size;
    size.max_sequences = o.batch;
    size.max_tokens = problem_.row.s_kv;
    size.max_append = std::max(chunk, problem_.row.s_q);
    THRIFTATTN_ASSIGN_OR_RETURN(cache, cuda::Cache::create(problem_.problem.cache, size, bench_->gpu().index));
    cache_ = std::move(cache);
    const int64_t bytes = std::max(step_bytes, chunk * o.batch * o.h_kv * o.d * 2);
    THRIFTATTN_ASSIGN_OR_RETURN(k, DeviceMemory::take(bytes, bench_->gpu().index, "keys"));
    THRIFTATTN_ASSIGN_OR_RETURN(v, DeviceMemory::take(bytes, bench_->gpu().index, "values"));
    k_ = std::move(k);
    v_ = std::move(v);
    seqs_.clear();
    for (int b = 0; b < o.batch; ++b) {
      THRIFTATTN_ASSIGN_OR_RETURN(seq, cache_->new_sequence(stream()));
      THRIFTATTN_RETURN_IF_ERROR(cache_->reserve(seq, problem_.row.s_kv, stream()));
      seqs_.push_back(seq);
    }
    for (int64_t t = 0; t < tokens; t += chunk) {
      THRIFTATTN_RETURN_IF_ERROR(step(t, std::min(chunk, tokens - t)));
      THRIFTATTN_RETURN_IF_ERROR(cache_->end_step(stream()));
      if (!bench_->progress->update(static_cast<double>(t) / static_cast<double>(tokens)))
        return Status(Code::cancelled, "cancelled");
    }
    return {};
  }

  // Tokens [first, first + n) of every sequence made in the k and v buffers, at an offset.
  Status stage(int64_t first, int64_t n, int64_t offset) {
    const BenchOptions& o = bench_->options;
    const auto* table = reinterpret_cast<const float*>(bench_->table.data());
    RETURN_IF_CUDA_ERROR(launch_rows(table, Input::key, first, n, o.batch, o.h_kv, o.d, k_.data() + offset, stream()));
    RETURN_IF_CUDA_ERROR(
        launch_rows(table, Input::value, first, n, o.batch, o.h_kv, o.d, v_.data() + offset, stream()));
    return {};
  }

  // Begins a step of n tokens of every sequence, in all layers.
  Status step(int64_t first, int64_t n) {
    const int64_t all = n * bench_->options.batch;
    THRIFTATTN_RETURN_IF_ERROR(stage(first, n, 0));
    THRIFTATTN_RETURN_IF_ERROR(cache_->set_batch(seqs_, std::vector<int64_t>(seqs_.size(), n), stream()));
    THRIFTATTN_RETURN_IF_ERROR(cache_->begin_step(stream()));
    for (int layer = 0; layer < layers(); ++layer)
      THRIFTATTN_RETURN_IF_ERROR(cache_->append(layer, rows_view(k_, 0, all), rows_view(v_, 0, all), stream()));
    return {};
  }

  Status check_faults() {
    THRIFTATTN_ASSIGN_OR_RETURN(faults, cache_->faults(stream()));
    if (!faults) return {};
    return data_loss(
        fmt::format("{}: {}", problem_.row.method,
                    faults.no_pages ? "an append found no page" : "an append met a value that is not finite"));
  }

  Status measure_calls() {
    const BenchOptions& o = bench_->options;
    Timing& row = problem_.row;
    THRIFTATTN_RETURN_IF_ERROR(fill(row.s_kv - row.s_q, row.s_q * o.batch * o.h_kv * o.d * 2));
    THRIFTATTN_RETURN_IF_ERROR(step(row.s_kv - row.s_q, row.s_q));
    THRIFTATTN_RETURN_IF_ERROR(check_faults());
    THRIFTATTN_ASSIGN_OR_RETURN(workspace, cuda::Workspace::create(plan_, bench_->gpu().index));
    workspace_ = std::move(workspace);
    const int64_t elements = row.s_q * o.batch * o.h_q * o.d;
    THRIFTATTN_ASSIGN_OR_RETURN(q, DeviceMemory::take(elements * 2, bench_->gpu().index, "queries"));
    THRIFTATTN_ASSIGN_OR_RETURN(out, DeviceMemory::take(elements * 2, bench_->gpu().index, "the result"));
    q_ = std::move(q);
    out_ = std::move(out);
    THRIFTATTN_ASSIGN_OR_RETURN(selection, check_result(elements));

    // So many calls that a graph lasts some milliseconds, and goes through all layers as often.
    const auto call = [&](int i) { return cuda::run(plan_, *workspace_, args(i % layers()), stream()); };
    THRIFTATTN_ASSIGN_OR_RETURN(warm, bench_->timer->between_events([&] { return call(0); }));
    const int turns = static_cast<int>(std::clamp(10.0 / std::max(warm * layers(), 1e-3), 1.0, 400.0 / layers() + 1));
    const int calls = turns * layers();
    const auto all_calls = [&]() -> Status {
      for (int i = 0; i < calls; ++i) THRIFTATTN_RETURN_IF_ERROR(call(i));
      return {};
    };
    THRIFTATTN_ASSIGN_OR_RETURN(times, bench_->timer->of_graph(o.reps, all_calls));
    for (double& ms : times) ms /= calls;
    row.by_round.push_back(median(times));
    times_.insert(times_.end(), times.begin(), times.end());

    for (int i = 0; i < kSingles; ++i) {
      THRIFTATTN_ASSIGN_OR_RETURN(ms, bench_->timer->between_events([&] { return call(i); }));
      singles_.push_back(ms);
    }
    single_ = median(singles_);
    if (selection.pages.empty()) return {};
    THRIFTATTN_RETURN_IF_ERROR(cuda::give_selection(plan_, *workspace_, *cache_, &selection, stream()));
    THRIFTATTN_ASSIGN_OR_RETURN(given, bench_->timer->of_graph(o.reps, all_calls));
    for (const double ms : given) given_.push_back(ms / calls);
    return {};
  }

  cuda::AttendArgs args(int layer) {
    const BenchOptions& o = bench_->options;
    const int64_t rows = problem_.row.s_q * o.batch, width = int64_t{o.h_q} * o.d;
    cuda::AttendArgs a;
    a.cache = &*cache_;
    a.layer = layer;
    a.q = {q_.data(), DType::f16, rows, o.h_q, o.d, width, o.d};
    a.out = {out_.data(), DType::f16, rows, o.h_q, o.d, width, o.d};
    return a;
  }

  // One call of layer 0 against the definition; what it promoted.
  Result<Selection> check_result(int64_t elements) {
    const BenchOptions& o = bench_->options;
    Timing& row = problem_.row;
    std::vector<float> q, one;
    for (int b = 0; b < o.batch; ++b) {
      bench_->inputs.rows(Input::query, b, row.s_kv - row.s_q, row.s_q, bench_->pool, &one);
      q.insert(q.end(), one.begin(), one.end());
    }
    std::vector<uint16_t> half(elements);
    const auto in_parts = [&](auto convert) {  // a prefill has 10^8 elements
      constexpr int64_t kPart = 1 << 16;
      bench_->pool->parallel_for((elements + kPart - 1) / kPart,
                                 [&](int64_t i, int) { convert(i * kPart, std::min(kPart, elements - i * kPart)); });
    };
    in_parts([&](int64_t at, int64_t n) {
      store_row(DType::f16, &q[at], n, &half[at]);
      load_row(DType::f16, &half[at], n, &q[at]);
    });
    RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(q_.data(), half.data(), elements * 2, cudaMemcpyHostToDevice, stream()));
    THRIFTATTN_RETURN_IF_ERROR(cuda::run(plan_, *workspace_, args(0), stream()));
    THRIFTATTN_ASSIGN_OR_RETURN(stats, cuda::stats(plan_, *workspace_, *cache_, stream()));
    RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(half.data(), out_.data(), elements * 2, cudaMemcpyDeviceToHost, stream()));
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream()));
    std::vector<float> out(elements);
    in_parts([&](int64_t at, int64_t n) { load_row(DType::f16, &half[at], n, &out[at]); });
    THRIFTATTN_RETURN_IF_ERROR(problem_.check(bench_->inputs, bench_->pool, q, out, stats.selection));
    problem_.count(stats.selection, cache_->bytes(), sizeof(uint16_t));
    row.cold = row.bytes * layers() >= bench_->cold_bytes();
    return std::move(stats.selection);
  }

  // Steps of s_q tokens from empty to s_kv, so many in one graph that their inputs are cold.
  Status measure_appends() {
    const BenchOptions& o = bench_->options;
    Timing& row = problem_.row;
    const int64_t step_tokens = row.s_q * o.batch, step_bytes = step_tokens * o.h_kv * o.d * 2;
    const int64_t most = std::max<int64_t>(1, row.s_kv / row.s_q / 2);
    const auto steps =
        std::clamp<int64_t>(static_cast<int64_t>(std::ceil(bench_->cold_bytes() / static_cast<double>(2 * step_bytes))),
                            1, std::min<int64_t>(most, 256));
    const int graphs = static_cast<int>(std::min<int64_t>(row.s_kv / row.s_q / steps - 1, o.reps));
    if (graphs < 1)
      return invalid_argument(fmt::format("--s-kv {}: an append of {} tokens is timed over {} and more", row.s_kv,
                                          row.s_q, 2 * row.s_q * steps));
    THRIFTATTN_RETURN_IF_ERROR(fill(0, step_bytes * steps));
    for (int64_t i = 0; i < steps; ++i) THRIFTATTN_RETURN_IF_ERROR(stage(i * row.s_q, row.s_q, i * step_bytes));
    THRIFTATTN_RETURN_IF_ERROR(cache_->set_batch(seqs_, std::vector<int64_t>(seqs_.size(), row.s_q), stream()));
    THRIFTATTN_ASSIGN_OR_RETURN(times, bench_->timer->of_graph(graphs, [&]() -> Status {
      for (int64_t i = 0; i < steps; ++i) {
        THRIFTATTN_RETURN_IF_ERROR(cache_->begin_step(stream()));
        THRIFTATTN_RETURN_IF_ERROR(cache_->append(0, rows_view(k_, i * step_bytes, step_tokens),
                                                  rows_view(v_, i * step_bytes, step_tokens), stream()));
        THRIFTATTN_RETURN_IF_ERROR(cache_->end_step(stream()));
      }
      return {};
    }));
    for (double& ms : times) ms /= static_cast<double>(steps);
    row.by_round.push_back(median(times));
    times_.insert(times_.end(), times.begin(), times.end());
    THRIFTATTN_RETURN_IF_ERROR(check_faults());
    THRIFTATTN_ASSIGN_OR_RETURN(held, cache_->length(seqs_[0], stream()));
    row.bytes = 2.0 * static_cast<double>(step_bytes) +
                static_cast<double>(cache_->bytes().total()) * static_cast<double>(row.s_q) / static_cast<double>(held);
    row.cold = steps > 1;
    return check_appended(std::min(held, row.s_q * steps));
  }

  // The first tokens, read back.
  Status check_appended(int64_t tokens) {
    const BenchOptions& o = bench_->options;
    const int64_t width = int64_t{o.h_kv} * o.d;
    tokens = std::min<int64_t>(tokens, 4096);
    std::vector<float> k(tokens * width), v(k.size()), want(o.d);
    THRIFTATTN_RETURN_IF_ERROR(cache_->download(seqs_[0], 0, 0, mutable_view(k.data(), tokens, o.h_kv, o.d),
                                                mutable_view(v.data(), tokens, o.h_kv, o.d), stream()));
    double error = 0, norm = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      bench_->inputs.row(Input::key, 0, t, 0, want.data());
      for (int64_t c = 0; c < o.d; ++c) {
        error += std::pow(k[t * width + c] - want[c], 2);
        norm += std::pow(want[c], 2);
      }
    }
    problem_.row.rel_err = std::sqrt(error / norm);
    if (problem_.row.rel_err <= 0.3) return {};
    return data_loss(fmt::format("{}: what was appended reads back with relative error {:.2e}", problem_.row.method,
                                 problem_.row.rel_err));
  }

  GpuBench* bench_;
  BenchProblem problem_;
  Plan plan_;
  std::vector<double> times_, singles_, given_;
  double single_ = 0;
  std::optional<cuda::Cache> cache_;
  std::optional<cuda::Workspace> workspace_;
  DeviceMemory k_, v_, q_, out_;
  std::vector<SeqId> seqs_;
};

Json machine_json(const GpuBench& bench, const Bandwidth& bandwidth) {
  const Gpu& gpu = bench.gpu();
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return {{"gpu", gpu.name},
          {"compute_capability", gpu.compute_capability},
          {"multiprocessors", gpu.multiprocessors},
          {"l2_bytes", gpu.l2_bytes},
          {"memory_bytes", gpu.memory_bytes},
          {"cuda_driver", driver},
          {"cuda_runtime", runtime},
          {"cpu", machine_info().cpu},
          {"read_gb_per_s", bandwidth.best_read()},
          {"read_gb_per_s_samples", bandwidth.read},
          {"read_buffer", kReadBytes},
          {"copy_gb_per_s", bandwidth.best_copy()}};
}

Json row_json(const BenchOptions& o, const GpuRow& row, double read_gb) {
  const Timing& r = row.timing();
  const double gb = r.bytes / r.median / 1e6;
  Json json{{"phase", o.phase},
            {"s_q", r.s_q},
            {"s_kv", r.s_kv},
            {"batch", o.batch},
            {"h_q", o.h_q},
            {"h_kv", o.h_kv},
            {"d", o.d},
            {"method", r.method},
            {"kernel", o.phase == "append" ? "append" : row.plan_used().kernel},
            {"target", r.target},
            {"ms_median", r.median},
            {"ms_min", r.least},
            {"ms_max", r.most},
            {"ms_by_round", r.by_round},
            {"bytes", r.bytes},
            {"flops", r.flops},
            {"gb_per_s", gb},
            {"pct_of_read_bandwidth", 100 * gb / read_gb},
            {"rel_err", r.rel_err},
            {"layers", r.layers},
            {"cold", r.cold}};
  if (o.phase != "append") json["ms_single"] = row.single();
  if (row.given()) json["ms_given"] = *row.given();
  return json;
}

std::string table(const GpuBench& bench, const Bandwidth& bandwidth, const std::vector<GpuRow>& rows) {
  const BenchOptions& o = bench.options;
  const double read_gb = bandwidth.best_read();
  std::string text = fmt::format("{}, batch {}, {} query and {} KV heads of {}; {}\n", o.phase, o.batch, o.h_q, o.h_kv,
                                 o.d, bench.gpu().name);
  text += fmt::format("measured here: reading {:.0f} GB/s over {:.1f} GB, copying {:.0f} GB/s\n\n", read_gb,
                      static_cast<double>(kReadBytes) / 1e9, bandwidth.best_copy());
  std::vector<std::vector<std::string>> lines{{"method", "kernel", "s_q", "s_kv", "us", "min", "max", "single", "given",
                                               "MB", "GB/s", "% of read", "TFLOP/s", "rel err"}};
  bool warm = false;
  for (const GpuRow& row : rows) {
    const Timing& r = row.timing();
    const double gb = r.bytes / r.median / 1e6;
    warm |= !r.cold;
    const bool append = o.phase == "append";
    lines.push_back({r.method + (r.cold ? "" : " *"), append ? "append" : row.plan_used().kernel,
                     fmt::format("{}", r.s_q), fmt::format("{}", r.s_kv), fmt::format("{:.1f}", 1e3 * r.median),
                     fmt::format("{:.1f}", 1e3 * r.least), fmt::format("{:.1f}", 1e3 * r.most),
                     append ? "" : fmt::format("{:.1f}", 1e3 * row.single()),
                     row.given() ? fmt::format("{:.1f}", 1e3 * *row.given()) : "", fmt::format("{:.1f}", r.bytes / 1e6),
                     fmt::format("{:.0f}", gb), fmt::format("{:.1f}", 100 * gb / read_gb),
                     fmt::format("{:.1f}", r.flops / r.median / 1e9), fmt::format("{:.1e}", r.rel_err)});
  }
  text += align(lines);
  text +=
      "\nus: median of calls in a CUDA graph; single: one call between two events; given: as us, under the selection "
      "that the method made,\nwhich is then not made again; MB: what the problem must read\n";
  if (warm) text += "* the layers it goes through are not four times the L2 cache: parts of them stay in it\n";
  return text;
}

}  // namespace

Status bench_attention_gpu(const BenchOptions& o, int device) {
  THRIFTATTN_ASSIGN_OR_RETURN(machine, cuda::machine(device));
  RETURN_IF_CUDA_ERROR(cudaSetDevice(device));
  ThreadPool pool(o.threads);
  Progress progress;
  Timer timer;
  GpuBench bench{o, std::move(machine), &pool, &progress, &timer, Inputs(o.h_q, o.h_kv, o.d), {}};
  const std::span<const float> rule = bench.inputs.table();
  THRIFTATTN_ASSIGN_OR_RETURN(on_device, DeviceMemory::take(std::ssize(rule) * 4, device, "the inputs' table"));
  bench.table = std::move(on_device);
  RETURN_IF_CUDA_ERROR(
      cudaMemcpyAsync(bench.table.data(), rule.data(), rule.size_bytes(), cudaMemcpyHostToDevice, timer.stream()));

  std::vector<GpuRow> rows;
  for (const int64_t s_kv : o.s_kv)
    for (const std::string& spec : o.methods) {
      THRIFTATTN_ASSIGN_OR_RETURN(method, one_method(spec));
      THRIFTATTN_ASSIGN_OR_RETURN(row, GpuRow::create(&bench, method, s_kv));
      rows.push_back(std::move(row));
    }
  Bandwidth bandwidth;
  for (int round = 0; round < o.rounds; ++round) {
    THRIFTATTN_RETURN_IF_ERROR(bandwidth.measure(&timer, bench.gpu()));
    for (GpuRow& row : rows) THRIFTATTN_RETURN_IF_ERROR(row.measure());
  }
  THRIFTATTN_RETURN_IF_ERROR(bandwidth.measure(&timer, bench.gpu()));
  progress.clear();

  Json json{{"schema", "thriftattn.bench/1"}, {"version", THRIFTATTN_VERSION}};
  json["machine"] = machine_json(bench, bandwidth);
  json["rounds"] = o.rounds;
  json["reps"] = o.reps;
  for (const GpuRow& row : rows) json["rows"].push_back(row_json(o, row, bandwidth.best_read()));
  if (o.json == "-") {
    fmt::print("{}\n", json.dump(1));
    return {};
  }
  if (!o.json.empty()) THRIFTATTN_RETURN_IF_ERROR(write_atomically(o.json, json.dump(1) + "\n"));
  fmt::print("{}", table(bench, bandwidth, rows));
  return {};
}

}  // namespace thriftattn::cli
