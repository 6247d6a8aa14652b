// The rows of one warp of the prefill: q in, scores, softmax, values, out. prefill.cu says why it is so.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <type_traits>

#include "cuda/mma.cuh"
#include "cuda/prefill_ring.cuh"

namespace thriftattn::cuda::prefill {

inline constexpr int kNoExponent = -128;  // of a row of q that has NaN or Inf
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kUnseen = -1e30f;        // the reference of a row that has seen nothing
inline constexpr float kRoom = 14, kBelow = 6;  // log2 of the largest p, and of the first maximum's
inline constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// --- rows of the caller

// n channels (2, 4 or 8) of a row.
template <class T, int n>
struct alignas(n * sizeof(T) > 16 ? 16 : n * sizeof(T)) Channels {
  T x[n];
};

template <class T, int n>
__device__ void store(T* to, const float (&x)[n]) {
  Channels<T, n> c;
#pragma unroll
  for (int i = 0; i < n; ++i) c.x[i] = static_cast<T>(x[i]);
  if (reinterpret_cast<uintptr_t>(to) % alignof(Channels<T, n>) == 0) {
    *reinterpret_cast<Channels<T, n>*>(to) = c;
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = c.x[i];
  }
}

// Calls f with the data of rows of whatever type.
template <class Pointer, class F>
__device__ void with_type(const Rows<Pointer>& rows, const F& f) {
  constexpr bool kConst = std::is_same_v<Pointer, const void*>;
  const auto as = [&]<class T>() { f(static_cast<std::conditional_t<kConst, const T*, T*>>(rows.data)); };
  if (rows.dtype == DType::f32) return as.template operator()<float>();
  if (rows.dtype == DType::f16) return as.template operator()<__half>();
  as.template operator()<__nv_bfloat16>();
}

// --- one warp: rows of a unit

__device__ inline uint4 load_shared(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}

__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_16x8x16(c, a[0], a[1], a[2], a[3], b0, b1);
}

template <int D>
struct Warp {
  static constexpr int kRowTiles = Tile<D>::kRowTiles, kRows = 2 * kRowTiles;  // kRows: of a lane; r = 2 mt + half
  static constexpr int kChannelBlocks = D / 32;
  static constexpr int kTokens = 32, kTiles = kTokens / 8;  // at once
  using Scores = float[kRowTiles][kTiles][4];

  const Attend& a;
  const int lane;
  const uint32_t q;           // the lane's part of its first fragment in shared memory
  float* const l_high;        // [kRows], in shared memory: of a lane, where somebody asks for it
  const int position, s_kv;   // of its first row, tokens of the sequence
  const Visible seen_by_all;  // tokens that all rows see
  int exponents = 0;  // of q, a byte for a row: it was multiplied by 2^-exponent; kNoExponent where it has NaN or Inf
  float reference[kRows], l[kRows];
  float o[kRowTiles][D / 8][4];

  __device__ Warp(const Attend& attend, int lane_, uint32_t q_, float* l_high_, int position_, int tokens)
      : a(attend),
        lane(lane_),
        q(q_),
        l_high(l_high_),
        position(position_),
        s_kv(tokens),
        seen_by_all{visible(attend.shape, position_ + 16 * kRowTiles - 1, tokens).first,
                    visible(attend.shape, position_, tokens).end} {}

  // Of a row's scores, to log2.
  __device__ float scale(int r) const { return a.scale * pow2(exponent(r)); }
  __device__ int exponent(int r) const { return static_cast<int8_t>(exponents >> (8 * r)); }
  __device__ int row(int r) const { return r / 2 * 16 + r % 2 * 8 + lane / 4; }

  // Rows of q, each times a power of two that brings its largest element to 2^8, so that FP16 holds any of them. A lane
  // loads neighbouring channels, some rows at once. Channels 32i + 8j + {0, 1} + 2t and 16 more are in fragment 2i + j.
  // Rows outside [first, s_kv) are zero.
  __device__ void load_q(int first, int64_t first_row, int head) {
    constexpr int kChannels = D / 32, kAtOnce = 8;
    const int channel = lane * kChannels;
    with_type(a.q, [&]<class T>(const T* data) {
      using Some = Channels<T, kChannels>;
      data += first_row * a.q.row_stride + head * a.q.head_stride + channel;
      const bool aligned =
          (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(a.q.row_stride) * sizeof(T)) % alignof(Some) == 0;
#pragma unroll 1
      for (int from = 0; from < 16 * kRowTiles; from += kAtOnce) {
        Some x[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int p = position + from + i;
          if (p < first || p >= s_kv || channel >= a.shape.d) continue;
          const T* at = data + static_cast<int64_t>(p - first) * a.q.row_stride;
          if (aligned) {
            x[i] = *reinterpret_cast<const Some*>(at);
          } else {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) x[i].x[c] = at[c];
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float row[kChannels];
#pragma unroll
          for (int c = 0; c < kChannels; ++c) row[c] = static_cast<float>(x[i].x[c]);
          keep_q(from + i, channel, row);
        }
      }
    });
    __syncwarp();
  }

