// Ranking and choosing on the GPU against the CPU's selection over the same cache, and against brute force where scores
// are exact. Selections may differ only where scores do by less than 1e-5 of the largest.
#include "cuda/rank_world.h"

namespace thriftattn::testing::ranking {
namespace {

// --- decode and verify

// launch_rank's results and room for them.
struct Ranked {
  Ranked(const World& w, const DeviceBatch& on)
      : units(on.batch.b * on.shape.h_kv),
        row_stride(static_cast<int>(round_up(on.shape.group * on.shape.max_s_q, 4))),
        max_pages(on.cache.max_pages),
        score(size(on.cache.max_pages)),
        q_norm(size(1)),
        order(size(max_pages)),
        counts(size(8)) {
    params.cache = on.cache;
    params.batch = on.batch;
    params.shape = on.shape;
    params.q = on.q_rows;
    params.method = w.chosen();
    params.row_stride = row_stride;
    params.score = score.get();
    params.q_norm = q_norm.get();
    params.lists = {max_pages, order.get(), counts.get()};
  }
  size_t size(int64_t each) const { return static_cast<size_t>(units * each); }

  // All that was written, bit for bit, untouched bytes included.
  std::vector<uint32_t> bits() const {
    std::vector<uint32_t> all;
    const auto add = [&all](const auto& x) {
      for (auto v : x.read()) all.push_back(std::bit_cast<uint32_t>(v));
    };
    add(score), add(q_norm), add(order), add(counts);
    return all;
  }
  void poison() {
    score.poison(), q_norm.poison();
    order.poison(), counts.poison();
  }

