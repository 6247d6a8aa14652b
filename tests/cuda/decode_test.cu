// Decode and verify kernels against attention in double over the same records, under injected lists.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <span>
#include <vector>

#include "cuda/gpu.h"
#include "cuda/params.h"
#include "format/codecs.h"
#include "format/selection.h"

namespace thriftattn::cuda {
namespace {

using testing::OnDevice;

constexpr double kLog2E = 1.4426950408889634;

struct Sequence {
  int s_kv = 0, s_q = 1;
};

struct Case {
  int h_q = 4, h_kv = 1, d = 128, d_v = 128;
  std::vector<Sequence> sequences;
  Tier rest = Tier::fp4;
  Fp4Format format = Fp4Format::nvfp4;
  bool centring = true, page_scale = true;
  bool all_high = true;  // else a ring of sink, recent and tail pages
  bool residual = true;
  bool causal = true;
  int64_t window = 0;
  float softcap = 0, q_scale = 1, v_scale = 1;
  double k_shift = 1.5;  // of every seventh channel of K
  bool sinks = false;
  unsigned page_seed = 1;  // of the page ids alone
  // Tier of a listed page, or -1 for pages that are not listed.
  int (*listed)(int unit, int page) = [](int, int) { return -1; };
  DType dtype = DType::f32;
  int loud_page = -1;  // its FP4 K is far off: the score of the first row is `loud` too high
  double loud = 0;
  int blocks = 0, warps = 0;  // 0: as decode_config says
  bool at_once = false;       // DecodeConfig::exchanges_at_once
  int mass_parts = 0;
  Force force{};
  bool forced_alone = false;  // the forced pages are promoted, without a list; else those that are listed

