// Plain tensors in FP4, blocks along the last axis: the formats by themselves, without pages. What comes back is where
// the tensors are; on a GPU the work is queued on the current stream of their framework.
#pragma once

#include <string_view>
#include <vector>

#include "tensors.h"
#include "thriftattn/method.h"

namespace thriftattn::python {

// (codes uint8 [..., n / 2], scales uint8 [..., n / block]) of x [..., n].
nb::object quantize(nb::handle x, Fp4Format format, Scales rule);

// float32 [..., n].
nb::object dequantize(nb::handle codes, nb::handle scales, Fp4Format format);

}  // namespace thriftattn::python
