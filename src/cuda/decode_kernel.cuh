// Decode and verify steps: attention of a few rows over a paged cache, the pages in FP4, FP4 in two planes and 16 bit.
//
//   pages --bulk copies--> a ring of 2 slots per warp --unpack--> FP16 fragments --mma--> scores --exp2--> p --mma--> o
//                                                                                          warps, then CTAs: merged
//
// One CTA of 12 warps per multiprocessor; each warp reads items of its own (decode_units.cuh) and knows nothing of the
// others until the CTA's part of a unit ends. Memory: 9216 bytes of a page of 64 tokens and one head at d = 128, and
// its exponents and mean, 272 bytes. Shared memory then: rings 111 KB, notes 25 KB, merge 33 KB.
// An item of 32 tokens takes about 590 instructions of a warp, 440 of them in the two products: 2.3 for each of a
// lane's 256 codes. Binds on DRAM where there is much to read; on its set-up and merge, 8 us, where there is little.
#pragma once

#include <cstdint>

#include "cuda/decode_merge.cuh"

namespace thriftattn::cuda {

// The kernel for 4, 8 or 16 rows at once (d256: 4 or 8), one source file each so that they compile side by side. One
// for each format, too: together they would take twice the instruction cache.
const void* decode_kernel_d128(int columns, Fp4Format format);
const void* decode_kernel_d256(int columns, Fp4Format format);

// Eight where a lane holds so much of q and o that twelve would not have the registers.
THRIFTATTN_HD constexpr int max_warps(int d_bucket, int columns) { return d_bucket == 128 && columns <= 8 ? 12 : 8; }

THRIFTATTN_HD constexpr int slot_bytes(const DeviceLayout& layout) {
  return layout.item_bytes > layout.high_item_bytes ? layout.item_bytes : layout.high_item_bytes;
}

THRIFTATTN_HD constexpr int ring_bytes(const DeviceLayout& layout) {
  return static_cast<int>(kRingSlots) * Ring::stride(slot_bytes(layout));
}

// Offsets in dynamic shared memory; rings are at 0. Segments: two of each warp, and the CTA's first.
struct SharedLayout {
  int notes, queries, merge, scan, share, segments, bytes;
};
THRIFTATTN_HD constexpr SharedLayout shared_layout(const DeviceLayout& layout, int columns, int warps, int blocks) {
  SharedLayout s{};
  s.notes = warps * ring_bytes(layout);
  s.queries = s.notes + warps * kNotes * (16 + 4 * columns);
  s.merge = s.queries + queries_bytes(columns, layout.dk);
  s.scan = static_cast<int>(
      round_up(s.merge + merge_layout(warps, columns, layout.dv, blocks).floats * static_cast<int>(sizeof(float)), 16));
  s.share = s.scan + static_cast<int>(round_up(warps * 4, 8));
  s.segments = s.share + static_cast<int>(sizeof(Share));
  s.bytes = s.segments + (2 * warps + 1) * static_cast<int>(sizeof(Segment));
  return s;
}

template <int D, int N, bool kMxfp4>
__global__ void __launch_bounds__(32 * max_warps(D, N), 1) decode_kernel(const __grid_constant__ DecodeArgs args) {
  using Rows = DecodeRows<D, N, D == 128, kMxfp4>;
  extern __shared__ __align__(128) uint8_t shared[];
  const DeviceLayout device = record_layout<D, D == 128>(args);
  // The same in all lanes, and the compiler is to know it: addresses made of it can stay out of the lanes' registers.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), warps = blockDim.x / 32;
  const SharedLayout layout = shared_layout(device, N, warps, gridDim.x);
  const Queries<N> queries{reinterpret_cast<uint32_t*>(shared + layout.queries), device.dk};
  Share& share = *reinterpret_cast<Share*>(shared + layout.share);
  Segment* segments = reinterpret_cast<Segment*>(shared + layout.segments);
  Segment& segment = segments[2 * warp];  // that is being read; the next one is the feed's
  Note<N>* notes = reinterpret_cast<Note<N>*>(shared + layout.notes) + warp * kNotes;
  int own_ring = warp * ring_bytes(device);
  asm volatile("" : "+r"(own_ring));  // to be kept: it would be multiplied again for every slot
  Ring ring(shared + own_ring, slot_bytes(device));
  Segment& first_segment = segments[2 * warps];
  // A share is found from lengths, and from counts where pages are listed. Lengths are made by begin_step, end_step,
  // cut and write, none of which lets another kernel start before its own end, so they are there; lists that are not
  // given may be made by the kernel ahead, which did, as q, states and the pages of this step's tokens may be.
  const bool waits_for_lists = args.p.promote == Promote::listed && !args.p.lists.given;
  const auto follow = [] {
    wait_for_previous_kernel();
    let_next_kernel_start();
  };
  if (waits_for_lists) follow();
  const bool has_share = find_share(args, reinterpret_cast<uint32_t*>(shared + layout.scan), share, first_segment);
  if (!has_share) {
    follow();
    return;
  }
  Feed<N> feed(args, device, share, segments[2 * warp + 1], notes);
  feed.start(first_segment);
  copy_segment(segment, first_segment);
  Merge<Rows> merge(args, merge_layout(warps, N, device.dv, gridDim.x),
                    reinterpret_cast<float*>(shared + layout.merge));
  Rows rows(args, queries, notes);

  // On to the next segment; after all of them to the units whose exchange cancelled, whole. False where there is none.
  // The feed, which looks ahead when a warp's items end, is there already where there is one more, or at one behind it.
  const auto move_on = [&] {
    int number = segment.number + 1;
    const bool again = segment.pass == Pass::again;
    const Segment& ahead = feed.segment();
    if (!again && ahead.number == number) {
      copy_segment(segment, ahead);
      return true;
    }
    const bool is_next = !again && ahead.number > number;
    if (!is_next) {
      if (!again)
        number = first_segment.number;
      else if (threadIdx.x == 0)
        args.p.tickets[segment.number] = 0;
      while (number < share.cancelled_end && args.p.tickets[number] != cancelled_ticket(blockIdx.x)) ++number;
      if (number >= share.cancelled_end) return false;
    }
    const Pass pass = is_next ? segment.pass : Pass::again;
    const Unit unit = unit_at(args, pass, number);
    const Segment next =
        is_next ? segment_of(unit, pass, number, segment.next(), share) : whole_unit(unit, pass, number);
    __syncwarp();
    if (threadIdx.x % 32 == 0) segment = next;
    __syncwarp();
    if (!is_next) feed.start(segment);
    return true;
  };

  // q comes before the copies that it would have to wait behind: all of them behind a wait for lists, or else but the
  // first, which starts while the kernel ahead may still run.
  if (waits_for_lists) queries.load(args.p, segment.unit);
  bool begun = false;
  int left = 0;                                    // of the warp's items of the segment
  int to_fill = waits_for_lists ? kRingSlots : 1;  // slots
  while (true) {
#pragma unroll 1
    for (; to_fill > 0; --to_fill)
      feed.fill(ring, [&] {
        if (!waits_for_lists) follow();
      });
    if (left == 0) {
      do {
        if (begun) {
          merge.finish(rows, segment, share);
          if (!move_on()) return;
          if (segment.pass == Pass::again) to_fill = kRingSlots;  // the feed has begun anew
        } else if (!waits_for_lists) {
          follow();
          to_fill = kRingSlots - 1;
        }
        if (begun || !waits_for_lists) queries.load(args.p, segment.unit);
        begun = true;
        rows.start();
        __syncthreads();
        rows.take_queries();
        left = (segment.end - segment.first - warp + warps - 1) / warps;
      } while (left == 0 && to_fill == 0);
      if (to_fill > 0) continue;
    }
    to_fill = rows.read(ring, segment);
    --left;
  }
}

}  // namespace thriftattn::cuda
