// A warp's ring of shared-memory slots that asynchronous copies fill: one bulk copy from sm_90, whose bytes the slot's
// barrier counts; 16 bytes a lane before (cp.async). A slot is filled again as soon as the warp has read it, so the
// copies of the next items are always under way. Warps share nothing and never wait for one another.
#pragma once

#include "cuda/mbarrier.cuh"

namespace thriftattn::cuda {

inline constexpr uint32_t kRingSlots = 2;  // a power of two

class Ring {
 public:
  // `slots` of slot_bytes each and `barriers`, kRingSlots of both, belong to the calling warp; slot_bytes is a multiple
  // of 16. Called by the whole warp.
  __device__ Ring(uint8_t* slots, uint64_t* barriers, uint32_t slot_bytes)
      : slots_(slots), slot_bytes_(slot_bytes), barriers_(shared_address(barriers)) {
    if (threadIdx.x % 32 == 0) {
      for (uint32_t i = 0; i < kRingSlots; ++i) init_barrier(barriers_ + 8 * i, kArrivals);
      before_bulk_copies();
    }
    __syncwarp();
  }

  // Fills the next slot, or leaves it empty where bytes = 0, by the whole warp, which has read what it held. `from` is
  // lane `leader`'s; it and bytes are multiples of 16.
  __device__ void fill(int leader, const uint8_t* from, int bytes) {
    const uint32_t slot = fill_++ % kRingSlots, barrier = barriers_ + 8 * slot;
    const uint32_t to = shared_address(slots_ + slot * slot_bytes_);
#if __CUDA_ARCH__ >= 900
    if (static_cast<int>(threadIdx.x % 32) == leader) {
      arrive_expecting(barrier, bytes);
      if (bytes > 0) copy_bulk(to, from, bytes, barrier);
    }
#else
    from = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), leader));
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 512) copy_async<16>(to + i, from + i);
    arrive_after_copies(barrier);
#endif
  }

  // Waits for the next slot to read, or for the one after it.
  __device__ const uint8_t* wait(uint32_t ahead = 0) const {
    const uint32_t n = read_ + ahead, slot = n % kRingSlots;
    cuda::wait(barriers_ + 8 * slot, n / kRingSlots % 2);
    return slots_ + slot * slot_bytes_;
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
  uint8_t* slots_;
  uint32_t slot_bytes_;
  uint32_t barriers_;
  uint32_t fill_ = 0, read_ = 0;  // slots filled and read since the begin
};

}  // namespace thriftattn::cuda
