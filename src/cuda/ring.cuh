// A warp's ring of shared-memory slots that asynchronous copies fill: bulk copies from sm_90, which one lane starts and
// the slot's barrier counts in bytes; before, 16 bytes a lane (cp.async). A slot is filled again as soon as the warp has
// read it, so the copies of the next items are always under way. Warps share nothing and never wait for one another.
#pragma once

#include <cstdint>

namespace thriftattn::cuda {

inline constexpr int kRingSlots = 2;

class Ring {
 public:
  // `slots` of slot_bytes each and `barriers`, kRingSlots of both, belong to the calling warp; slot_bytes is a multiple
  // of 16. Called by the whole warp.
  __device__ Ring(uint8_t* slots, uint64_t* barriers, int slot_bytes)
      : slots_(slots), slot_bytes_(slot_bytes), barriers_(shared_address(barriers)), lane_(threadIdx.x % 32) {
    if (lane_ == 0) {
      for (int i = 0; i < kRingSlots; ++i)
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barriers_ + 8 * i), "r"(kArrivals) : "memory");
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    }
    __syncwarp();
  }

  // The slot to fill next. All lanes of the warp have read what it held: a __syncwarp() stands between.
  __device__ uint8_t* fill_slot() const { return slots_ + fill_ * slot_bytes_; }

  // start, copies (16 bytes or a multiple, both ends aligned to 16), finish: by the whole warp, on the slot to fill.
  // `bytes` is the sum of the copies.
  __device__ void start_fill(int bytes) const {
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(fill_barrier()), "r"(bytes) : "memory");
#endif
  }
  __device__ void copy(int to, const void* from, int bytes) const {
    const uint32_t target = shared_address(fill_slot()) + to;
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
                   "l"(from), "r"(bytes), "r"(fill_barrier())
                   : "memory");
#else
    for (int i = lane_ * 16; i < bytes; i += 512)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + i),
                   "l"(static_cast<const uint8_t*>(from) + i)
                   : "memory");
#endif
  }
  __device__ void finish_fill() {
#if __CUDA_ARCH__ < 900
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(fill_barrier()) : "memory");
#endif
    fill_ = fill_ + 1 == kRingSlots ? 0 : fill_ + 1;
  }

  // Waits for the next slot to read, or for the one after it.
  __device__ const uint8_t* wait(int ahead = 0) const {
    const int slot = (read_ + ahead) % kRingSlots;
    const uint32_t phase = read_ + ahead >= kRingSlots ? phase_ ^ 1 : phase_;
    uint32_t done;
    do {
      asm volatile("{.reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                   : "=r"(done)
                   : "r"(barriers_ + 8 * slot), "r"(phase)
                   : "memory");
    } while (!done);
    return slots_ + slot * slot_bytes_;
  }
  // All lanes have read the slot.
  __device__ void release() {
    __syncwarp();
    if (++read_ == kRingSlots) {
      read_ = 0;
      phase_ ^= 1;
    }
  }

 private:
#if __CUDA_ARCH__ >= 900
  static constexpr int kArrivals = 1;
#else
  static constexpr int kArrivals = 32;
#endif
  __device__ static uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }
  __device__ uint32_t fill_barrier() const { return barriers_ + 8 * fill_; }

  uint8_t* slots_;
  int slot_bytes_;
  uint32_t barriers_;
  int lane_;
  int fill_ = 0, read_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace thriftattn::cuda
