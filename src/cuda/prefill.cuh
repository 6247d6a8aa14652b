// What the two kernels of a prefill share: the form and the place of expanded pages, which keys a row sees.
#pragma once

#include "cuda/params.h"

namespace thriftattn::cuda {

// A page of one head as the flash kernel reads it, 16 bit:
//   [K: 8 items of 8 tokens, 16 dk bytes each][V: 4 items of 16 tokens, 32 dv bytes each]
// K stands as in a 16-bit record of DeviceLayout. V is regrouped, so that a lane's 16 bytes are two B fragments of
// m16n8k16, which want tokens 2t and 8 + 2t in neighbouring registers: 16 channels after 16 channels, 512 bytes each,
// with lane = 4 (channel % 8) + t; then 4 words, channel % 16 / 8 and token / 8.
struct ExpandedPage {
  int k_item, v, v_item, bytes;
};
THRIFTATTN_HD constexpr ExpandedPage expanded_page(int dk, int dv) {
  return {16 * dk, kPageTokens * 2 * dk, 32 * dv, kPageTokens * 2 * (dk + dv)};
}

// Where they lie in scratch. The tail's copy has zeros for the tokens that do not exist.
struct ExpandedPages {
  uint8_t *fp4, *fp4x2;  // [b, h_kv, pages, bytes]; null where no such form is stored
  uint8_t* fp16;         // [b, h_kv, high_room.pages, bytes]
  uint8_t* tail;         // [b, h_kv, bytes]
  int pages, h_kv;
  HighRoom high_room;
  int64_t bytes;

  // Of head g of sequence i. Pages that have a 16-bit form are the first ones or among the last ones.
  THRIFTATTN_HD uint8_t* fp4_at(int i, int g, int page) const { return fp4 + at(i, g, pages, page); }
  THRIFTATTN_HD uint8_t* fp4x2_at(int i, int g, int page) const { return fp4x2 + at(i, g, pages, page); }
  THRIFTATTN_HD uint8_t* fp16_at(int i, int g, int page) const {
    const int sink = high_room.sink;
    return fp16 + at(i, g, high_room.pages, page < sink ? page : sink + (page - sink) % (high_room.pages - sink));
  }
  THRIFTATTN_HD uint8_t* tail_at(int i, int g) const { return tail + at(i, g, 1, 0); }

 private:
  THRIFTATTN_HD int64_t at(int i, int g, int room, int page) const {
    return ((static_cast<int64_t>(i) * h_kv + g) * room + page) * bytes;
  }
};

inline ExpandedPages expanded_pages(const PrefillParams& p) {
  const LayerCache& c = p.cache;
  ExpandedPages e{};
  e.pages = 16 * p.tier_words;
  e.high_room = p.high_room;
  e.h_kv = c.h_kv;
  e.bytes = expanded_page(c.layout.dk, c.layout.dv).bytes;
  const int64_t of_one_page = e.bytes * p.batch.b * c.h_kv;
  e.tail = static_cast<uint8_t*>(p.scratch);
  e.fp16 = e.tail + of_one_page;
  uint8_t* next = e.fp16 + of_one_page * e.high_room.pages;
  if (p.shape.rest == Tier::fp16) return e;
  if (c.fp4) e.fp4 = next, next += of_one_page * e.pages;
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

__device__ inline int floor_page(int position) {
  return position >= 0 ? position / kPageTokens : -((kPageTokens - 1 - position) / kPageTokens);
}

// Query blocks of a step's rows, the last of which is the sequence's last token.
struct QueryBlocks {
  int first_position;  // of block 0, a multiple of 64; below 0 where rows stand before the first token
  int count;
};
__device__ inline QueryBlocks query_blocks(int s_q, int s_kv) {
  const int first = floor_page(s_kv - s_q);
  return {first * kPageTokens, s_q == 0 ? 0 : floor_page(s_kv - 1) - first + 1};
}

}  // namespace thriftattn::cuda
