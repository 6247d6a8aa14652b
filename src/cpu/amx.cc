// Attention of some rows over some pages on BF16 matrix tiles (AMX).
//
//   q --scale, round--> Q tiles                                 once per task; what rounding left over, for the means
//   page records --unpack, once per form that some head reads--> K and V tiles                        (L2, 4 pages)
//   Q tiles x K tiles --> scores [32, 64] of FP32 --+ mean, exp2--> P tiles [64, 256]                     (L1)
//   P tiles x V tiles --> O [64, d_v], FP32, loaded and stored once per 4 pages                           (L2)
//
// Rows go in groups of up to 64 of one head, four groups together, which share the unpacked pages. A (group, page) is
// 128 tile products where d = d_v = 128, 16 cycles each, and 256 registers of scores at about 13 vector instructions:
// 2048 and 1700 cycles, on different units. Measured (docs/performance.md), scores take 1800 where their products are
// 1024, P x V 1900, softmax 1900, and scores with softmax 4700: what binds is the way of tiles between L1, L2 and the
// tile registers, and of scores from tile stores to vector loads, which cannot be forwarded. The softmax of 32 rows is
// therefore laid between the products that make the next 32 rows' scores, which gains an eighth of the time where the
// core's other thread is busy and loses a twentieth where it is not. A quarter of a page's unpacking comes on top: 650.
//
// So that no row needs its maximum before its exponentials, m is a bound and not the maximum: an integer, raised to the
// row's maximum, rounded up, only where a score exceeds it by more than kSlack. p then stays below 2^kSlack, its
// rounding is relative, and raising m multiplies by powers of two, which changes no bit of p, l and o. l and the sums
// of pages add the rounded p, so that an output is a mean of values whatever the rounding.
#include "cpu/amx.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/block.h"
#include "format/page_layout.h"

namespace thriftattn::cpu {
namespace {

inline constexpr int64_t kTileBytes = 1024;
constexpr int kGroupRows = 64, kGroups = 4, kRows = kGroups * kGroupRows;  // of one batch
constexpr int kRowTiles = kGroupRows / 16;
constexpr int kPart = 32;         // rows whose scores are made together
constexpr int kStepPages = 4;     // pages between a load and a store of O
constexpr int kWindowPages = 16;  // pages whose means are multiplied together: lanes of a tile
constexpr int kForms = 3;         // of one page: fp4, fp4x2, fp16
constexpr float kSlack = 8;       // log2 of how far p may exceed 1

// Tile memory of one thread. Sizes in bytes; everything begins on a cache line.
struct Memory {
  Memory(int d, int d_v, char* memory) : depth(static_cast<int>(round_up(d, 32) / 32)), columns(d_v / 16) {
    auto at = reinterpret_cast<uintptr_t>(memory);  // a number, because sizes alone are asked for with no memory
    const auto take = [&](int64_t n) {
      const uintptr_t here = at;
      at += static_cast<uintptr_t>(round_up(n, 64));
      return reinterpret_cast<char*>(here);
    };
    const int64_t q_bytes = kGroups * kRowTiles * depth * kTileBytes;
    q = take(q_bytes);
    q_rest = take(q_bytes);
    for (char*& tiles : k) tiles = take(kPageTokens / 16 * depth * kTileBytes);
    for (char*& tiles : v) tiles = take(columns * kPageTokens / 32 * kTileBytes);
    for (char*& tiles : mean) tiles = take(depth * kTileBytes);
    p = take(kRowTiles * kStepPages * 2 * kTileBytes);
    o = take(kGroups * kRowTiles * columns * kTileBytes);
    for (float*& s : scores) s = reinterpret_cast<float*>(take(kPart * kPageTokens * sizeof(float)));
    mean_scores = reinterpret_cast<float*>(take(kRows * kWindowPages * sizeof(float)));
    l = reinterpret_cast<float*>(take(kRows * 16 * sizeof(float)));
    l_high = reinterpret_cast<float*>(take(kRows * 16 * sizeof(float)));
    m = reinterpret_cast<float*>(take(kRows * sizeof(float)));
    shift = reinterpret_cast<float*>(take(kRows * sizeof(float)));
    bound = reinterpret_cast<float*>(take(kRows * sizeof(float)));
    bytes = static_cast<int64_t>(at - reinterpret_cast<uintptr_t>(memory));
  }
  int depth, columns;  // tiles of d channels, rounded up; of d_v channels
  char *q, *q_rest;    // [groups, row tiles, depth] tiles: q rounded; what that left over
  char *k[kStepPages * kForms], *v[kStepPages * kForms];
  char* mean[2];             // [depth] tiles, a lane per page: the means rounded; what was left
  char* p;                   // [row tiles, pages, 2] tiles
  char* o;                   // [groups, row tiles, columns] tiles of float
  float* scores[2];          // [32, 64]
  float* mean_scores;        // [rows, 16 pages]
  float *l, *l_high;         // [rows, 16], to be summed
  float *m, *shift, *bound;  // [rows]: m; -m, or 0 where m is -inf; m + kSlack
  int64_t bytes;             // of all
};

}  // namespace

int64_t amx_bytes(int d, int d_v) { return Memory(d, d_v, nullptr).bytes; }

bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
}