  // Row `row` of the warp's, of which a lane has the channels from `channel` on.
  template <int n>
  __device__ void keep_q(int row, int channel, const float (&x)[n]) {
    uint32_t largest = 0;  // by bits, where NaN is the largest
#pragma unroll
    for (int i = 0; i < n; ++i) largest = max(largest, bits_of(x[i]) & 0x7fffffffu);
    largest = __reduce_max_sync(~0u, largest);
    const bool finite = largest < 0x7f800000u;
    const int e = largest == 0 ? 0 : max(-90, min(120, static_cast<int>(largest >> 23) - 127 - 8));
    const float factor = !finite ? 0 : a.shape.sm_scale < 0 ? -pow2(-e) : pow2(-e);
    if (lane / 4 == row % 8) exponents |= ((finite ? e : kNoExponent) & 0xff) << (row / 8 * 8);
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const int ch = channel + i, fragment = ch / 32 * 2 + ch % 16 / 8, half = ch % 32 / 16;
      const uint32_t packed = finite ? pack_half2(x[i] * factor, x[i + 1] * factor) : 0u;
      const uint32_t to = q - lane * 16 + (fragment * kRowTiles + row / 16) * 512 + (row % 8 * 4 + ch % 8 / 2) * 16 +
                          (half * 2 + row % 16 / 8) * 4;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(packed) : "memory");
    }
  }

  // The state before the first key: empty, or a sink's.
  __device__ void start(int head) {
    const float sink = a.sinks ? a.sinks[head] * kLog2e : kUnseen;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reference[r] = fmaxf(sink, kUnseen);
      l[r] = sink > kUnseen && lane % 4 == 0 ? 1.0f : 0.0f;  // a sum is that of four lanes
      if (a.row_mass_high) l_high[r] = l[r];
    }
#pragma unroll
    for (int mt = 0; mt < kRowTiles; ++mt)
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[mt][n][e] = 0;
  }

  // s = q K^T of 32 tokens, whose first K is at `at`.
  __device__ void scores(uint32_t at, Scores& s) const {
#pragma unroll
    for (int i = 0; i < kChannelBlocks; ++i) {
      uint32_t x[2][kRowTiles][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
          const uint4 f = load_shared(q + ((i * 2 + j) * kRowTiles + mt) * 512);
          x[j][mt][0] = f.x, x[j][mt][1] = f.y, x[j][mt][2] = f.z, x[j][mt][3] = f.w;
        }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint4 k = load_shared(at + n * Tile<D>::kPage.k_item + i * 512);
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
          if (i == 0) s[mt][n][0] = s[mt][n][1] = s[mt][n][2] = s[mt][n][3] = 0;
          multiply(s[mt][n], x[0][mt], k.x, k.y);
        }
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) multiply(s[mt][n], x[1][mt], k.z, k.w);
      }
    }
  }

  // Scores of tokens from `token` on that a row does not see become -inf.
  __device__ void hide(int token, Scores& s) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Visible v = visible(a.shape, position + row(r), s_kv);
      const int first = v.first - token - lane % 4 * 2, end = v.end - token - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n * 8 + e < first || n * 8 + e >= end) s[r / 2][n][r % 2 * 2 + e] = -INFINITY;
    }
  }

  // Scores become cap * tanh(score / cap), still to be scaled.
  __device__ void cap(Scores& s) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int e = exponent(r);
      asm volatile("" : "+r"(e));  // what follows is not worth registers from page to page
      const float to = a.to_cap * pow2(e), from = a.from_cap * pow2(-e);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[r / 2][n][r % 2 * 2 + i];
          x = from -
              2 * from * reciprocal_fast(1 + exp2_fast(x * to));  // tanh y = 1 - 2 / (1 + e^2y): 2^-23 of the cap
        }
    }
  }

  // Moves row r's reference.
  __device__ void raise(int r, float to) {
    const float shrink = exp2_fast(reference[r] - to);
    reference[r] = to;
    l[r] *= shrink;
    if (a.row_mass_high) l_high[r] *= shrink;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      o[r / 2][n][r % 2 * 2] *= shrink;
      o[r / 2][n][r % 2 * 2 + 1] *= shrink;
    }
  }

  // Scores of 32 tokens as soft-cap and mask leave them, and references under which their p fit FP16.
  __device__ void settle(Scores& s, int token) {
    if (a.shape.softcap > 0) cap(s);
    if (token < seen_by_all.first || token + kTokens > seen_by_all.end) hide(token, s);
    float top[kRows];
    bool passes = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      top[r] = s[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        top[r] = fmaxf(top[r], fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
      top[r] *= scale(r);
      passes |= top[r] > reference[r] + kRoom;
    }
    if (!__any_sync(~0u, passes)) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
      if (top[r] > reference[r] + kRoom) raise(r, top[r] - kBelow);
    }
  }

  // o += p V of 32 tokens, whose first V is at `at`; p = 2^(s - reference) of the second 16 tokens is made beside the
  // products of the first.
  __device__ void values(uint32_t at, Scores& s, float (&sum)[kRows]) {
    constexpr int kParts = 2 * kRowTiles;  // of the p of 16 tokens: (8 tokens, tile of 16 rows)
    uint32_t p[kTokens / 16][kRowTiles][4];
    const auto make_p = [&](int i, int part) {
      const int mt = part / 2, n = part % 2;
      float(&x)[4] = s[mt][i * 2 + n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[e] = exp2_fast(fmaf(x[e], scale(mt * 2 + e / 2), -reference[mt * 2 + e / 2]));
        sum[mt * 2 + e / 2] += x[e];
      }
      p[i][mt][n * 2] = pack_half2(x[0], x[1]);
      p[i][mt][n * 2 + 1] = pack_half2(x[2], x[3]);
    };
#pragma unroll
    for (int part = 0; part < kParts; ++part) make_p(0, part);
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i)
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        const uint4 v = load_shared(at + i * Tile<D>::kPage.v_item + n * 512);
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) multiply(o[mt][n * 2], p[i][mt], v.x, v.y);
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) multiply(o[mt][n * 2 + 1], p[i][mt], v.z, v.w);
        if (i + 1 < kTokens / 16)
