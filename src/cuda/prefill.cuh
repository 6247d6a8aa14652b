// What the two kernels of a prefill share: where expanded pages lie, which keys a row sees.
#pragma once

#include "cuda/params.h"

namespace thriftattn::cuda {

// Pages that are not stored in 16 bit, as 16-bit records of the device's layout: one loop reads these and the cache's
// own. The tails are copies too, with zeros for the tokens that do not exist, which may hold anything in the cache.
struct ExpandedPages {
  uint8_t* fp4;    // [b, h_kv, pages, record_bytes]: mean + first plane; null where no FP4 is stored
  uint8_t* fp4x2;  // the same with the second plane; null where none is stored
  uint8_t* tail;   // [b, h_kv, record_bytes]
  int pages, h_kv;
  int64_t record_bytes;

  THRIFTATTN_HD int64_t at(int sequence, int g, int page) const {
    return ((static_cast<int64_t>(sequence) * h_kv + g) * pages + page) * record_bytes;
  }
  THRIFTATTN_HD int64_t tail_at(int sequence, int g) const {
    return (static_cast<int64_t>(sequence) * h_kv + g) * record_bytes;
  }
};

inline ExpandedPages expanded_pages(const PrefillParams& p) {
  const LayerCache& c = p.cache;
  ExpandedPages e{};
  e.pages = 16 * p.tier_words;
  e.h_kv = c.h_kv;
  e.record_bytes = c.layout.high_bytes;
  const int64_t one_tier = e.at(p.batch.b, 0, 0);
  e.tail = reinterpret_cast<uint8_t*>(p.scratch);
  uint8_t* next = e.tail + e.tail_at(p.batch.b, 0);
  if (p.shape.rest == Tier::fp16) return e;
  if (c.fp4) e.fp4 = next, next += one_tier;
  if (c.residual) e.fp4x2 = next;
  return e;
}

// The keys that a row sees, as Mask of format/selection.h has them.
struct Visible {
  int first, end;  // tokens
};
__device__ inline Visible visible(const Shape& shape, int position, int s_kv) {
  const int64_t w = shape.window, end = shape.causal ? position + int64_t{1} : w > 0 ? position + w : s_kv;
  return {static_cast<int>(w > 0 ? max(int64_t{0}, position - w + 1) : 0),
          static_cast<int>(min(max(end, int64_t{0}), static_cast<int64_t>(s_kv)))};
}

}  // namespace thriftattn::cuda
