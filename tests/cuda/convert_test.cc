// The device's order of a page's words, on the host: every place is used once, the masks of a fragment give each lane
// its values, and conversion is exact both ways.
#include "cuda/convert.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace thriftattn::cuda {
namespace {

std::vector<std::pair<int, int>> head_sizes() {
  std::vector<std::pair<int, int>> sizes;
  for (int d = 16; d <= kMaxChannels; d += 16) sizes.push_back({d, d % 96 + 16});
  for (int d = 16; d <= kMaxChannels; d += 16) sizes.push_back({d % 96 + 16, d});
  return sizes;
}

TEST(DeviceLayout, EveryBitOfAnItemHasOneMeaning) {
  for (const auto& [d, d_v] : head_sizes()) {
    const DeviceLayout l = device_layout(d, d_v);
    std::vector<int> bits(static_cast<size_t>(l.item_bytes) * 8), high(static_cast<size_t>(l.high_item_bytes));
    const auto code = [&](CodePlace p) {
      ASSERT_EQ(p.word % 4, 0);
      ++bits[static_cast<size_t>(p.word * 8 + p.sign)];
      for (int i = 0; i < 3; ++i) ++bits[static_cast<size_t>(p.word * 8 + p.magnitude + i)];
    };
    std::set<int> scales;
    for (int t = 0; t < kItemTokens; ++t) {
      for (int c = 0; c < l.dk; ++c) {
        code(l.k_code(c, t));
        ASSERT_EQ(l.k_scale(c, t), l.k_scale(c / 16 * 16, t)) << "16 channels share a scale";
        scales.insert(l.k_scale(c, t));
      }
      for (int c = 0; c < l.dv; ++c) {
        code(l.v_code(c, t));
        ASSERT_EQ(l.v_scale(c, t), l.v_scale(c, t / 16 * 16)) << "16 tokens share a scale";
        scales.insert(l.v_scale(c, t));
      }
    }
    for (const int at : scales)
      for (int i = 0; i < 8; ++i) ++bits[static_cast<size_t>(at * 8 + i)];
    ASSERT_EQ(static_cast<int>(scales.size()), 2 * (l.dk + l.dv));
    for (const int uses : bits) ASSERT_EQ(uses, 1) << d << ", " << d_v;

    for (int t = 0; t < kHighItemTokens; ++t) {
      for (int c = 0; c < l.dk; ++c) ++high[static_cast<size_t>(l.high_k(c, t))];
      for (int c = 0; c < l.dv; ++c) ++high[static_cast<size_t>(l.high_v_at(c, t))];
    }
    for (size_t i = 0; i < high.size(); ++i) ASSERT_EQ(high[i], i % 2 == 0) << d << ", " << d_v;
  }
}

// A record of random codes and scales, padding zero.
std::vector<uint8_t> random_fp4(const PageLayout& l, std::mt19937& random) {
  std::vector<uint8_t> record(static_cast<size_t>(l.fp4_bytes));
  const auto fill = [&](const PlaneLayout& plane, int rows, int64_t codes, int64_t scales) {
    for (int lane = 0; lane < plane.lanes; ++lane) {
      for (int r = 0; r < rows; ++r)
        record[static_cast<size_t>(codes + plane.code_offset(r, lane))] |=
            static_cast<uint8_t>((random() & 15u) << PlaneLayout::code_shift(r));
      for (int r = 0; r < rows; r += plane.group)
        record[static_cast<size_t>(scales + plane.scale_offset(r, lane))] = static_cast<uint8_t>(random());
    }
  };
  fill(l.k, l.d, l.k_codes, l.k_scales);
  fill(l.v, kPageTokens, l.v_codes, l.v_scales);
  return record;
}

uint8_t code_at(const PlaneLayout& plane, const uint8_t* codes, int r, int lane) {
  return (codes[plane.code_offset(r, lane)] >> PlaneLayout::code_shift(r)) & 15;
}

uint32_t word_at(const uint8_t* at) {
  uint32_t word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

// Registers a0..a3 of a word of codes, as kernels take them out: two FP16 each.
void unpack(uint32_t w, uint32_t (&a)[4]) {
  constexpr uint32_t kMask = 0x8E008E00;
  a[0] = w & kMask;
  a[1] = (w << 3) & kMask;
  a[2] = ((w & 0x40384038) * 66) & kMask;
  a[3] = ((w & 0x20072007) * 516) & kMask;
}

// Row and place in the contraction of half `odd` of register a of lane, in a 16 x 16 fragment of A.
int row_of(int lane, int a) { return lane / 4 + a % 2 * 8; }
int depth_of(int lane, int a, int odd) { return lane % 4 * 2 + odd + a / 2 * 8; }

TEST(DeviceLayout, MasksGiveEachLaneItsCodes) {
  std::mt19937 random(5);
  for (const auto& [d, d_v] : head_sizes()) {
    const PageLayout page = page_layout(d, d_v, Fp4Format::nvfp4, true, false, false);
    const DeviceLayout l = device_layout(d, d_v);
    const std::vector<uint8_t> canonical = random_fp4(page, random);
    std::vector<uint8_t> device(static_cast<size_t>(l.fp4_bytes));
    to_device_fp4(page, l, canonical.data(), device.data());
    for (int item = 0; item < kPageTokens / kItemTokens; ++item)
      for (int block = 0; block < (l.dk + l.dv) / 32; ++block)
        for (int lane = 0; lane < 32; ++lane)
          for (int w = 0; w < 4; ++w) {
            const bool is_v = block >= l.dk / 32;
            const int c0 = (is_v ? block - l.dk / 32 : block) * 32;
            uint32_t a[4];
            unpack(word_at(device.data() + item * l.item_bytes + block * 512 + lane * 16 + w * 4), a);
            for (int i = 0; i < 4; ++i)
              for (int odd = 0; odd < 2; ++odd) {
                // Tile w / 2 of 16 rows; k 0-7 are depths 8 (w % 2) + ... of the first 16, k 8-15 of the second.
                const int row = w / 2 * 16 + row_of(lane, i), k = depth_of(lane, i, odd);
                const int depth = k / 8 * 16 + w % 2 * 8 + k % 8;
                const int channel = c0 + (is_v ? row : depth), token = item * 32 + (is_v ? depth : row);
                const bool padding = channel >= (is_v ? d_v : d);
                const uint8_t code = padding ? uint8_t{0}
                                     : is_v  ? code_at(page.v, canonical.data() + page.v_codes, token, channel)
                                             : code_at(page.k, canonical.data() + page.k_codes, channel, token);
                const float got = f16_decode(static_cast<uint16_t>(a[i] >> 16 * odd)) * 0x1p14f;
                ASSERT_EQ(bits_of(got), bits_of(e2m1_decode(code))) << d << ", " << d_v << ", lane " << lane;
              }
          }
  }
}

TEST(DeviceLayout, SixteenBitItemsAreFragments) {
  std::mt19937 random(6);
  for (const auto& [d, d_v] : head_sizes()) {
    const PageLayout page = page_layout(d, d_v, Fp4Format::nvfp4, true, false, false);
    const DeviceLayout l = device_layout(d, d_v);
    std::vector<uint8_t> canonical(static_cast<size_t>(page.high_bytes)), device(static_cast<size_t>(l.high_bytes));
    for (uint8_t& byte : canonical) byte = static_cast<uint8_t>(random());
    to_device_high(page, l, canonical.data(), kPageTokens, device.data());
    const auto value = [&](int64_t at) {
      uint16_t bits;
      std::memcpy(&bits, canonical.data() + 2 * at, sizeof(bits));
      return bits;
    };
    for (int item = 0; item < kPageTokens / kHighItemTokens; ++item)
      for (int block = 0; block < (l.dk + l.dv) / 32; ++block)
        for (int lane = 0; lane < 32; ++lane)
          for (int w = 0; w < 4; ++w)
            for (int odd = 0; odd < 2; ++odd) {
              const bool is_v = block >= l.dk / 32;
              const int c0 = (is_v ? block - l.dk / 32 : block) * 32;
              const uint32_t word = word_at(device.data() + item * l.high_item_bytes + block * 512 + lane * 16 + w * 4);
              const auto got = static_cast<uint16_t>(word >> 16 * odd);
              // K: rows are the item's 8 tokens, words a0, a2 of k-step 0 and of 1. V: words a0, a1 of two channel
              // tiles.
              const int token = item * 8 + (is_v ? lane % 4 * 2 + odd : lane / 4);
              const int channel =
                  is_v ? c0 + w / 2 * 16 + row_of(lane, w % 2) : c0 + w % 2 * 16 + w / 2 * 8 + lane % 4 * 2 + odd;
              if (channel >= (is_v ? d_v : d)) {
                ASSERT_EQ(got, 0);
              } else {
                ASSERT_EQ(got, value(is_v ? page.high_v_at(token, channel) : page.high_k_at(token, channel)));
              }
            }
  }
}

TEST(Convert, GivesBackWhatItTook) {
  std::mt19937 random(7);
  for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4})
    for (const auto& [d, d_v] : head_sizes()) {
      const PageLayout page = page_layout(d, d_v, format, true, false, false);
      const DeviceLayout l = device_layout(d, d_v);
      const std::vector<uint8_t> fp4 = random_fp4(page, random);
      std::vector<uint8_t> device(static_cast<size_t>(l.fp4_bytes), 0xff), back(fp4.size(), 0xff);
      to_device_fp4(page, l, fp4.data(), device.data());
      to_canonical_fp4(l, page, device.data(), back.data());
      ASSERT_EQ(back, fp4) << d << ", " << d_v;

      std::vector<uint8_t> high(static_cast<size_t>(page.high_bytes)), high_back(high.size(), 0xff);
      for (uint8_t& byte : high) byte = static_cast<uint8_t>(random());
      device.assign(static_cast<size_t>(l.high_bytes), 0xff);
      to_device_high(page, l, high.data(), kPageTokens, device.data());
      to_canonical_high(l, page, device.data(), high_back.data());
      ASSERT_EQ(high_back, high) << d << ", " << d_v;
    }
}

