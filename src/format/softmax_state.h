// The state of an online softmax, in units of log2, and its merge: {m, l, o} with out = o / l and
// lse = ln 2 * (m + log2 l). The empty state is m = -inf, l = 0, o = 0.
#pragma once

#include <cmath>
#include <limits>

#include "format/codecs.h"

namespace thriftattn {

// One row's state, wherever it lives.
struct SoftmaxRow {
  float *m, *l, *l_high, *o;  // o: [d_v]
};

// a = a merged with b: associative up to rounding, exact where either is empty. o stays in FP32.
inline void merge(SoftmaxRow a, SoftmaxRow b, int d_v) {
  const float m = *a.m > *b.m ? *a.m : *b.m;
  if (*b.m == -std::numeric_limits<float>::infinity()) return;
  const float wa = *a.m == m ? 1.0f : std::exp2(*a.m - m), wb = *b.m == m ? 1.0f : std::exp2(*b.m - m);
  *a.m = m;
  *a.l = *a.l * wa + *b.l * wb;
  *a.l_high = *a.l_high * wa + *b.l_high * wb;
  for (int c = 0; c < d_v; ++c) a.o[c] = a.o[c] * wa + b.o[c] * wb;
}

}  // namespace thriftattn
