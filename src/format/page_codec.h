// Encoding of a full page and reading back of its forms, in plain scalar code: what the layout means. Backends bring
// faster readers and writers, whose bytes are the same; this one serves cache export and tests.
#pragma once

#include "format/page_layout.h"
#include "thriftattn/cache.h"

namespace thriftattn {

// The 16-bit form's two directions.
inline float high_decode(DType type, uint16_t bits) {
  return type == DType::bf16 ? bf16_decode(bits) : f16_decode(bits);
}
inline uint16_t high_encode(DType type, float x) { return type == DType::bf16 ? bf16_encode(x) : f16_encode(x); }

// The largest finite float whose 16-bit form is finite: the next one rounds to infinity.
constexpr float high_limit(DType type) { return type == DType::bf16 ? 0x1.fefffep127f : 0x1.ffdffep15f; }

// Rows of a caller's tensor, one head's.
struct AppendRows {
  const void* data = nullptr;  // the first row's first channel
  DType dtype = DType::f32;
  int64_t row_bytes = 0;  // from one row to the next
};

// Rows [first, end) of one page of one head, which enter it, and the records that receive them. Where the rows fill the
// page and forms of it are stored, `summary` and the planes are given and are encoded as encode_page does, bit for bit;
// else all three are null.
struct PageAppend {
  const CacheConfig* config = nullptr;
  const PageLayout* layout = nullptr;
  AppendRows k, v;
  int first = 0, end = 0;
  uint16_t* high = nullptr;
  uint8_t *fp4 = nullptr, *residual = nullptr, *summary = nullptr;
  const PageAppend* next = nullptr;  // what the caller appends after this: brought near meanwhile, never written
};

// Encodes one full page of one head. `high` is its 16-bit record; `fp4`, `residual` and `summary` receive theirs, and
// each may be null where the storage keeps none (`residual` needs `fp4`, `fp4` needs `summary`).
void encode_page(const CacheConfig& config, const PageLayout& layout, const uint16_t* high, uint8_t* fp4,
                 uint8_t* residual, uint8_t* summary);

// Decodes K [d, 64] and V [64, d_v] of one page from its FP4 plane, plus the second plane unless `residual` is null.
void decode_page(const CacheConfig& config, const PageLayout& layout, const uint8_t* fp4, const uint8_t* residual,
                 const uint8_t* summary, float* k, float* v);

}  // namespace thriftattn
