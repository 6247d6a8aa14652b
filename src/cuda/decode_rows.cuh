// The arithmetic of one warp: N rows of a unit against one item after another.
//
//   K codes -> FP16 fragments -mma-> sums x scales -> scores -> p -transpose-> V codes -> FP16 fragments -mma-> o
//
// K and V are the A operand, 16 tokens or 16 channels at a time, q and p the B operand. 16 codes share a scale, so a
// product of 16 x 16 codes must meet its scale before it is added to others: it is multiplied in FP32.
//
//   N = 4    B is block diagonal: its columns 0-3 are the rows over the first scale group of a fragment, columns 4-7
//            the same rows over the second, zero elsewhere. Both groups share one product of full depth; a lane's
//            accumulators belong to one group (t / 2), and the halves are added at the end.
//   N >= 8   a product of depth 8 for each scale group.
//
// Scores are in units of log2. A row's reference m is an integer above -inf and p = 2^(x - v_exponent - m): the page's
// exponent of V rides on p, so that V's codes need no further factor; sums of p take it out again. A score is made as
// x + kGrid, which rounds it to a multiple of 2^-16 (more finely near -kGrid alone), so that x - v_exponent - m is
// exact and p's rounding to 16 bit is the same whatever m is: what an exchange takes out is what went in. m moves when
// a score passes it by kSlack.
#pragma once

#include <cstdint>

#include "cuda/decode_queries.cuh"
#include "cuda/mma.cuh"
#include "cuda/unpack.cuh"

namespace thriftattn::cuda {

inline constexpr float kNothing =
    -1e30f;  // m of a row that has seen nothing; never -inf, so that differences are numbers
inline constexpr float kMasked = -3e38f;  // a score that is not seen: below every m by more than a float can say
inline constexpr float kSlack = 6.0f;
inline constexpr float kLog2E = 1.4426950408889634f;

// D: channels that there are registers for. kExact: K and V have D channels, so that every loop is unrolled.
template <int D, int N, bool kExact, bool kMxfp4>
class DecodeRows {
 public:
  static constexpr bool kDiagonal = N == 4;
  static constexpr int kTiles = kDiagonal ? 1 : N / 8;          // of 8 columns of B
  static constexpr int kGroups = kDiagonal ? 1 : 2;             // scale groups that a lane multiplies by
  static constexpr int kRows = 2 * kTiles;                      // rows of a lane: row(r), r in [0, kRows)
  static constexpr int kFp4Cells = kDiagonal ? 2 : 4 * kTiles;  // of an item in FP4: a token and two rows of this lane
  static constexpr int kColumns = N, kMaxOutputs = N * D;
  static constexpr bool kExactSize = kExact;
  using Tile = float[kTiles][4];
  using Columns = uint32_t[kTiles][2];

  __device__ DecodeRows(const DecodeArgs& args, const Queries<N>& queries, Note<N>* notes)
      : args_(args),
        queries_(queries),
        notes_(notes),
        layout_(record_layout<D, kExact>(args)),
        g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4) {}

  // The tile's row of this lane's r-th column pair element.
  __device__ int row(int r) const { return kDiagonal ? 2 * (t_ & 1) + r : r / 2 * 8 + 2 * t_ + r % 2; }