  int64_t units;
  int row_stride, max_pages;
  OnDevice<float> score, q_norm;
  OnDevice<uint32_t> order;
  OnDevice<int32_t> counts;
  cuda::RankParams params = {};
};

std::vector<Promoted> entries(const uint32_t* from, int64_t n) {
  std::vector<Promoted> pages;
  for (int64_t i = 0; i < n; ++i) pages.push_back({static_cast<int32_t>(from[i] / 4), static_cast<Tier>(from[i] % 4)});
  return pages;
}

// The unit's promoted pages by page. All that it sees must stand in the order of reading: promoted by tier, then
// others.
std::vector<Promoted> read_lists(const Ranked& r, size_t u, const BlockPages& block, const std::string& what) {
  const std::vector<uint32_t> order = r.order.read();
  const std::vector<int32_t> counts = r.counts.read();
  const int32_t* count = &counts[u * 8];
  const std::vector<Promoted> all = entries(&order[u * static_cast<size_t>(r.max_pages)], block.n());
  int32_t of_tier[4] = {};
  for (int32_t i = 0; i < count[0]; ++i) ++of_tier[static_cast<int>(all[static_cast<size_t>(i)].tier)];
  for (int i = 0; i < 4; ++i) EXPECT_EQ(count[1 + i], of_tier[3 - i]) << what;
  const auto others = all.begin() + count[0];
  EXPECT_TRUE(std::is_sorted(all.begin(), others, [](const Promoted& a, const Promoted& b) {
    return std::pair(-static_cast<int>(a.tier), a.page) < std::pair(-static_cast<int>(b.tier), b.page);
  })) << what;
  const auto by_page = [](const Promoted& a, const Promoted& b) { return a.page < b.page; };
  EXPECT_TRUE(std::is_sorted(others, all.end(), by_page)) << what;
  EXPECT_TRUE(std::all_of(others, all.end(), [&](const Promoted& p) { return p.tier == r.params.method.rest; }))
      << what;
  std::vector<Promoted> pages = all;
  std::sort(pages.begin(), pages.end(), by_page);
  for (size_t i = 0; i < pages.size(); ++i)
    EXPECT_EQ(pages[i].page, static_cast<int32_t>(block.first_visible) + static_cast<int32_t>(i)) << what;
  pages.assign(all.begin(), others);
  std::sort(pages.begin(), pages.end(), by_page);
  return pages;
}

void expect_decode(const Scene& scene) {
  std::string what;
  {
    std::ostringstream text;
    text << scene;
    what = text.str();
  }
  World w(scene);
  const DeviceBatch on(w);
  Ranked r(w, on);
  ASSERT_CUDA(cuda::launch_rank(r.params, nullptr)) << what;
  ASSERT_CUDA(cudaDeviceSynchronize()) << what;
  const std::vector<uint32_t> once = r.bits();
  r.poison();
  ASSERT_CUDA(cuda::launch_rank(r.params, nullptr)) << what;
  ASSERT_CUDA(cudaDeviceSynchronize()) << what;
  EXPECT_EQ(once, r.bits()) << what << ": a second run differs";

  const Selection want = w.select_on_cpu();
  const std::vector<int32_t> counts = r.counts.read();
  const std::vector<float> scores = r.score.read();
  size_t block = 0;
  for (size_t u = 0; u < static_cast<size_t>(r.units); ++u) {
    const size_t i = u / static_cast<size_t>(scene.shape.h_kv);
    const int g = static_cast<int>(u) % scene.shape.h_kv;
    const Growth& grown = scene.growths[i];
    const std::string here = what + ", sequence " + std::to_string(i) + " of " + std::to_string(grown.s_kv()) +
                             ", head " + std::to_string(g);
    if (grown.s_q == 0) {
      EXPECT_EQ(counts[u * 8], 0) << here;
      continue;
    }
    const Facts f = facts_of(w, i, g, g * w.group(), w.group(), w.first_row(i), grown.s_q, grown.settled);
    const std::vector<Promoted> got = read_lists(r, u, f.block, here);
    const size_t first = static_cast<size_t>(want.first[block]), end = static_cast<size_t>(want.first[block + 1]);
    expect_same(got, {want.pages.data() + first, end - first}, f, here);
    ++block;
    if (ranks(w.chosen()) && w.chosen().budget.kind != Budget::Kind::tolerance) {
      double largest = 0, worst = 0;
      for (size_t p = 0; p < f.rank.size(); ++p) {
        const float score =
            scores[u * static_cast<size_t>(on.cache.max_pages) + static_cast<size_t>(f.block.first_visible) + p];
        if (std::isinf(f.rank[p]) && static_cast<double>(score) == f.rank[p]) continue;
        largest = std::max(largest, std::fabs(f.rank[p]));
        const double error = std::fabs(static_cast<double>(score) - f.rank[p]);
        worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
      }
      EXPECT_LE(worst, kClose * largest) << here << ": scores";
    }
    // What is wanted and not stored: forced pages that are read as the rest, and all ranked ones without a high tier.
    int64_t missing = 0, forced = 0;
    for (size_t p = 0; p < f.forced.size(); ++p) {
      const int32_t page = static_cast<int32_t>(f.block.first_visible) + static_cast<int32_t>(p);
      const bool listed = std::any_of(got.begin(), got.end(), [page](const Promoted& x) { return x.page == page; });
      forced += f.forced[p];
      missing += f.forced[p] && !listed && w.chosen().rest != Tier::fp16;
    }
    if (high_tier(w.chosen().storage) == Tier::none && ranks(w.chosen()))
      missing += budget_pages(w.chosen().budget, f.block, forced, false) - forced;
    EXPECT_EQ(counts[u * 8 + 5], missing) << here;
  }
}

const std::vector<Growth> kManyLengths = {{0, 1}, {62, 1}, {63, 1}, {64, 1}, {64, 0}, {191, 1}, {1000, 1}, {4159, 1}};

TEST(CudaRank, DecodeChoosesAsTheCpu) {
  SKIP_WITHOUT_GPU();
  for (const char* method : {"thrift:policy=block_mean",
                             "thrift:policy=block_mean,budget=0.3,storage=dual",
                             "thrift:policy=block_mean,force=none",
                             "thrift:policy=block_mean,force=sink:2+previous:3,budget=0.1",
                             "thrift:policy=block_mean,budget=paper:0.1",
                             "thrift:policy=block_mean,budget=top_k:7",
                             "thrift:policy=block_mean,budget=per64",
                             "thrift:policy=block_mean,budget=1",
                             "thrift:policy=block_mean,storage=fp4_only",
                             "thrift:policy=block_mean,centring=off",
                             "thrift:policy=block_mean,budget=mass:0.7",
                             "thrift:policy=block_mean,budget=tolerance:0.05",
                             "quest",
                             "topk",
                             "window",
                             "thrift:policy=quest,budget=top_k:5",
                             "thrift:policy=second_moment",
                             "thrift:policy=second_moment,budget=mass:0.5",
                             "thrift:policy=recent,budget=0.2",
                             "paper:arithmetic=kv4"})
    expect_decode({.method = method, .growths = kManyLengths});
}

TEST(CudaRank, SeveralCtasOfAUnitChooseTogether) {
  SKIP_WITHOUT_GPU();
  for (const char* method :
       {"thrift:policy=block_mean", "quest:budget=0.2", "thrift:policy=block_mean,budget=mass:0.9"})
    expect_decode({.method = method, .shape = {2, 1, 32, 32}, .growths = {{40000, 2}}});
}

TEST(CudaRank, VerifyStepsHeadSizesAndGroups) {
  SKIP_WITHOUT_GPU();
  const std::vector<Growth> growths = {{500, 3}, {0, 5}, {1279, 16}, {2000, 1}, {126, 2}};
  for (const char* method : {"thrift:policy=block_mean", "quest", "thrift:policy=second_moment,budget=0.2"})
    for (const Shape& shape : {Shape{4, 4, 128, 128}, Shape{16, 1, 128, 64}, Shape{8, 1, 256, 32}, Shape{5, 1, 80, 16},
                               Shape{24, 2, 16, 16}, Shape{6, 2, 192, 128}})
      expect_decode({.method = method, .shape = shape, .growths = growths});
}

TEST(CudaRank, WindowsMasksAndTypes) {
  SKIP_WITHOUT_GPU();
  const std::vector<Growth> growths = {{500, 3}, {1300, 1}, {1279, 2}, {2047, 16}};
  for (const char* method : {"thrift:policy=block_mean,budget=0.2", "quest", "thrift:policy=recent",
                             "thrift:policy=block_mean,budget=per64"})
    for (const int64_t window : {0, 100, 64 * 20})
      for (const bool causal : {true, false})
        expect_decode({.method = method,
                       .window = window,
                       .causal = causal,
                       .q_dtype = causal ? DType::f16 : DType::bf16,
                       .growths = growths});
}

TEST(CudaRank, RowsWithNanOrInfTakeNoPart) {
  SKIP_WITHOUT_GPU();
  for (const char* method :
       {"thrift:policy=block_mean,budget=0.2", "quest:budget=0.3", "thrift:policy=second_moment", "window"})
    for (const int64_t s_q : {1, 7})
      expect_decode({.method = method,
                     .shape = {4, 2, 64, 64},
                     .growths = {{900, s_q}, {1500, s_q}, {700, s_q}},
                     .poison_rows = true});
}

// Queries and means of small whole numbers: products are exact, and ties are many.
struct ExactWorld {
  static constexpr int kD = 16;
  int n;
  std::vector<float> score;
  std::vector<uint8_t> records;  // [n] summaries; page j has id n - 1 - j
  std::vector<float> q;          // [1, 1, 16]
  PageLayout layout = page_layout(kD, kD, Fp4Format::nvfp4, true, false, false);

