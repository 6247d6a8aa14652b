// A page's records between the canonical order (format/page_layout.h) and the device's (format/device_layout.h). Exact
// both ways: only the order differs, and that MXFP4's scales of 32 stand twice on the device. Padding is zero there.
//
// Every byte of the result is gathered from the other record by itself. So these run alone on the host, and as the
// threads of a block on the device: thread `first` of `step` takes every step-th part.
#pragma once

#include <cstdint>

#include "format/device_layout.h"
#include "format/page_layout.h"

namespace thriftattn::cuda {
namespace convert_detail {

// Where the parts of one matrix, K or V as [depth, lanes], stand in an fp4 record of either order.
struct Matrix {
  PlaneLayout plane;
  int rows;                        // depths that hold data: d, or 64
  int device_depth, device_lanes;  // padded: dk and 64, or 64 and dv
  int64_t codes, scales;           // offsets in a canonical record
  bool is_v;

  THRIFTATTN_HD int token(int r, int lane) const { return is_v ? r : lane; }
  THRIFTATTN_HD int channel(int r, int lane) const { return is_v ? lane : r; }
  THRIFTATTN_HD int64_t item(const DeviceLayout& l, int r, int lane) const {
    return int64_t{token(r, lane) / kItemTokens} * l.item_bytes;
  }
  THRIFTATTN_HD CodePlace code_place(const DeviceLayout& l, int r, int lane) const {
    const int t = token(r, lane) % kItemTokens, c = channel(r, lane);
    return is_v ? l.v_code(c, t) : l.k_code(c, t);
  }
  THRIFTATTN_HD int64_t scale_at(const DeviceLayout& l, int r, int lane) const {
    const int t = token(r, lane) % kItemTokens, c = channel(r, lane);
    return item(l, r, lane) + (is_v ? l.v_scale(c, t) : l.k_scale(c, t));
  }
};

THRIFTATTN_HD inline Matrix matrix_of(const PageLayout& l, const DeviceLayout& device, bool is_v) {
  return is_v ? Matrix{l.v, kPageTokens, kPageTokens, device.dv, l.v_codes, l.v_scales, true}
              : Matrix{l.k, l.d, device.dk, kPageTokens, l.k_codes, l.k_scales, false};
}

template <class T>
THRIFTATTN_HD T load(const uint8_t* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
template <class T>
THRIFTATTN_HD void store(uint8_t* to, T value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

}  // namespace convert_detail

// An fp4 or residual record: fp4_bytes of either layout.
THRIFTATTN_HD inline void to_device_fp4(const PageLayout& from, const DeviceLayout& to, const uint8_t* canonical,
                                        uint8_t* device, int first = 0, int step = 1) {
  for (const bool is_v : {false, true}) {
    const convert_detail::Matrix m = convert_detail::matrix_of(from, to, is_v);
    // A word holds the codes of depths r, r + 1, r + 16, r + 17 in lanes `lane` and lane + 8.
    const int half_lanes = m.device_lanes / 2, words = m.device_depth / 4 * half_lanes;
    for (int i = first; i < words; i += step) {
      const int lane0 = i % half_lanes / 8 * 16 + i % 8, y = i / half_lanes, r0 = y / 8 * 32 + y % 8 * 2;
      uint32_t word = 0;
      for (int code = 0; code < 8; ++code) {
        const int r = r0 + code % 2 + code / 4 * 16, lane = lane0 + code / 2 % 2 * 8;
        if (r >= m.rows || lane >= m.plane.lanes) continue;
        const uint32_t bits = (canonical[m.codes + m.plane.code_offset(r, lane)] >> PlaneLayout::code_shift(r)) & 15u;
        const CodePlace place = m.code_place(to, r, lane);
        word |= (bits >> 3) << place.sign | (bits & 7u) << place.magnitude;
      }
      convert_detail::store(device + m.item(to, r0, lane0) + m.code_place(to, r0, lane0).word, word);
    }
    for (int i = first; i < m.device_depth / 16 * m.device_lanes; i += step) {
      const int lane = i % m.device_lanes, r = i / m.device_lanes * 16;
      device[m.scale_at(to, r, lane)] =
          lane < m.plane.lanes ? canonical[m.scales + m.plane.scale_offset(r, lane)] : uint8_t{0};
    }
  }
}

THRIFTATTN_HD inline void to_canonical_fp4(const DeviceLayout& from, const PageLayout& to, const uint8_t* device,
                                           uint8_t* canonical, int first = 0, int step = 1) {
  for (const bool is_v : {false, true}) {
    const convert_detail::Matrix m = convert_detail::matrix_of(to, from, is_v);
    const auto code = [&](int r, int lane) {
      const CodePlace place = m.code_place(from, r, lane);
      const auto word = convert_detail::load<uint32_t>(device + m.item(from, r, lane) + place.word);
      return ((word >> place.sign & 1u) << 3 | (word >> place.magnitude & 7u)) << PlaneLayout::code_shift(r);
    };
    // A byte holds the codes of depths r and r + 4.
    for (int i = first; i < m.plane.code_bytes(); i += step) {
      const int lane = i % m.plane.lanes, y = i / m.plane.lanes, r = y / 4 * 8 + y % 4;
      canonical[m.codes + m.plane.code_offset(r, lane)] =
          static_cast<uint8_t>(r < m.rows ? code(r, lane) | code(r + 4, lane) : 0);
    }
    for (int i = first; i < m.plane.scale_bytes(); i += step) {
      const int lane = i % m.plane.lanes, r = i / m.plane.lanes * m.plane.group;
      canonical[m.scales + m.plane.scale_offset(r, lane)] = r < m.rows ? device[m.scale_at(from, r, lane)] : uint8_t{0};
    }
  }
}

// A high record: high_bytes of either layout. Of a tail only the first `tokens` are there; the device has zeros after
// them.
THRIFTATTN_HD inline void to_device_high(const PageLayout& from, const DeviceLayout& to, const uint8_t* canonical,
                                         int tokens, uint8_t* device, int first = 0, int step = 1) {
  for (int i = first; i < kPageTokens * (to.dk + to.dv); i += step) {
    const int t = i % kPageTokens, c = i / kPageTokens, in_item = t % kHighItemTokens;
    const bool is_v = c >= to.dk;
    const int channel = is_v ? c - to.dk : c;
    const bool holds = t < tokens && channel < (is_v ? from.d_v : from.d);
    const int64_t at = 2 * (is_v ? from.high_v_at(t, channel) : from.high_k_at(t, channel));
    convert_detail::store(device + int64_t{t / kHighItemTokens} * to.high_item_bytes +
                              (is_v ? to.high_v_at(channel, in_item) : to.high_k(channel, in_item)),
                          holds ? convert_detail::load<uint16_t>(canonical + at) : uint16_t{0});
  }
}

THRIFTATTN_HD inline void to_canonical_high(const DeviceLayout& from, const PageLayout& to, const uint8_t* device,
                                            uint8_t* canonical, int first = 0, int step = 1) {
  for (int i = first; i < kPageTokens * (to.d + to.d_v); i += step) {
    const int t = i % kPageTokens, c = i / kPageTokens, in_item = t % kHighItemTokens;
    const bool is_v = c >= to.d;
    const int channel = is_v ? c - to.d : c;
    convert_detail::store(
        canonical + 2 * (is_v ? to.high_v_at(t, channel) : to.high_k_at(t, channel)),
        convert_detail::load<uint16_t>(device + int64_t{t / kHighItemTokens} * from.high_item_bytes +
                                       (is_v ? from.high_v_at(channel, in_item) : from.high_k(channel, in_item))));
  }
}

}  // namespace thriftattn::cuda
