// A warp's ring of shared-memory slots that asynchronous copies fill: a record by one bulk copy from sm_90, by 16 bytes
// a lane before, and a few bytes beside it by 16 at a time (cp.async). A slot's barrier counts both. A slot is filled
// again as soon as the warp has read it, so the copies of the next items are always under way. Warps share nothing and
// never wait for one another.
#pragma once

#include <cstdint>

namespace thriftattn::cuda {

inline constexpr uint32_t kRingSlots = 2;  // a power of two

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

  // The slot to fill next. All lanes of the warp have read what it held: a __syncwarp() stands between.
  __device__ uint8_t* fill_slot() const { return slots_ + fill_ % kRingSlots * slot_bytes_; }

  // To fill a slot, one lane, the leader, copies what stands beside the record; then the whole warp calls fill(), which
  // copies the leader's record to the front of the slot, or nothing. Both ends of a copy are aligned to 16 bytes, of
  // which it moves a multiple.
  __device__ void copy_beside(int to, const void* from) const {
    copy_16(shared_address(fill_slot()) + to, static_cast<const uint8_t*>(from));
  }
  __device__ void fill(bool is_leader, const uint8_t* record, int bytes) {
    const uint32_t to = shared_address(fill_slot()), barrier = barriers_ + 8 * (fill_ % kRingSlots);
#if __CUDA_ARCH__ >= 900
    if (is_leader) {
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
      if (bytes > 0)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
            "l"(record), "r"(bytes), "r"(barrier)
            : "memory");
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
    }
#else
    const int leader = __ffs(__ballot_sync(~0u, is_leader)) - 1;
    record = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(record), leader));
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 512) copy_16(to + i, record + i);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
    ++fill_;
  }

  // Waits for the next slot to read, or for the one after it.
  __device__ const uint8_t* wait(uint32_t ahead = 0) const {
    const uint32_t n = read_ + ahead, slot = n % kRingSlots;
    uint32_t done;
    do {
      asm volatile("{.reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                   : "=r"(done)
                   : "r"(barriers_ + 8 * slot), "r"(n / kRingSlots % 2)
                   : "memory");
    } while (!done);
    return slots_ + slot * slot_bytes_;
  }
  // The warp has read `n` slots.
  __device__ void release(uint32_t n) {
    __syncwarp();
    read_ += n;
  }

 private:
#if __CUDA_ARCH__ >= 900
  static constexpr int kArrivals = 2;  // the leader's, of the bulk copy and of the others
#else
  static constexpr int kArrivals = 32;
#endif
  __device__ static uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }
  __device__ static void copy_16(uint32_t to, const uint8_t* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }

  uint8_t* slots_;
  uint32_t slot_bytes_;
  uint32_t barriers_;
  uint32_t fill_ = 0, read_ = 0;  // slots filled and read since the begin
};

}  // namespace thriftattn::cuda