  // The softmax starts anew.
  __device__ void start() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) m[r] = kNothing, l[r] = 0, l_high[r] = 0;
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[i][tile][e] = 0;
  }

  // The tile's rows of q, which the CTA has loaded.
  __device__ void take_queries() {
#pragma unroll
    for (int w = 0; w < D / 16; ++w)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = w / 2 * 32 + half * 16 + w % 2 * 8 + 2 * t_, row = kDiagonal ? g_ % 4 : tile * 8 + g_;
          const bool wanted = (!kDiagonal || half == g_ / 4) && (kExact || channel < layout_.dk);
          q_[w][tile][half] = wanted ? queries_.row(row, 0)[channel / 2] : 0;
        }
  }

  // The next item in the ring; returns how many slots it took.
  __device__ int read(Ring& ring, const Segment& segment) {
    const uint32_t number = read_;
    const Note<N>& note = notes_[number % kNotes];
    uint32_t word = note.word;
    if (word & Note<N>::kWait) {
      word ^= Note<N>::kWait;
      copies_done();
      __syncwarp();
      put_means<D, N, kExact>(args_, queries_, notes_, number);
    }
    const uint32_t exponents = note.exponents;
    const uint8_t* slot = ring.wait();
    word = __shfl_sync(~0u, word, 0);  // it is the same in all lanes, and the compiler is to know it
    int planes = 1;
    if (const Tier tier = Item::tier(word); tier == Tier::fp4) {
      read_fp4<false>(slot, nullptr, exponents, note.q_mean, segment, word);
    } else if (tier == Tier::fp4x2) {
      read_fp4<true>(slot, ring.wait(1), exponents, note.q_mean, segment, word);
      planes = 2;
    } else if (tier == Tier::fp16) {
      read_high(slot, exponents, segment, word);
    }
    ++read_;
    ring.release(planes);
    return planes;
  }

  // l and l_high of the whole warp, in every lane.
  __device__ void add_lanes() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      l[r] = sum_tokens(l[r]);
      l_high[r] = sum_tokens(l_high[r]);
    }
  }

  // put(r, channel, value) for every sum of o that falls to this lane; value is in units of codes.
  template <class Put>
  __device__ void each_output(const Put& put) const {
    for_blocks(layout_.dv, [&](int i) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float(&s)[4] = o[2 * i + half][tile];
          const int channel = 32 * i + 16 * half + g_;
          if constexpr (kDiagonal) {
#pragma unroll
            for (int e = 0; e < 2; ++e) put(e, channel + t_ / 2 * 8, add_halves(s[e], s[2 + e]));
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) put(2 * tile + e % 2, channel + e / 2 * 8, s[e]);
          }
        }
    });
  }

  // One lane of those that share the rows row(0..kRows).
  __device__ bool speaks_for_rows() const { return g_ == 0 && (!kDiagonal || t_ < 2); }

  float m[kRows], l[kRows], l_high[kRows];  // l, l_high: of this lane's tokens; l_high: its part above fp4
  float o[D / 16][kTiles][4];               // in units of codes: 2^-14 of what it means

 private:
  // An item of 32 tokens, in one plane or in two. Of one in two planes that is to be taken out, what its first plane
  // alone says is, and what both do is put in.
  template <bool kTwoPlanes>
  __device__ void read_fp4(const uint8_t* first, const uint8_t* second, uint32_t exponents, const float* q_mean,
                           const Segment& segment, uint32_t word) {
    const bool is_exchange = kTwoPlanes && Item::taken_out(word);
    const auto token = [this](int cell) {
      return kDiagonal ? t_ / 2 * 16 + cell * 8 + g_ : cell / kTiles % 2 * 16 + cell / kTiles / 2 * 8 + g_;
    };
    uint32_t p[kFp4Cells], p_out[kFp4Cells];
    float sum[kRows], m_out[kRows], weight;
    float sums[2][kTiles][4] = {};  // [ml]: of tokens 16 ml + g and 16 ml + 8 + g
    float scale = args_.code_scale * exp2_fast(-exponent_of(exponents, 0));
#pragma unroll 1
    for (const uint8_t* slot = first;;) {
      multiply(
          slot, slot + layout_.k_scales, layout_.dk, [this](int i, int j) -> const Columns& { return q_[2 * i + j]; },
          [&sums](int, int half) -> Tile& { return sums[half]; });
      const bool is_whole = !kTwoPlanes || slot != first;
      if (is_whole || is_exchange) {
        float x[kFp4Cells][2];
        if constexpr (kDiagonal) {
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) x[j][e] = add_halves(sums[0][0][2 * j + e], sums[1][0][2 * j + e]);
        } else {
          each([&](int ml, int tile, int e) { x[(e / 2 * 2 + ml) * kTiles + tile][e % 2] = sums[ml][tile][e]; });
        }
        // Rows that do not exist may have any mean: nobody reads what becomes of them.
        float base[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) base[r] = q_mean[row(r)];
        const uint32_t in_or_out = is_whole && is_exchange ? word & ~Item::kTakenOut : word;
        weight = absorb<kFp4Cells>(segment, in_or_out, scale, base, exponent_of(exponents, 2), token, x, p, sum);
      }
      if (is_whole) break;
      if (is_exchange) {
#pragma unroll
        for (int i = 0; i < kFp4Cells; ++i) p_out[i] = p[i];
#pragma unroll
        for (int r = 0; r < kRows; ++r) m_out[r] = m[r];
      }
      const float exponent = exponent_of(exponents, 1);
      const float factor = exp2_fast(fmaxf(-126.0f, fminf(exponent - exponent_of(exponents, 0), 126.0f)));
      each([&](int ml, int tile, int e) { sums[ml][tile][e] *= factor; });
      scale = args_.code_scale * exp2_fast(-exponent);
      slot = second;
    }

    add_values<kTwoPlanes>(first, second, exponents, is_exchange, p, p_out, m_out);
    if constexpr (kTwoPlanes)