  ExactWorld(int pages, int values, int nan_every) : n(pages), score(static_cast<size_t>(pages)), q(kD) {
    std::mt19937 random(static_cast<uint32_t>(pages + values));
    records.assign(static_cast<size_t>(n * layout.summary_bytes), 0);
    q[0] = 1;
    q[1] = 64;
    for (int j = 0; j < n; ++j) {
      auto* mean =
          reinterpret_cast<uint16_t*>(&records[static_cast<size_t>((n - 1 - j) * layout.summary_bytes + layout.mean)]);
      const int x = static_cast<int>(random() % static_cast<unsigned>(values)) - values / 2;
      mean[0] = f16_encode(static_cast<float>(x % 64));
      mean[1] = f16_encode(static_cast<float>(x / 64));
      score[static_cast<size_t>(j)] = static_cast<float>(x);
      if (nan_every && j % nan_every == 0) {
        mean[2] = 0x7e00;
        score[static_cast<size_t>(j)] = -INFINITY;
      }
    }
  }

  // The k best, ties to the lower page.
  std::vector<int32_t> best(int k) const {
    std::vector<int32_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](int32_t a, int32_t b) {
      return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)];
    });
    order.resize(static_cast<size_t>(k));
    std::sort(order.begin(), order.end());
    return order;
  }
};