#pragma unroll
          for (int part = n * kParts / (D / 16); part < (n + 1) * kParts / (D / 16); ++part) make_p(i + 1, part);
      }
  }

  // What is in a place of the ring, from `token` on; at: the lane's part of the first fragment. `high`: it counts as
  // above fp4. 32 tokens at a time, so that there are registers for fragments under way.
  __device__ void attend(uint32_t at, int token, bool high) {
#pragma unroll 1
    for (int i = 0; i < Tile<D>::kTokens; i += kTokens) {
      Scores s;
      scores(at + i / 8 * Tile<D>::kPage.k_item, s);
      settle(s, token + i);
      float sum[kRows] = {};
      values(at + Tile<D>::kV + i / 16 * Tile<D>::kPage.v_item, s, sum);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        l[r] += sum[r];
        if (high && a.row_mass_high) l_high[r] += sum[r];
      }
    }
  }

  // Writes 8 rows at a time by way of the place of q, so that a row's channels go out together: tiles of 8 channels, 32
  // bytes, tile n of row i at n ^ i.
  __device__ void finish(int first, int64_t first_row, int head) {
    const uint32_t eight_rows = q - lane * 16;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inverse = finish_row(r, first, first_row, head);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(eight_rows + lane / 4 * D * 4 + (n ^ lane / 4) * 32 +
                                                              lane % 4 * 8),
                     "f"(o[r / 2][n][r % 2 * 2] * inverse), "f"(o[r / 2][n][r % 2 * 2 + 1] * inverse)
                     : "memory");
      __syncwarp();
      with_type(a.out, [&](auto* data) {
#pragma unroll 1
        for (int i = lane; i < 8 * D / 4; i += 32) {
          const int of_eight = i / (D / 4), channel = i % (D / 4) * 4, p = position + r * 8 + of_eight;
          if (p < first || p >= s_kv || channel >= a.shape.d_v) continue;
          const uint4 x = load_shared(eight_rows + of_eight * D * 4 + (channel / 8 ^ of_eight) * 32 + channel % 8 * 4);
          store(data + (first_row + (p - first)) * a.out.row_stride + head * a.out.head_stride + channel,
                {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)});
        }
      });
      __syncwarp();
    }
  }

  // Writes what there is one of for a row; returns the factor of its output.
  __device__ float finish_row(int r, int first, int64_t first_row, int head) const {
    const auto sum_of_four = [](float x) {
      x += __shfl_xor_sync(~0u, x, 1);
      return x + __shfl_xor_sync(~0u, x, 2);
    };
    const float mass = sum_of_four(l[r]), high = a.row_mass_high ? sum_of_four(l_high[r]) : 0;
    const bool finite = exponent(r) != kNoExponent;
    const int p = position + row(r);
    if (p >= first && p < s_kv && lane % 4 == 0) {
      const int64_t to = (first_row + (p - first)) * a.shape.h_q + head;
      if (a.lse) a.lse[to] = !finite ? kNaN : mass == 0 ? -INFINITY : (reference[r] + __log2f(mass)) * kLn2;
      if (a.row_mass_high) a.row_mass_high[to] = finite && mass > 0 ? high / mass : 0.0f;
    }
    return !finite ? kNaN : mass == 0 ? 0.0f : 1 / mass;
  }
};

}  // namespace thriftattn::cuda::prefill
