// Prefill on the GPU under injected tiers, against attention in double over the values that the cache's codes mean. The
// bound is twice the error of a plain loop with the same roundings: q, K and V in FP16, p in FP16, sums in FP32.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/gpu.h"
#include "cuda/params.h"
#include "format/page_codec.h"
#include "format/rows.h"
#include "format/selection.h"

namespace thriftattn::cuda {
namespace {

using testing::OnDevice;

struct Case {
  std::vector<int> s_q, s_kv;  // of every sequence
  int h_q = 2, h_kv = 1, d = 128, d_v = 128;
  bool causal = true;
  int64_t window = 0;
  float sm_scale = 0, softcap = 0;  // sm_scale 0: 1 / sqrt(d)
  bool sinks = false;
  Storage storage = Storage::residual;
  Fp4Format format = Fp4Format::nvfp4;
  bool centring = true;
  Tier rest = Tier::fp4;
  double promoted = 0.2;  // of the pairs, each in a tier that is stored
  DType q = DType::f32, out = DType::f32;
  int padding = 0;  // channels between heads of q and out
  float q_scale = 1;
  std::vector<int> nan_rows = {};  // rows of q, counted over all sequences
  unsigned seed = 1;               // of the values
  unsigned place = 1;              // of pages and slots
};

struct Result {
  std::vector<float> out, lse, mass_high;  // [rows, h_q, d_v], [rows, h_q]
};

// Keys and values of one (sequence, KV head) in every tier, [tier][token][channel]; a tail in fp16 alone.
struct HeadValues {
  std::vector<float> k[4], v[4];
};

class Prefill {
 public:
  explicit Prefill(const Case& c) : c_(c), b_(static_cast<int>(c.s_q.size())), group_(c.h_q / c.h_kv) {
    config_.h_kv = c.h_kv;
    config_.d = c.d;
    config_.d_v = c.d_v;
    config_.storage = c.storage;
    config_.format = c.format;
    config_.centring = c.centring && has_fp4();
    config_.mean = config_.centring;
    canonical_ = page_layout(c.d, c.d_v, c.format, config_.mean, false, false);
    layout_ = device_layout(c.d, c.d_v);
    scale_ = c.sm_scale != 0 ? c.sm_scale : 1.0f / std::sqrt(static_cast<float>(c.d));
    make_rows();
    make_pages();
    make_tiers();
  }

  const Case& of() const { return c_; }
  int rows() const { return first_row_.back(); }
  int64_t tier_words() const { return tier_words_; }
  std::vector<uint32_t>& tiers() { return tiers_; }
  std::vector<float>& q() { return q_; }

