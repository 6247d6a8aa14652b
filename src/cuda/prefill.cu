// Attention of query blocks of 64 rows over pages of mixed tiers, instruction family `warp` (mma.sync m16n8k16, FP16
// with FP32 sums).
//
//   expanded pages (prefill_expand.cu) --bulk copy--> ring in shared memory
//   q --once, times a power of two a row--> FP16 fragments in shared memory
//   q, K --mma--> s (FP32) --soft-cap, mask, exp2--> p (FP16) --mma with V--> o (FP32) --> out, lse
//
// Work. A unit is a query block of one query head: 64 rows, all of which read a page in the same tier. A block of
// threads takes up to four units of one KV head, so that K and V come from L2 once for 256 rows; those with most pages
// come first. The ring gets the forms of a page that some unit reads, page by page, and a warp whose unit does not read
// one leaves it at once. Every unit reads a page in one form only, so all warps have the same work, and how far they
// may drift apart is what the ring holds.
//
// Registers. A warp has 32 rows (16 where d > 128), so that a fragment of K or V serves two products; with 16 rows the
// reads of shared memory, 16 bytes a lane and contiguous, would bind. o takes 128 registers, s of 32 tokens 32 more: q
// is read again for every 32 tokens, and what a page wants of the rest (scales, masks) is made again rather than kept.
// Code that runs once per block of threads is in small loops: fetched from afar, it costs more than it does.
//
// Cost at d = 128, per warp and 32 tokens: 368 instructions, 128 of them mma and 52 loads of 512 bytes. Bound by
// latency and by mma.sync, whose rate is six tenths of wgmma's on sm_90: the two warps of a scheduler fill each other's
// gaps.
//
// The maximum is lazy: the reference that is subtracted from a row's scores moves only where p would pass 2^14, and
// starts so that the first maximum's p is 2^6; FP16 then holds p down to 2^-30 of it. A row sum is that of p unrounded.
#include <algorithm>
#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/prefill_rows.cuh"

namespace thriftattn::cuda {
namespace prefill {
namespace {

// The last query blocks come first: they see most pages. False where there is nothing to do.
__device__ bool find_work(const Attend& a, int chunks, Work& w) {
  const int heads = a.batch.b * a.shape.h_kv, group = a.shape.group;
  const int chunk = chunks - 1 - static_cast<int>(blockIdx.x) / heads, head = static_cast<int>(blockIdx.x) % heads;
  w.sequence = head / a.shape.h_kv;
  w.g = head % a.shape.h_kv;
  const int s_q = a.batch.s_q[w.sequence];
  w.s_kv = a.cache.s_kv[a.batch.slot[w.sequence]];
  w.first = w.s_kv - s_q;
  const QueryBlocks blocks = query_blocks(s_q, w.s_kv);
  w.first_block = blocks.first_position;
  w.first_unit = chunk * a.units;
  w.units = min(a.units, blocks.count * group - w.first_unit);
  if (w.units <= 0) return false;
  const auto last_of = [&](int u) {
    return min(w.first_block + (w.first_unit + u) / group * kPageTokens + kPageTokens, w.s_kv) - 1;
  };
  const int row = max(w.first_block + w.first_unit / group * kPageTokens, w.first);
  w.first_page = visible(a.shape, row, w.s_kv).first / kPageTokens;
  w.end_page = static_cast<int>(pages_for(visible(a.shape, last_of(w.units - 1), w.s_kv).end));
  w.tail_readers = 0;
  const int tail = w.s_kv / kPageTokens * kPageTokens;
  for (int u = 0; u < kMaxUnits; ++u) {
    const int unit = w.first_unit + u;
    const int64_t at = (static_cast<int64_t>(w.sequence) * a.shape.h_q + w.g * group + unit % group) * a.max_blocks;
    w.tiers[u] = u < w.units ? a.tiers + (at + unit / group) * a.tier_words : nullptr;
    if (u < w.units && visible(a.shape, last_of(u), w.s_kv).end > tail) w.tail_readers |= 1u << u;
  }
  return true;
}

template <int D>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) attend_kernel(const __grid_constant__ Attend a, int chunks) {
  extern __shared__ __align__(128) uint8_t shared[];
  Control& c = *reinterpret_cast<Control*>(shared);
  uint8_t* ring = shared + sizeof(Control);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = a.units * Tile<D>::kUnitWarps;
  const uint32_t first_fragment = shared_address(ring) + lane * 16;

  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      init_barrier(shared_address(&c.full[i]), kFillers);
      init_barrier(shared_address(&c.empty[i]), 32 * warps);
    }
    init_barrier(shared_address(&c.refilled), 32);
    Work work;
    if (!find_work(a, chunks, work)) work.units = 0;
    c.work = work;
    c.next = c.token = c.count = 0;
    c.window_page = work.first_page / kWindow * kWindow;
  }
  if (a.cache.layout.dk != D || a.cache.layout.dv != D)
    for (int i = threadIdx.x * 16; i < a.stages * Tile<D>::kPlaceBytes; i += blockDim.x * 16)
      *reinterpret_cast<uint4*>(ring + i) = uint4{};
  before_bulk_copies();
  __syncthreads();
  const Work& work = c.work;
  if (work.units <= 0) return;
  if (warp == 0)
    for (int i = 0; i < a.stages; ++i) fill<D>(a, c, ring, i, lane);