bool has_fast_avx512_bf16() { return has_avx512_bf16() && __builtin_cpu_is("amd"); }

bool has_amx() {
  static const bool allowed = [] {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile))
      return false;
    constexpr int kArchReqXcompPerm = 0x1023, kXtileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
  }();
  return allowed;
}

}  // namespace thriftattn::cpu

// From here on functions may use what has_avx512_bf16() asks for. g++ takes the operands that its own headers leave
// undefined for a mistake.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include "cpu/amx_pages.h"  // NOLINT: needs kTileBytes
#include "cpu/amx_tiles.h"

namespace thriftattn::cpu {
namespace {

// Up to 64 rows of one head.
struct Group {
  int head, first, rows;  // first: of the task's rows
  int row_tiles() const { return (rows + 15) / 16; }
};

// A page that some head of the task reads.
struct WindowPage {
  int64_t page;
  Tier tier[kMaxHeadsPerTask];
  bool wanted[4];
};

// One page of a step as one group reads it.
struct Operand {
  const char *k, *v;
  Tier tier;
  int64_t page;
  int mean;     // its lane among the means; -1 = its tiles are whole
  bool masked;  // some row does not see all of it
};

// 2^x for x <= kSlack, relative error below 3e-6; 0 for -inf. A polynomial of degree 4 in x - floor(x), fitted for the
// smallest largest relative error.
__m512 exp2_bounded(__m512 x) {
  constexpr int kMinusFloor = 0x09;
  const __m512 f = _mm512_reduce_ps(x, kMinusFloor);
  __m512 y = _mm512_set1_ps(0.013534167916046056f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.05201146061046783f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.24144275689141184f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6930038344699927f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.000002593370694f));
  return _mm512_scalef_ps(y, x);
}

template <class T>
class Batch {
 public:
  Batch(const BlockTask& task, char* memory) : t_(task), at_(task.layout->d, task.layout->d_v, memory) {}

  void add(const Group& group) { groups_[n_groups_++] = group; }

  void run() {
    for (int g = 0; g < n_groups_; ++g) load(g);
    TierCursor cursors[kMaxHeadsPerTask];
    for (int h = 0; h < t_.heads; ++h) cursors[h].promoted = t_.promoted[h];
    WindowPage window[kWindowPages];
    int n = 0;
    for (int64_t p = t_.first_page; p < t_.end_page; ++p) {
      WindowPage& w = window[n];
      w.page = p;
      page_tiers(t_, p, cursors, w.tier, w.wanted);
      if (t_.page_m) no_mass(w);
      if (w.wanted[1] || w.wanted[2] || w.wanted[3]) ++n;
      if (n == kWindowPages || (n > 0 && p + 1 == t_.end_page)) {
        if (t_.centring) multiply_means(window, n);
        for (int i = 0; i < n; i += kStepPages) step(window, i, std::min(n, i + kStepPages));
        n = 0;
      }
    }
    for (int g = 0; g < n_groups_; ++g) store(g);
  }

 private:
  char* q_tiles(char* tiles, int g, int row_tile) const {
    return tiles + (g * kRowTiles + row_tile) * at_.depth * kTileBytes;
  }
  // The 16 channels of column tile c of row r of group g.
  float* o_at(int g, int r, int c) const {
    return reinterpret_cast<float*>(at_.o + ((g * kRowTiles + r / 16) * at_.columns + c) * kTileBytes + r % 16 * 64);
  }

  // The first 32 tokens of operand `page` in row r of P; the other 32 stand a tile on.
  char* p_at(int r, int page) const {
    const auto row = static_cast<unsigned>(r);
    return at_.p + (row / 16 * kStepPages + page) * 2 * kTileBytes + row % 16 * 64;
  }