  // Runs rows [begin_i, end_i) of every sequence as one step whose last token is the last row's; all rows by default.
  Result run(const std::vector<int>& begin = {}, const std::vector<int>& end = {}) const {
    std::vector<int32_t> s_q(b_), first_row(b_), slot(b_), s_kv(slots_, -1);
    for (int i = 0; i < b_; ++i) {
      const int from = begin.empty() ? 0 : begin[i], to = end.empty() ? c_.s_q[i] : end[i];
      s_q[i] = to - from;
      first_row[i] = first_row_[i] + from;
      slot[i] = slot_[i];
      s_kv[slot_[i]] = c_.s_kv[i] - (c_.s_q[i] - to);
    }
    const int most = std::max(1, *std::max_element(s_q.begin(), s_q.end()));
    // Tiers of this step's blocks, out of those of all rows.
    const int max_blocks = most / kPageTokens + 2;
    std::vector<uint32_t> tiers(static_cast<size_t>(b_) * c_.h_q * max_blocks * tier_words_, 0);
    for (int i = 0; i < b_; ++i) {
      const int tokens = s_kv[slot[i]], skipped = first_block(tokens - s_q[i]) - first_block(offset(i));
      for (int h = 0; h < c_.h_q; ++h)
        for (int block = 0; block < max_blocks && skipped + block < max_blocks_; ++block)
          for (int page = 0; page < tokens / kPageTokens; ++page)
            set_tier(tiers, max_blocks, i, h, block, page, tier(i, h, skipped + block, page));
    }

    const int64_t head_stride = c_.d + c_.padding, row_stride = c_.h_q * head_stride + c_.padding;
    const int64_t out_head = c_.d_v + c_.padding, out_row = c_.h_q * out_head + c_.padding;
    std::vector<uint8_t> q(static_cast<size_t>(rows() * row_stride * size_of(c_.q)), 0xff);
    for (int r = 0; r < rows(); ++r)
      for (int h = 0; h < c_.h_q; ++h)
        store_row(c_.q, &q_[(static_cast<size_t>(r) * c_.h_q + h) * c_.d], c_.d,
                  q.data() + (r * row_stride + h * head_stride) * size_of(c_.q));
    const std::vector<uint8_t> untouched(static_cast<size_t>(rows() * out_row * size_of(c_.out)), 0xff);
    const std::vector<float> nothing(static_cast<size_t>(rows()) * c_.h_q, -7);

    const OnDevice<uint8_t> d_q(q), d_out(untouched), d_fp4(fp4_), d_residual(residual_), d_high(high_),
        d_summary(summary_);
    const OnDevice<float> d_lse(nothing), d_mass(nothing), d_sinks(sinks_);
    const OnDevice<int32_t> d_table(table_), d_s_kv(s_kv), d_slot(slot), d_s_q(s_q), d_first(first_row);
    const OnDevice<uint32_t> d_tiers(tiers);

    PrefillParams p{};
    p.cache.layout = layout_;
    p.cache.canonical = canonical_;
    p.cache.fp4 = has_fp4() ? d_fp4.get() : nullptr;
    p.cache.residual = c_.storage == Storage::residual ? d_residual.get() : nullptr;
    p.cache.high = d_high.get();
    p.cache.summary = d_summary.get();
    p.cache.block_table = d_table.get();
    p.cache.s_kv = d_s_kv.get();
    p.cache.max_pages = max_pages_;
    p.cache.h_kv = c_.h_kv;
    p.cache.all_high = all_high();
    p.cache.sink = kSink;
    p.cache.ring_pages = ring_pages_;
    p.cache.format = c_.format;
    p.cache.centring = config_.centring;
    p.batch = {b_, d_slot.get(), d_s_q.get(), d_first.get()};
    p.shape = {c_.h_q, c_.h_kv, group_, c_.d, c_.d_v, most, c_.causal, c_.window, scale_, c_.softcap, c_.rest};
    p.q = {d_q.get(), c_.q, row_stride, head_stride};
    p.out = {d_out.get(), c_.out, out_row, out_head};
    p.lse = d_lse.get();
    p.row_mass_high = d_mass.get();
    p.sinks = c_.sinks ? d_sinks.get() : nullptr;
    p.max_blocks = max_blocks;
    p.tiers = d_tiers.get();
    p.tier_words = tier_words_;

    Problem problem;
    problem.b = b_;
    problem.h_q = c_.h_q;
    problem.h_kv = c_.h_kv;
    problem.d = c_.d;
    problem.d_v = c_.d_v;
    problem.max_s_q = most;
    problem.max_s_kv = int64_t{max_pages_} * kPageTokens;
    problem.method.rest = c_.rest;
    problem.cache = config_;
    const OnDevice<uint8_t> scratch(
        std::vector<uint8_t>(static_cast<size_t>(prefill_scratch_bytes(problem, {})), 0xff));
    p.scratch = scratch.get();
    p.high_room = prefill_high_room(problem);
    EXPECT_CUDA(launch_expand(p, nullptr));
    EXPECT_CUDA(launch_prefill(p, nullptr));
    EXPECT_CUDA(cudaDeviceSynchronize());

    Result result;
    const std::vector<uint8_t> out = d_out.read();
    result.out.resize(static_cast<size_t>(rows()) * c_.h_q * c_.d_v);
    for (int r = 0; r < rows(); ++r)
      for (int h = 0; h < c_.h_q; ++h)
        load_row(c_.out, out.data() + (r * out_row + h * out_head) * size_of(c_.out), c_.d_v,
                 &result.out[(static_cast<size_t>(r) * c_.h_q + h) * c_.d_v]);
    for (int64_t at = 0; at < std::ssize(out); ++at) {  // nothing is written between heads and rows
      const int64_t element = at / size_of(c_.out) % out_row;
      const bool gap = element >= c_.h_q * out_head || element % out_head >= c_.d_v;
      if (gap && out[static_cast<size_t>(at)] != 0xff) ADD_FAILURE() << "byte " << at << " of out is not the kernel's";
    }
    result.lse = d_lse.read();
    result.mass_high = d_mass.read();
    return result;
  }