TEST(CudaRank, TakesExactlyTheBestAndBreaksTiesByPage) {
  SKIP_WITHOUT_GPU();
  for (const int n : {1, 2, 31, 32, 33, 127, 129, 255, 257, 2048, 5000, 16384})
    for (const int values : {1, 2, 30, 100000})
      for (const int nan_every : {0, 3}) {
        const ExactWorld w(n, values, nan_every);
        const OnDevice<uint8_t> records(w.records);
        std::vector<int32_t> ids(static_cast<size_t>(n));
        std::iota(ids.rbegin(), ids.rend(), 0);
        const OnDevice<int32_t> table(ids), s_kv(std::vector<int32_t>{n * kPageTokens}), zero(std::vector<int32_t>{0}),
            one(std::vector<int32_t>{1});
        const OnDevice<float> q(w.q), score(static_cast<size_t>(n)), q_norm(1);
        const OnDevice<uint32_t> order(static_cast<size_t>(n));
        const OnDevice<int32_t> counts(8);
        cuda::RankParams p = {};
        p.cache.canonical = w.layout;
        p.cache.summary = records.get();
        p.cache.block_table = table.get();
        p.cache.released = zero.get();
        p.cache.s_kv = s_kv.get();
        p.cache.max_pages = n;
        p.cache.h_kv = 1;
        p.cache.all_high = true;
        p.batch = {1, zero.get(), one.get(), zero.get()};
        p.shape = {1, 1, 1, ExactWorld::kD, ExactWorld::kD, 1, true, 0, 1.0f, 0.0f, Tier::fp4};
        p.q = {q.get(), DType::f32, ExactWorld::kD, ExactWorld::kD};
        p.row_stride = 4;
        p.score = score.get();
        p.q_norm = q_norm.get();
        p.lists = {n, order.get(), counts.get()};
        for (const int k : {0, 1, n / 20, n / 2, n - 1, n}) {
          p.method = method("thrift:policy=block_mean,storage=dual,force=none,budget=top_k:" + std::to_string(k));
          ASSERT_CUDA(cuda::launch_rank(p, nullptr));
          ASSERT_CUDA(cudaDeviceSynchronize());
          const std::vector<uint32_t> pages = order.read();
          std::vector<int32_t> got;
          for (int i = 0; i < counts.read()[0]; ++i)
            got.push_back(static_cast<int32_t>(pages[static_cast<size_t>(i)] / 4));  // in one tier: by page
          ASSERT_EQ(got, w.best(k)) << k << " of " << n << ", listed " << counts.read()[0] << ", " << values
                                    << " values, NaN every " << nan_every;
        }
      }
}

// --- fp4_mass

