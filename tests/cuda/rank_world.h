// Caches with sequences that a step has just grown, on the CPU and on the GPU: what the tests of ranking share, and
// what a page's rank is by definition.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "attention/cache_state.h"
#include "attention/session.h"
#include "cpu/backend.h"
#include "cpu/select.h"
#include "cuda/choose.cuh"
#include "cuda/gpu.h"
#include "cuda/params.h"
#include "format/params.h"
#include "format/selection.h"

namespace thriftattn::testing::ranking {

inline constexpr double kClose = 1e-5;  // of the largest score: such pages may change places

// What a step brings one sequence.
struct Growth {
  int64_t settled = 0, s_q = 1;
  int64_t s_kv() const { return settled + s_q; }
};

struct Scene {
  std::string method;
  Phase phase = Phase::decode;
  Shape shape = {8, 2, 64, 64};
  int64_t window = 0;
  bool causal = true;
  DType q_dtype = DType::f32;
  std::vector<Growth> growths;
  bool poison_rows = false;  // some rows of q hold NaN or Inf
};

inline std::ostream& operator<<(std::ostream& out, const Scene& s) {
  return out << s.method << ", " << s.shape << ", window " << s.window << (s.causal ? "" : ", not causal");
}

// A batch in a cache on the CPU, in the middle of a step: all rows are appended, nothing is settled since.
class World {
 public:
  explicit World(const Scene& scene) : scene_(scene), method_(method(scene.method)) {
    const Shape& shape = scene.shape;
    if (method_.policy == Policy::automatic) method_.policy = Policy::block_mean;
    method_.arithmetic = Arithmetic::kv4;
    auto made = KvCache::create(CacheConfig::for_method(method_, 1, shape.h_kv, shape.d, shape.d_v));
    EXPECT_TRUE(made.ok()) << made.status().message();
    cache_.emplace(std::move(*made));
    for (size_t i = 0; i < scene.growths.size(); ++i) {
      const Growth& g = scene.growths[i];
      const Tokens tokens = attention_like(shape, g.s_kv(), static_cast<uint32_t>(i) + 1);
      seqs_.push_back(cache_->new_sequence());
      EXPECT_OK(cache_->append(seqs_.back(), 0, tokens.k_view(0, g.settled), tokens.v_view(0, g.settled), pool()));
      EXPECT_OK(cache_->settle(seqs_.back(), 0));
      EXPECT_OK(
          cache_->append(seqs_.back(), 0, tokens.k_view(g.settled, g.s_q), tokens.v_view(g.settled, g.s_q), pool()));
      s_q_.push_back(g.s_q);
      first_row_.push_back(rows());
      q_.insert(q_.end(), tokens.q.end() - g.s_q * shape.h_q * shape.d, tokens.q.end());
    }
    if (scene.poison_rows)
      for (int64_t r = 0; r < rows(); r += 3)
        q_[static_cast<size_t>((r * shape.h_q + r % shape.h_q) * shape.d + r % shape.d)] = r % 2 ? NAN : -INFINITY;
    if (scene.q_dtype != DType::f32)
      for (float x : q_) q16_.push_back(scene.q_dtype == DType::f16 ? f16_encode(x) : bf16_encode(x));
    for (size_t i = 0; i < q16_.size(); ++i)
      q_[i] = scene.q_dtype == DType::f16 ? f16_decode(q16_[i]) : bf16_decode(q16_[i]);
  }

  const Scene& scene() const { return scene_; }
  const Method& chosen() const { return method_; }
  int64_t rows() const { return static_cast<int64_t>(q_.size()) / (scene_.shape.h_q * scene_.shape.d); }
  int64_t first_row(size_t i) const { return first_row_[i]; }
  const std::vector<float>& q() const { return q_; }
  const CacheState& state() const { return cache_->state(); }
  int64_t max_s_q() const { return std::max<int64_t>(1, *std::max_element(s_q_.begin(), s_q_.end())); }
  int group() const { return scene_.shape.h_q / scene_.shape.h_kv; }
  static float sm_scale(int d) { return 1.0f / std::sqrt(static_cast<float>(d)); }