  // Compares sampled rows of a run with the reference.
  void expect_agreement(const Result& got, const char* what) const {
    double worst = 0, plain_worst = 0, worst_lse = 0, plain_lse = 0, worst_mass = 0, largest_v = 0;
    for (int i = 0; i < b_; ++i)
      for (int h = 0; h < c_.h_q; ++h)
        for (int r = 0; r < c_.s_q[i]; r += r < 3 || r > c_.s_q[i] - 4 || c_.s_q[i] < 150 ? 1 : 17) {
          const Row row = reference(i, h, r);
          const size_t at = static_cast<size_t>(first_row_[i] + r) * c_.h_q + h;
          if (row.nan) {
            EXPECT_TRUE(std::isnan(got.out[at * c_.d_v]) && std::isnan(got.lse[at])) << what << " row " << r;
            continue;
          }
          if (row.lse == -INFINITY) {
            EXPECT_EQ(got.lse[at], -INFINITY) << what << " row " << r;
            EXPECT_EQ(got.out[at * c_.d_v], 0.0f) << what << " row " << r;
            continue;
          }
          largest_v = std::max(largest_v, row.largest_v);
          for (int ch = 0; ch < c_.d_v; ++ch) {
            const double error = std::fabs(got.out[at * c_.d_v + ch] - row.out[ch]);
            if (!(error <= worst)) worst = error;
            plain_worst = std::max(plain_worst, std::fabs(row.plain[ch] - row.out[ch]));
          }
          const double lse_error = std::fabs(got.lse[at] - row.lse),
                       mass_error = std::fabs(got.mass_high[at] - row.high);
          if (!(lse_error <= worst_lse)) worst_lse = lse_error;
          if (!(mass_error <= worst_mass)) worst_mass = mass_error;
          plain_lse = std::max(plain_lse, std::fabs(row.plain_lse - row.lse));
        }
    printf("  %-28s error %.2e, plain loop %.2e (of the largest |v|); lse %.1e, %.1e; mass %.1e\n", what,
           worst / largest_v, plain_worst / largest_v, worst_lse, plain_lse, worst_mass);
    EXPECT_LE(worst, 2 * plain_worst + 2e-5 * largest_v) << what;
    EXPECT_LE(worst_lse, 2 * plain_lse + 2e-5) << what;
    EXPECT_LE(worst_mass, 2 * plain_lse + 2e-5) << what;
  }

  Tier tier(int i, int h, int block, int page) const {
    const size_t row = (static_cast<size_t>(i) * c_.h_q + h) * max_blocks_ + block;
    return static_cast<Tier>(tiers_[row * tier_words_ + page / 16] >> (page % 16 * 2) & 3);
  }
  void set_tier(int i, int h, int block, int page, Tier tier) {
    set_tier(tiers_, max_blocks_, i, h, block, page, tier);
  }
  int offset(int i) const { return c_.s_kv[i] - c_.s_q[i]; }
  int block_of(int i, int row) const { return (offset(i) + row) / kPageTokens - first_block(offset(i)); }

 private:
  static constexpr int kSink = 1;

  struct Row {
    bool nan = false;
    std::vector<double> out, plain;
    double lse = -INFINITY, plain_lse = 0, high = 0, largest_v = 0;
  };

  bool has_fp4() const { return c_.storage != Storage::high_only; }
  bool all_high() const { return c_.storage == Storage::high_only || c_.storage == Storage::dual; }
  static int first_block(int offset) { return offset / kPageTokens; }

  void set_tier(std::vector<uint32_t>& tiers, int max_blocks, int i, int h, int block, int page, Tier tier) const {
    const size_t row = (static_cast<size_t>(i) * c_.h_q + h) * max_blocks + block;
    uint32_t& word = tiers[row * tier_words_ + page / 16];
    word = (word & ~(3u << (page % 16 * 2))) | static_cast<uint32_t>(tier) << (page % 16 * 2);
  }

  void make_rows() {
    first_row_ = {0};
    for (const int n : c_.s_q) first_row_.push_back(first_row_.back() + n);
    std::mt19937 random(c_.seed);
    std::normal_distribution<float> normal;
    q_.resize(static_cast<size_t>(rows()) * c_.h_q * c_.d);
    for (float& x : q_) x = normal(random) * c_.q_scale;
    for (const int r : c_.nan_rows)
      q_[static_cast<size_t>(r) * c_.h_q * c_.d + 3] = r % 2 ? NAN : std::numeric_limits<float>::infinity();
    for (float& x : q_) {  // as the caller's type holds it
      uint8_t bytes[4];
      store_row(c_.q, &x, 1, bytes);
      load_row(c_.q, bytes, 1, &x);
    }
    for (int h = 0; h < c_.h_q; ++h) sinks_.push_back(normal(random) * 2);
  }

