// What fills a warp's ring: the items of the CTA's share, of which warp w of n takes every n-th, unit after unit.
//
// Items are made 32 at a time, one a lane: the list of pages and the block table, out of L1 after the first touch. A
// record goes to the ring; the little else that an item needs, its note, is copied when it is made, for all 32 at once.
#pragma once

#include <cstdint>

#include "cuda/decode_units.cuh"
#include "cuda/ring.cuh"

namespace thriftattn::cuda {

inline constexpr float kGrid = 192.0f;  // scores are made with this added: numbers near it are multiples of 2^-16

// A warp's notes on its items in order: item n's is number n % kNotes. Copies are under way when a word says so: the
// reader of that item waits for them, and they are all there until another word says so.
inline constexpr int kNotes = 64;  // 32 made, and those that are still in the ring
inline constexpr int kMeans = 16;  // notes whose q_mean the reader makes at once, when one of them says that he waits

template <int kColumns>
struct alignas(16) Note {
  uint32_t exponents;      // of the page, 4 signed bytes: K of both planes, V of both planes
  uint32_t word;           // Item's, and the bits below
  const uint8_t* mean;     // Item's
  float q_mean[kColumns];  // kGrid + q . mean of the tile's rows: the reader puts it here, where there is a mean

  static constexpr uint32_t kWait = 1u << 31;
  static constexpr uint32_t kSpecial = 1u << 30;    // scores are capped or masked
  static constexpr uint32_t kKeepsMass = 1u << 29;  // their mass is wanted
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
      : args_(args), layout_(layout), share_(share), segment_(segment), notes_(notes) {
    if (!args.p.cache.centring)
#pragma unroll 1
      for (int i = threadIdx.x % 32; i < kNotes * kColumns; i += 32) notes[i / kColumns].q_mean[i % kColumns] = kGrid;
  }

  // From here on the items of `from` and, but in Pass::again, of all segments after it.
  __device__ void start(const Segment& from) {
    copy_segment(segment_, from);
    enter();
  }

  // Where it is: at or ahead of what is being read.
  __device__ const Segment& segment() const { return segment_; }

  // Starts the copy of the next item, or plane of one, if there is one. before_new() comes before anything is read of a
  // page that this step's tokens are in.
  template <class BeforeNew>
  __device__ void fill(Ring& ring, const BeforeNew& before_new) {
    if (next_ == batch_ && !make_batch(before_new)) return;
    ring.fill(next_, record_, bytes_);
    if (planes_ >> next_ & 1) {
      planes_ ^= 1u << next_;
      if (static_cast<int>(threadIdx.x % 32) == next_) record_ += args_.p.cache.residual - args_.p.cache.fp4;
    } else {
      ++next_;
    }
  }

 private:
  __device__ void enter() { at_ = segment_.first + static_cast<int>(threadIdx.x) / 32; }

  template <class BeforeNew>
  __device__ bool make_batch(const BeforeNew& before_new) {
    const int warps = static_cast<int>(blockDim.x) / 32, lane = threadIdx.x % 32;
    while (at_ >= segment_.end) {
      if (!next_segment(args_, share_, segment_)) return false;
      enter();
    }
    batch_ = min(32, (segment_.end - at_ + warps - 1) / warps);
    next_ = 0;
    bool second_plane = false, is_new = false;
    Item item;
    if (lane < batch_) {
      const Unit& unit = segment_.unit;
      item = item_at(args_, segment_.pass, unit, at_ + lane * warps);
      const Tier tier = Item::tier(item.word);
      second_plane = tier == Tier::fp4x2;
      is_new = Item::token(item.word) / kPageTokens >= (unit.s_kv - unit.s_q) / kPageTokens;
      record_ = item.record;
      bytes_ = tier == Tier::fp16 ? layout_.high_item_bytes : layout_.item_bytes;
      if (tier == Tier::none) record_ = args_.p.cache.fp4, bytes_ = 16;  // anything: nobody reads it
    }
    planes_ = __ballot_sync(~0u, second_plane);
    if (__any_sync(~0u, is_new)) before_new();
    if (lane < batch_)
      take_note(item, notes_[(made_ + lane) % kNotes], lane % kMeans == 0);
    else
      notes_[(made_ + lane) % kNotes].mean = nullptr;
    __syncwarp();  // a lane may read another's note next
    made_ += batch_;
    at_ += 32 * warps;
    return true;
  }

  __device__ void take_note(const Item& item, Note<kColumns>& note, bool wait) const {
    using N = Note<kColumns>;
    note.word = item.word | (wait ? N::kWait : 0) | (is_special(item) ? N::kSpecial : 0) |
                (keeps_mass(item) ? N::kKeepsMass : 0);
    note.mean = item.mean;
    if (item.summary != nullptr)
      copy_async<4>(shared_address(&note.exponents), item.summary);
    else
      note.exponents = 0;
    if (item.mean != nullptr)
#pragma unroll 1
      for (int at = 0; at < 2 * args_.p.shape.d; at += 64) prefetch_l2(item.mean + at);
  }

  __device__ bool is_special(const Item& item) const {
    const int first = Item::token(item.word);
    const int tokens = Item::tier(item.word) == Tier::fp16 ? kHighItemTokens : kItemTokens;
    return args_.softcap > 0 || first < segment_.unit.first_common || first + tokens > segment_.unit.end_common;
  }

  // Halves have no place for items of eighths.
  __device__ bool keeps_mass(const Item& item) const {
    const bool is_high = Item::tier(item.word) == Tier::fp16;
    return args_.p.page_mass != nullptr && (keeps_eighths(args_) || !is_high);
  }

  const DecodeArgs& args_;
  const DeviceLayout layout_;
  const Share& share_;
  Segment& segment_;
  Note<kColumns>* notes_;
  int at_ = 0;                       // this warp's next item of the segment
  const uint8_t* record_ = nullptr;  // of this lane's item, and what to copy of it
  int bytes_ = 0;
  uint32_t made_ = 0;         // items since the begin
  int batch_ = 0, next_ = 0;  // items made, and the one to fill next
  uint32_t planes_ = 0;       // bit n: item n of the batch has one more plane to fill than the one that is next
};

}  // namespace thriftattn::cuda
