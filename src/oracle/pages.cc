#include "oracle/pages.h"

#include <algorithm>
#include <cmath>

#include "oracle/codecs.h"

namespace thriftattn::oracle {

namespace {

double max_abs(const std::vector<double>& x) {
  double amax = 0;
  for (double value : x) amax = std::max(amax, std::fabs(value));
  return amax;
}

// Encodes one plane of a page x [64, channels] with one page scale. Blocks run along channels (K) or along tokens (V).
std::vector<double> encode_plane(const Method& method, const std::vector<double>& x, int channels, bool along_tokens) {
  const int exponent = method.page_scale ? page_exponent(max_abs(x), method.format, method.scales) : 0;
  const int lines = along_tokens ? channels : kPageTokens, length = along_tokens ? kPageTokens : channels;
  const auto index = [&](int line, int i) {
    return static_cast<size_t>(along_tokens ? i * channels + line : line * channels + i);
  };
  std::vector<double> decoded(x.size());
  std::vector<float> values(static_cast<size_t>(length));
  for (int line = 0; line < lines; ++line) {
    for (int i = 0; i < length; ++i) values[static_cast<size_t>(i)] = static_cast<float>(x[index(line, i)]);
    const std::vector<double> out = quantise(method.format, method.scales, exponent, values);
    for (int i = 0; i < length; ++i) decoded[index(line, i)] = out[static_cast<size_t>(i)];
  }
  return decoded;
}

// First plane and the sum of both, where the storage keeps two: the second encodes what the first left, in FP32.
void encode_planes(const Method& method, const std::vector<double>& x, int channels, bool along_tokens,
                   std::vector<double>& first, std::vector<double>& both) {
  first = encode_plane(method, x, channels, along_tokens);
  if (method.storage != Storage::residual && method.storage != Storage::compact) return;
  std::vector<double> left(x.size());
  for (size_t i = 0; i < x.size(); ++i) left[i] = static_cast<float>(x[i]) - static_cast<float>(first[i]);
  both = encode_plane(method, left, channels, along_tokens);
  for (size_t i = 0; i < x.size(); ++i) both[i] += first[i];
}

std::vector<double> fp8(const std::vector<double>& x) {
  const double scale = static_cast<float>(max_abs(x)) / 448.0f;
  std::vector<double> out(x.size(), 0.0);
  if (scale == 0) return out;
  for (size_t i = 0; i < x.size(); ++i) {
    out[i] = scale * round_to(e4m3_values(), static_cast<float>(x[i]) / static_cast<float>(scale));
  }
  return out;
}

double rms_of_rows(const std::vector<double>& x) {
  double sum = 0;
  for (double value : x) sum += value * value;
  return std::sqrt(sum / kPageTokens);
}

std::vector<double> difference(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> out(a.size());
  for (size_t i = 0; i < a.size(); ++i) out[i] = a[i] - b[i];
  return out;
}

void summarise(const Input& input, Page& page) {
  for (int c = 0; c < input.d; ++c) {
    float sum = 0;
    double exact = 0, low = INFINITY, high = -INFINITY;
    for (int t = 0; t < kPageTokens; ++t) {
      const double k = page.k[static_cast<size_t>(t * input.d + c)];
      sum += static_cast<float>(k);
      exact += k;
      low = std::min(low, k);
      high = std::max(high, k);
    }
    double variance = 0;
    for (int t = 0; t < kPageTokens; ++t) {
      const double off = page.k[static_cast<size_t>(t * input.d + c)] - exact / kPageTokens;
      variance += off * off / kPageTokens;
    }
    page.k_mean.push_back(round_to(input.high_dtype, sum * (1.0f / 64.0f)));
    page.k_min.push_back(low);
    page.k_max.push_back(high);
    page.k_variance.push_back(static_cast<float>(variance));
  }
}

void encode(const Input& input, Page& page) {
  page.v_norm = rms_of_rows(page.v);
  if (input.method.storage == Storage::high_only) return;  // no planes, nothing reads them
  page.k_centre = input.method.centring ? page.k_mean : std::vector<double>(static_cast<size_t>(input.d), 0.0);
  std::vector<double> x(page.k.size());
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(page.k[i]) - static_cast<float>(page.k_centre[i % static_cast<size_t>(input.d)]);
  }
  encode_planes(input.method, x, input.d, false, page.k_fp4, page.k_fp4x2);
  encode_planes(input.method, page.v, input.d_v, true, page.v_fp4, page.v_fp4x2);
  if (input.method.arithmetic == Arithmetic::mma8) {
    page.k_fp8 = fp8(page.k_fp4);
    page.v_fp8 = fp8(page.v_fp4);
  }
  page.eps_k = rms_of_rows(difference(x, page.k_fp4));
  page.eps_v = rms_of_rows(difference(page.v, page.v_fp4));
}

}  // namespace

std::vector<Head> build_heads(const Input& input) {
  std::vector<Head> heads(static_cast<size_t>(input.h_kv));
  for (int h = 0; h < input.h_kv; ++h) {
    Head& head = heads[static_cast<size_t>(h)];
    for (int64_t t = 0; t < input.s_kv; ++t) {
      for (int c = 0; c < input.d; ++c) {
        head.k.push_back(round_to(input.high_dtype, input.k[(t * input.h_kv + h) * input.d + c]));
      }
      for (int c = 0; c < input.d_v; ++c) {
        head.v.push_back(round_to(input.high_dtype, input.v[(t * input.h_kv + h) * input.d_v + c]));
      }
    }
    for (int64_t j = 0; j < input.s_kv / kPageTokens; ++j) {
      Page& page = head.pages.emplace_back();
      page.k.assign(head.k.begin() + j * kPageTokens * input.d, head.k.begin() + (j + 1) * kPageTokens * input.d);
      page.v.assign(head.v.begin() + j * kPageTokens * input.d_v, head.v.begin() + (j + 1) * kPageTokens * input.d_v);
      summarise(input, page);
      encode(input, page);
    }
  }
  return heads;
}

}  // namespace thriftattn::oracle