  // Pages stand in shuffled records of pools full of NaN.
  void make_pages() {
    int pages = 0, most = 1;
    for (const int n : c_.s_kv) {
      pages += static_cast<int>(pages_for(n));
      most = std::max(most, static_cast<int>(pages_for(n)));
    }
    slots_ = b_ + 2;
    max_pages_ = most + 1;
    tier_words_ = (max_pages_ + 15) / 16;
    ring_pages_ = max_pages_ + 3;
    const int records = pages + 5, high_records = all_high() ? records : slots_ * ring_pages_;
    std::mt19937 random(c_.place);
    std::vector<int> ids(records), slots(slots_);
    std::iota(ids.begin(), ids.end(), 0);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random);
    std::shuffle(slots.begin(), slots.end(), random);
    slot_.assign(slots.begin(), slots.begin() + b_);
    table_.assign(static_cast<size_t>(slots_) * max_pages_, -1);
    fp4_.assign(has_fp4() ? static_cast<size_t>(records * c_.h_kv * layout_.fp4_bytes) : 0, 0xff);
    residual_.assign(fp4_.size(), 0xff);
    summary_.assign(static_cast<size_t>(records * c_.h_kv * canonical_.summary_bytes), 0xff);
    high_.assign(static_cast<size_t>(high_records * c_.h_kv * layout_.high_bytes), 0xff);

    std::mt19937 values(c_.seed + 1);
    std::normal_distribution<float> normal;
    LayerCache where{};
    where.all_high = all_high();
    where.sink = kSink;
    where.ring_pages = ring_pages_;
    size_t next = 0;
    for (int i = 0; i < b_; ++i) {
      std::vector<float> channel_mean(c_.d);
      for (float& m : channel_mean) m = normal(values);
      const int n = c_.s_kv[i];
      for (int g = 0; g < c_.h_kv; ++g) {
        HeadValues x;
        for (int t = 0; t < 4; ++t) {
          x.k[t].resize(static_cast<size_t>(n) * c_.d);
          x.v[t].resize(static_cast<size_t>(n) * c_.d_v);
        }
        heads_.push_back(std::move(x));
      }
      for (int page = 0; page < pages_for(n); ++page) {
        const int id = ids[next++];
        table_[static_cast<size_t>(slot_[i]) * max_pages_ + page] = id;
        for (int g = 0; g < c_.h_kv; ++g) {
          std::vector<uint16_t> record(static_cast<size_t>(canonical_.high_bytes / 2), 0);
          const int tokens = std::min(kPageTokens, n - page * kPageTokens);
          for (int t = 0; t < tokens; ++t) {
            for (int ch = 0; ch < c_.d; ++ch)
              record[canonical_.high_k_at(t, ch)] = f16_encode(normal(values) + channel_mean[ch]);
            for (int ch = 0; ch < c_.d_v; ++ch) record[canonical_.high_v_at(t, ch)] = f16_encode(normal(values) + 0.5f);
          }
          const int64_t high = where.high_record(slot_[i], page, id) * c_.h_kv + g;
          write_high(record, tokens, &high_[high * layout_.high_bytes]);
          keep(i, g, page, tokens, record, static_cast<int64_t>(id) * c_.h_kv + g);
        }
      }
    }
  }

  void write_high(const std::vector<uint16_t>& record, int tokens, uint8_t* to) const {
    const auto put = [&](int64_t at, uint16_t x) { std::memcpy(to + at, &x, 2); };
    for (int t = 0; t < tokens; ++t) {
      const int64_t item = t / kHighItemTokens * layout_.high_item_bytes;
      for (int ch = 0; ch < layout_.dk; ++ch)
        put(item + layout_.high_k(ch, t % kHighItemTokens), ch < c_.d ? record[canonical_.high_k_at(t, ch)] : 0);
      for (int ch = 0; ch < layout_.dv; ++ch)
        put(item + layout_.high_v_at(ch, t % kHighItemTokens), ch < c_.d_v ? record[canonical_.high_v_at(t, ch)] : 0);
    }
  }

  // Codes and scales of a canonical record, in the device's order.
  void write_plane(const std::vector<uint8_t>& plane, uint8_t* to) const {
    std::memset(to, 0, static_cast<size_t>(layout_.fp4_bytes));
    const auto write = [&](const PlaneLayout& p, int64_t codes, int64_t scales, int channels, bool is_k) {
      for (int t = 0; t < kPageTokens; ++t)
        for (int ch = 0; ch < channels; ++ch) {
          const int r = is_k ? ch : t, lane = is_k ? t : ch, in_item = t % kItemTokens;
          uint8_t* item = to + t / kItemTokens * layout_.item_bytes;
          const uint32_t code = plane[codes + p.code_offset(r, lane)] >> PlaneLayout::code_shift(r) & 15u;
          const CodePlace at = is_k ? layout_.k_code(ch, in_item) : layout_.v_code(ch, in_item);
          uint32_t word;
          std::memcpy(&word, item + at.word, 4);
          word |= (code >> 3) << at.sign | (code & 7) << at.magnitude;
          std::memcpy(item + at.word, &word, 4);
          item[is_k ? layout_.k_scale(ch, in_item) : layout_.v_scale(ch, in_item)] =
              plane[scales + p.scale_offset(r, lane)];
        }
    };
    write(canonical_.k, canonical_.k_codes, canonical_.k_scales, c_.d, true);
    write(canonical_.v, canonical_.v_codes, canonical_.v_scales, c_.d_v, false);
  }