  const uint8_t* summary(size_t i, int64_t page, int g) const {
    const Sequence& s = *state().find(seqs_[i]);
    return state().summary.at(state().forms_of(s.pages[static_cast<size_t>(page)], 0)[g].summary);
  }
  int64_t released(size_t i) const { return state().find(seqs_[i])->released[0]; }
  int64_t pages(size_t i) const { return pages_for(scene_.growths[i].s_kv()); }

  Selection select_on_cpu() {
    Problem p;
    p.phase = scene_.phase;
    p.b = static_cast<int>(seqs_.size());
    p.max_s_q = max_s_q();
    for (const Growth& g : scene_.growths) p.max_s_kv = std::max(p.max_s_kv, g.s_kv());
    p.h_q = scene_.shape.h_q;
    p.h_kv = scene_.shape.h_kv;
    p.d = scene_.shape.d;
    p.d_v = scene_.shape.d_v;
    p.causal = scene_.causal;
    p.window = scene_.window;
    p.method = method_;
    p.cache = cache_->config();
    auto planned = plan(p, Machine::here(2));
    EXPECT_TRUE(planned.ok()) << planned.status().message();
    auto workspace = Workspace::create(*planned);
    AttendArgs args;
    args.cache = &*cache_;
    args.seqs = seqs_;
    args.s_q = s_q_;
    args.q = view(q_.data(), rows(), p.h_q, p.d);
    auto selected = thriftattn::select(*planned, *workspace, pool(), args);
    EXPECT_TRUE(selected.ok()) << selected.status().message();
    return *selected;
  }

  const void* q_bytes() const { return q16_.empty() ? static_cast<const void*>(q_.data()) : q16_.data(); }
  int64_t q_size() const { return static_cast<int64_t>(q_.size()) * size_of(scene_.q_dtype); }

 private:
  Scene scene_;
  Method method_;
  std::optional<KvCache> cache_;
  std::vector<SeqId> seqs_;
  std::vector<int64_t> s_q_, first_row_;
  std::vector<float> q_;  // [rows, h_q, d]
  std::vector<uint16_t> q16_;
};

// The same batch on the device: pages in another order, sequences in other slots, 16-bit forms by rule alone.
struct DeviceBatch {
  explicit DeviceBatch(const World& w)
      : table(make_table(w)),
        summaries(make_summaries(w)),
        slot(slots(w)),
        s_q(each(w, [](const Growth& g) { return g.s_q; })),
        s_kv(by_slot(w, [&w](size_t i) { return w.scene().growths[i].s_kv(); })),
        released(by_slot(w, [&w](size_t i) { return w.released(i); })),
        first_row(rows(w)),
        q(static_cast<size_t>(w.q_size())) {
    EXPECT_EQ(cudaSuccess, cudaMemcpy(q.get(), w.q_bytes(), static_cast<size_t>(w.q_size()), cudaMemcpyHostToDevice));
    const CacheConfig& config = w.state().config;
    const Shape& s = w.scene().shape;
    cache.layout = device_layout(s.d, s.d_v);
    cache.canonical = w.state().layout;
    cache.summary = summaries.get();
    cache.fp4 = config.storage == Storage::high_only ? nullptr : summaries.get();  // never read
    cache.residual = config.storage == Storage::residual ? summaries.get() : nullptr;
    cache.block_table = table.get();
    cache.s_kv = s_kv.get();
    cache.released = released.get();
    cache.max_pages = max_pages(w);
    cache.h_kv = s.h_kv;
    cache.all_high = config.storage == Storage::high_only || config.storage == Storage::dual;
    cache.sink = config.sink;
    cache.format = config.format;
    cache.centring = config.centring;
    batch = {static_cast<int>(w.scene().growths.size()), slot.get(), s_q.get(), first_row.get()};
    shape = {s.h_q,
             s.h_kv,
             w.group(),
             s.d,
             s.d_v,
             static_cast<int>(w.max_s_q()),
             w.scene().causal,
             w.scene().window,
             World::sm_scale(s.d),
             0,
             w.chosen().rest};
    q_rows = {q.get(), w.scene().q_dtype, int64_t{s.h_q} * s.d, s.d};
  }