TEST(CudaRank, ChoosesByMassAsTheCpu) {
  SKIP_WITHOUT_GPU();
  const std::vector<Growth> growths = {{0, 1}, {63, 3}, {64, 0}, {640, 16}, {1500, 2}, {9000, 1}};
  for (const char* spec :
       {"thrift:policy=fp4_mass", "thrift:policy=fp4_mass,budget=0.3,storage=dual",
        "thrift:policy=fp4_mass,storage=fp4_only", "thrift:policy=fp4_mass,budget=mass:0.8",
        "thrift:policy=fp4_mass,budget=tolerance:0.02", "thrift:policy=fp4_mass,force=none,budget=top_k:9"})
    for (const bool poison_rows : {false, true}) {
      const Scene scene = {.method = spec, .shape = {8, 2, 32, 32}, .growths = growths, .poison_rows = poison_rows};
      World w(scene);
      const DeviceBatch on(w);
      Ranked r(w, on);
      ASSERT_CUDA(cuda::launch_rank(r.params, nullptr));  // q_norm
      ASSERT_CUDA(cudaDeviceSynchronize());
      const std::vector<float> q_norm = r.q_norm.read();
      const size_t rows = static_cast<size_t>(r.row_stride), pages = static_cast<size_t>(on.cache.max_pages);
      std::vector<Facts> facts(static_cast<size_t>(r.units));
      const bool of_all =
          w.chosen().budget.kind == Budget::Kind::mass || w.chosen().budget.kind == Budget::Kind::tolerance;
      const size_t parts = of_all ? 8 : 2;
      std::vector<float> mass(static_cast<size_t>(r.units) * pages * parts * rows, NAN);
      std::vector<float> state(static_cast<size_t>(r.units) * rows * 4, NAN);
      std::mt19937 random(5);
      std::normal_distribution<float> normal;
      for (size_t u = 0; u < facts.size(); ++u) {
        const size_t i = u / 2;
        const Growth& grown = growths[i];
        const int g = static_cast<int>(u) % 2;
        if (grown.s_q == 0) continue;
        Facts& f = facts[u] = facts_of(w, i, g, g * 4, 4, w.first_row(i), grown.s_q, grown.settled);
        std::fill(f.rank.begin(), f.rank.end(), 0.0);
        for (int h = 0; h < 4; ++h) {
          std::vector<double> share(f.rank.size());
          int64_t finite = 0;
          for (int64_t t = 0; t < grown.s_q; ++t) {
            const size_t row = static_cast<size_t>(h * grown.s_q + t);
            const float* q = &w.q()[static_cast<size_t>(((w.first_row(i) + t) * 8 + g * 4 + h) * 32)];
            const bool ok = std::all_of(q, q + 32, [](float x) { return std::isfinite(x); });
            finite += ok;
            double sum = ok ? 0.5 : NAN;  // of the tail and a sink
            std::vector<double> of_row(share.size());
            for (size_t p = 0; p < share.size(); ++p) {
              if (parts == 2 && f.forced[p]) continue;  // read in 16 bit, which leaves no halves
              const size_t page = u * pages + static_cast<size_t>(f.block.first_visible) + p;
              for (size_t part = 0; part < parts; ++part) {
                float& x = mass[(page * parts + part) * rows + row];
                x = 3 * normal(random);
                if (p % 11 == 5 || (p % 3 == 0 && part % 4 > 0)) x = NAN;  // nothing is seen there
                if (ok && !std::isnan(x)) of_row[p] += std::exp2(static_cast<double>(x));
              }
              sum += of_row[p];
            }
            float* ml = &state[(u * rows + row) * 4];
            ml[0] = 1.5f;
            ml[1] = static_cast<float>(sum / std::exp2(1.5));
            if (ok)
              for (size_t p = 0; p < share.size(); ++p) share[p] += of_row[p] / sum;
          }
          for (size_t p = 0; p < share.size() && finite > 0; ++p)
            f.rank[p] = std::max(f.rank[p], share[p] / static_cast<double>(finite));
        }
      }
      const OnDevice<float> page_mass(mass);
      const OnDevice<float> state_ml(state);
      const cuda::MassParams params = {r.params, state_ml.get(), page_mass.get(), static_cast<int>(parts)};
      std::vector<uint32_t> once;
      for (int run = 0; run < 2; ++run) {
        ASSERT_CUDA(cuda::launch_choose_by_mass(params, nullptr));
        ASSERT_CUDA(cudaDeviceSynchronize());
        if (run == 0) once = r.bits();
      }
      EXPECT_EQ(once, r.bits()) << spec << ": a second run differs";

      Problem problem;
      problem.phase = Phase::decode;
      problem.sm_scale = World::sm_scale(32);
      problem.method = w.chosen();
      const std::vector<int32_t> counts = r.counts.read();
      for (size_t u = 0; u < facts.size(); ++u) {
        const size_t i = u / 2;
        const std::string here = std::string(spec) + ", unit " + std::to_string(u);
        if (growths[i].s_q == 0) {
          EXPECT_EQ(counts[u * 8], 0) << here;
          continue;
        }
        Facts& f = facts[u];
        cpu::Choice choice(static_cast<int64_t>(pages));
        std::vector<PageRef> refs(pages, PageRef{});
        for (size_t p = 0; p < f.rank.size(); ++p) {
          const int64_t page = f.block.first_visible + static_cast<int64_t>(p);
          const bool high = on.cache.has_high(static_cast<int>(page), static_cast<int>(w.released(i)));
          const uint8_t* summary = w.summary(i, page, static_cast<int>(u) % 2);
          refs[static_cast<size_t>(page)] = {summary, on.cache.residual ? summary : nullptr,
                                             high ? reinterpret_cast<const uint16_t*>(summary) : nullptr, summary};
          choice.score[static_cast<size_t>(page)] = static_cast<float>(f.rank[p]);
        }
        cpu::choose(problem, *cpu::kernels_for(cpu::targets().back()), f.block, refs.data(), q_norm[u], choice);
        if (w.chosen().budget.kind == Budget::Kind::tolerance)
          for (size_t p = 0; p < f.rank.size(); ++p)
            f.rank[p] = static_cast<double>(choice.contribution[static_cast<size_t>(f.block.first_visible) + p]);
        expect_same(read_lists(r, u, f.block, here), choice.result(), f, here);
        EXPECT_EQ(counts[u * 8 + 5], choice.wanted_not_stored) << here;
      }
    }
}