  // The page in all its tiers, for the reference, and its other records.
  void keep(int i, int g, int page, int tokens, const std::vector<uint16_t>& record, int64_t at) {
    HeadValues& x = heads_[static_cast<size_t>(i) * c_.h_kv + g];
    const auto set = [&](Tier tier, auto k_of, auto v_of) {
      for (int t = 0; t < tokens; ++t) {
        const size_t token = static_cast<size_t>(page) * kPageTokens + t;
        for (int ch = 0; ch < c_.d; ++ch) x.k[static_cast<int>(tier)][token * c_.d + ch] = k_of(t, ch);
        for (int ch = 0; ch < c_.d_v; ++ch) x.v[static_cast<int>(tier)][token * c_.d_v + ch] = v_of(t, ch);
      }
    };
    set(
        Tier::fp16, [&](int t, int ch) { return f16_decode(record[canonical_.high_k_at(t, ch)]); },
        [&](int t, int ch) { return f16_decode(record[canonical_.high_v_at(t, ch)]); });
    if (!has_fp4() || tokens < kPageTokens) return;
    std::vector<uint8_t> planes[2];
    for (auto& plane : planes) plane.resize(static_cast<size_t>(canonical_.fp4_bytes));
    std::vector<uint8_t> summary(static_cast<size_t>(canonical_.summary_bytes));
    const bool two = c_.storage == Storage::residual;
    encode_page(config_, canonical_, record.data(), planes[0].data(), two ? planes[1].data() : nullptr, summary.data());
    write_plane(planes[0], &fp4_[at * layout_.fp4_bytes]);
    if (two) write_plane(planes[1], &residual_[at * layout_.fp4_bytes]);
    std::copy(summary.begin(), summary.end(), &summary_[at * canonical_.summary_bytes]);
    std::vector<float> k(static_cast<size_t>(c_.d) * kPageTokens), v(static_cast<size_t>(c_.d_v) * kPageTokens);
    for (const Tier tier : {Tier::fp4, Tier::fp4x2}) {
      if (tier == Tier::fp4x2 && !two) continue;
      decode_page(config_, canonical_, planes[0].data(), tier == Tier::fp4 ? nullptr : planes[1].data(), summary.data(),
                  k.data(), v.data());
      set(
          tier, [&](int t, int ch) { return k[static_cast<size_t>(ch) * kPageTokens + t]; },
          [&](int t, int ch) { return v[static_cast<size_t>(t) * c_.d_v + ch]; });
    }
  }

  // Random tiers among those that are stored; the pages that a block does not see are none.
  void make_tiers() {
    max_blocks_ = 2;
    for (const int n : c_.s_q) max_blocks_ = std::max(max_blocks_, n / kPageTokens + 2);
    tiers_.assign(static_cast<size_t>(b_) * c_.h_q * max_blocks_ * tier_words_, 0);
    std::mt19937 random(c_.seed + 2);
    std::uniform_real_distribution<double> uniform;
    for (int i = 0; i < b_; ++i)
      for (int h = 0; h < c_.h_q; ++h)
        for (int block = 0; c_.s_q[i] > 0 && block <= block_of(i, c_.s_q[i] - 1); ++block) {
          const int start = (first_block(offset(i)) + block) * kPageTokens;
          const BlockPages seen = block_pages(std::max(start, offset(i)), std::min(start + kPageTokens, c_.s_kv[i]) - 1,
                                              c_.s_kv[i], {c_.causal, c_.window});
          for (int page = static_cast<int>(seen.first_visible); page < seen.visible; ++page) {
            const bool high = all_high() || page < kSink || page >= offset(i) / kPageTokens - 2;
            std::vector<Tier> stored;
            if (high) stored.push_back(Tier::fp16);
            if (c_.storage == Storage::residual) stored.push_back(Tier::fp4x2);
            if (c_.rest == Tier::none && has_fp4()) stored.push_back(Tier::fp4);
            const bool promote = uniform(random) < c_.promoted && !stored.empty();
            set_tier(i, h, block, page, promote ? stored[random() % stored.size()] : c_.rest);
          }
        }
  }

