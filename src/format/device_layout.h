// The words of a page's records on a GPU. Same codes, scales and 16-bit values as the canonical layout (page_layout.h),
// in the order in which the fragments of mma.sync m16n8k16 want them, so that a warp reads 16 bytes a lane, contiguous,
// and unpacks by masks alone. Only the order differs: conversion is exact both ways. Summary records are the same.
//
// K and V channels are padded to multiples of 32 with zero codes and zero values.
//
// An fp4 or residual record is 2 items of 32 tokens, each
//   [K codes: 16 dk][V codes: 16 dv][K scales: 2 dk][V scales: 2 dv]       4608 bytes at d = 128
// A high record is 8 items of 8 tokens, each
//   [K: 8 dk of 16 bit][V: 8 dv of 16 bit]                                 4096 bytes at d = 128
//
// A fragment of the A operand (16 rows x 16 of the contraction) is four registers a lane, g = lane / 4, t = lane % 4:
//   a0 (row g, k 2t and 2t+1)   a1 (row g+8, same k)   a2 (row g, k 8+2t and 8+2t+1)   a3 (row g+8, same k as a2)
// One 32-bit word of codes is one fragment's eight: the low half-word those of even k, the high one those of odd k. In
// a half-word, with a code written as s,eem:
//   bit 15 s(a0)  14 s(a2)  13 s(a3)  12 s(a1)   11-9 eem(a0)   8-6 eem(a1)   5-3 eem(a2)   2-0 eem(a3)
// so that with M = 0x8E008E00   a0 = w & M   a1 = (w << 3) & M   a2 = ((w & 0x40384038) * 66) & M
// a3 = ((w & 0x20072007) * 516) & M   are two FP16 values each, 2^-14 times what the codes mean.
//
// k 0-7 of a fragment belong to one scale group and k 8-15 to the next, so that a block-diagonal B keeps their sums
// apart. MXFP4's groups of 32 stand as two groups of 16 with the same scale.
#pragma once

#include <cstdint>

#include "format/page_layout.h"

namespace thriftattn {

inline constexpr int kItemTokens = 32;     // of an fp4 item
inline constexpr int kHighItemTokens = 8;  // of a 16-bit item

// A code's place: the byte offset of its 32-bit word in an item, and the bits of its sign and of its lowest magnitude
// bit there.
struct CodePlace {
  int word = 0, sign = 0, magnitude = 0;
};

struct DeviceLayout {
  int dk = 0, dv = 0;                           // padded channels
  int item_bytes = 0;                           // of 32 tokens of one plane
  int v_codes = 0, k_scales = 0, v_scales = 0;  // offsets in an item; K codes are at 0
  int64_t fp4_bytes = 0;
  int high_item_bytes = 0;  // of 8 tokens
  int high_v = 0;           // offset of V in a 16-bit item
  int64_t high_bytes = 0;

  // Of the code at [channel, token of the item].
  THRIFTATTN_HD constexpr CodePlace k_code(int channel, int token) const {
    const int k = channel % 16, row = token % 16;
    const int lane = row % 8 * 4 + k % 8 / 2, word = token / 16 * 2 + k / 8;
    return place(channel / 32 * 512 + lane * 16 + word * 4, channel % 2, row / 8 + channel % 32 / 16 * 2);
  }
  THRIFTATTN_HD constexpr CodePlace v_code(int channel, int token) const {
    const int k = token % 16, row = channel % 16;
    const int lane = row % 8 * 4 + k % 8 / 2, word = channel % 32 / 16 * 2 + k / 8;
    return place(v_codes + channel / 32 * 512 + lane * 16 + word * 4, token % 2, row / 8 + token / 16 * 2);
  }

  // Byte offset in an item of the scale of the 16 channels, or of the 16 tokens, that hold the element.
  THRIFTATTN_HD constexpr int k_scale(int channel, int token) const {
    return k_scales + (token % 8 * 2 + channel % 32 / 16) * (dk / 8) + channel / 32 * 4 + token / 8;
  }
  THRIFTATTN_HD constexpr int v_scale(int channel, int token) const {
    return v_scales + (channel % 8 * 2 + token / 16) * (dv / 8) + channel / 8;
  }

  // Byte offset in a 16-bit item. K: (a0, a2) of the fragments of channels 32i + 8j + {0..7, 16..23}, j = 0, 1. V: (a0,
  // a1) of 16 channels, two tiles of them.
  THRIFTATTN_HD constexpr int high_k(int channel, int token) const {
    const int lane = token * 4 + channel % 8 / 2;
    return channel / 32 * 512 + lane * 16 + channel % 16 / 8 * 8 + channel % 32 / 16 * 4 + channel % 2 * 2;
  }
  THRIFTATTN_HD constexpr int high_v_at(int channel, int token) const {
    const int lane = channel % 8 * 4 + token / 2;
    return high_v + channel / 32 * 512 + lane * 16 + channel % 32 / 16 * 8 + channel % 16 / 8 * 4 + token % 2 * 2;
  }

 private:
  // `a` is the register (0..3) that holds the code.
  THRIFTATTN_HD static constexpr CodePlace place(int word, int odd, int a) {
    constexpr int kSign[4] = {15, 12, 14, 13}, kMagnitude[4] = {9, 6, 3, 0};
    return {word, kSign[a] + 16 * odd, kMagnitude[a] + 16 * odd};
  }
};

THRIFTATTN_HD constexpr DeviceLayout device_layout(int d, int d_v) {
  DeviceLayout l;
  l.dk = static_cast<int>(round_up(d, 32));
  l.dv = static_cast<int>(round_up(d_v, 32));
  l.v_codes = 16 * l.dk;
  l.k_scales = l.v_codes + 16 * l.dv;
  l.v_scales = l.k_scales + 2 * l.dk;
  l.item_bytes = l.v_scales + 2 * l.dv;
  l.fp4_bytes = int64_t{kPageTokens / kItemTokens} * l.item_bytes;
  l.high_v = 2 * kHighItemTokens * l.dk;
  l.high_item_bytes = l.high_v + 2 * kHighItemTokens * l.dv;
  l.high_bytes = int64_t{kPageTokens / kHighItemTokens} * l.high_item_bytes;
  return l;
}

static_assert(device_layout(128, 128).item_bytes == 4608 && device_layout(128, 128).high_item_bytes == 4096);
static_assert(device_layout(128, 128).item_bytes % 16 == 0, "bulk copies move 16 bytes");

}  // namespace thriftattn