  int group() const { return h_q / h_kv; }
  float sm_scale() const { return 1.0f / std::sqrt(static_cast<float>(d)); }
};

double uniform(uint64_t key) {
  key += 0x9e3779b97f4a7c15u;
  key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9u;
  key = (key ^ (key >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((key ^ (key >> 31)) >> 11) * 0x1p-53;
}
double normal(uint64_t a, uint64_t b, uint64_t c) {
  const uint64_t key = a * 0x100000001b3u + b * 0x10000193u * 977 + c * 2;
  return std::sqrt(-2 * std::log(uniform(key) + 1e-300)) * std::cos(6.283185307179586 * uniform(key + 1));
}
float to_f16(double x) { return f16_decode(f16_encode(static_cast<float>(x))); }

// A page of one head as every tier reads it: [64 tokens, channels].
using Matrix = std::vector<double>;
struct PageValues {
  Matrix k_high, v_high, k_fp4, v_fp4, k_planes, v_planes;
  std::vector<double> mean;
};

// One layer's cache and the inputs of a step, on the host in double and in the device's records.
struct Fixture {
  Case c;
  DeviceLayout layout;
  PageLayout canonical;
  int max_pages = 1, max_s_q = 1, row_stride, ring_pages, pages;
  std::vector<int32_t> table, slots, lengths, s_q, first_row;
  std::vector<uint8_t> fp4, residual, high, summary;
  std::vector<float> q, sinks;
  std::map<std::tuple<int, int, int>, PageValues> values;  // sequence, page, head
  int rows = 0;

  explicit Fixture(const Case& the_case) : c(the_case) {
    layout = device_layout(c.d, c.d_v);
    canonical = page_layout(c.d, c.d_v, c.format, true, false, false);
    const int b = static_cast<int>(c.sequences.size());
    int total = 0;
    for (const Sequence& s : c.sequences) {
      const int n = static_cast<int>(pages_for(s.s_kv));
      max_pages = std::max(max_pages, n + 1);
      max_s_q = std::max(max_s_q, s.s_q);
      total += n;
    }
    row_stride = static_cast<int>(round_up(c.group() * max_s_q, 4));
    ring_pages = 1 + 4;
    pages = total + 5;
    const int max_sequences = b + 1;
    table.assign(max_sequences * max_pages, -1);
    lengths.assign(max_sequences, 0);
    std::vector<int> ids(pages);
    for (int i = 0; i < pages; ++i) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), std::mt19937(c.page_seed));
    fp4.assign(pages * c.h_kv * layout.fp4_bytes, 0xff);
    residual = fp4;
    high.assign((c.all_high ? pages : max_sequences * ring_pages) * c.h_kv * layout.high_bytes, 0xff);
    summary.assign(pages * c.h_kv * canonical.summary_bytes, 0xff);
    for (int i = 0, id = 0; i < b; ++i) {
      slots.push_back(b - i);
      lengths[b - i] = c.sequences[i].s_kv;
      s_q.push_back(c.sequences[i].s_q);
      first_row.push_back(rows);
      rows += c.sequences[i].s_q;
      for (int j = 0; j < pages_for(c.sequences[i].s_kv); ++j) table[(b - i) * max_pages + j] = ids[id++];
    }
    for (int row = 0; row < rows; ++row)
      for (int h = 0; h < c.h_q; ++h)
        for (int i = 0; i < c.d; ++i) q.push_back(static_cast<float>(c.q_scale * normal(1, row * c.h_q + h, i)));
    for (float& x : q) x = c.dtype == DType::f16 ? to_f16(x) : c.dtype == DType::bf16 ? bf16_decode(bf16_encode(x)) : x;
    for (int h = 0; h < c.h_q; ++h) sinks.push_back(static_cast<float>(2 * normal(2, h, 0)));
    for (int i = 0; i < b; ++i)
      for (int j = 0; j < pages_for(c.sequences[i].s_kv); ++j)
        for (int g = 0; g < c.h_kv; ++g) make_page(i, j, g);
  }

  // Pages that have lost their 16-bit form: the first and the last two full ones keep it.
  static int released_pages(int s_kv) { return std::max(1, s_kv / kPageTokens - 2); }

  LayerCache view() const {
    LayerCache v{};
    v.layout = layout, v.canonical = canonical;
    v.max_pages = max_pages, v.h_kv = c.h_kv;
    v.all_high = c.all_high, v.sink = 1, v.ring_pages = ring_pages;
    v.format = c.format, v.centring = c.centring;
    return v;
  }

  // Encodes one plane of K or V and gives back what it means.
  Matrix encode(const Matrix& x, int channels, bool is_k, int exponent, std::vector<uint8_t>& pool, int64_t record) {
    const int group = block_size(c.format), depth = is_k ? static_cast<int>(round_up(channels, 32)) : 64;
    const int padded = is_k ? layout.dk : layout.dv;
    const int lanes = is_k ? 64 : padded;
    Matrix decoded(64 * channels);
    for (int lane = 0; lane < lanes; ++lane)
      for (int first = 0; first < depth; first += group) {
        float in[kMaxBlockSize];
        uint8_t codes[kMaxBlockSize];
        const auto at = [&](int i) {
          const int token = is_k ? lane : first + i, channel = is_k ? first + i : lane;
          return std::pair(token, channel);
        };
        for (int i = 0; i < group; ++i) {
          const auto [token, channel] = at(i);
          in[i] = channel < channels ? std::ldexp(static_cast<float>(x[token * channels + channel]), exponent) : 0.0f;
        }
        const uint8_t scale = encode_block(c.format, Scales::six, in, codes);
        for (int i = 0; i < group; ++i) {
          const auto [token, channel] = at(i);
          uint8_t* item = &pool[record * layout.fp4_bytes + token / 32 * layout.item_bytes];
          const CodePlace place = is_k ? layout.k_code(channel, token % 32) : layout.v_code(channel, token % 32);
          uint32_t word;
          std::memcpy(&word, item + place.word, 4);
          word &= ~(1u << place.sign | 7u << place.magnitude);
          word |= static_cast<uint32_t>(codes[i] >> 3) << place.sign | (codes[i] & 7u) << place.magnitude;
          std::memcpy(item + place.word, &word, 4);
          item[is_k ? layout.k_scale(channel, token % 32) : layout.v_scale(channel, token % 32)] = scale;
          if (channel < channels)
            decoded[token * channels + channel] = std::ldexp(
                static_cast<double>(e2m1_decode(codes[i])) * static_cast<double>(decode_scale(c.format, scale)),
                -exponent);
        }
      }
    return decoded;
  }

  void make_page(int i, int j, int g) {
    const int slot = slots[i], id = table[slot * max_pages + j], s_kv = lengths[slot];
    const int tokens = std::min(64, s_kv - 64 * j);
    const bool full = tokens == 64;
    const int64_t record = int64_t{id} * c.h_kv + g;
    PageValues p;
    p.k_high.assign(64 * c.d, 0), p.v_high.assign(64 * c.d_v, 0), p.mean.assign(c.d, 0);
    for (int t = 0; t < tokens; ++t) {
      const uint64_t key = (uint64_t{1} * i * 100003 + j * 64 + t) * 64 + g;
      const bool sink = j == 0 && t == 0;
      for (int n = 0; n < c.d; ++n)
        p.k_high[t * c.d + n] = to_f16((n % 29 == 3 ? 4 : 1) * normal(3, key, n) + (n % 7 == 0 ? c.k_shift : 0));
      for (int n = 0; n < c.d_v; ++n)
        p.v_high[t * c.d_v + n] = to_f16(c.v_scale * (sink ? 0.01 : 1) * (normal(4, key, n) + 0.3));
    }
    for (int n = 0; full && c.centring && n < c.d; ++n) {
      double sum = 0;
      for (int t = 0; t < 64; ++t) sum += p.k_high[t * c.d + n];
      p.mean[n] = to_f16(sum / 64);
    }
    const LayerCache cache = view();
    const bool has_high = cache.has_high(j, released_pages(s_kv)) || !full;
    if (has_high) {
      uint8_t* to = &high[(cache.high_record(slot, j, id) * c.h_kv + g) * layout.high_bytes];
      for (int t = 0; t < static_cast<int>(round_up(tokens, 8)); ++t) {
        uint8_t* item = to + t / 8 * layout.high_item_bytes;
        const auto put = [&](int at, double x) {
          const uint16_t bits = f16_encode(static_cast<float>(x));
          std::memcpy(item + at, &bits, 2);
        };
        for (int n = 0; n < layout.dk; ++n) put(layout.high_k(n, t % 8), n < c.d ? p.k_high[t * c.d + n] : 0);
        for (int n = 0; n < layout.dv; ++n) put(layout.high_v_at(n, t % 8), n < c.d_v ? p.v_high[t * c.d_v + n] : 0);
      }
    }
    if (full) {
      PageSummary facts{};
      const auto planes = [&](const Matrix& x, int channels, bool is_k, int8_t(&exponent)[2], Matrix& first,
                              Matrix& both) {
        Matrix left = x;
        for (int plane = 0; plane < 2; ++plane) {
          double amax = 0;
          for (double v : left) amax = std::max(amax, std::abs(v));
          const int e = c.page_scale ? page_exponent(static_cast<float>(amax), c.format, Scales::six) : 0;
          exponent[plane] = static_cast<int8_t>(e);
          const Matrix decoded = encode(left, channels, is_k, e, plane == 0 ? fp4 : residual, record);
          if (plane == 0) first = both = decoded;
          for (size_t n = 0; n < left.size(); ++n) {
            left[n] -= decoded[n];
            if (plane == 1) both[n] += decoded[n];
          }
        }
      };
      Matrix k = p.k_high;
      for (int t = 0; t < 64; ++t)
        for (int n = 0; n < c.d; ++n) k[t * c.d + n] -= p.mean[n];
      if (j == c.loud_page) {  // along q of the first row that reads it
        const float* row = &q[(first_row[i] * c.h_q + g * c.group()) * c.d];
        double norm = 0;
        for (int n = 0; n < c.d; ++n) norm += row[n] * row[n];
        for (int n = 0; n < c.d; ++n) k[5 * c.d + n] += row[n] * c.loud / (norm * c.sm_scale());
      }
      planes(k, c.d, true, facts.k_exponent, p.k_fp4, p.k_planes);
      planes(p.v_high, c.d_v, false, facts.v_exponent, p.v_fp4, p.v_planes);
      uint8_t* to = &summary[record * canonical.summary_bytes];
      std::memcpy(to, &facts, sizeof facts);
      for (int n = 0; c.centring && n < c.d; ++n) {
        const uint16_t bits = f16_encode(static_cast<float>(p.mean[n]));
        std::memcpy(to + canonical.mean + 2 * n, &bits, 2);
      }
    }
    values[{i, j, g}] = std::move(p);
  }

  int unit(int i, int g) const { return i * c.h_kv + g; }

  // Full pages that some row of sequence i sees: [first, s_kv / 64).
  int first_page(int i) const {
    if (c.window == 0) return 0;
    const int64_t oldest = c.sequences[i].s_kv - c.sequences[i].s_q;
    return static_cast<int>(
        std::min<int64_t>(std::max<int64_t>(0, oldest - c.window + 1) / 64, c.sequences[i].s_kv / 64));
  }
  // The tier in which a full page is read.
  Tier tier(int i, int g, int j) const {
    if (c.forced_alone) return forced(i, j) ? forced_tier(c.rest, has_high(i, j), c.residual) : c.rest;
    const int t = c.listed(unit(i, g), j);
    return t < 0 ? c.rest : static_cast<Tier>(t);
  }
  bool has_high(int i, int j) const { return view().has_high(j, released_pages(c.sequences[i].s_kv)); }
  bool forced(int i, int j) const {
    const int first = std::max(0, c.sequences[i].s_kv - c.sequences[i].s_q) / 64;
    return j < c.force.sink || (j >= first ? c.force.diagonal : j >= first - c.force.previous);
  }
};

struct Result {
  std::vector<double> out, bound;      // [rows, h_q, d_v]; bound: sum of p |v| / l, what errors of p may move
  std::vector<double> lse, mass_high;  // [rows, h_q]
  std::map<std::tuple<int, int, int>, double> mass;  // unit row, page, eighth: log2 of the sum
};

Result reference(const Fixture& f) {
  const Case& c = f.c;
  Result r;
  r.out.assign(f.rows * c.h_q * c.d_v, 0), r.bound = r.out;
  r.lse.assign(f.rows * c.h_q, -std::numeric_limits<double>::infinity());
  r.mass_high.assign(f.rows * c.h_q, 0);
  for (int i = 0; i < static_cast<int>(c.sequences.size()); ++i)
    for (int row = 0; row < c.sequences[i].s_q; ++row)
      for (int h = 0; h < c.h_q; ++h) {
        const int g = h / c.group(), s_kv = c.sequences[i].s_kv, at = f.first_row[i] + row;
        const int position = s_kv - c.sequences[i].s_q + row;
        const float* q = &f.q[(at * c.h_q + h) * c.d];
        struct Key {
          double x;
          const double* v;
          bool high;
          int token;
        };
        std::vector<Key> keys;
        for (int t = 0; t < s_kv; ++t) {
          const int j = t / 64;
          const bool full = j < s_kv / 64;
          if (c.causal && t > position) continue;
          if (c.window > 0 && std::abs(t - position) >= c.window) continue;
          if (full && j < f.first_page(i)) continue;
          const Tier tier = full ? f.tier(i, g, j) : Tier::fp16;
          if (tier == Tier::none) continue;
          const PageValues& p = f.values.at({i, j, g});
          const Matrix& k = tier == Tier::fp16 ? p.k_high : tier == Tier::fp4x2 ? p.k_planes : p.k_fp4;
          const Matrix& v = tier == Tier::fp16 ? p.v_high : tier == Tier::fp4x2 ? p.v_planes : p.v_fp4;
          double s = 0;
          for (int n = 0; n < c.d; ++n) {
            s += static_cast<double>(to_f16(q[n])) * k[t % 64 * c.d + n];
            if (tier != Tier::fp16) s += static_cast<double>(q[n]) * p.mean[n];
          }
          s *= c.sm_scale();
          if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
          keys.push_back({s * kLog2E, &v[t % 64 * c.d_v], tier != Tier::fp4, t});
        }
        double m = -std::numeric_limits<double>::infinity(), l = 0, l_high = 0;
        for (const Key& key : keys) m = std::max(m, key.x);
        const double sink = c.sinks ? f.sinks[h] * kLog2E : -std::numeric_limits<double>::infinity();
        m = std::max(m, sink);
        const int o = (at * c.h_q + h) * c.d_v;
        for (const Key& key : keys) {
          const double p = std::exp2(key.x - m);
          l += p;
          if (key.high) l_high += p;
          double& mass = r.mass[{f.unit(i, g) * f.row_stride + h % c.group() * c.sequences[i].s_q + row, key.token / 64,
                                 key.token % 64 / 8}];
          mass += std::exp2(key.x);
          for (int n = 0; n < c.d_v; ++n) r.out[o + n] += p * key.v[n], r.bound[o + n] += p * std::abs(key.v[n]);
        }
        if (c.sinks) l += std::exp2(sink - m), l_high += std::exp2(sink - m);
        if (l > 0) {
          for (int n = 0; n < c.d_v; ++n) r.out[o + n] /= l, r.bound[o + n] /= l;
          r.lse[at * c.h_q + h] = (m + std::log2(l)) / kLog2E;
          r.mass_high[at * c.h_q + h] = l_high / l;
        }
      }
  return r;
}

struct Output {
  std::vector<float> out, lse;
  std::vector<float> mass_high;  // [units, row_stride]
  std::vector<float> page_mass;  // as in DecodeParams
  std::vector<int32_t> counts;   // of Promote::forced, as in Lists
  bool operator==(const Output& other) const {
    return std::memcmp(out.data(), other.out.data(), out.size() * 4) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * 4) == 0;
  }
};

enum class Mode { attend, exchange };

// One step on the GPU. exchange: all listed pages that are not forced are exchanged after a pass in FP4.
Output run(const Fixture& f, Mode mode = Mode::attend) {
  const Case& c = f.c;
  const int b = static_cast<int>(c.sequences.size()), units = b * c.h_kv;
  const float nan = std::numeric_limits<float>::quiet_NaN();

  Problem problem;
  problem.phase = Phase::decode;
  problem.b = b, problem.max_s_q = f.max_s_q, problem.max_s_kv = f.max_pages * 64;
  problem.h_q = c.h_q, problem.h_kv = c.h_kv, problem.d = c.d, problem.d_v = c.d_v;
  DecodeConfig config = decode_config(problem, *testing::gpu_machine()->gpu);
  if (c.blocks > 0) config.blocks = c.blocks;
  if (c.warps > 0) config.warps = c.warps;
  config.exchanges_at_once = c.at_once;

  // Lists: of the whole selection, or of the forced pages alone.
  const auto make_lists = [&](bool forced_only, std::vector<uint32_t>& order, std::vector<int32_t>& counts) {
    order.assign(units * f.max_pages, ~0u);
    counts.assign(units * 8, 0);
    for (int i = 0; i < b; ++i)
      for (int g = 0; g < c.h_kv; ++g) {
        const int u = f.unit(i, g);
        int at = 0;
        const auto listed = [&](int j) { return forced_only && !f.forced(i, j) ? -1 : c.listed(u, j); };
        for (int t = 3; t >= -1; --t) {
          for (int j = f.first_page(i); j < c.sequences[i].s_kv / 64; ++j)
            if (listed(j) == t) {
              order[u * f.max_pages + at++] = static_cast<uint32_t>(j * 4 + (t < 0 ? static_cast<int>(c.rest) : t));
              if (t >= 0) ++counts[u * 8 + 4 - t];
            }
          if (t == 0) counts[u * 8] = at;
        }
      }
  };
  const size_t element = c.dtype == DType::f32 ? 4 : 2;
  const int64_t q_stride = c.h_q * c.d + 8;  // rows of q and out stand apart, and heads of out are in turn
  std::vector<uint8_t> q(f.rows * q_stride * element, 0xff);
  for (int row = 0; row < f.rows; ++row)
    for (int n = 0; n < c.h_q * c.d; ++n) {
      const float x = f.q[row * c.h_q * c.d + n];
      const uint16_t bits = c.dtype == DType::f16 ? f16_encode(x) : bf16_encode(x);
      std::memcpy(&q[(row * q_stride + n) * element], c.dtype == DType::f32 ? static_cast<const void*>(&x) : &bits,
                  element);
    }

  const OnDevice fp4(f.fp4), residual(f.residual), high(f.high), summary(f.summary), q_device(q);
  const OnDevice table(f.table), lengths(f.lengths), slots(f.slots), s_q(f.s_q), first_row(f.first_row);
  const OnDevice sinks(f.sinks);
  const OnDevice<uint8_t> out(std::vector<uint8_t>(std::max(1, f.rows * c.h_q * c.d_v) * element, 0xff));
  const OnDevice<float> lse(std::vector<float>(f.rows * c.h_q, nan));
  const OnDevice<float> mass_high(std::vector<float>(units * f.row_stride, nan));
  const OnDevice<float> state_ml(std::vector<float>(units * f.row_stride * 4, nan));
  const OnDevice<float> state_o(std::vector<float>(units * f.row_stride * f.layout.dv, nan));
  const OnDevice<float> page_mass(
      std::vector<float>(int64_t{units} * f.max_pages * std::max(1, c.mass_parts) * f.row_stride, nan));
  const OnDevice<uint8_t> partials(std::vector<uint8_t>(decode_partial_bytes(problem, config), 0xff));
  const OnDevice<int32_t> tickets(std::vector<int32_t>(units * config.tiles, 0));
  std::vector<uint32_t> order;
  std::vector<int32_t> counts;
  make_lists(mode == Mode::exchange, order, counts);
  const OnDevice first_order(order);
  const OnDevice first_counts(counts);
  make_lists(false, order, counts);
  if (mode == Mode::exchange)  // which does without the others
    for (int u = 0; u < units; ++u)
      std::fill(&order[u * f.max_pages + counts[u * 8]], order.data() + (u + 1) * f.max_pages, ~0u);
  const OnDevice all_order(order);
  const OnDevice all_counts(counts);

  DecodeParams p{};
  p.cache = f.view();
  p.cache.fp4 = fp4.get(), p.cache.residual = c.residual ? residual.get() : nullptr, p.cache.high = high.get();
  p.cache.summary = summary.get(), p.cache.block_table = table.get();
  std::vector<int32_t> released_of;
  for (const int32_t s_kv : f.lengths) released_of.push_back(f.released_pages(s_kv));
  const OnDevice released(released_of);
  p.cache.released = released.get(), p.cache.s_kv = lengths.get();
  p.batch = {b, slots.get(), s_q.get(), first_row.get()};
  p.shape = {c.h_q, c.h_kv, c.group(), c.d, c.d_v, f.max_s_q, c.causal, c.window, c.sm_scale(), c.softcap, c.rest};
  p.q = {q_device.get(), c.dtype, q_stride, c.d};
  p.out = {out.get(), c.dtype, c.d_v, static_cast<int64_t>(f.rows) * c.d_v};
  p.lse = lse.get(), p.sinks = c.sinks ? sinks.get() : nullptr;
  p.lists = {f.max_pages, first_order.get(), first_counts.get()};
  p.row_stride = f.row_stride;
  p.page_mass = c.mass_parts > 0 ? page_mass.get() : nullptr;
  p.mass_parts = c.mass_parts;
  p.row_mass_high = mass_high.get();
  p.promote = c.forced_alone ? Promote::forced : Promote::listed;
  p.force = c.force;
  p.partials = partials.get(), p.tickets = tickets.get();
  cudaStream_t stream;
  EXPECT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  if (mode == Mode::exchange) {
    p.state_ml = state_ml.get(), p.state_o = state_o.get();
    EXPECT_CUDA(launch_attend(p, config, stream));
    p.lists = {f.max_pages, all_order.get(), all_counts.get()};
    EXPECT_CUDA(launch_exchange(p, config, stream));
  } else {
    EXPECT_CUDA(launch_attend(p, config, stream));
  }
  EXPECT_CUDA(cudaStreamSynchronize(stream));
  EXPECT_CUDA(cudaStreamDestroy(stream));
  for (const int32_t ticket : tickets.read()) EXPECT_EQ(ticket, 0);

  Output o;
  o.lse = lse.read(), o.mass_high = mass_high.read(), o.page_mass = page_mass.read();
  o.counts = first_counts.read();
  const std::vector<uint8_t> bytes = out.read();
  o.out.resize(f.rows * c.h_q * c.d_v);
  for (int row = 0; row < f.rows; ++row)
    for (int h = 0; h < c.h_q; ++h)
      for (int n = 0; n < c.d_v; ++n) {
        float x;
        uint16_t bits;
        const uint8_t* from = &bytes[((int64_t{h} * f.rows + row) * c.d_v + n) * element];
        std::memcpy(&x, from, 4 * (element == 4)), std::memcpy(&bits, from, 2);
        o.out[(row * c.h_q + h) * c.d_v + n] = c.dtype == DType::f32   ? x
                                               : c.dtype == DType::f16 ? f16_decode(bits)
                                                                       : bf16_decode(bits);
      }
  return o;
}

// p is rounded to 16 bit, by 2^-11 of itself at most; sums and exponents are worth a little more.
void expect_close(const Fixture& f, const Output& got, const Result& want, double p_error = 5e-4) {
  const double out_error = f.c.dtype == DType::f32 ? 0 : f.c.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  double worst = 0;
  for (size_t i = 0; i < want.out.size(); ++i) {
    const double error = std::abs(got.out[i] - want.out[i]);
    const double allowed = p_error * want.bound[i] + out_error * std::abs(want.out[i]) + 1e-6 * f.c.v_scale;
    if (!(error <= allowed)) worst = std::isnan(error) ? INFINITY : std::max(worst, error / allowed);
    if (!(error <= allowed) && worst < 1e9) {
      ADD_FAILURE() << "out[" << i << "] = " << got.out[i] << " want " << want.out[i] << " allowed error " << allowed;
      break;
    }
  }
  EXPECT_LE(worst, 1);
  for (size_t i = 0; i < want.lse.size(); ++i) {
    if (std::isinf(want.lse[i]))
      EXPECT_EQ(got.lse[i], want.lse[i]) << i;
    else
      ASSERT_NEAR(got.lse[i], want.lse[i], 2e-5 * (1 + std::abs(want.lse[i]))) << i;
  }
  for (int i = 0; i < static_cast<int>(f.c.sequences.size()); ++i)
    for (int row = 0; row < f.c.sequences[i].s_q; ++row)
      for (int h = 0; h < f.c.h_q; ++h) {
        const int unit_row = h % f.c.group() * f.c.sequences[i].s_q + row;
        ASSERT_NEAR(got.mass_high[f.unit(i, h / f.c.group()) * f.row_stride + unit_row],
                    want.mass_high[(f.first_row[i] + row) * f.c.h_q + h], 1e-4);
      }
}

void expect_right(const Case& c, Mode mode = Mode::attend) {
  const Fixture f(c);
  expect_close(f, run(f, mode), reference(f));
}

// Every tier, in turn.
int mixed(int unit, int page) {
  constexpr int kTiers[] = {-1, 3, -1, 2, 1, -1, -1, 0, 2, -1, 3};
  return kTiers[(page * 5 + unit * 3) % 11];
}
int some_high(int, int page) { return page % 5 == 1 ? 3 : -1; }
int some_planes(int, int page) { return page % 5 == 1 ? 2 : -1; }
int all_high(int, int) { return 3; }

class Decode : public ::testing::Test {
  void SetUp() override { SKIP_WITHOUT_GPU(); }
};

TEST_F(Decode, UniformFp4) { expect_right({.sequences = {{1000}}}); }
TEST_F(Decode, PromotedIn16Bit) { expect_right({.sequences = {{1000}}, .listed = some_high}); }
TEST_F(Decode, PromotedInTwoPlanes) { expect_right({.sequences = {{1000}}, .listed = some_planes}); }
TEST_F(Decode, EveryTier) { expect_right({.h_q = 8, .h_kv = 2, .sequences = {{1500}}, .listed = mixed}); }
TEST_F(Decode, RestIn16Bit) { expect_right({.sequences = {{777}}, .rest = Tier::fp16, .listed = mixed}); }
TEST_F(Decode, RestSkipped) { expect_right({.sequences = {{777}}, .rest = Tier::none, .listed = mixed}); }

TEST_F(Decode, EveryLength) {
  for (int s_kv : {1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 191, 333}) {
    SCOPED_TRACE(s_kv);
    expect_right({.sequences = {{s_kv}}, .listed = mixed});
  }
}

TEST_F(Decode, EveryHeadSize) {
  for (int d : {16, 48, 64, 80, 96, 128, 192, 256})
    for (int d_v : {d, d == 128 ? 64 : 128}) {
      SCOPED_TRACE(::testing::Message() << d << " " << d_v);
      expect_right({.h_q = 4, .h_kv = 2, .d = d, .d_v = d_v, .sequences = {{500}, {70}}, .listed = mixed});
      expect_right({.h_q = 7, .h_kv = 1, .d = d, .d_v = d_v, .sequences = {{400}}, .listed = mixed});
    }
}

TEST_F(Decode, EveryGroupAndNumberOfRows) {
  for (int group : {1, 2, 3, 4, 5, 7, 8, 12, 16})
    for (int s_q : {1, 2, 5, 16}) {
      SCOPED_TRACE(::testing::Message() << group << " " << s_q);
      expect_right({.h_q = group, .h_kv = 1, .sequences = {{450, s_q}}, .listed = mixed});
      if (group % 4 == 0)
        expect_right({.h_q = group, .h_kv = 1, .d = 64, .d_v = 64, .sequences = {{450, s_q}}, .listed = mixed});
    }
}

TEST_F(Decode, SequencesOfDifferentLengths) {
  const std::vector<Sequence> sequences = {{0, 0}, {1, 1}, {900, 3}, {64, 1}, {65, 4}, {2500, 1}, {5, 5}, {63, 2}};
  expect_right({.h_q = 8, .h_kv = 2, .sequences = sequences, .listed = mixed});
  expect_right({.h_q = 8, .h_kv = 2, .sequences = sequences, .listed = mixed, .blocks = 3});
}

TEST_F(Decode, ManyShortSequences) {
  std::vector<Sequence> sequences;
  for (int i = 0; i < 300; ++i) sequences.push_back({i % 90, i % 90 > 0 ? 1 : 0});
  expect_right({.h_q = 4, .h_kv = 2, .d = 64, .d_v = 64, .sequences = sequences, .listed = mixed});
}

TEST_F(Decode, Windows) {
  for (int64_t window : {1, 40, 64, 100, 300, 5000})
    for (bool causal : {true, false}) {
      SCOPED_TRACE(::testing::Message() << window << " " << causal);
      expect_right(
          {.h_q = 4, .h_kv = 2, .sequences = {{700, 5}, {90, 1}}, .causal = causal, .window = window, .listed = mixed});
    }
}

TEST_F(Decode, NotCausal) { expect_right({.sequences = {{300, 9}}, .causal = false, .listed = mixed}); }
TEST_F(Decode, Softcap) { expect_right({.sequences = {{700}}, .softcap = 5, .listed = mixed}); }
TEST_F(Decode, Mxfp4) {
  expect_right({.sequences = {{700}}, .format = Fp4Format::mxfp4, .listed = mixed});
  expect_right({.h_q = 16, .d = 96, .d_v = 96, .sequences = {{700}}, .format = Fp4Format::mxfp4, .listed = mixed});
}
TEST_F(Decode, WithoutCentring) { expect_right({.sequences = {{700}}, .centring = false, .listed = mixed}); }
TEST_F(Decode, WithoutPageScale) { expect_right({.sequences = {{700}}, .page_scale = false, .listed = mixed}); }
TEST_F(Decode, PeakedSoftmax) { expect_right({.sequences = {{1200}}, .q_scale = 8, .listed = mixed}); }
TEST_F(Decode, SmallAndLargeValues) {
  expect_right({.sequences = {{1200}}, .v_scale = 0x1p-9f, .listed = mixed});
  expect_right({.sequences = {{1200}}, .v_scale = 0x1p9f, .listed = mixed});
}

TEST_F(Decode, Sinks) {
  expect_right({.h_q = 8, .h_kv = 2, .sequences = {{700}, {3}, {66}}, .sinks = true, .listed = mixed});
}

// A row whose window holds no page in a tier above none sees nothing.
TEST_F(Decode, RowsThatSeeNothing) {
  const Case c{.sequences = {{128}}, .rest = Tier::none};
  const Fixture f(c);
  const Output got = run(f);
  expect_close(f, got, reference(f));
  for (float x : got.out) EXPECT_EQ(x, 0);
  for (float x : got.lse) EXPECT_EQ(x, -std::numeric_limits<float>::infinity());
  expect_right({.sequences = {{128}}, .rest = Tier::none, .sinks = true});
}

TEST_F(Decode, DataTypes) {
  for (DType dtype : {DType::f16, DType::bf16})
    expect_right({.sequences = {{700, 2}}, .listed = mixed, .dtype = dtype});
}

TEST_F(Decode, RingOf16BitPages) {
  const auto listed = [](int, int page) { return page == 0 || page == 11 || page == 12 ? 3 : page % 4 == 1 ? 2 : -1; };
  expect_right({.sequences = {{64 * 13 + 20}}, .all_high = false, .listed = listed});
}

TEST_F(Decode, NonFiniteQueriesStayInTheirRow) {
  const Case c{.h_q = 8, .h_kv = 2, .sequences = {{300, 2}}, .listed = mixed};
  Fixture f(c);
  const Output clean = run(f);
  f.q[3 * c.d + 7] = std::numeric_limits<float>::quiet_NaN();
  f.q[9 * c.d + 1] = std::numeric_limits<float>::infinity();
  f.q[12 * c.d + 100] = -std::numeric_limits<float>::infinity();
  const Output got = run(f);
  for (int row = 0; row < 16; ++row) {
    const bool bad = row == 3 || row == 9 || row == 12;
    EXPECT_EQ(std::isnan(got.lse[row]), bad) << row;
    for (int n = 0; n < c.d_v; ++n) {
      if (bad)
        EXPECT_TRUE(std::isnan(got.out[row * c.d_v + n])) << row;
      else
        EXPECT_NEAR(got.out[row * c.d_v + n], clean.out[row * c.d_v + n], 1e-3) << row;
    }
  }
}

TEST_F(Decode, PageShuffleAndRerunGiveTheSameBits) {
  Case c{.h_q = 8, .h_kv = 2, .sequences = {{3000}, {400, 3}}, .listed = mixed};
  const Output first = run(Fixture(c));
  EXPECT_TRUE(first == run(Fixture(c)));
  for (unsigned seed : {2u, 3u}) {
    c.page_seed = seed;
    EXPECT_TRUE(first == run(Fixture(c)));
  }
}

TEST_F(Decode, AnyNumberOfBlocksAndWarps) {
  for (int blocks : {1, 2, 7, 50})
    for (int warps : {1, 5, 0}) {
      SCOPED_TRACE(::testing::Message() << blocks << " " << warps);
      expect_right(
          {.h_q = 8, .h_kv = 2, .sequences = {{1700}, {400, 3}}, .listed = mixed, .blocks = blocks, .warps = warps});
    }
}

TEST_F(Decode, AllPromotedIs16Bit) {
  Case c{.sequences = {{1000}}, .listed = all_high};
  const Output promoted = run(Fixture(c));
  c.rest = Tier::fp16;
  c.listed = Case{}.listed;
  EXPECT_TRUE(promoted == run(Fixture(c)));
}

TEST_F(Decode, PageMasses) {
  for (int parts : {2, 8}) {
    const Case c{.h_q = 6, .h_kv = 2, .sequences = {{900, 2}, {70}}, .listed = some_planes, .mass_parts = parts};
    const Fixture f(c);
    const Output got = run(f);
    const Result want = reference(f);
    for (int i = 0; i < 2; ++i)
      for (int g = 0; g < c.h_kv; ++g)
        for (int j = 0; j < pages_for(c.sequences[i].s_kv); ++j) {
          if (parts == 2 && j >= c.sequences[i].s_kv / 64) continue;
          for (int row = 0; row < c.group() * c.sequences[i].s_q; ++row) {
            double mass = 0, exact = 0;
            for (int part = 0; part < parts; ++part) {
              const float x =
                  got.page_mass[((int64_t{f.unit(i, g)} * f.max_pages + j) * parts + part) * f.row_stride + row];
              if (!std::isnan(x)) mass += std::exp2(static_cast<double>(x));
            }
            for (int part = 0; part < 8; ++part) {
              const auto at = want.mass.find({f.unit(i, g) * f.row_stride + row, j, part});
              if (at != want.mass.end()) exact += at->second;
            }
            ASSERT_NEAR(mass, exact, 1e-4 * exact) << i << " " << g << " " << j << " " << row;
          }
        }
  }
}

// q . k_mean takes q unrounded: in 16 bit alone it would be off by 1e-3 here.
TEST_F(Decode, MeansMeetTheUnroundedQueries) {
  for (int h_q : {4, 8, 16}) expect_right({.h_q = h_q, .sequences = {{1500, 1}}, .k_shift = 40, .listed = some_planes});
  expect_right({.h_q = 4, .d = 80, .d_v = 80, .sequences = {{1500, 2}}, .k_shift = 40, .listed = some_planes});
}

// More than two batches of items for a warp, and several units a CTA.
TEST_F(Decode, LongUnitsInFewBlocks) {
  const std::vector<Sequence> sequences = {{9000, 1}, {5000, 2}, {100, 1}, {7000, 1}};
  for (int blocks : {1, 5})
    expect_right({.h_q = 4, .h_kv = 1, .sequences = sequences, .listed = mixed, .blocks = blocks});
}

// Without lists, in the tiers that format/selection.h gives them.
TEST_F(Decode, ForcedPagesByArithmetic) {
  const Force forces[] = {{1, true, 1}, {0, false, 0}, {3, false, 2}, {0, true, 0}, {2, true, 20}, {40, true, 3}};
  for (const Force& force : forces)
    for (bool all_high : {true, false})
      for (bool residual : {true, false})
        for (int64_t window : {0, 500}) {
          SCOPED_TRACE(::testing::Message() << force.sink << " " << force.diagonal << " " << force.previous << " "
                                            << all_high << " " << residual << " " << window);
          const Case c{.h_q = 8,
                       .h_kv = 2,
                       .sequences = {{64 * 13 + 20}, {64 * 9}, {130, 3}, {64 * 30 + 5, 9}, {40}, {64 * 7 + 1, 2}},
                       .all_high = all_high,
                       .residual = residual,
                       .window = window,
                       .force = force,
                       .forced_alone = true};
          const Fixture f(c);
          const Output got = run(f);
          expect_close(f, got, reference(f));
          for (int i = 0; i < static_cast<int>(c.sequences.size()); ++i) {
            int high = 0, planes = 0, wanted = 0;
            for (int j = f.first_page(i); j < c.sequences[i].s_kv / 64; ++j) {
              if (!f.forced(i, j)) continue;
              (f.has_high(i, j) ? high : residual ? planes : wanted) += 1;
            }
            const int32_t* count = &got.counts[f.unit(i, 1) * 8];
            EXPECT_EQ(count[0], high + planes);
            EXPECT_EQ(count[1], high);
            EXPECT_EQ(count[2], planes);
            EXPECT_EQ(count[5], wanted);
            EXPECT_EQ(count[6], f.released_pages(c.sequences[i].s_kv));
          }
        }
}

TEST_F(Decode, ExchangeIsAttentionUnderTheSameLists) {
  for (int d : {128, 64})
    for (bool at_once : {false, true}) {
      Case c{.h_q = 8,
             .h_kv = 2,
             .d = d,
             .d_v = d,
             .sequences = {{2000}, {300, 3}, {40}},
             .listed = mixed,
             .at_once = at_once,
             .force = {1, true, 1}};
      expect_right(c, Mode::exchange);
      c.sinks = true;
      expect_right(c, Mode::exchange);
      c.blocks = 3;
      const Fixture f(c);
      EXPECT_TRUE(run(f, Mode::exchange) == run(f, Mode::exchange));
    }
}

// A page whose FP4 scores are far too high holds all of a row's mass until it is exchanged.
TEST_F(Decode, ExchangeOfALoudPage) {
  for (double loud : {3.0, 8.0, 12.0, 40.0, 70.0})
    for (int tier : {2, 3}) {
      SCOPED_TRACE(::testing::Message() << loud << " " << tier);
      Case c{.h_q = 4, .sequences = {{1500}}, .loud_page = 7, .loud = loud};
      c.listed = tier == 2 ? [](int, int page) { return page == 7 || page == 20 ? 2 : -1; }
                           : [](int, int page) { return page == 7 || page == 20 ? 3 : -1; };
      for (bool at_once : {false, true})
        for (int blocks : {0, 1}) {
          c.at_once = at_once, c.blocks = blocks;
          expect_right(c, Mode::exchange);
        }
    }
}

}  // namespace
}  // namespace thriftattn::cuda