  // One row by definition, and by a plain loop with the kernel's roundings.
  Row reference(int i, int h, int r) const {
    Row row;
    const float* q = &q_[(static_cast<size_t>(first_row_[i] + r) * c_.h_q + h) * c_.d];
    const HeadValues& x = heads_[static_cast<size_t>(i) * c_.h_kv + h / group_];
    for (int ch = 0; ch < c_.d; ++ch) row.nan |= !std::isfinite(q[ch]);
    row.out.assign(c_.d_v, 0.0);
    row.plain.assign(c_.d_v, 0.0);
    const int position = offset(i) + r, n = c_.s_kv[i], block = block_of(i, r);
    const Mask mask{c_.causal, c_.window};
    const auto half = [](float y) { return f16_decode(f16_encode(y)); };
    float largest = 0;  // q is rounded as if its largest element were near 2^8
    for (int ch = 0; ch < c_.d; ++ch) largest = std::max(largest, std::fabs(q[ch]));
    const float unit = row.nan || largest == 0 ? 1.0f : std::exp2(8 - std::floor(std::log2(largest)));
    std::vector<double> score(static_cast<size_t>(n), -INFINITY);
    std::vector<float> plain(static_cast<size_t>(n), -INFINITY);
    std::vector<int> form(static_cast<size_t>(n));
    double m = c_.sinks ? sinks_[h] : -INFINITY;
    for (int64_t t = mask.first_token(position); t < mask.end_token(position, n); ++t) {
      const Tier tier_of =
          t >= n / kPageTokens * kPageTokens ? Tier::fp16 : tier(i, h, block, static_cast<int>(t / kPageTokens));
      form[t] = static_cast<int>(tier_of);
      if (tier_of == Tier::none) continue;
      const float* k = &x.k[form[t]][static_cast<size_t>(t) * c_.d];
      double s = 0;
      float p = 0;
      for (int ch = 0; ch < c_.d; ++ch) {
        s += static_cast<double>(q[ch]) * k[ch];
        p += half(q[ch] * unit) / unit * half(k[ch]);
      }
      score[t] = s * scale_;
      plain[t] = p * scale_;
      if (c_.softcap > 0) {
        score[t] = c_.softcap * std::tanh(score[t] / c_.softcap);
        plain[t] = c_.softcap * std::tanh(plain[t] / c_.softcap);
      }
      m = std::max(m, score[t]);
    }
    if (m == -INFINITY) return row;
    double l = c_.sinks ? std::exp(sinks_[h] - m) : 0, high = l;
    float plain_l = static_cast<float>(l);
    for (int t = 0; t < n; ++t) {
      if (score[t] == -INFINITY) continue;
      const double p = std::exp(score[t] - m);
      const float pp = std::exp(plain[t] - static_cast<float>(m));
      l += p;
      plain_l += pp;
      if (form[t] > static_cast<int>(Tier::fp4)) high += p;
      const float* v = &x.v[form[t]][static_cast<size_t>(t) * c_.d_v];
      for (int ch = 0; ch < c_.d_v; ++ch) {
        row.out[ch] += p * v[ch];
        row.plain[ch] += static_cast<double>(half(pp)) * half(v[ch]);
        row.largest_v = std::max(row.largest_v, std::fabs(static_cast<double>(v[ch])));
      }
    }
    for (int ch = 0; ch < c_.d_v; ++ch) {
      row.out[ch] /= l;
      float rounded = static_cast<float>(row.plain[ch] / plain_l);
      uint8_t bytes[4];
      store_row(c_.out, &rounded, 1, bytes);
      load_row(c_.out, bytes, 1, &rounded);
      row.plain[ch] = rounded;
    }
    row.lse = m + std::log(l);
    row.plain_lse = m + std::log(plain_l);
    row.high = high / l;
    return row;
  }