  static int max_pages(const World& w) {
    int64_t most = 0;
    for (size_t i = 0; i < w.scene().growths.size(); ++i) most = std::max(most, w.pages(i));
    return static_cast<int>(most) + 3;
  }
  static std::vector<int32_t> slots(const World& w) {
    std::vector<int32_t> slot(w.scene().growths.size());
    std::iota(slot.rbegin(), slot.rend(), 1);  // slot 0 belongs to nobody
    return slot;
  }
  template <class Field>
  static std::vector<int32_t> each(const World& w, Field field) {
    std::vector<int32_t> all;
    for (const Growth& g : w.scene().growths) all.push_back(static_cast<int32_t>(field(g)));
    return all;
  }
  template <class Field>
  static std::vector<int32_t> by_slot(const World& w, Field field) {
    std::vector<int32_t> all(w.scene().growths.size() + 1, -1), slot = slots(w);
    for (size_t i = 0; i < slot.size(); ++i) all[static_cast<size_t>(slot[i])] = static_cast<int32_t>(field(i));
    return all;
  }
  static std::vector<int32_t> rows(const World& w) {
    std::vector<int32_t> first;
    for (size_t i = 0; i < w.scene().growths.size(); ++i) first.push_back(static_cast<int32_t>(w.first_row(i)));
    return first;
  }
  // Page ids, shuffled: [slots, max pages].
  static std::vector<int32_t> make_table(const World& w) {
    const std::vector<int32_t> slot = slots(w);
    int64_t all = 0;
    for (size_t i = 0; i < slot.size(); ++i) all += w.pages(i);
    std::vector<int32_t> ids(static_cast<size_t>(all));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(7));
    std::vector<int32_t> table((slot.size() + 1) * static_cast<size_t>(max_pages(w)), -1);
    size_t next = 0;
    for (size_t i = 0; i < slot.size(); ++i)
      for (int64_t j = 0; j < w.pages(i); ++j) table[static_cast<size_t>(slot[i] * max_pages(w) + j)] = ids[next++];
    return table;
  }
  static std::vector<uint8_t> make_summaries(const World& w) {
    const std::vector<int32_t> slot = slots(w), table = make_table(w);
    const int h_kv = w.scene().shape.h_kv;
    const int64_t bytes = w.state().layout.summary_bytes;
    int64_t all = 0;
    for (size_t i = 0; i < slot.size(); ++i) all += w.pages(i);
    std::vector<uint8_t> pool(static_cast<size_t>(all * h_kv * bytes), 0xff);
    for (size_t i = 0; i < slot.size(); ++i)
      for (int64_t j = 0; j < w.pages(i); ++j)
        for (int g = 0; g < h_kv; ++g) {
          const int64_t id = table[static_cast<size_t>(slot[i] * max_pages(w) + j)];
          if (const uint8_t* from = w.summary(i, j, g))
            std::memcpy(&pool[static_cast<size_t>((id * h_kv + g) * bytes)], from, static_cast<size_t>(bytes));
        }
    return pool;
  }

  OnDevice<int32_t> table;
  OnDevice<uint8_t> summaries;
  OnDevice<int32_t> slot, s_q, s_kv, released, first_row;
  OnDevice<uint8_t> q;
  cuda::LayerCache cache = {};
  cuda::Batch batch = {};
  cuda::Shape shape = {};
  cuda::Rows<const void*> q_rows = {};
};

// What one query block of one head or unit ranks its pages by, in double.
struct Facts {
  BlockPages block;
  std::vector<double> rank;  // [visible pages from first_visible on], what pages are ordered by
  std::vector<bool> forced;
};