  const int u = warp / Tile<D>::kUnitWarps, unit = work.first_unit + u,
            head = work.g * a.shape.group + unit % a.shape.group;
  const int block = work.first_block + unit / a.shape.group * kPageTokens;
  const int64_t first_row = a.batch.first_row[work.sequence];
  uint8_t* q = ring + a.stages * Tile<D>::kPlaceBytes;
  float* l_high = reinterpret_cast<float*>(q + warps * Tile<D>::kQBytes) + threadIdx.x * Warp<D>::kRows;
  Warp<D> rows(a, lane, shared_address(q + warp * Tile<D>::kQBytes) + lane * 16, l_high,
               block + warp % Tile<D>::kUnitWarps * Tile<D>::kRows, work.s_kv);
  const bool exists = u < work.units;
  if (exists) {
    rows.load_q(work.first, first_row, head);
    rows.start(head);
  }
  // Warps take turns to refill: before it leaves page j, warp j % warps waits until all have left page j - lag, which
  // as a rule they have, and fills its place. One refill comes after the other, for they share the list of what is
  // next. A parity says whether the one before is done: the one before that is, since its warp has left page j - 2.
  static_assert(kMaxStages - 2 <= 2);
  const int lag = max(1, a.stages - 2);
  int stage = 0, turn = warp, refill = warp - lag;
  for (uint32_t phase = 0;;) {
    wait(shared_address(&c.full[stage]), phase);
    const int2 entry = c.entry[stage];
    if (entry.x == kEnd) break;
    if (entry.y >> u & 1) rows.attend(first_fragment + stage * Tile<D>::kPlaceBytes, entry.x, entry.y < 0);
    if (turn-- == 0) {
      if (refill >= 0) {
        const bool before = stage < lag;
        const int place = before ? stage - lag + a.stages : stage - lag;
        wait(shared_address(&c.empty[place]), phase ^ before);
        wait(shared_address(&c.refilled), (refill + 1) % 2);
        fill<D>(a, c, ring, place, lane);
        arrive(shared_address(&c.refilled));
      }
      refill += warps;
      turn = warps - 1;
    }
    before_bulk_copies();
    arrive(shared_address(&c.empty[stage]));
    if (++stage == a.stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  if (exists) rows.finish(work.first, first_row, head);
}

// As many rows as there are warps for, unless that leaves no room to load while what came before is read.
template <int D>
PrefillConfig config_of(bool row_mass_high, int64_t shared_bytes) {
  const auto bytes_of = [&](int units, int stages) {
    const int l_high = row_mass_high ? 32 * Warp<D>::kRows * static_cast<int>(sizeof(float)) : 0;
    return static_cast<int>(sizeof(Control)) + stages * Tile<D>::kPlaceBytes +
           units * Tile<D>::kUnitWarps * (Tile<D>::kQBytes + l_high);
  };
  PrefillConfig c{};
  c.units = kMaxWarps / Tile<D>::kUnitWarps;
  while (c.units > 1 && bytes_of(c.units, 2) > shared_bytes) c.units /= 2;
  c.stages = kMaxStages;
  while (c.stages > 2 && bytes_of(c.units, c.stages) > shared_bytes) --c.stages;
  c.warps = c.units * Tile<D>::kUnitWarps;
  c.shared_bytes = bytes_of(c.units, c.stages);
  return c;
}

template <int D>
cudaError_t launch(const PrefillParams& p, const PrefillConfig& config, cudaStream_t stream) {
  Attend a{};
  a.cache = p.cache;
  a.batch = p.batch;
  a.shape = p.shape;
  a.q = p.q;
  a.out = p.out;
  a.lse = p.lse;
  a.sinks = p.sinks;
  a.row_mass_high = p.row_mass_high;
  a.tiers = p.tiers;
  a.max_blocks = p.max_blocks;
  a.tier_words = p.tier_words;
  a.expanded = expanded_pages(p);
  a.scale = std::abs(p.shape.sm_scale) * kLog2e;
  if (p.shape.softcap > 0) {
    a.to_cap = 2 * a.scale / p.shape.softcap;
    a.from_cap = p.shape.softcap / std::abs(p.shape.sm_scale);
  }
  a.units = config.units;
  a.stages = config.stages;
  if (const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(attend_kernel<D>));
      error != cudaSuccess)
    return error;
  const int64_t chunks = (static_cast<int64_t>(p.max_blocks) * p.shape.group + a.units - 1) / a.units;
  const int64_t blocks = chunks * p.batch.b * p.shape.h_kv;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  attend_kernel<D>
      <<<static_cast<unsigned>(blocks), 32 * config.warps, config.shared_bytes, stream>>>(a, static_cast<int>(chunks));
  return cudaGetLastError();
}

}  // namespace
}  // namespace prefill

PrefillConfig prefill_config(const DeviceLayout& layout, bool row_mass_high, int64_t shared_bytes) {
  const int channels = std::max(layout.dk, layout.dv);
  return channels <= 64    ? prefill::config_of<64>(row_mass_high, shared_bytes)
         : channels <= 128 ? prefill::config_of<128>(row_mass_high, shared_bytes)
                           : prefill::config_of<256>(row_mass_high, shared_bytes);
}

cudaError_t launch_prefill(const PrefillParams& p, cudaStream_t stream) {
  int device = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const PrefillConfig config = prefill_config(p.cache.layout, p.row_mass_high != nullptr, shared);
  const int channels = std::max(p.cache.layout.dk, p.cache.layout.dv);
  return channels <= 64    ? prefill::launch<64>(p, config, stream)
         : channels <= 128 ? prefill::launch<128>(p, config, stream)
                           : prefill::launch<256>(p, config, stream);
}

}  // namespace thriftattn::cuda
