// Attention on the matrix tiles of AMX-BF16, as one entry of the CPU backend's list of targets.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace thriftattn::cpu {

inline constexpr const char* kAmx = "AMX";
// The same kernel over tile registers made of AVX-512, so that it is tested on machines without AMX. Far slower than
// AVX-512 by itself: it runs where it is forced and is never listed among the targets.
inline constexpr const char* kAmxEmulated = "AMX_EMULATED";

// Whether this processor has AMX-BF16 and AVX512-BF16 and the system lets this process use them: the first call asks it
// for the tile registers.
bool has_amx();
// AVX512-BF16 alone, which the emulation takes.
bool has_avx512_bf16();
// Whether vdpbf16ps runs at the rate of FMAs and so multiplies twice as fast: 3.7 G/s a core measured on AMD Zen 4.
// Intel runs a quarter of that (1.1 to 1.3 G/s measured), fewer multiply-adds than its FMAs do; it has AMX.
bool has_fast_avx512_bf16();

// Bytes of Tiles::matrix of one thread.
int64_t amx_bytes(int d, int d_v);

// As Kernels::attend, for any number of rows, kv4 only and without kept scores: q (scaled), k, v and p are rounded to
// BF16, each once, where they enter a product; sums are FP32, l is the sum of the rounded p. An FP4 page is exact
// in BF16, and its mean, kept apart, meets q in 16 bits of each.
void attend_amx(const BlockTask& task, Tiles& tiles);
void attend_amx_emulated(const BlockTask& task, Tiles& tiles);

}  // namespace thriftattn::cpu
