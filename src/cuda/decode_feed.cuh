// What fills a warp's ring: the items of the CTA's share, of which warp w of n takes every n-th, unit after unit.
//
// Addresses are made 32 items at a time, one a lane: the list of promoted pages, a binary search for those that are not
// in it, and the block table, all out of L1 after the first touch. A slot holds
//   [the item's record, of one plane][summary: 16 bytes][q.k_mean of the tile's rows: 4 bytes each][Item::word: 4
//   bytes]
#pragma once

#include <cstdint>

#include "cuda/decode_units.cuh"
#include "cuda/ring.cuh"

namespace thriftattn::cuda {

// Offsets in a slot.
struct SlotLayout {
  int summary, q_mean, word, bytes;
};

// The layout of records, a constant where D says it.
template <int D, bool kExact>
__device__ DeviceLayout record_layout(const DecodeArgs& args) {
  if constexpr (kExact) {
    constexpr DeviceLayout layout = device_layout(D, D);
    return layout;
  } else {
    return args.p.cache.layout;
  }
}

THRIFTATTN_HD constexpr SlotLayout slot_layout(const DeviceLayout& layout, int columns) {
  SlotLayout s{};
  s.summary = layout.item_bytes > layout.high_item_bytes ? layout.item_bytes : layout.high_item_bytes;
  s.q_mean = s.summary + static_cast<int>(sizeof(PageSummary));
  s.word = s.q_mean + 4 * columns;
  s.bytes = s.word + 16;
  return s;
}

template <int kColumns>
class Feed {
 public:
  // `segment` is room in shared memory for the calling warp alone.
  __device__ Feed(const DecodeArgs& args, const DeviceLayout& layout, const Share& share, Segment& segment)
      : args_(args), layout_(layout), slot_(slot_layout(layout, kColumns)), share_(share), segment_(segment) {}

  // From here on the items of `from` and, but in Pass::again, of all segments after it.
  __device__ void start(const Segment& from) {
    copy_segment(segment_, from);
    enter();
  }

  // Where it is: at or ahead of what is being read.
  __device__ const Segment& segment() const { return segment_; }

  // Starts the copies of the next item, or plane of one, if there is one. The lane that made the item starts them.
  __device__ void fill(Ring& ring) {
    if (next_ == batch_ && !make_batch()) return;
    const Tier tier = Item::tier(__shfl_sync(~0u, item_.word, next_));
    const LayerCache& cache = args_.p.cache;
    const int bytes = tier == Tier::none ? 0 : tier == Tier::fp16 ? layout_.high_item_bytes : layout_.item_bytes;
    const bool is_leader = static_cast<int>(threadIdx.x) % 32 == next_;
    if (is_leader && second_plane_ == 0) {
      *reinterpret_cast<uint32_t*>(ring.fill_slot() + slot_.word) = item_.word;
      if (item_.summary != nullptr)
        ring.copy_beside(slot_.summary, item_.summary);
      else
        *reinterpret_cast<uint32_t*>(ring.fill_slot() + slot_.summary) = 0;  // exponents
#pragma unroll
      for (int row = 0; row < kColumns; row += 4)
        if (item_.q_mean != nullptr && segment_.unit.first_row + row < args_.p.row_stride)
          ring.copy_beside(slot_.q_mean + 4 * row, item_.q_mean + row);
    }
    ring.fill(is_leader, second_plane_ != 0 ? item_.record + (cache.residual - cache.fp4) : item_.record, bytes);
    second_plane_ = tier == Tier::fp4x2 ? second_plane_ ^ 1 : 0;
    next_ += second_plane_ ^ 1;
  }

 private:
  __device__ void enter() {
    at_ = segment_.first + static_cast<int>(threadIdx.x) / 32;
    end_ = segment_.end;
  }

  __device__ bool make_batch() {
    const int warps = static_cast<int>(blockDim.x) / 32, lane = threadIdx.x % 32;
    while (at_ >= end_) {
      if (segment_.pass == Pass::again || segment_.next() >= share_.end) return false;
      next_segment(args_, share_, segment_);
      enter();
    }
    batch_ = min(32, (end_ - at_ + warps - 1) / warps);
    next_ = 0;
    if (lane < batch_) item_ = item_at(args_, segment_.pass, segment_.unit, at_ + lane * warps);
    at_ += 32 * warps;
    return true;
  }

  const DecodeArgs& args_;
  const DeviceLayout layout_;
  const SlotLayout slot_;
  const Share& share_;
  Segment& segment_;
  int at_ = 0, end_ = 0;      // this warp's next item of the segment, and where they end
  Item item_;                 // of this lane
  int batch_ = 0, next_ = 0;  // items made, and the one to fill next
  int second_plane_ = 0;      // 1: of item next_ the first plane is filled
};

}  // namespace thriftattn::cuda
