// A warp's ring of shared-memory slots that asynchronous copies fill: one bulk copy from sm_90, whose bytes the slot's
// barrier counts; 16 bytes a lane before (cp.async). A slot is filled again as soon as the warp has read it, so the
// copies of the next items are always under way. Warps share nothing and never wait for one another.
#pragma once

#include <cstdint>

namespace thriftattn::cuda {

inline constexpr uint32_t kRingSlots = 2;  // a power of two

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 4 or 16 bytes by one lane, there when copies_done() has returned in that lane.
template <int bytes>
__device__ void copy_async(uint32_t to, const void* from) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
// Brings the 64 bytes around `from` to L2.
__device__ inline void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
__device__ inline void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

class Ring {
 public:
  // `slots` of slot_bytes each and `barriers`, kRingSlots of both, belong to the calling warp; slot_bytes is a multiple
  // of 16. Called by the whole warp.
  __device__ Ring(uint8_t* slots, uint64_t* barriers, uint32_t slot_bytes)
      : slots_(slots), slot_bytes_(slot_bytes), barriers_(shared_address(barriers)) {
    if (threadIdx.x % 32 == 0) {
      for (uint32_t i = 0; i < kRingSlots; ++i)
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barriers_ + 8 * i), "r"(kArrivals) : "memory");
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
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
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
      if (bytes > 0)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
            "l"(from), "r"(bytes), "r"(barrier)
            : "memory");
    }
#else
    from = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), leader));
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 512) copy_async<16>(to + i, from + i);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
  }

  // Waits for the next slot to read, or for the one after it.
  __device__ const uint8_t* wait(uint32_t ahead = 0) const {
    const uint32_t n = read_ + ahead, slot = n % kRingSlots;
    while (!is_full(barriers_ + 8 * slot, n / kRingSlots % 2)) {
    }
    return slots_ + slot * slot_bytes_;
  }
  // The warp has read `n` slots.
  __device__ void release(uint32_t n) {
    __syncwarp();
    read_ += n;
  }

 private:
  __device__ static bool is_full(uint32_t barrier, uint32_t phase) {
    uint32_t full;
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                 : "=r"(full)
                 : "r"(barrier), "r"(phase)
                 : "memory");
#else
    asm volatile("{.reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                 : "=r"(full)
                 : "r"(barrier), "r"(phase)
                 : "memory");
#endif
    return full != 0;
  }

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
