// A page's records between the canonical order (format/page_layout.h) and the device's (format/device_layout.h). Exact
// both ways: only the order differs, and that MXFP4's scales of 32 stand twice on the device. Padding is zero there.
#pragma once

#include <cstdint>

#include "format/device_layout.h"
#include "format/page_layout.h"

namespace thriftattn::cuda {

// An fp4 or residual record: fp4_bytes of either layout.
void to_device_fp4(const PageLayout& from, const DeviceLayout& to, const uint8_t* canonical, uint8_t* device);
void to_canonical_fp4(const DeviceLayout& from, const PageLayout& to, const uint8_t* device, uint8_t* canonical);

// A high record: high_bytes of either layout. Of a tail only the first `tokens` are there; the device has zeros after
// them.
void to_device_high(const PageLayout& from, const DeviceLayout& to, const uint8_t* canonical, int tokens,
                    uint8_t* device);
void to_canonical_high(const DeviceLayout& from, const PageLayout& to, const uint8_t* device, uint8_t* canonical);

}  // namespace thriftattn::cuda
