// KvCache as Python sees it: tensors in and out, around a store on the CPU or on a GPU.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "store.h"
#include "turn.h"

namespace thriftattn::python {

// What a call brings beside q, and what it wants.
struct Extras {
  nb::handle sinks;                  // None or [h_q]
  const Selection* given = nullptr;  // promote exactly these
  nb::handle out;                    // None or [b, s_q, h_q, d_v]
  bool return_lse = false;
  bool stats = false;
  nb::handle stream;  // stream_of()
};

// What a call did, and the shape of its page_mass.
struct CallStats : Stats {
  int64_t b = 0, h_kv = 0, pages = 0;
};

class Cache {
 public:
  Cache(const Method& method, const CacheConfig& config, Device device, const Room& room);

  const Method& method() const { return method_; }
  Device device() const { return device_; }
  Store& store() { return *store_; }
  const CacheConfig& config() const { return store_->config(); }

  std::vector<SeqId> new_sequences(int64_t count);
  void append(std::span<const SeqId> seqs, int layer, nb::handle k, nb::handle v, nb::handle stream);
  // out, or (out, lse), (out, stats), (out, lse, stats). Settles the layer.
  nb::object attend(std::span<const SeqId> seqs, int layer, const Form& form, const Method& method, nb::handle q,
                    const Extras& extras);
  Selection select(std::span<const SeqId> seqs, int layer, const Form& form, const Method& method, nb::handle q,
                   nb::handle stream);

 private:
  Method method_;
  Device device_;
  std::unique_ptr<Store> store_;
};

}  // namespace thriftattn::python
