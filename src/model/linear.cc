#include "model/linear.h"

#include <fmt/format.h>
#include <omp.h>
#include <dnnl.hpp>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace thriftattn::model {
namespace {

using dnnl::matmul;
using dnnl::memory;

constexpr int64_t kTileRows = 256;
constexpr int64_t kPanelColumns = 256;

dnnl::engine& engine() {
  static dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

// oneDNN on the calling thread alone, and the caller's setting again afterwards.
class OneThread {
 public:
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_ = omp_get_max_threads();
};

// The scratch memory that oneDNN would provide belongs to the thread that creates a primitive; ours runs on any.
dnnl::primitive_attr own_scratchpad() {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  return attributes;
}

// y [rows, columns of the panel, rows `stride` apart] = x [rows, inputs] W + bias
matmul::primitive_desc describe(memory::data_type type, int64_t rows, int64_t inputs, int64_t columns, int64_t stride,
                                bool bias, const memory::desc& weights) {
  const memory::desc x({rows, inputs}, type, memory::format_tag::ab);
  const memory::desc y({rows, columns}, memory::data_type::f32, memory::dims{stride, 1});
  const memory::desc b({1, columns}, memory::data_type::f32, memory::format_tag::ab);
  return {bias ? matmul::desc(x, weights, b, y) : matmul::desc(x, weights, y), own_scratchpad(), engine()};
}

}  // namespace

struct Linear::Panels {
  // A matrix product for one number of rows and columns.
  struct Kernel {
    matmul::primitive_desc desc;
    matmul primitive;
    memory::desc x;       // the caller's rows
    dnnl::reorder round;  // x to BF16; empty for F32
    int64_t scratch_bytes = 0;
  };
  struct Panel {
    int64_t first = 0, columns = 0;
    memory weights;
  };

  int64_t inputs = 0, outputs = 0;
  memory::data_type type = memory::data_type::f32;
  std::vector<Panel> panels;
  std::vector<float> bias;                                // [outputs], or empty
  std::mutex mutex;                                       // of `kernels`
  std::map<std::pair<int64_t, int64_t>, Kernel> kernels;  // by rows and columns

  // oneDNN 2.6 reads and writes through null pointers when memory ends under it: an end that near is reported here.
  static void check_headroom() {
    constexpr size_t kHeadroom = size_t{32} << 20;
    void* volatile probe = std::malloc(kHeadroom);  // volatile: a compiler may take an unused block for granted
    if (!probe) throw std::bad_alloc();
    std::free(probe);
  }

  const Kernel& kernel(int64_t rows, const Panel& panel) {
    std::lock_guard lock(mutex);
    const auto key = std::pair(rows, panel.columns);
    auto it = kernels.find(key);
    if (it == kernels.end()) {
      check_headroom();
      Kernel k;
      k.desc = describe(type, rows, inputs, panel.columns, outputs, !bias.empty(), panel.weights.get_desc());
      k.primitive = matmul(k.desc);
      k.x = memory::desc({rows, inputs}, memory::data_type::f32, memory::format_tag::ab);
      if (type == memory::data_type::bf16) {
        const dnnl::reorder::primitive_desc round(engine(), k.x, engine(), k.desc.src_desc(), own_scratchpad());
        k.round = dnnl::reorder(round);
        k.scratch_bytes = static_cast<int64_t>(round.scratchpad_desc().get_size());
      }
      k.scratch_bytes = std::max(k.scratch_bytes, static_cast<int64_t>(k.desc.scratchpad_desc().get_size()));
      it = kernels.emplace(key, std::move(k)).first;
    }
    return it->second;
  }