// --- on the host

TEST(Selection, ForcedPagesCountAsTheyAreListed) {
  for (const Force& force :
       {Force{}, Force{1, true, 1}, Force{3, false, 2}, Force{0, true, 0}, Force{100, true, 5}, Force{2, false, 0}})
    for (const int64_t window : {0, 70, 200})
      for (int64_t first = -3; first < 700; first += 37)
        for (const int64_t rows : {1, 16, 64})
          for (const int64_t more : {0, 63, 200}) {
            const BlockPages block =
                block_pages(first, first + rows - 1, std::max<int64_t>(0, first + rows + more), {more == 0, window});
            int64_t listed = 0;
            for (int64_t p = block.first_visible; p < block.visible; ++p) listed += is_forced(force, block, p);
            EXPECT_EQ(forced_pages(force, block).count(block), listed);
          }
}

TEST(Selection, KeysOrderAsScores) {
  const std::vector<float> ascending = {-INFINITY, -3e38f, -1, -1e-40f, 0, 1e-40f, 1, 3e38f, INFINITY};
  for (size_t i = 0; i + 1 < ascending.size(); ++i)
    EXPECT_LT(cuda::key_of(ascending[i]), cuda::key_of(ascending[i + 1]));
  for (const float x : ascending) EXPECT_EQ(cuda::score_of(cuda::key_of(x)), x);
  EXPECT_EQ(cuda::key_of(-0.0f), cuda::key_of(0.0f));
  EXPECT_EQ(cuda::key_of(NAN), cuda::key_of(-INFINITY));
  EXPECT_LT(cuda::key_of(INFINITY), cuda::Cut::none().key);
}

}  // namespace
}  // namespace thriftattn::testing::ranking
