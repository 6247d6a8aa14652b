// The eight tile registers, each 16 rows of 64 bytes: what the kernel of amx.cc asks of AMX, and the same in AVX-512.
// Included by amx.cc alone, below its choice of instruction sets.
#pragma once

namespace thriftattn::cpu {
namespace {

// All tiles are used whole, so one configuration serves every product: accumulators are [16, 16] of float, a left
// operand [16 rows, 32 depths] and a right one [16 pairs of depths, 16 lanes, 2] of BF16.
struct AmxTiles {
  static void begin() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;  // bytes of a row
      config[48 + i] = 16;      // rows
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void end() { asm volatile("tilerelease"); }

  // The compiler's intrinsics take literal numbers only and do not say that they touch memory.
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

// Sums as TDPBF16PS does: even and odd depths apart, then their sum to the accumulator, rounding each time. It differs
// in subnormal numbers alone, which AMX takes for zero.
struct EmulatedTiles {
  struct alignas(64) Tile {
    uint32_t row[16][16];
  };
  static Tile& tile(int i) {
    static thread_local Tile tiles[8];
    return tiles[i];
  }
  static void begin() {}
  static void end() {}

  template <int kTile>
  static void zero() {
    std::memset(&tile(kTile), 0, sizeof(Tile));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(tile(kTile).row[r], static_cast<const char*>(from) + r * stride, 64);
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile(kTile).row[r], 64);
  }
  template <int kSum, int kLeft, int kRight>
  static void dot() {
    const Tile &a = tile(kLeft), &b = tile(kRight);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (int m = 0; m < 16; ++m) {
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int k = 0; k < 16; ++k) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(a.row[m][k])), y = _mm512_load_si512(b.row[k]);
        even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                               _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
        odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                              _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
      }
      float* sum = reinterpret_cast<float*>(tile(kSum).row[m]);
      _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(even, odd)));
    }
  }
};

// --- products of blocks of tiles: R x C accumulators in tiles 0-3, left operands in 4-5, right ones in 6-7

template <class T, int R, int C>
void zero_sums() {
  T::template zero<0>();
  if constexpr (C > 1) T::template zero<1>();
  if constexpr (R > 1) T::template zero<2>();
  if constexpr (R > 1 && C > 1) T::template zero<3>();
}

// Accumulator (r, c) stands at from + r * row + c * column; its own rows are `stride` bytes apart.
template <class T, int R, int C>
void load_sums(const char* from, int64_t row, int64_t column, int64_t stride) {
  T::template load<0>(from, stride);
  if constexpr (C > 1) T::template load<1>(from + column, stride);
  if constexpr (R > 1) T::template load<2>(from + row, stride);
  if constexpr (R > 1 && C > 1) T::template load<3>(from + row + column, stride);
}
template <class T, int R, int C>
void store_sums(char* to, int64_t row, int64_t column, int64_t stride) {
  T::template store<0>(to, stride);
  if constexpr (C > 1) T::template store<1>(to + column, stride);
  if constexpr (R > 1) T::template store<2>(to + row, stride);
  if constexpr (R > 1 && C > 1) T::template store<3>(to + row + column, stride);
}

// sums += a b over `depth` tiles of 32 depths, those of one operand one after another. `between` is called after each:
// what it does runs on the vector units while the tiles are multiplied.
template <class T, int R, int C, class Between>
void accumulate(int depth, const char* a, int64_t a_row, const char* b, int64_t b_column, const Between& between) {
  for (int i = 0; i < depth; ++i, a += kTileBytes, b += kTileBytes) {
    T::template load<6>(b, 64);
    T::template load<4>(a, 64);
    T::template dot<0, 4, 6>();
    if constexpr (C > 1) {
      T::template load<7>(b + b_column, 64);
      T::template dot<1, 4, 7>();
    }
    if constexpr (R > 1) {
      T::template load<5>(a + a_row, 64);
      T::template dot<2, 5, 6>();
      if constexpr (C > 1) T::template dot<3, 5, 7>();
    }
    between();
  }
}

}  // namespace
}  // namespace thriftattn::cpu
