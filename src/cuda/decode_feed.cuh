// What fills a warp's ring: the items of the CTA's share, of which warp w of n takes every n-th, unit after unit.
//
// Addresses are made 32 items at a time, one a lane: the list of promoted pages, a binary search for those that are not
// in it, and the block table, all out of L1 after the first touch. A slot holds
//   [the item's record, of one plane][summary: 16 bytes][q.k_mean of the tile's rows: 4 bytes each][Item::word: 4 bytes]
#pragma once

#include <cstdint>

#include "cuda/decode_units.cuh"
#include "cuda/ring.cuh"

namespace thriftattn::cuda {

// Offsets in a slot.
struct SlotLayout {
  int summary, q_mean, word, bytes;
};
THRIFTATTN_HD constexpr SlotLayout slot_layout(const DeviceLayout& layout, int columns) {
  SlotLayout s{};
  s.summary = layout.item_bytes > layout.high_item_bytes ? layout.item_bytes : layout.high_item_bytes;
  s.q_mean = s.summary + static_cast<int>(sizeof(PageSummary));
  s.word = s.q_mean + 4 * columns;
  s.bytes = s.word + 16;
  return s;
}

// Where a warp is in its CTA's share: in shared memory, because it is looked at once in 32 items.
struct FeedPlace {
  Unit unit;
  int64_t begin, end;  // of the share
  int64_t unit_begin;
  int number;  // of the unit, among all
  Pass pass;
};

class Feed {
 public:
  // `place` is room in shared memory for the calling warp alone.
  __device__ Feed(const DecodeArgs& args, const SlotLayout& slot, FeedPlace* place)
      : args_(args), slot_(slot), place_(*place) {}

  // From here on the items of [begin, end), of which unit `number` at unit_begin is the first. Of that one alone in
  // Pass::again.
  __device__ void start(Pass pass, int number, int64_t unit_begin, int64_t begin, int64_t end) {
    if (threadIdx.x % 32 == 0) place_.begin = begin, place_.end = end, place_.pass = pass;
    enter(number, unit_begin);
  }

  // Starts the copies of the next item, or plane of one, if there is one.
  __device__ void fill(Ring& ring) {
    if (next_ == batch_ && !make_batch()) return;
    const uint32_t word = __shfl_sync(~0u, item_.word, next_);
    const int64_t record = __shfl_sync(~0u, item_.record, next_);
    const uint32_t summary = __shfl_sync(~0u, item_.summary, next_);
    const LayerCache& cache = args_.p.cache;
    const DeviceLayout& layout = cache.layout;
    const Tier tier = Item::tier(word);
    const int page = Item::token(word) / kPageTokens, in_page = Item::token(word) % kPageTokens;

    const bool with_summary = summary != Item::kNone && !second_plane_;
    if (threadIdx.x % 32 == 0) {
      *reinterpret_cast<uint32_t*>(ring.fill_slot() + slot_.word) = word;
      if (!with_summary) *reinterpret_cast<uint32_t*>(ring.fill_slot() + slot_.summary) = 0;  // exponents
    }
    const bool is_high = tier == Tier::fp16;
    const bool with_mean = !is_high && !second_plane_ && args_.p.q_mean != nullptr;
    const int mean_bytes = 4 * min(args_.columns, args_.p.row_stride - place_.unit.first_row);
    const int bytes = is_high ? layout.high_item_bytes : layout.item_bytes;
    if (tier == Tier::none) {
      ring.start_fill(0);
    } else {
      ring.start_fill(bytes + (with_summary ? static_cast<int>(sizeof(PageSummary)) : 0) + (with_mean ? mean_bytes : 0));
      const uint8_t* from = is_high ? cache.high + record * layout.high_bytes + in_page / kHighItemTokens * bytes
                                    : (second_plane_ ? cache.residual : cache.fp4) + record * layout.fp4_bytes +
                                          in_page / kItemTokens * bytes;
      ring.copy(0, from, bytes);
      if (with_summary) ring.copy(slot_.summary, cache.summary + summary * cache.canonical.summary_bytes,
                                  static_cast<int>(sizeof(PageSummary)));
      if (with_mean)
        ring.copy(slot_.q_mean,
                  args_.p.q_mean +
                      (int64_t{place_.unit.index} * cache.max_pages + page) * args_.p.row_stride + place_.unit.first_row,
                  mean_bytes);
    }
    ring.finish_fill();
    second_plane_ = tier == Tier::fp4x2 && !second_plane_;
    if (!second_plane_) ++next_;
  }

 private:
  __device__ void enter(int number, int64_t unit_begin) {
    if (threadIdx.x % 32 == 0) place_.number = number, place_.unit_begin = unit_begin;
    __syncwarp();
    enter_unit(args_, place_.pass, number, place_.unit);
    at_ = place_.unit.items.before(place_.begin - unit_begin) + static_cast<int>(threadIdx.x) / 32;
    end_ = place_.unit.items.before(place_.end - unit_begin);
  }

  __device__ bool make_batch() {
    const int warps = static_cast<int>(blockDim.x) / 32, lane = threadIdx.x % 32;
    while (at_ >= end_) {
      const int64_t next = place_.unit_begin + place_.unit.items.weight();
      if (place_.pass == Pass::again || next >= place_.end) return false;
      enter(place_.number + 1, next);
    }
    batch_ = min(32, (end_ - at_ + warps - 1) / warps);
    next_ = 0;
    if (lane < batch_) item_ = item_at(args_, place_.pass, place_.unit, at_ + lane * warps);
    at_ += 32 * warps;
    return true;
  }

  const DecodeArgs& args_;
  const SlotLayout slot_;
  FeedPlace& place_;
  int at_ = 0, end_ = 0;      // this warp's next item of the unit, and where they end
  Item item_;                 // of this lane
  int batch_ = 0, next_ = 0;  // items made, and the one to fill next
  bool second_plane_ = false;
};

}  // namespace thriftattn::cuda
