#include "cuda/convert.h"

#include <cstring>

namespace thriftattn::cuda {
namespace {

// Where the parts of one matrix, K or V as [depth, lanes], stand in an fp4 record of either order.
struct Matrix {
  const PlaneLayout& plane;
  int rows;  // depths that hold data: d, or 64
  int64_t codes, scales;
  bool is_v;

  int token(int r, int lane) const { return is_v ? r : lane; }
  int channel(int r, int lane) const { return is_v ? lane : r; }
  int item(int r, int lane) const { return token(r, lane) / kItemTokens; }

  CodePlace code_place(const DeviceLayout& l, int r, int lane) const {
    const int t = token(r, lane) % kItemTokens, c = channel(r, lane);
    return is_v ? l.v_code(c, t) : l.k_code(c, t);
  }
  int scale_place(const DeviceLayout& l, int r, int lane) const {
    const int t = token(r, lane) % kItemTokens, c = channel(r, lane);
    return is_v ? l.v_scale(c, t) : l.k_scale(c, t);
  }
};

// Calls f for both matrices.
template <class F>
void for_matrices(const PageLayout& l, const F& f) {
  f(Matrix{l.k, l.d, l.k_codes, l.k_scales, false});
  f(Matrix{l.v, kPageTokens, l.v_codes, l.v_scales, true});
}

// Calls f(offset in a canonical high record, offset in a device one) of every value of the first `tokens`.
template <class F>
void for_high(const PageLayout& canonical, const DeviceLayout& device, int tokens, const F& f) {
  for (int t = 0; t < tokens; ++t) {
    const int64_t item = int64_t{t / kHighItemTokens} * device.high_item_bytes;
    const int in_item = t % kHighItemTokens;
    for (int c = 0; c < canonical.d; ++c) f(2 * canonical.high_k_at(t, c), item + device.high_k(c, in_item));
    for (int c = 0; c < canonical.d_v; ++c) f(2 * canonical.high_v_at(t, c), item + device.high_v_at(c, in_item));
  }
}

}  // namespace

void to_device_fp4(const PageLayout& from, const DeviceLayout& to, const uint8_t* canonical, uint8_t* device) {
  std::memset(device, 0, static_cast<size_t>(to.fp4_bytes));
  for_matrices(from, [&](const Matrix& m) {
    for (int lane = 0; lane < m.plane.lanes; ++lane) {
      for (int r = 0; r < m.rows; ++r) {
        const uint8_t byte = canonical[m.codes + m.plane.code_offset(r, lane)];
        const uint32_t code = (byte >> PlaneLayout::code_shift(r)) & 15u;
        const CodePlace place = m.code_place(to, r, lane);
        uint8_t* at = device + m.item(r, lane) * int64_t{to.item_bytes} + place.word;
        uint32_t word;
        std::memcpy(&word, at, sizeof(word));
        word |= (code >> 3) << place.sign | (code & 7u) << place.magnitude;
        std::memcpy(at, &word, sizeof(word));
      }
      for (int r = 0; r < m.plane.depth; r += 16)  // also where padding belongs to a group that holds data
        device[m.item(r, lane) * int64_t{to.item_bytes} + m.scale_place(to, r, lane)] =
            canonical[m.scales + m.plane.scale_offset(r, lane)];
    }
  });
}

void to_canonical_fp4(const DeviceLayout& from, const PageLayout& to, const uint8_t* device, uint8_t* canonical) {
  std::memset(canonical, 0, static_cast<size_t>(to.fp4_bytes));
  for_matrices(to, [&](const Matrix& m) {
    for (int lane = 0; lane < m.plane.lanes; ++lane) {
      for (int r = 0; r < m.rows; ++r) {
        const CodePlace place = m.code_place(from, r, lane);
        uint32_t word;
        std::memcpy(&word, device + m.item(r, lane) * int64_t{from.item_bytes} + place.word, sizeof(word));
        const uint32_t code = (word >> place.sign & 1u) << 3 | (word >> place.magnitude & 7u);
        canonical[m.codes + m.plane.code_offset(r, lane)] |= static_cast<uint8_t>(code << PlaneLayout::code_shift(r));
      }
      for (int r = 0; r < m.rows; r += m.plane.group)
        canonical[m.scales + m.plane.scale_offset(r, lane)] =
            device[m.item(r, lane) * int64_t{from.item_bytes} + m.scale_place(from, r, lane)];
    }
  });
}

void to_device_high(const PageLayout& from, const DeviceLayout& to, const uint8_t* canonical, int tokens,
                    uint8_t* device) {
  std::memset(device, 0, static_cast<size_t>(to.high_bytes));
  for_high(from, to, tokens,
           [&](int64_t at, int64_t device_at) { std::memcpy(device + device_at, canonical + at, 2); });
}

void to_canonical_high(const DeviceLayout& from, const PageLayout& to, const uint8_t* device, uint8_t* canonical) {
  for_high(to, from, kPageTokens,
           [&](int64_t at, int64_t device_at) { std::memcpy(canonical + at, device + device_at, 2); });
}

}  // namespace thriftattn::cuda