  // --- rows in and out

  void load(int g) {
    const Group& group = groups_[g];
    const int d = t_.layout->d, d_v = t_.layout->d_v;
    const __m512 scale = _mm512_set1_ps(t_.softcap > 0 ? t_.sm_scale / t_.softcap : t_.sm_scale * kLog2e);
    for (int r = 0; r < 16 * group.row_tiles(); ++r) {
      const float* q = t_.q + static_cast<int64_t>(group.first + r) * d;
      for (int i = 0; i < at_.depth; ++i) {
        __m512 x[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int half = 0; half < 2 && r < group.rows; ++half)
          if (32 * i + 16 * half < d) x[half] = _mm512_mul_ps(_mm512_loadu_ps(q + 32 * i + 16 * half), scale);
        const int64_t place = i * kTileBytes + r % 16 * 64;
        const __m512i rounded = round(x[0], x[1]);
        _mm512_storeu_si512(q_tiles(at_.q, g, r / 16) + place, rounded);
        if (t_.centring) _mm512_storeu_si512(q_tiles(at_.q_rest, g, r / 16) + place, rest(x[0], x[1], rounded));
      }
    }
    fresh_[g] = std::all_of(t_.state.m + group.first, t_.state.m + group.first + group.rows,
                            [](float m) { return m == kMinusInf; });
    for (int r = 0; r < 16 * group.row_tiles(); ++r) {
      const int64_t row = group.first + r;
      const bool exists = r < group.rows;
      const float was = exists ? t_.state.m[row] : kMinusInf, m = std::ceil(was);
      const float shrink = was == kMinusInf ? 0.0f : std::exp2(was - m);
      set_bound(g * kGroupRows + r, m);
      _mm512_store_ps(at_.l + (g * kGroupRows + r) * 16, _mm512_setzero_ps());
      _mm512_store_ps(at_.l_high + (g * kGroupRows + r) * 16, _mm512_setzero_ps());
      if (exists) at_.l[(g * kGroupRows + r) * 16] = t_.state.l[row] * shrink;
      if (exists) at_.l_high[(g * kGroupRows + r) * 16] = t_.state.l_high[row] * shrink;
      for (int c = 0; c < at_.columns && !fresh_[g]; ++c) {
        const __m512 o = exists ? _mm512_loadu_ps(t_.state.o + row * d_v + 16 * c) : _mm512_setzero_ps();
        _mm512_store_ps(o_at(g, r, c), _mm512_mul_ps(o, _mm512_set1_ps(shrink)));
      }
    }
  }

  void store(int g) const {
    const Group& group = groups_[g];
    for (int r = 0; r < group.rows; ++r) {
      const int64_t row = group.first + r;
      const int i = g * kGroupRows + r;
      t_.state.m[row] = at_.m[i];
      t_.state.l[row] = _mm512_reduce_add_ps(_mm512_load_ps(at_.l + i * 16));
      t_.state.l_high[row] = _mm512_reduce_add_ps(_mm512_load_ps(at_.l_high + i * 16));
      for (int c = 0; c < at_.columns && !fresh_[g]; ++c)
        _mm512_storeu_ps(t_.state.o + row * t_.layout->d_v + 16 * c, _mm512_load_ps(o_at(g, r, c)));
    }
  }

