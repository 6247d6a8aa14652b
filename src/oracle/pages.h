// What a cache stores of every full page, by definition: 16-bit values, mean, summaries, both FP4 planes.
#pragma once

#include <cstdint>
#include <vector>

#include "oracle/oracle.h"

namespace thriftattn::oracle {

// One page of one KV head. K arrays are [64, d], V arrays [64, d_v], per-channel arrays [d].
struct Page {
  std::vector<double> k, v;    // the 16-bit values
  std::vector<double> k_mean;  // rounded to 16 bit
  std::vector<double> k_min, k_max, k_variance;
  std::vector<double> k_centre;          // k_mean under centring, else 0: what the planes do not encode
  std::vector<double> k_fp4, v_fp4;      // first plane, decoded
  std::vector<double> k_fp4x2, v_fp4x2;  // both planes, decoded and added; empty where the storage keeps one
  std::vector<double> k_fp8, v_fp8;      // the first plane as mma8 reads it; empty in other arithmetic
  double eps_k = 0, eps_v = 0;           // root mean square over tokens of the first plane's error vector
  double v_norm = 0;                     // root mean square over tokens of |v|
};

// All full pages of one KV head, and the 16-bit values of all its tokens.
struct Head {
  std::vector<double> k, v;  // [s_kv, d], [s_kv, d_v]
  std::vector<Page> pages;
};

std::vector<Head> build_heads(const Input& input);

}  // namespace thriftattn::oracle