TEST(Convert, AScaleOf32StandsTwice) {
  const PageLayout page = page_layout(48, 32, Fp4Format::mxfp4, true, false, false);
  const DeviceLayout l = device_layout(48, 32);
  std::mt19937 random(8);
  const std::vector<uint8_t> fp4 = random_fp4(page, random);
  std::vector<uint8_t> device(static_cast<size_t>(l.fp4_bytes));
  to_device_fp4(page, l, fp4.data(), device.data());
  for (int t = 0; t < kPageTokens; ++t) {
    const uint8_t* item = device.data() + t / kItemTokens * l.item_bytes;
    for (int c = 0; c < l.dk; ++c)
      ASSERT_EQ(item[l.k_scale(c, t % kItemTokens)],
                fp4[static_cast<size_t>(page.k_scales + page.k.scale_offset(c, t))]);
    for (int c = 0; c < l.dv; ++c)
      ASSERT_EQ(item[l.v_scale(c, t % kItemTokens)],
                fp4[static_cast<size_t>(page.v_scales + page.v.scale_offset(t, c))]);
  }
}

TEST(Convert, NothingFollowsTheTokensOfATail) {
  const PageLayout page = page_layout(32, 48, Fp4Format::nvfp4, true, false, false);
  const DeviceLayout l = device_layout(32, 48);
  const std::vector<uint8_t> high(static_cast<size_t>(page.high_bytes), 0xff);
  std::vector<uint8_t> device(static_cast<size_t>(l.high_bytes), 0xff);
  std::vector<uint16_t> back(high.size() / 2);
  to_device_high(page, l, high.data(), 13, device.data());
  to_canonical_high(l, page, device.data(), reinterpret_cast<uint8_t*>(back.data()));
  for (int t = 0; t < kPageTokens; ++t)
    for (int c = 0; c < page.d; ++c) ASSERT_EQ(back[static_cast<size_t>(page.high_k_at(t, c))], t < 13 ? 0xffff : 0);
}

}  // namespace
}  // namespace thriftattn::cuda