  void fill(Panel* panel, std::span<const Tensor> tensors, Rows stored);
  void multiply(const float* x, int64_t rows, float* y, const Panel& panel);
};

// Gathers the panel's part of the stacked tensors and puts it into oneDNN's layout for full tiles.
void Linear::Panels::fill(Panel* panel, std::span<const Tensor> tensors, Rows stored) {
  std::vector<float> rows(panel->columns * inputs);
  if (stored == Rows::inputs) {
    for (int64_t i = 0; i < inputs; ++i) {
      tensors[0].read(i * outputs + panel->first, panel->columns, &rows[i * panel->columns]);
    }
  } else {
    int64_t top = 0;  // first row of the tensor in the stack
    for (const Tensor& t : tensors) {
      const int64_t from = std::max(panel->first, top), to = std::min(panel->first + panel->columns, top + t.shape[0]);
      if (from < to) t.read((from - top) * inputs, (to - from) * inputs, &rows[(from - panel->first) * inputs]);
      top += t.shape[0];
    }
  }
  check_headroom();
  const memory::desc any({inputs, panel->columns}, type, memory::format_tag::any);
  const memory::desc layout =
      describe(type, kTileRows, inputs, panel->columns, outputs, !bias.empty(), any).weights_desc();
  const auto order = stored == Rows::inputs ? memory::format_tag::ab : memory::format_tag::ba;
  const memory plain({{inputs, panel->columns}, memory::data_type::f32, order}, engine(), rows.data());
  panel->weights = memory(layout, engine());
  dnnl::stream stream(engine());
  dnnl::reorder(plain, panel->weights).execute(stream, const_cast<memory&>(plain), panel->weights);
  stream.wait();
}

void Linear::Panels::multiply(const float* x, int64_t rows, float* y, const Panel& panel) {
  thread_local std::vector<uint16_t> rounded;
  thread_local std::vector<uint8_t> scratch;
  const Kernel& k = kernel(rows, panel);
  if (std::ssize(scratch) < k.scratch_bytes) scratch.resize(k.scratch_bytes);
  const memory::desc scratch_desc({k.scratch_bytes}, memory::data_type::u8, memory::format_tag::a);
  const memory scratchpad(scratch_desc, engine(), scratch.data());
  dnnl::stream stream(engine());
  memory input(k.x, engine(), const_cast<float*>(x));
  if (k.round) {
    if (std::ssize(rounded) < rows * inputs) rounded.resize(rows * inputs);
    memory in_bf16(k.desc.src_desc(), engine(), rounded.data());
    k.round.execute(stream, {{DNNL_ARG_FROM, input}, {DNNL_ARG_TO, in_bf16}, {DNNL_ARG_SCRATCHPAD, scratchpad}});
    input = in_bf16;
  }
  std::unordered_map<int, memory> args = {
      {DNNL_ARG_SRC, input},
      {DNNL_ARG_WEIGHTS, panel.weights},
      {DNNL_ARG_DST, memory(k.desc.dst_desc(), engine(), y + panel.first)},
      {DNNL_ARG_SCRATCHPAD, scratchpad},
  };
  if (!bias.empty()) args[DNNL_ARG_BIAS] = memory(k.desc.bias_desc(), engine(), &bias[panel.first]);
  k.primitive.execute(stream, args);
  stream.wait();
}

namespace {

constexpr int64_t kSerialWork = 1 << 20;  // multiplications that are over before other threads have woken up

// Runs task(i) for every i on the pool, one oneDNN thread each, and turns oneDNN's exceptions into a Status.
template <class Task>
Status on_pool(ThreadPool& pool, int64_t count, bool serial, const Task& task) {
  std::mutex mutex;
  Status status;
  const auto guarded = [&](int64_t i, int) {
    const OneThread one;
    const auto keep = [&](Code code, const char* what) {
      std::lock_guard lock(mutex);
      if (status.ok()) status = Status(code, fmt::format("matrix product: {}", what));
    };
    try {
      task(i);
    } catch (const std::bad_alloc&) {
      keep(Code::out_of_memory, "no memory left");
    } catch (const dnnl::error& e) {
      keep(e.status == dnnl_unimplemented ? Code::unsupported : Code::out_of_memory, e.what());
    } catch (const std::exception& e) {
      keep(Code::out_of_memory, e.what());
    }
  };
  if (serial) {
    for (int64_t i = 0; i < count; ++i) guarded(i, 0);
  } else {
    pool.parallel_for(count, guarded);
  }
  return status;
}

}  // namespace

Linear::Linear() = default;
Linear::Linear(Linear&&) noexcept = default;
Linear& Linear::operator=(Linear&&) noexcept = default;
Linear::~Linear() = default;

int64_t Linear::inputs() const { return panels_->inputs; }
int64_t Linear::outputs() const { return panels_->outputs; }

Result<Linear> Linear::create(std::span<const Tensor> weights, std::span<const Tensor> biases, Compute compute,
                              ThreadPool& pool, Rows stored) {
  Linear out;
  out.panels_ = std::make_unique<Panels>();
  Panels& p = *out.panels_;
  p.type = compute == Compute::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
  p.inputs = weights[0].shape[stored == Rows::inputs ? 0 : 1];
  for (const Tensor& t : weights) p.outputs += t.shape[stored == Rows::inputs ? 1 : 0];
  for (const Tensor& t : biases) {
    p.bias.resize(p.bias.size() + t.shape[0]);
    t.read(0, t.shape[0], &p.bias[p.bias.size() - t.shape[0]]);
  }
  for (int64_t first = 0; first < p.outputs; first += kPanelColumns) {
    p.panels.push_back({first, std::min(kPanelColumns, p.outputs - first), {}});
  }
  THRIFTATTN_RETURN_IF_ERROR(
      on_pool(pool, std::ssize(p.panels), false, [&](int64_t i) { p.fill(&p.panels[i], weights, stored); }));
  return out;
}

Status Linear::apply(const float* x, int64_t rows, float* y, ThreadPool& pool) const {
  Panels& p = *panels_;
  const int64_t columns = std::ssize(p.panels), tiles = (rows + kTileRows - 1) / kTileRows;
  return on_pool(pool, tiles * columns, rows * p.inputs * p.outputs <= kSerialWork, [&](int64_t i) {
    const int64_t first = i / columns * kTileRows;
    p.multiply(x + first * p.inputs, std::min(kTileRows, rows - first), y + first * p.outputs, p.panels[i % columns]);
  });
}

}  // namespace thriftattn::model
