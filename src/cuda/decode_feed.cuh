// What fills a warp's ring: the items of the CTA's share, of which warp w of n takes every n-th, unit after unit.
//
// Items are made 32 at a time, one a lane: the list of promoted pages, a binary search for those that are not in it,
// and the block table, all out of L1 after the first touch. A record goes to the ring; the little else that an item
// needs, its note, is copied when it is made, for all 32 at once.
#pragma once

#include <cstdint>

#include "cuda/decode_units.cuh"
#include "cuda/ring.cuh"

namespace thriftattn::cuda {

// A warp's notes on its items in order: item n's is number n % kNotes. Copies are under way when a word says so: the
// reader of that item waits for them, and they are all there until another word says so.
inline constexpr int kNotes = 64;  // 32 made, and those that are still in the ring

template <int kColumns>
struct alignas(16) Note {
  char4 exponents;  // of the page: K of both planes, V of both planes
  uint32_t word;    // Item's, and kWait
  uint32_t unused[2];
  float q_mean[kColumns];  // of the tile's rows; of rows that do not exist anything

  static constexpr uint32_t kWait = 1u << 31;
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

template <int kColumns>
class Feed {
 public:
  // `segment` and `notes` are room in shared memory for the calling warp alone.
  __device__ Feed(const DecodeArgs& args, const DeviceLayout& layout, const Share& share, Segment& segment,
                  Note<kColumns>* notes)
      : args_(args), layout_(layout), share_(share), segment_(segment), notes_(notes) {}

  // From here on the items of `from` and, but in Pass::again, of all segments after it.
  __device__ void start(const Segment& from) {
    copy_segment(segment_, from);
    enter();
  }

  // Where it is: at or ahead of what is being read.
  __device__ const Segment& segment() const { return segment_; }

  // Starts the copy of the next item, or plane of one, if there is one.
  __device__ void fill(Ring& ring) {
    if (next_ == batch_ && !make_batch()) return;
    const Tier tier = Item::tier(__shfl_sync(~0u, word_, next_));
    const int bytes = tier == Tier::none ? 0 : tier == Tier::fp16 ? layout_.high_item_bytes : layout_.item_bytes;
    ring.fill(next_, second_plane_ != 0 ? record_ + (args_.p.cache.residual - args_.p.cache.fp4) : record_, bytes);
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
      if (!next_segment(args_, share_, segment_)) return false;
      enter();
    }
    batch_ = min(32, (end_ - at_ + warps - 1) / warps);
    next_ = 0;
    if (lane < batch_) {
      const Item item = item_at(args_, segment_.pass, segment_.unit, at_ + lane * warps);
      word_ = item.word;
      record_ = item.record;
      take_note(item, notes_[(made_ + lane) % kNotes], lane == 0);
    }
    __syncwarp();  // a lane may read another's note next
    made_ += batch_;
    at_ += 32 * warps;
    return true;
  }

  __device__ void take_note(const Item& item, Note<kColumns>& note, bool wait) const {
    note.word = item.word | (wait ? Note<kColumns>::kWait : 0);
    if (item.summary != nullptr)
      copy_async<4>(shared_address(&note.exponents), item.summary);
    else
      note.exponents = {0, 0, 0, 0};
#pragma unroll
    for (int row = 0; row < kColumns; row += 4)
      if (item.q_mean != nullptr && segment_.unit.first_row + row < args_.p.row_stride)
        copy_async<16>(shared_address(note.q_mean + row), item.q_mean + row);
  }

  const DecodeArgs& args_;
  const DeviceLayout layout_;
  const Share& share_;
  Segment& segment_;
  Note<kColumns>* notes_;
  int at_ = 0, end_ = 0;  // this warp's next item of the segment, and where they end
  uint32_t word_ = 0;     // of this lane's item
  const uint8_t* record_ = nullptr;
  uint32_t made_ = 0;         // items since the begin
  int batch_ = 0, next_ = 0;  // items made, and the one to fill next
  int second_plane_ = 0;      // 1: of item next_ the first plane is filled
};

}  // namespace thriftattn::cuda