  Case c_;
  int b_, group_, slots_ = 0, max_pages_ = 0, ring_pages_ = 0, max_blocks_ = 0, tier_words_ = 0;
  float scale_ = 0;
  CacheConfig config_;
  PageLayout canonical_;
  DeviceLayout layout_;
  std::vector<int> first_row_, slot_;
  std::vector<float> q_, sinks_;
  std::vector<int32_t> table_;
  std::vector<uint8_t> fp4_, residual_, high_, summary_;
  std::vector<HeadValues> heads_;  // [b, h_kv]
  std::vector<uint32_t> tiers_;
};

void expect_agreement(const Case& c, const char* what) {
  const Prefill prefill(c);
  prefill.expect_agreement(prefill.run(), what);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
bool same(const Result& a, const Result& b) {
  return same(a.out, b.out) && same(a.lse, b.lse) && same(a.mass_high, b.mass_high);
}

class CudaPrefill : public ::testing::Test {
 protected:
  void SetUp() override { SKIP_WITHOUT_GPU(); }
};

TEST_F(CudaPrefill, EveryLength) {
  for (const int n : {1, 2, 63, 64, 65, 127, 128, 129, 200, 1000}) {
    Case c{.s_q = {n}, .s_kv = {n}};
    c.seed = static_cast<unsigned>(n);
    expect_agreement(c, ("length " + std::to_string(n)).c_str());
  }
}

TEST_F(CudaPrefill, ChunksAfterAnyPast) {
  for (const auto& [s_q, s_kv] : {std::pair{1, 64},
                                  {1, 65},
                                  {1, 1000},
                                  {17, 200},
                                  {64, 128},
                                  {64, 100},
                                  {100, 1000},
                                  {130, 700},
                                  {65, 65},
                                  {200, 20000}})
    expect_agreement({.s_q = {s_q}, .s_kv = {s_kv}},
                     (std::to_string(s_q) + " after " + std::to_string(s_kv - s_q)).c_str());
}

TEST_F(CudaPrefill, SequencesOfDifferentLengths) {
  expect_agreement({.s_q = {100, 0, 1, 333, 64}, .s_kv = {100, 70, 500, 400, 192}, .h_q = 4, .h_kv = 2},
                   "five sequences");
}

TEST_F(CudaPrefill, EveryGroup) {
  for (const auto& [h_q, h_kv] : {std::pair{1, 1}, {3, 1}, {4, 4}, {6, 2}, {8, 1}, {10, 2}, {16, 1}})
    expect_agreement({.s_q = {300}, .s_kv = {331}, .h_q = h_q, .h_kv = h_kv},
                     (std::to_string(h_q) + " heads over " + std::to_string(h_kv)).c_str());
}

TEST_F(CudaPrefill, EveryHeadSize) {
  for (int d = 16; d <= 256; d += 16) {
    expect_agreement({.s_q = {150}, .s_kv = {277}, .d = d, .d_v = d}, ("d " + std::to_string(d)).c_str());
  }
  expect_agreement({.s_q = {150}, .s_kv = {277}, .d = 192, .d_v = 128}, "d 192, d_v 128");
  expect_agreement({.s_q = {150}, .s_kv = {277}, .d = 48, .d_v = 240}, "d 48, d_v 240");
  expect_agreement({.s_q = {150}, .s_kv = {277}, .d = 64, .d_v = 16}, "d 64, d_v 16");
}

TEST_F(CudaPrefill, EveryMask) {
  for (const bool causal : {true, false})
    for (const int64_t window : {0, 1, 30, 64, 65, 300})
      for (const int d : {64, 128, 256})
        expect_agreement(
            {.s_q = {260}, .s_kv = {591}, .d = d, .d_v = d, .causal = causal, .window = window},
            ((causal ? "causal, window " : "window ") + std::to_string(window) + ", d " + std::to_string(d)).c_str());
}

TEST_F(CudaPrefill, ScoresOfEveryKind) {
  const Case c{.s_q = {200}, .s_kv = {400}};
  Case x = c;
  x.softcap = 50;
  expect_agreement(x, "soft-cap 50");
  x.softcap = 2;
  x.sinks = true;
  expect_agreement(x, "soft-cap 2, sinks");
  x = c;
  x.sinks = true;
  expect_agreement(x, "sinks");
  x.window = 40;
  expect_agreement(x, "sinks and window");
  x = c;
  x.q_scale = 6;
  expect_agreement(x, "sharp");
  x.q = DType::f16;
  expect_agreement(x, "sharp, q in FP16");
  x.q_scale = 1e-20f;
  x.q = DType::f32;
  expect_agreement(x, "tiny q");
  x.q_scale = 1e9f;
  x.sm_scale = 1e-10f;
  expect_agreement(x, "q beyond FP16");
  x = c;
  x.sm_scale = -0.1f;
  expect_agreement(x, "negative scale");
}

TEST_F(CudaPrefill, EveryTypeAndStride) {
  for (const DType q : {DType::f32, DType::f16, DType::bf16})
    for (const DType out : {DType::f32, DType::f16, DType::bf16})
      for (const int padding : {0, 3, 8})
        expect_agreement({.s_q = {70}, .s_kv = {150}, .q = q, .out = out, .padding = padding},
                         ("types " + std::to_string(static_cast<int>(q)) + std::to_string(static_cast<int>(out)) +
                          ", padding " + std::to_string(padding))
                             .c_str());
}

TEST_F(CudaPrefill, EveryStorageAndRest) {
  for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4})
    for (const Storage storage : {Storage::dual, Storage::residual, Storage::fp4_only})
      for (const Tier rest : {Tier::none, Tier::fp4})
        for (const double promoted : {0.0, 0.05, 0.5, 1.0})
          expect_agreement(
              {.s_q = {300},
               .s_kv = {700},
               .h_q = 4,
               .storage = storage,
               .format = format,
               .centring = format == Fp4Format::nvfp4,
               .rest = rest,
               .promoted = promoted},
              (to_string(storage) + " over " + to_string(rest) + ", " + std::to_string(promoted).substr(0, 4)).c_str());
  for (const Storage storage : {Storage::dual, Storage::high_only})
    expect_agreement({.s_q = {300}, .s_kv = {700}, .storage = storage, .rest = Tier::fp16}, "everything in 16 bit");
  expect_agreement({.s_q = {300}, .s_kv = {700}, .storage = Storage::high_only, .rest = Tier::none},
                   "16 bit over none");
}

