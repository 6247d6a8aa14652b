// A warp's ring of shared-memory slots that asynchronous copies fill: a record by one bulk copy from sm_90, by 16 bytes
// a lane before, and a few bytes beside it by 16 at a time (cp.async). A slot's barrier counts both. A slot is filled
// again as soon as the warp has read it, so the copies of the next items are always under way. Warps share nothing and
// never wait for one another.
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

  // To fill a slot: start, copies, finish, by the whole warp. Sources are those of lane `leader`; both ends of a copy
  // are aligned to 16 bytes, of which it moves a multiple.
  __device__ void start_fill([[maybe_unused]] int leader, [[maybe_unused]] int record_bytes) const {
#if __CUDA_ARCH__ >= 900
    if (lane_ == leader)
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(fill_barrier()), "r"(record_bytes)
                   : "memory");
#endif
  }
  // The record, to the front of the slot.
  __device__ void copy_record(int leader, const uint8_t* from, int bytes) const {
    const uint32_t to = shared_address(fill_slot());
#if __CUDA_ARCH__ >= 900
    if (lane_ == leader)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "l"(from), "r"(bytes), "r"(fill_barrier())
                   : "memory");
#else
    from = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), leader));
    for (int i = lane_ * 16; i < bytes; i += 512) copy_16(to + i, from + i);
#endif
  }
  __device__ void copy_beside(int leader, int to, const void* from, int bytes) const {
    if (lane_ == leader)
      for (int i = 0; i < bytes; i += 16)
        copy_16(shared_address(fill_slot()) + to + i, static_cast<const uint8_t*>(from) + i);
  }
  __device__ void finish_fill([[maybe_unused]] int leader) {
#if __CUDA_ARCH__ >= 900
    if (lane_ == leader)
#endif
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(fill_barrier()) : "memory");
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
  __device__ uint32_t fill_barrier() const { return barriers_ + 8 * fill_; }

  uint8_t* slots_;
  int slot_bytes_;
  uint32_t barriers_;
  int lane_;
  int fill_ = 0, read_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace thriftattn::cuda
