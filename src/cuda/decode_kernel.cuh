// Decode and verify steps: attention of a few rows over a paged cache, the pages in FP4, FP4 in two planes and 16 bit.
//
//   pages --bulk copies--> a ring of 2 slots per warp --unpack--> FP16 fragments --mma--> scores --exp2--> p --mma--> o
//                                                                                          warps, then CTAs: merged
//
// One CTA of 12 warps per multiprocessor; each warp reads items of its own (decode_units.cuh) and knows nothing of the
// others until the CTA's part of a unit ends. Memory: 9216 bytes of a page of 64 tokens and one head at d = 128, and its
// exponents and q.k_mean, 32 bytes. Shared memory at d = 128 and 4 rows: 12 x 2 slots of 4656 bytes, 26 KB of merge.
// Binds on DRAM where there is much to read, else on its set-up: shares, first addresses, merge.
#pragma once

#include <cstdint>

#include "cuda/decode_merge.cuh"

namespace thriftattn::cuda {

// The kernel for 4, 8 or 16 rows at once (d256: 4 or 8), one source file each so that they compile side by side.
const void* decode_kernel_d128(int columns);
const void* decode_kernel_d256(int columns);

THRIFTATTN_HD constexpr int max_warps(int d_bucket) { return d_bucket == 128 ? 12 : 8; }

// Offsets in dynamic shared memory.
struct SharedLayout {
  int merge, units, scan, barriers, bytes;  // rings are at 0
};
THRIFTATTN_HD constexpr SharedLayout shared_layout(const DeviceLayout& layout, int columns, int warps, int blocks) {
  SharedLayout s{};
  s.merge = warps * kRingSlots * slot_layout(layout, columns).bytes;
  s.units = s.merge + merge_layout(warps, columns, layout.dv, blocks).floats * static_cast<int>(sizeof(float));
  s.scan = static_cast<int>(round_up(s.units + warps * static_cast<int>(sizeof(FeedPlace) + sizeof(Unit)), 16));
  s.barriers = s.scan + 32 * 8 + static_cast<int>(round_up(sizeof(Share), 16));
  s.bytes = s.barriers + warps * kRingSlots * 8;
  return s;
}

template <int D, int N>
__global__ void __launch_bounds__(32 * max_warps(D), 1) decode_kernel(const __grid_constant__ DecodeArgs args) {
  using Rows = DecodeRows<D, N, D == 128>;
  extern __shared__ __align__(128) uint8_t shared[];
  const DeviceLayout& device = args.p.cache.layout;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const SharedLayout layout = shared_layout(device, N, warps, gridDim.x);
  const SlotLayout slot = slot_layout(device, N);
  FeedPlace* places = reinterpret_cast<FeedPlace*>(shared + layout.units);
  Unit& unit = reinterpret_cast<Unit*>(places + warps)[warp];  // that is being read
  const Share& share = *reinterpret_cast<const Share*>(shared + layout.scan + 32 * 8);
  Ring ring(shared + warp * kRingSlots * slot.bytes,
            reinterpret_cast<uint64_t*>(shared + layout.barriers) + kRingSlots * warp, slot.bytes);
  wait_for_previous_kernel();
  let_next_kernel_start();

  if (!find_share(args, reinterpret_cast<int64_t*>(shared + layout.scan), const_cast<Share*>(&share))) return;
  Feed feed(args, slot, places + warp);
  feed.start(args.pass, share.unit, share.unit_begin, share.begin, share.end);
  Merge<Rows> merge(args, merge_layout(warps, N, device.dv, gridDim.x), reinterpret_cast<float*>(shared + layout.merge));
  Rows rows(args);

  Pass pass = args.pass;
  int number = share.unit, end_number = 0;
  int64_t begin = share.unit_begin;
  bool cancelled = false, first_unit = true;
  while (true) {
    if (first_unit) {
      for (int i = 0; i < kRingSlots; ++i) feed.fill(ring);
      first_unit = false;
    }
    enter_unit(args, pass, number, unit);
    rows.start(unit);
    const bool whole = pass == Pass::again;
    const int first = whole ? 0 : unit.items.before(share.begin - begin);
    const int end = unit.items.before(whole ? INT64_MAX : share.end - begin);
#pragma unroll 1
    for (int i = first + warp; i < end; i += warps) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(ring.wait() + slot.word);
      const Tier tier = Item::tier(word);
      const int planes = tier == Tier::fp4x2 ? 2 : 1;
      typename Rows::Columns p[2];
      float second = 1;
      if (tier == Tier::fp16)
        rows.read_high(ring, unit, pass, word);
      else if (tier != Tier::none)
        second = rows.read_keys(ring, unit, pass, word, planes, p);
#pragma unroll 1
      for (int plane = 0; plane < planes; ++plane) {
        if (tier == Tier::fp4 || tier == Tier::fp4x2) rows.read_values(ring, plane == 0 ? 1.0f : second, p);
        ring.release();
        feed.fill(ring);
      }
    }
    cancelled |= merge.finish(rows, unit, pass, number, share, begin);

    if (pass != Pass::again) {
      begin += unit.items.weight();
      ++number;
      if (begin < share.end) continue;
      if (!cancelled) return;
      pass = Pass::again;
      end_number = number;
      number = share.unit;
    } else {
      if (threadIdx.x == 0) args.p.tickets[number] = 0;
      ++number;
    }
    while (number < end_number && args.p.tickets[number] != cancelled_ticket(blockIdx.x)) ++number;
    if (number == end_number) return;
    feed.start(pass, number, 0, 0, INT64_MAX);
    first_unit = true;
  }
}

}  // namespace thriftattn::cuda