  // 32 values in order.
  static __m512i round(__m512 a, __m512 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }
  // The BF16 values at even and at odd places.
  static __m512 even(__m512i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)); }
  static __m512 odd(__m512i bits) {
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __m512 back(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  static __m512i rest(__m512 a, __m512 b, __m512i rounded) {
    return round(_mm512_sub_ps(a, back(_mm512_castsi512_si256(rounded))),
                 _mm512_sub_ps(b, back(_mm512_extracti64x4_epi64(rounded, 1))));
  }

  void set_bound(int row, float m) {
    at_.m[row] = m;
    at_.shift[row] = m == kMinusInf ? 0.0f : -m;
    at_.bound[row] = m + kSlack;
  }

  // --- what a page costs nothing to say

  // A page that a head skips has no mass for it.
  void no_mass(const WindowPage& w) const {
    for (int g = 0; g < n_groups_; ++g) {
      if (w.tier[groups_[g].head] != Tier::none) continue;
      for (int r = groups_[g].first; r < groups_[g].first + groups_[g].rows; ++r)
        t_.page_m[r * t_.page_stride + w.page] = kMinusInf;
    }
  }

  // mean_scores = q.k_mean of the window's pages, in two limbs of either: relative error about 2^-16.
  void multiply_means(const WindowPage* window, int n) {
    const int d = t_.layout->d;
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(16));
    bool apart = false;
    for (int i = 0; i < n; ++i) {
      if (!window[i].wanted[static_cast<int>(Tier::fp4)] && !window[i].wanted[static_cast<int>(Tier::fp4x2)]) continue;
      apart = true;
      const uint16_t* mean = mean_of(t_, t_.pages[window[i].page]);
      for (int c = 0; c < at_.depth; ++c) {
        const __m512 x = load_high(t_.high_dtype, mean + 32 * c);
        const __m512 y = 32 * c + 16 < d ? load_high(t_.high_dtype, mean + 32 * c + 16) : _mm512_setzero_ps();
        const __m512i rounded = round(x, y);
        _mm512_i32scatter_epi32(at_.mean[0] + c * kTileBytes + 4 * i, lanes, rounded, 4);
        _mm512_i32scatter_epi32(at_.mean[1] + c * kTileBytes + 4 * i, lanes, rest(x, y, rounded), 4);
      }
    }
    if (!apart) return;
    const auto nothing = [] {};
    for (int g = 0; g < n_groups_; ++g)
      for (int r = 0; r < groups_[g].row_tiles(); ++r) {
        zero_sums<T, 1, 1>();
        accumulate<T, 1, 1>(at_.depth, q_tiles(at_.q_rest, g, r), 0, at_.mean[0], 0, nothing);
        accumulate<T, 1, 1>(at_.depth, q_tiles(at_.q, g, r), 0, at_.mean[1], 0, nothing);
        accumulate<T, 1, 1>(at_.depth, q_tiles(at_.q, g, r), 0, at_.mean[0], 0, nothing);
        char* to = reinterpret_cast<char*>(at_.mean_scores + (g * kGroupRows + 16 * r) * kWindowPages);
        store_sums<T, 1, 1>(to, 0, 0, kWindowPages * sizeof(float));
      }
  }

  // --- one step: pages [first, end) of the window, every group

  void step(const WindowPage* window, int first, int end) {
    for (int i = first; i < end; ++i)
      for (int form = 1; form <= kForms; ++form) {
        if (!window[i].wanted[form]) continue;
        const int slot = (i - first) * kForms + form - 1;
        const int64_t p = window[i].page;
        unpack_k(t_, t_.pages[p], Tier(form), at_.depth, at_.k[slot]);
        unpack_v(t_, t_.pages[p], Tier(form),
                 static_cast<int>(std::min<int64_t>(kPageTokens, t_.s_kv - p * kPageTokens)), kPageTokens / 32,
                 at_.v[slot]);
      }
    for (int g = 0; g < n_groups_; ++g) {
      Operand operands[kStepPages];
      int n = 0;
      for (int i = first; i < end; ++i) {
        const Tier tier = window[i].tier[groups_[g].head];
        if (tier == Tier::none) continue;
        const int slot = (i - first) * kForms + static_cast<int>(tier) - 1;
        operands[n++] = {at_.k[slot],
                         at_.v[slot],
                         tier,
                         window[i].page,
                         t_.centring && tier != Tier::fp16 ? i : -1,
                         !sees_all(t_, window[i].page)};
      }
      if (n == 0) continue;
      make_p(g, operands, n);
      if (groups_[g].row_tiles() > 1) multiply_p<2>(g, 0, operands, n);
      if (groups_[g].row_tiles() > 3) multiply_p<2>(g, 2, operands, n);
      if (groups_[g].row_tiles() % 2 == 1) multiply_p<1>(g, groups_[g].row_tiles() - 1, operands, n);
      fresh_[g] = false;
    }
  }

  // Scores of up to 32 rows against one page, to become p.
  struct Part {
    int g = 0, first = 0, end = 0;  // rows of the group still to do
    int row0 = 0;                   // of `scores`
    float* scores = nullptr;
    const Operand* operands = nullptr;
    int page = 0;  // of the operands
  };

  void make_p(int g, const Operand* operands, int n) {
    const int rows = groups_[g].rows;
    Part done;
    int turn = 0;
    for (int page = 0; page < n; ++page)
      for (int first = 0; first < rows; first += kPart, turn ^= 1) {
        const int end = std::min(rows, first + kPart);
        const int quota = (done.end - done.first + 4 * at_.depth - 1) / (4 * at_.depth) * 2;
        const auto between = [&] {
          if (done.first < done.end) softmax(done, std::min(done.end, done.first + quota));
        };
        const char *q = q_tiles(at_.q, g, first / 16), *k = operands[page].k;
        if (end - first > 16)
          multiply_q<2>(q, k, at_.scores[turn], between);
        else
          multiply_q<1>(q, k, at_.scores[turn], between);
        softmax(done, done.end);
        done = {g, first, end, first, at_.scores[turn], operands, page};
      }
    softmax(done, done.end);
  }

  template <int R, class Between>
  void multiply_q(const char* q, const char* k, float* scores, const Between& between) {
    const int64_t row = at_.depth * kTileBytes;
    for (int c = 0; c < kPageTokens / 16; c += 2) {
      zero_sums<T, R, 2>();
      accumulate<T, R, 2>(at_.depth, q, row, k + c * row, row, between);
      store_sums<T, R, 2>(reinterpret_cast<char*>(scores + 16 * c), 16 * kPageTokens * sizeof(float), 64,
                          kPageTokens * sizeof(float));
    }
  }

  template <int R>
  void multiply_p(int g, int row_tile, const Operand* operands, int n) {
    for (int c = 0; c < at_.columns; c += 2) {
      char* o = at_.o + ((g * kRowTiles + row_tile) * at_.columns + c) * kTileBytes;
      if (c + 1 < at_.columns)
        multiply_p<R, 2>(row_tile, c, operands, n, fresh_[g], o);
      else
        multiply_p<R, 1>(row_tile, c, operands, n, fresh_[g], o);
    }
  }
  template <int R, int C>
  void multiply_p(int row_tile, int c, const Operand* operands, int n, bool fresh, char* o) {
    constexpr int kDepth = kPageTokens / 32;
    constexpr int64_t kRow = kStepPages * kDepth * kTileBytes;
    if (fresh)
      zero_sums<T, R, C>();
    else
      load_sums<T, R, C>(o, at_.columns * kTileBytes, kTileBytes, 64);
    for (int page = 0; page < n; ++page)
      accumulate<T, R, C>(kDepth, at_.p + row_tile * kRow + page * kDepth * kTileBytes, kRow,
                          operands[page].v + c * kDepth * kTileBytes, kDepth * kTileBytes, [] {});
    store_sums<T, R, C>(o, at_.columns * kTileBytes, kTileBytes, 64);
  }

  // --- softmax

  // Rows [part.first, end) of the part.
  void softmax(Part& part, int end) {
    if (part.first >= end) return;
    const bool plain = !part.operands[part.page].masked && !(t_.softcap > 0);
    if (plain && !t_.page_m) {
      softmax_rows<true>(part, end);
    } else {
      softmax_rows<false>(part, end);
    }
    part.first = end;
  }

  // kPlain: every token is seen, no soft-cap, no page sums.
  template <bool kPlain>
  void softmax_rows(const Part& part, int end) {
    const Operand& page = part.operands[part.page];
    const Group& group = groups_[part.g];
    const int first = part.g * kGroupRows;
    const float* s = part.scores + (part.first - part.row0) * kPageTokens;
    for (int r = part.first; r < end; ++r, s += kPageTokens) {
      const int row = first + r;
      __m512 x[4];
      for (int i = 0; i < 4; ++i) x[i] = _mm512_load_ps(s + 16 * i);
      float mean = page.mean < 0 ? 0.0f : at_.mean_scores[row * kWindowPages + page.mean];
      if constexpr (!kPlain) {
        if (t_.softcap > 0) {
          for (int i = 0; i < 4; ++i) x[i] = cap(_mm512_add_ps(x[i], _mm512_set1_ps(mean)));
          mean = 0;
        }
        if (page.masked) hide(visible_tokens(t_, page.page, group.first + r), x);
      }
      const __m512 top =
          _mm512_add_ps(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])), _mm512_set1_ps(mean));
      if (_mm512_cmp_ps_mask(top, _mm512_set1_ps(at_.bound[row]), _CMP_GT_OQ) != 0)
        raise(part.g, r, part.page, _mm512_reduce_max_ps(top));
      const __m512 shift = _mm512_set1_ps(mean + at_.shift[row]);
      for (int i = 0; i < 4; ++i) x[i] = exp2_bounded(_mm512_add_ps(x[i], shift));
      char* p = p_at(r, part.page);
      const __m512i low = round(x[0], x[1]), high = round(x[2], x[3]);
      _mm512_store_si512(p, low);
      _mm512_store_si512(p + kTileBytes, high);
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(even(low), odd(low)), _mm512_add_ps(even(high), odd(high)));
      add(at_.l + row * 16, sum);
      if (page.tier > Tier::fp4) add(at_.l_high + row * 16, sum);
      if constexpr (!kPlain) {
        if (t_.page_m) {
          const int64_t at = (group.first + r) * t_.page_stride + page.page;
          t_.page_m[at] = at_.m[row];
          t_.page_l[at] = _mm512_reduce_add_ps(sum);
        }
      }
    }
  }

  static void add(float* to, __m512 x) { _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), x)); }

  static void hide(Visible seen, __m512* x) {
    const auto below = [](int64_t n) { return n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0}; };
    const uint64_t mask = below(seen.end) & ~below(seen.first);
    for (int i = 0; i < 4; ++i)
      x[i] = _mm512_mask_mov_ps(_mm512_set1_ps(kMinusInf), static_cast<__mmask16>(mask >> (16 * i)), x[i]);
  }

  // softcap * log2 e * tanh(x), from 1 - 2 / (e^2x + 1).
  __m512 cap(__m512 x) const {
    const __m512 limit = _mm512_set1_ps(40), one = _mm512_set1_ps(1);
    const __m512 y = _mm512_min_ps(
        _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(2 * kLog2e)), _mm512_sub_ps(_mm512_setzero_ps(), limit)), limit);
    const __m512 e = _mm512_add_ps(exp2_bounded(y), one);
    return _mm512_mul_ps(_mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2), e)), _mm512_set1_ps(t_.softcap * kLog2e));
  }

  // Row r of the group met a score of `top` on operand `page`: m rises above it, and l, o and the p that this step has
  // made of it so far shrink by a power of two.
  __attribute__((noinline)) void raise(int g, int r, int page, float top) {
    const int row = g * kGroupRows + r;
    const float old = at_.m[row], m = std::ceil(top);
    set_bound(row, m);
    if (old == kMinusInf) return;
    const __m512 shrink = _mm512_set1_ps(m - old > 126 ? 0.0f : std::exp2(old - m));
    const auto scale = [&](float* x) { _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), shrink)); };
    scale(at_.l + row * 16);
    scale(at_.l_high + row * 16);
    for (int c = 0; c < at_.columns; ++c) scale(o_at(g, r, c));
    for (int i = 0; i < 2 * page; ++i) {
      char* p = p_at(r, 0) + i * kTileBytes;
      const __m512i bits = _mm512_load_si512(p);
      _mm512_store_si512(p, exact_pairs(_mm512_mul_ps(even(bits), shrink), _mm512_mul_ps(odd(bits), shrink)));
    }
  }

  const BlockTask& t_;
  const Memory at_;
  Group groups_[kGroups];
  int n_groups_ = 0;
  bool fresh_[kGroups];  // nothing has been added to the group's o, which is not written yet
};

template <class T>
void attend(const BlockTask& t, Tiles& tiles) {
  T::begin();
  int h = 0, r = 0;
  while (h < t.heads) {
    Batch<T> batch(t, tiles.matrix);
    for (int i = 0; i < kGroups && h < t.heads; ++i) {
      batch.add({h, h * t.rows + r, std::min(kGroupRows, t.rows - r)});
      r += kGroupRows;
      if (r >= t.rows) {
        r = 0;
        ++h;
      }
    }
    batch.run();
  }
  T::end();
}

}  // namespace

void attend_amx(const BlockTask& task, Tiles& tiles) { attend<AmxTiles>(task, tiles); }
void attend_amx_emulated(const BlockTask& task, Tiles& tiles) { attend<EmulatedTiles>(task, tiles); }

}  // namespace thriftattn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

#else  // no x86-64

namespace thriftattn::cpu {
bool has_amx() { return false; }
bool has_avx512_bf16() { return false; }
bool has_fast_avx512_bf16() { return false; }
int64_t amx_bytes(int, int) { return 0; }
void attend_amx(const BlockTask&, Tiles&) {}
void attend_amx_emulated(const BlockTask&, Tiles&) {}
}  // namespace thriftattn::cpu
#endif
