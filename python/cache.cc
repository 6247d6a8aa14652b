#include "cache.h"

#include <fmt/format.h>

#include <optional>

namespace thriftattn::python {
namespace {

std::unique_ptr<Store> make_store(const CacheConfig& config, Device device, const Room& room) {
  if (device.is_cpu()) return value_or_raise(make_cpu_store(config));
  const Machine machine = machine_of(device);
  return value_or_raise(in_turn([&] { return make_gpu_store(config, machine, room); }));
}

// A tensor of sequences of a cache; b of them.
Batch of_cache(nb::handle object, const char* name, std::initializer_list<const char*> axes, Device device, int64_t b) {
  Batch t = batch(object, name, axes);
  check_device(t.tensor, name, "the cache", device);
  if (t.b != b) throw nb::value_error(fmt::format("{} has {} sequences, seqs has {}", name, t.b, b).c_str());
  return t;
}

}  // namespace

Cache::Cache(const Method& method, const CacheConfig& config, Device device, const Room& room)
    : method_(method), device_(device), store_(make_store(config, device, room)) {}

std::vector<SeqId> Cache::new_sequences(int64_t count) {
  std::vector<SeqId> seqs;
  for (int64_t i = 0; i < count; ++i) seqs.push_back(value_or_raise(in_turn([&] { return store_->new_sequence(); })));
  return seqs;
}

void Cache::append(std::span<const SeqId> seqs, int layer, nb::handle k, nb::handle v, nb::handle stream) {
  const Batch keys = of_cache(k, "k", {"b", "s", "h_kv", "d"}, device_, std::ssize(seqs));
  const Batch values = of_cache(v, "v", {"b", "s", "h_kv", "d_v"}, device_, std::ssize(seqs));
  const cuda::Stream order = stream_of(stream, k, device_);
  const bool wait = must_wait(k, device_) || must_wait(v, device_);
  check(in_turn([&]() -> Status {
    THRIFTATTN_RETURN_IF_ERROR(store_->order_on(order));
    THRIFTATTN_RETURN_IF_ERROR(store_->append(seqs, layer, keys, values));
    return wait ? store_->wait() : Status();
  }));
}

nb::object Cache::attend(std::span<const SeqId> seqs, int layer, const Form& form, const Method& method, nb::handle q,
                         const Extras& extras) {
  static constexpr std::initializer_list<const char*> kAxes = {"b", "s_q", "h_q", "d"};
  Batch rows = of_cache(q, "q", kAxes, device_, std::ssize(seqs));
  // A prefill that is neither given nor asked for anything beside out takes sequences one by one.
  if (!device_.is_cpu() && (form.phase == Phase::decode || extras.given || extras.stats))
    rows = in_rows_on_gpu(std::move(rows), q, "q", kAxes, extras.stream);
  const int64_t s_q = rows.first.tokens, h_q = rows.first.heads;
  std::optional<Tensor> sinks;
  if (!extras.sinks.is_none()) {
    sinks = tensor(extras.sinks, "sinks", {"h_q"});
    check_device(*sinks, "sinks", "q", device_);
    if (sinks->dtype != DType::f32) throw nb::type_error("sinks: float32 is supported");
    if (sinks->size(0) != h_q)
      throw nb::value_error(fmt::format("sinks has {} heads, q has {}", sinks->size(0), h_q).c_str());
  }
  Written out = written(extras.out, "out", {rows.b, s_q, h_q, config().d_v}, rows.first.dtype, q, device_);
  std::optional<Output> lse;
  if (extras.return_lse)
    lse.emplace(std::vector<size_t>{static_cast<size_t>(rows.b), static_cast<size_t>(s_q), static_cast<size_t>(h_q)},
                dlpack_type(DType::f32), q, device_);

  CallStats stats;
  Call call{seqs, layer, form, method, rows, out.view};
  call.lse = lse ? lse->data<float>() : nullptr;
  call.sinks = sinks ? static_cast<const float*>(sinks->data()) : nullptr;
  call.given = extras.given;
  call.stats = extras.stats ? &stats : nullptr;
  const cuda::Stream order = stream_of(extras.stream, q, device_);
  const bool wait = must_wait(q, device_);
  check(in_turn([&]() -> Status {
    THRIFTATTN_RETURN_IF_ERROR(store_->order_on(order));
    THRIFTATTN_RETURN_IF_ERROR(store_->attend(call));
    return wait ? store_->wait() : Status();
  }));

  stats.b = rows.b;
  stats.h_kv = config().h_kv;
  stats.pages = stats.b == 0 ? 0 : std::ssize(stats.page_mass) / (stats.b * stats.h_kv);
  nb::object tensor = out.tensor.release();
  if (lse && extras.stats) return nb::make_tuple(tensor, lse->release(), std::move(stats));
  if (lse) return nb::make_tuple(tensor, lse->release());
  if (extras.stats) return nb::make_tuple(tensor, std::move(stats));
  return tensor;
}

Selection Cache::select(std::span<const SeqId> seqs, int layer, const Form& form, const Method& method, nb::handle q,
                        nb::handle stream) {
  static constexpr std::initializer_list<const char*> kAxes = {"b", "s_q", "h_q", "d"};
  Batch rows = of_cache(q, "q", kAxes, device_, std::ssize(seqs));
  Call call{seqs, layer, form, method, rows, {}};
  std::optional<Written> scratch;
  if (!device_.is_cpu()) {
    rows = in_rows_on_gpu(std::move(rows), q, "q", kAxes, stream);
    scratch.emplace(written(nb::none(), "out", {rows.b, rows.first.tokens, rows.first.heads, config().d_v},
                            rows.first.dtype, q, device_));
    call.q = rows;
    call.out = scratch->view;
  }
  const cuda::Stream order = stream_of(stream, q, device_);
  return value_or_raise(in_turn([&]() -> Result<Selection> {
    THRIFTATTN_RETURN_IF_ERROR(store_->order_on(order));
    return store_->select(call);
  }));
}

}  // namespace thriftattn::python
