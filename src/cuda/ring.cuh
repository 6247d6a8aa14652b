// A warp's ring of shared-memory slots that asynchronous copies fill: one bulk copy from sm_90, whose bytes the slot's
// barrier counts; 16 bytes a lane before (cp.async). A slot is filled again as soon as the warp has read it, so the
// copies of the next items are always under way. Warps share nothing and never wait for one another.
#pragma once

#include "cuda/mbarrier.cuh"
#include "format/page_layout.h"

namespace thriftattn::cuda {

inline constexpr uint32_t kRingSlots = 2;  // a power of two

class Ring {
 public:
  // What a slot for `bytes`, a multiple of 16, takes in shared memory: its barrier follows it. Bulk copies to addresses
  // that are no multiples of 128 are slower.
  THRIFTATTN_HD static constexpr int stride(int bytes) { return static_cast<int>(round_up(bytes + 8, 128)); }

  // kRingSlots slots that belong to the calling warp. Called by the whole warp.
  __device__ Ring(uint8_t* slots, int slot_bytes) : slots_(slots), slot_bytes_(slot_bytes) {
    if (threadIdx.x % 32 == 0) {
      for (uint32_t i = 0; i < kRingSlots; ++i) init_barrier(barrier(slot(i)), kArrivals);
      before_bulk_copies();
    }
    __syncwarp();
  }

  // Fills the next slot, by the whole warp, which has read what it held. `from` and `bytes`, at least 16, are those of
  // lane `leader` and multiples of 16.
  __device__ void fill(int leader, const uint8_t* from, int bytes) {
    uint8_t* to = slot(fill_++);
#if __CUDA_ARCH__ >= 900
    if (static_cast<int>(threadIdx.x % 32) == leader) {
      arrive_expecting(barrier(to), bytes);
      copy_bulk_once(shared_address(to), from, bytes, barrier(to));
    }
#else
    from = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), leader));
    bytes = __shfl_sync(~0u, bytes, leader);
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 512) copy_async<16>(shared_address(to) + i, from + i);
    arrive_after_copies(barrier(to));
#endif
  }

  // Waits for the next slot to read, or for the one after it.
  __device__ const uint8_t* wait(uint32_t ahead = 0) const {
    const uint32_t n = read_ + ahead;
    cuda::wait(barrier(slot(n)), n / kRingSlots);
    return slot(n);
  }
  // The warp has read `n` slots.
  __device__ void release(uint32_t n) {
    before_bulk_copies();
    __syncwarp();
    read_ += n;
  }

 private:
#if __CUDA_ARCH__ >= 900
  static constexpr int kArrivals = 1;
#else
  static constexpr int kArrivals = 32;
#endif
  __device__ uint8_t* slot(uint32_t n) const { return slots_ + n % kRingSlots * stride(slot_bytes_); }
  __device__ uint32_t barrier(const uint8_t* slot) const { return shared_address(slot + slot_bytes_); }

  uint8_t* slots_;
  int slot_bytes_;
  uint32_t fill_ = 0, read_ = 0;  // slots filled and read since the begin
};

}  // namespace thriftattn::cuda