TEST_F(CudaPrefill, NaNStaysWithinItsRow) {
  expect_agreement({.s_q = {140}, .s_kv = {200}, .nan_rows = {0, 1, 17, 70, 139}}, "NaN and Inf in q");
}

TEST_F(CudaPrefill, RerunIsBitwiseEqual) {
  const Prefill prefill({.s_q = {700, 65}, .s_kv = {1000, 65}, .h_q = 8, .h_kv = 2});
  const Result first = prefill.run();
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(same(prefill.run(), first));
}

TEST_F(CudaPrefill, PlacesOfPagesDoNotMatter) {
  Case c{.s_q = {300, 65}, .s_kv = {700, 65}, .h_q = 4};
  const Result first = Prefill(c).run();
  c.place = 77;
  EXPECT_TRUE(same(Prefill(c).run(), first));
}

// Chunks may end inside a page, which is the tail then, in 16 bit: so the diagonal pages are in 16 bit here.
TEST_F(CudaPrefill, ChunkedIsOneShot) {
  for (const Storage storage : {Storage::dual, Storage::high_only}) {
    Prefill prefill({.s_q = {500},
                     .s_kv = {700},
                     .h_q = 4,
                     .storage = storage,
                     .rest = storage == Storage::dual ? Tier::fp4 : Tier::fp16});
    for (int h = 0; h < 4; ++h)
      for (int row = 0; row < 500; ++row)
        prefill.set_tier(0, h, prefill.block_of(0, row), (200 + row) / kPageTokens, Tier::fp16);
    const Result whole = prefill.run();
    for (const int chunk : {64, 100, 130, 499}) {
      Result parts = whole;
      for (int from = 0; from < 500; from += chunk) {
        const int to = std::min(500, from + chunk);
        const Result part = prefill.run({from}, {to});
        std::copy(part.out.begin() + from * 4 * 128, part.out.begin() + to * 4 * 128,
                  parts.out.begin() + from * 4 * 128);
        std::copy(part.lse.begin() + from * 4, part.lse.begin() + to * 4, parts.lse.begin() + from * 4);
      }
      EXPECT_TRUE(same(parts.out, whole.out) && same(parts.lse, whole.lse)) << "chunks of " << chunk;
    }
  }
}

// Query heads that share a KV head give what each would give alone.
TEST_F(CudaPrefill, GroupsAreRepeatedHeads) {
  Case c{.s_q = {200}, .s_kv = {400}, .h_q = 6, .h_kv = 1};
  Prefill group(c);
  const Result all = group.run();
  for (int h = 0; h < 6; ++h) {
    c.h_q = 1;
    Prefill alone(c);
    for (int r = 0; r < 200; ++r)
      std::copy_n(&group.q()[(static_cast<size_t>(r) * 6 + h) * 128], 128, &alone.q()[static_cast<size_t>(r) * 128]);
    for (int block = 0; block <= alone.block_of(0, 199); ++block)
      for (int page = 0; page < 400 / kPageTokens; ++page)
        alone.set_tier(0, 0, block, page, group.tier(0, h, block, page));
    const Result one = alone.run();
    for (int r = 0; r < 200; ++r)
      EXPECT_EQ(
          std::memcmp(&one.out[static_cast<size_t>(r) * 128], &all.out[(static_cast<size_t>(r) * 6 + h) * 128], 512), 0)
          << "head " << h << ", row " << r;
  }
}

}  // namespace
}  // namespace thriftattn::cuda