inline Facts facts_of(const World& w, size_t i, int g, int first_head, int heads, int64_t first_row, int64_t rows,
                      int64_t position) {
  const Method& m = w.chosen();
  const Shape& shape = w.scene().shape;
  const PageLayout& layout = w.state().layout;
  const double s = static_cast<double>(World::sm_scale(shape.d));
  Facts f;
  f.block =
      block_pages(position, position + rows - 1, w.scene().growths[i].s_kv(), {w.scene().causal, w.scene().window});
  const size_t n = static_cast<size_t>(f.block.n());
  f.rank.assign(n, -INFINITY);
  for (size_t p = 0; p < n; ++p)
    f.forced.push_back(is_forced(m.force, f.block, f.block.first_visible + static_cast<int64_t>(p)));
  double q_norm = 0;
  for (int h = first_head; h < first_head + heads; ++h) {
    std::vector<double> mean(static_cast<size_t>(shape.d));
    int64_t finite = 0;
    for (int64_t r = first_row; r < first_row + rows; ++r) {
      const float* q = &w.q()[static_cast<size_t>((r * shape.h_q + h) * shape.d)];
      if (!std::all_of(q, q + shape.d, [](float x) { return std::isfinite(x); })) continue;
      ++finite;
      for (int c = 0; c < shape.d; ++c) mean[static_cast<size_t>(c)] += static_cast<double>(q[c]);
    }
    if (finite == 0) continue;
    double norm = 0;
    for (double& x : mean) {
      x /= static_cast<double>(finite);
      norm += x * x;
    }
    q_norm = std::max(q_norm, std::sqrt(norm));
    for (size_t p = 0; p < n; ++p) {
      const uint8_t* record = w.summary(i, f.block.first_visible + static_cast<int64_t>(p), g);
      const auto half = [&](int64_t at, int c) {
        return static_cast<double>(f16_decode(reinterpret_cast<const uint16_t*>(record + at)[c]));
      };
      double score = m.policy == Policy::recent ? static_cast<double>(p) : 0;
      for (int c = 0; c < shape.d; ++c) {
        const double q = mean[static_cast<size_t>(c)];
        if (m.policy == Policy::block_mean) score += s * q * half(layout.mean, c);
        if (m.policy == Policy::quest) score += s * std::max(q * half(layout.min, c), q * half(layout.max, c));
        if (m.policy == Policy::second_moment)
          score +=
              s * q * half(layout.mean, c) +
              0.5 * s * s * q * q * static_cast<double>(reinterpret_cast<const float*>(record + layout.variance)[c]);
      }
      f.rank[p] = std::max(f.rank[p], score);
    }
  }
  if (m.budget.kind == Budget::Kind::tolerance && n > 0) {
    const double top = *std::max_element(f.rank.begin(), f.rank.end());
    double total = 0;
    for (double x : f.rank) total += std::exp(x - top);
    for (size_t p = 0; p < n; ++p) {
      PageSummary page;
      std::memcpy(&page, w.summary(i, f.block.first_visible + static_cast<int64_t>(p), g), sizeof(page));
      f.rank[p] = std::exp(f.rank[p] - top) / total *
                  (s * q_norm * static_cast<double>(page.eps_k) * static_cast<double>(page.v_norm) +
                   static_cast<double>(page.eps_v));
    }
  }
  return f;
}

inline void expect_same(const std::vector<Promoted>& got, std::span<const Promoted> want, const Facts& f,
                        const std::string& what) {
  EXPECT_EQ(got.size(), want.size()) << what;
  const auto rank = [&f](const Promoted& p) { return f.rank[static_cast<size_t>(p.page - f.block.first_visible)]; };
  double largest = 0, border = INFINITY;  // the weakest page that the CPU promotes for its rank
  for (double x : f.rank)
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  for (const Promoted& p : want)
    if (!f.forced[static_cast<size_t>(p.page - f.block.first_visible)]) border = std::min(border, rank(p));
  const auto expect_near_border = [&](std::span<const Promoted> some, std::span<const Promoted> others,
                                      const char* by) {
    for (const Promoted& p : some) {
      if (std::find(others.begin(), others.end(), p) != others.end()) continue;
      EXPECT_LE(std::fabs(rank(p) - border), kClose * largest)
          << what << ": page " << p.page << ':' << to_string(p.tier) << " is promoted by the " << by << " alone";
    }
  };
  expect_near_border(got, want, "GPU");
  expect_near_border(want, got, "CPU");
}

}  // namespace thriftattn::testing::ranking