#pragma unroll
      for (int r = 0; r < kRows; ++r) l_high[r] += weight * sum[r];
  }

  // To o the products of p and V, of both planes, and of an exchange those of p_out, which has m_out, and V's first.
  template <bool kTwoPlanes>
  __device__ void add_values(const uint8_t* first, const uint8_t* second, uint32_t exponents, bool is_exchange,
                             uint32_t (&p)[kFp4Cells], const uint32_t (&p_out)[kFp4Cells],
                             const float (&m_out)[kRows]) {
#pragma unroll 1
    for (const uint8_t* slot = first;;) {
      Columns columns[2];  // B operands: p of tokens 8j + {0..7, 16..23}
      if constexpr (kDiagonal) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t y = transpose_8x8(p[j]);
          columns[j][0][0] = g_ < 4 ? y : 0;
          columns[j][0][1] = g_ < 4 ? 0 : y;
        }
      } else {
#pragma unroll
        for (int cell = 0; cell < kFp4Cells; ++cell)
          columns[cell / kTiles / 2][cell % kTiles][cell / kTiles % 2] = transpose_8x8(p[cell]);
      }
      multiply(
          slot + layout_.v_codes, slot + layout_.v_scales, layout_.dv,
          [&columns](int, int j) -> const Columns& { return columns[j]; },
          [this](int i, int half) -> Tile& { return o[2 * i + half]; });
      if (!kTwoPlanes) break;
      if (slot != second) {
        // p carries the exponent of the first plane's V. The second one's is larger, but where it is all zero.
        const float factor = exp2_fast(fminf(exponent_of(exponents, 2) - exponent_of(exponents, 3), 0.0f));
#pragma unroll
        for (int i = 0; i < kFp4Cells; ++i) p[i] = multiply_half2(p[i], pack_half2(factor, factor));
        slot = second;
      } else if (!is_exchange) {
        break;
      } else {
#pragma unroll
        for (int i = 0; i < kFp4Cells; ++i) {
          const int r = i % kTiles * 2;
          p[i] = multiply_half2(p_out[i], pack_half2(exp2_fast(m_out[r] - m[r]), exp2_fast(m_out[r + 1] - m[r + 1])));
        }
        slot = second = first;  // the last one
        is_exchange = false;
      }
    }
  }

  // An item of 8 tokens in 16 bit.
  __device__ void read_high(const uint8_t* slot, uint32_t exponents, const Segment& segment, uint32_t word) {
    const float exponent = exponent_of(exponents, 2);
    float sums[kTiles][4] = {};
    const int lane = threadIdx.x % 32;
    for_blocks(layout_.dk, [&](int i) {
      const uint4 w = *reinterpret_cast<const uint4*>(slot + i * 512 + lane * 16);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        mma_16x8x16(sums[tile], w.x, 0, w.y, 0, q_[2 * i][tile][0], q_[2 * i][tile][1]);
        mma_16x8x16(sums[tile], w.z, 0, w.w, 0, q_[2 * i + 1][tile][0], q_[2 * i + 1][tile][1]);
      }
    });
    float x[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[tile][e] = sums[tile][e];
        if constexpr (kDiagonal) x[tile][e] += __shfl_xor_sync(~0u, x[tile][e], 2);
      }
    float base[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) base[r] = kGrid;
    uint32_t p[kTiles];
    float sum[kRows];
    const float weight = absorb<kTiles>(
        segment, word, args_.score_scale, base, exponent, [this](int) { return g_; }, x, p, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) l_high[r] += weight * sum[r];
    uint32_t columns[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      columns[tile] = transpose_8x8(p[tile]);
      if (kDiagonal && g_ >= 4) columns[tile] = 0;
    }
    const float scale = exp2_fast(exponent) / kCodeScale;  // o is in units of codes
    for_blocks(layout_.dv, [&](int i) {
      const uint4 w = *reinterpret_cast<const uint4*>(slot + layout_.high_v + i * 512 + lane * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          float sum[4] = {};
          mma_16x8x8(sum, half == 0 ? w.x : w.z, half == 0 ? w.y : w.w, columns[tile]);
#pragma unroll
          for (int e = 0; e < 4; ++e) o[2 * i + half][tile][e] += scale * sum[e];
        }
    });
  }

  // action(i, tile, e) for all of [2][kTiles][4].
  template <class Do>
  __device__ static void each(const Do& action) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e) action(i, tile, e);
  }

  // action(i) for every 32 channels.
  template <class Do>
  __device__ static void for_blocks(int channels, const Do& action) {
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
      if (kExact || 32 * i < channels) action(i);
  }

  // With B block diagonal, lanes t and t ^ 2 hold the sums of both scale groups for rows g (`low`) and g + 8 (`high`)
  // of A. Each keeps one of the two: t < 2 the row g, the others g + 8.
  __device__ float add_halves(float low, float high) const {
    const bool lower = t_ < 2;
    return (lower ? low : high) + __shfl_xor_sync(~0u, lower ? high : low, 2);
  }

  // Over the lanes that hold other tokens of the same rows.
  __device__ static float sum_tokens(float x) {
#pragma unroll
    for (int step = kDiagonal ? 2 : 4; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
  }

  // The same for one row of a lane's, row(r), which it chooses: rows are halved while lanes are added up. Each of the N
  // rows is some lane's below N.
  __device__ float sum_of_row(const float (&x)[kRows], int& r) const {
    float sum[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum[i] = x[i];
    r = 0;
    int rows = kRows;
#pragma unroll
    for (int step = kDiagonal ? 2 : 4; step < 32; step *= 2) {
      const bool upper = step < 4 ? t_ & step : g_ & step / 4;
      if (rows == 1) {
        sum[0] += __shfl_xor_sync(~0u, sum[0], step);
        continue;
      }
      rows /= 2;
      r += upper ? rows : 0;
#pragma unroll
      for (int i = 0; i < rows; ++i)
        sum[i] = (upper ? sum[i + rows] : sum[i]) + __shfl_xor_sync(~0u, upper ? sum[i] : sum[i + rows], step);
    }
    return sum[0];
  }

  __device__ static float max_tokens(float x) {
#pragma unroll
    for (int step = kDiagonal ? 2 : 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }

  // acc(i, half) += scale * (codes x b) over one plane's K or V, `channels` of it. Block i of 32 channels is 4
  // fragments: `half` 0 and 1 (the rows of A), j = 0 and 1 along the contraction with b(i, j).
  template <class B, class Acc>
  __device__ void multiply(const uint8_t* codes, const uint8_t* scales, int channels, const B& b, const Acc& acc) {
    constexpr int kChunk = !kExact || kTiles > 1 ? 1 : kDiagonal ? D / 32 : 2;  // blocks whose scales are made at once
    const int lane = threadIdx.x % 32, stride = (kExact ? D : channels) / 8;
    const uint8_t* own = scales + (kDiagonal ? 2 * g_ + t_ / 2 : 2 * g_) * stride;
#pragma unroll
    for (int first = 0; first < D / 32; first += kChunk) {
      if (!kExact && 32 * first >= channels) break;
      float scale[kChunk][kGroups][4];
      uint32_t words[kGroups][kChunk];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) load_words(own + group * stride + first * 4, words[group]);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
#pragma unroll
        for (int group = 0; group < kGroups; ++group) unpack_scales<kMxfp4>(words[group][i], scale[i][group]);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const uint4 w = *reinterpret_cast<const uint4*>(codes + (first + i) * 512 + lane * 16);
        multiply_pair(w.x, w.y, b(first + i, 0), b(first + i, 1), scale[i], 0, acc(first + i, 0));
        multiply_pair(w.z, w.w, b(first + i, 0), b(first + i, 1), scale[i], 2, acc(first + i, 1));
      }
    }
  }

  template <int n>
  __device__ static void load_words(const uint8_t* from, uint32_t (&words)[n]) {
    if constexpr (n == 4) {
      const uint4 w = *reinterpret_cast<const uint4*>(from);
      words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
  }

  // sums += the scales of rows g and g + 8 (at scale[group][at], [at + 1]) times the product of two fragments.
  __device__ static void multiply_pair(uint32_t w0, uint32_t w1, const Columns& b0, const Columns& b1,
                                       const float (&scale)[kGroups][4], int at, Tile& sums) {
    const Fragment a0 = unpack_codes(w0), a1 = unpack_codes(w1);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float s[4] = {};
        if constexpr (kDiagonal) {
          mma_16x8x16(s, a0.a[0], a0.a[1], a0.a[2], a0.a[3], b0[0][0], b0[0][1]);
          mma_16x8x16(s, a1.a[0], a1.a[1], a1.a[2], a1.a[3], b1[0][0], b1[0][1]);
        } else {
          mma_16x8x8(s, a0.a[2 * group], a0.a[2 * group + 1], b0[tile][group]);
          mma_16x8x8(s, a1.a[2 * group], a1.a[2 * group + 1], b1[tile][group]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[tile][e] = __fmaf_rn(scale[group][at + e / 2], s[e], sums[tile][e]);
      }
  }

  // Products of one item to p, rounded, two rows a word, and to the sums of p unrounded, times the weight returned:
  // what l has taken. A score is scale * x + base - kGrid. token(cell) counts from the item's first; rows of cell c are
  // row(c % kTiles * 2) and the next.
  template <int kCells, class Token>
  __device__ float absorb(const Segment& segment, uint32_t word, float scale, const float (&base)[kRows],
                          float v_exponent, const Token& token, float (&x)[kCells][2], uint32_t (&p)[kCells],
                          float (&sum)[kRows]) {
    each_score<kCells>([&](int i, int e, int r) { x[i][e] = __fmaf_rn(x[i][e], scale, base[r]); });
    if (word & Note<N>::kSpecial) cap_and_mask<kCells>(segment.unit, Item::token(word), token, x);
    if (kCells == kTiles && kDiagonal && t_ >= 2) x[0][0] = x[0][1] = kMasked;  // lanes without a token

    // The binary logarithm of p.
    const float shift = v_exponent + kGrid;
    const auto relative = [&](int i, int e) { return __fsub_rn(x[i][e], m[i % kTiles * 2 + e] + shift); };
    float above = relative(0, 0);
    each_score<kCells>([&](int i, int e, int) { above = fmaxf(above, relative(i, e)); });
    if (__any_sync(~0u, above > kSlack)) raise<kCells>(shift, x);

#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = i % kTiles * 2 + e;
        pair[e] = exp2_fast(relative(i, e));
        sum[r] = i < kTiles ? pair[e] : sum[r] + pair[e];
      }
      p[i] = pack_half2(pair[0], pair[1]);
    }
    if (word & Note<N>::kKeepsMass) put_mass(segment.unit, word, v_exponent, sum);
    float weight = exp2_fast(v_exponent);
    if (Item::taken_out(word)) {
      weight = -weight;
#pragma unroll
      for (int i = 0; i < kCells; ++i) p[i] ^= 0x80008000u;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) l[r] = __fmaf_rn(weight, sum[r], l[r]);
    return weight;
  }

  template <int kCells, class Token>
  __device__ void cap_and_mask(const Unit& unit, int first, const Token& token, float (&x)[kCells][2]) const {
    const int tokens = kCells == kTiles ? kHighItemTokens : kItemTokens;
    if (args_.softcap > 0) {
      const float cap = args_.softcap;
      each_score<kCells>([&](int i, int e, int) {  // tanh y = 1 - 2 / (1 + e^2y)
        const float power = exp2_fast(fminf(__fdividef((x[i][e] - kGrid) * (2 * kLog2E), cap), 126.0f));
        x[i][e] = __fadd_rn(cap - 2 * cap * reciprocal_fast(1 + power), kGrid);
      });
    }
    if (first < unit.first_common || first + tokens > unit.end_common) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int unit_row = unit.first_row + row(r), r_q = unit_row - quotient_of_small(unit_row, unit.s_q) * unit.s_q;
        const Seen seen = seen_by(args_.p.shape, unit.s_q, unit.s_kv, r_q);
#pragma unroll
        for (int i = 0; i < kCells; ++i)
          if (i % kTiles == r / 2 && (first + token(i) < seen.first || first + token(i) >= seen.end))
            x[i][r % 2] = kMasked;
      }
    }
  }

  // The exponent of a page's K, or second plane of K, V or its second plane.
  __device__ static float exponent_of(uint32_t exponents, int which) {
    return static_cast<float>(static_cast<int8_t>(exponents >> 8 * which));
  }

  // action(cell, e, r): row r of this lane is element e of the cell.
  template <int kCells, class Do>
  __device__ static void each_score(const Do& action) {
#pragma unroll
    for (int i = 0; i < kCells; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) action(i, e, i % kTiles * 2 + e);
  }

  // x: scores and `shift`.
  template <int kCells>
  __device__ void raise(float shift, const float (&x)[kCells][2]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float largest = kMasked;
#pragma unroll
      for (int i = r / 2; i < kCells; i += kTiles) largest = fmaxf(largest, x[i][r % 2]);
      const float next = fmaxf(m[r], ceilf(max_tokens(largest) - shift));
      const float factor = exp2_fast(m[r] - next);
      m[r] = next;
      l[r] *= factor;
      l_high[r] *= factor;
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int e = r % 2; e < 4; e += 2) o[i][r / 2][e] *= factor;
    }
  }

  // By one lane for each row. Rows that do not exist leave theirs where there is room for them: nobody reads it.
  __device__ void put_mass(const Unit& unit, uint32_t word, float exponent, const float (&sum)[kRows]) const {
    const DecodeParams& p = args_.p;
    int r;
    const float mass = sum_of_row(sum, r);
    float reference = m[0];
#pragma unroll
    for (int i = 1; i < kRows; ++i) reference = i == r ? m[i] : reference;
    const uint32_t at = static_cast<uint32_t>(unit.first_row + row(r)),
                   row_stride = static_cast<uint32_t>(p.row_stride);
    if (g_ >= N / 4 || (N > 4 && at >= row_stride)) return;
    const uint64_t part = static_cast<uint32_t>(Item::token(word)) >> args_.mass_shift;
    float* to =
        p.page_mass + (uint64_t{args_.mass_stride} * static_cast<uint32_t>(unit.index) + part * row_stride + at);
    *to = reference + exponent + log2_fast(mass);
    if (keeps_eighths(args_) && Item::tier(word) != Tier::fp16)
#pragma unroll 1
      for (int i = 1; i < kItemTokens / kHighItemTokens; ++i) *(to += row_stride) = NAN;
  }

  const DecodeArgs& args_;
  const DeviceLayout layout_;
  const Queries<N> queries_;
  Note<N>* notes_;
  uint32_t read_ = 0;  // items since the begin
  uint32_t q_[D / 16][kTiles][2];
  int g_, t_;
};

}  // namespace thriftattn::cuda
