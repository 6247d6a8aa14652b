// A cache in long use: random steps over many sequences, each attention call against the oracle, which knows nothing of
// pages that are shared, released, cut, saved or loaded.
//
// THRIFTATTN_SOAK_SECONDS  how long, 3 unless given
// THRIFTATTN_SOAK_SEED     of the first episode, 1 unless given; a failure names the seed that repeats it at once
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention/agreement.h"
#include "attention/cache_state.h"
#include "format/page_codec.h"

namespace thriftattn::testing {
namespace {

constexpr int64_t kLongest = 600;  // tokens of one sequence
constexpr size_t kMostSequences = 6;

// What the test knows of one sequence: its keys and values as they were stored in 16 bit, and as a lossy cut left them.
struct Known {
  std::vector<Tokens> layers;  // k and v; no q
  bool was_cut = false;        // then 16-bit pages of its window may be gone
  bool was_shared = false;     // then a fork may hold 16-bit pages outside its window

  bool grown_alone() const { return !was_cut && !was_shared; }

  int64_t length() const { return layers[0].s; }
};

class Episode {
 public:
  explicit Episode(uint32_t seed) : random_(seed) {}

  // Random steps, then everything is freed.
  void run(int steps) {
    set_up();
    for (int i = 0; i < steps && !HasFailure(); ++i) step();
    while (!HasFailure() && !known_.empty()) free(known_.begin()->first);
    if (HasFailure()) return;
    const MemoryUse use = cache_->bytes();
    EXPECT_EQ(use.total(), 0) << use.codes << " " << use.residual << " " << use.high << " " << use.summaries << " "
                              << use.tables;
  }

  std::string history() const {
    std::string all;
    for (const std::string& line : history_) all += line + "\n";
    return all;
  }
  int calls() const { return calls_; }

 private:
  static bool HasFailure() { return ::testing::Test::HasFailure(); }
  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class List>
  auto one_of(const List& list) {
    return list[static_cast<size_t>(below(static_cast<int64_t>(std::size(list))))];
  }
  void note(std::string line) { history_.push_back(std::move(line)); }

  static std::string name_of(Storage storage) { return to_string(storage); }

  // A method that this episode's cache serves for heads of one storage.
  Method method_for(Storage storage, Phase phase) {
    static const char* const kPolicies[] = {"auto",          "auto",     "block_mean", "quest",
                                            "second_moment", "fp4_mass", "recent",     "oracle"};
    static const char* const kBudgets[] = {"0", "0.1", "0.3", "0.7", "paper:0.3", "top_k:2", "mass:0.9", "per64"};
    for (;;) {
      if (storage == Storage::high_only && one_in(4)) return *parse_method("fp16" + options_after(":"));
      const std::string policy = one_of(kPolicies);
      if (phase == Phase::prefill && policy == "fp4_mass") continue;
      std::string spec = "thrift:policy=" + policy + ",budget=" + one_of(kBudgets) + ",storage=" + name_of(storage) +
                         (storage == Storage::high_only ? ",rest=none" : form_) + options_after(",");
      if (one_in(6)) spec += ",arithmetic=mma4";
      const auto parsed = parse_method(spec);
      if (parsed.ok()) return *parsed;
    }
  }
  std::string options_after(const std::string& separator) const { return separator + window_; }

  void set_up() {
    static const Shape kShapes[] = {{4, 2, 32, 32}, {2, 1, 16, 48}, {3, 3, 32, 16}, {4, 1, 80, 64}, {2, 2, 48, 16}};
    static const char* const kForms[] = {"", ",format=mxfp4", ",scales=4over6"};
    static const char* const kWindows[] = {"force=sink:1+diagonal+previous:1", "force=none", "force=sink:2+previous:2",
                                           "force=sink:1+diagonal+previous:1,recent=4"};
    static const Storage kStorages[] = {Storage::high_only, Storage::dual, Storage::residual, Storage::fp4_only};
    shape_ = one_of(kShapes);
    form_ = std::string(one_of(kForms)) + (one_in(3) ? ",centring=off" : "") + (one_in(3) ? ",page_scale=off" : "");
    window_ = one_of(kWindows);
    const int layers = 1 + static_cast<int>(below(3));
    const auto base = parse_method("thrift:storage=residual" + form_ + options_after(","));
    ASSERT_TRUE(base.ok()) << base.status().message();
    CacheConfig config = CacheConfig::for_method(*base, layers, shape_.h_kv, shape_.d, shape_.d_v);
    config.storage = one_of(kStorages);
    if (one_in(3))
      for (int i = 0; i < layers * shape_.h_kv; ++i) config.storage_by_head.push_back(one_of(kStorages));
    config.mean = config.min_max = config.variance = true;
    config.high_dtype = one_in(3) ? DType::bf16 : DType::f16;
    if (one_in(4)) config.max_bytes = 200000 + below(3000000);
    pool_ = std::make_unique<ThreadPool>(1 + static_cast<int>(below(4)));
    causal_ = !one_in(4);
    token_window_ = one_in(3) ? 20 + below(300) : 0;
    softcap_ = one_in(3) ? 3.0f : 0.0f;
    for (int h = 0; h < shape_.h_q; ++h) sinks_.push_back(3.0f - 1.5f * static_cast<float>(h));
    has_sinks_ = one_in(3);
    auto made = KvCache::create(config);
    ASSERT_TRUE(made.ok()) << made.status().message();
    cache_.emplace(std::move(*made));
    std::string storages = to_string(config.storage);
    for (const Storage s : config.storage_by_head) storages += "/" + to_string(s);
    note("cache " + storages + form_ + " " + window_ + " layers " + std::to_string(layers) + " h " +
         std::to_string(shape_.h_q) + "/" + std::to_string(shape_.h_kv) + " d " + std::to_string(shape_.d) + "/" +
         std::to_string(shape_.d_v) + (config.high_dtype == DType::bf16 ? " bf16" : " f16") + " max_bytes " +
         std::to_string(config.max_bytes) + " threads " + std::to_string(pool_->size()) +
         (causal_ ? " causal" : " not causal") + " window " + std::to_string(token_window_) + " softcap " +
         std::to_string(softcap_) + (has_sinks_ ? " sinks" : ""));
  }

  void step() {
    const int64_t dice = below(20);
    if (known_.empty() || (known_.size() < kMostSequences && dice == 0)) return create();
    const SeqId seq = std::next(known_.begin(), below(std::ssize(known_)))->first;
    if (dice < 12) return model_step();
    if (dice < 14) return known_.size() < kMostSequences ? fork(seq) : free(seq);
    if (dice < 17) return truncate(seq);
    if (dice < 19) return known_.size() < kMostSequences ? save_and_load(seq) : free(seq);
    free(seq);
  }

  void create() {
    const SeqId seq = cache_->new_sequence();
    ASSERT_FALSE(known_.contains(seq));
    note("new " + std::to_string(seq));
    known_[seq].layers.assign(static_cast<size_t>(cache_->config().layers), Tokens{shape_, 0, {}, {}, {}});
  }

  void free(SeqId seq) {
    note("free " + std::to_string(seq));
    EXPECT_OK(cache_->free(seq));
    EXPECT_EQ(cache_->length(seq), -1);
    known_.erase(seq);
  }

  void fork(SeqId seq) {
    const auto copy = cache_->fork(seq);
    note("fork " + std::to_string(seq) + (copy.ok() ? " to " + std::to_string(*copy) : " refused"));
    if (!copy.ok()) {
      EXPECT_EQ(copy.status().code(), Code::out_of_memory) << copy.status().message();
      EXPECT_GT(cache_->config().max_bytes, 0);
      return;
    }
    known_[seq].was_shared = true;
    known_[*copy] = known_[seq];
  }

  void save_and_load(SeqId seq) {
    const std::string path = std::filesystem::temp_directory_path() / ("soak-" + std::to_string(getpid()));
    note("save and load " + std::to_string(seq));
    ASSERT_OK(cache_->save(seq, path));
    const auto seen = inspect_saved(path);
    const MemoryUse before = cache_->bytes();
    const auto copy = cache_->load(path);
    std::filesystem::remove(path);
    ASSERT_TRUE(seen.ok()) << seen.status().message();
    EXPECT_EQ(seen->tokens, known_[seq].length());
    if (!copy.ok()) {
      EXPECT_EQ(copy.status().code(), Code::out_of_memory) << copy.status().message();
      EXPECT_GT(before.total() + seen->bytes.total(), cache_->config().max_bytes);
      EXPECT_EQ(cache_->bytes().total(), before.total());
      return;
    }
    note("  as " + std::to_string(*copy));
    EXPECT_EQ(cache_->bytes().total(), before.total() + seen->bytes.total());
    known_[*copy] = known_[seq];
  }

  void truncate(SeqId seq) {
    Known& k = known_[seq];
    const int64_t length = k.length(), full = length / kPageTokens;
    // Mostly near the end, where it matters.
    const int64_t to = one_in(2) ? below(length + 1) : std::max<int64_t>(0, length - below(200));
    const bool lossy = one_in(2);
    note("truncate " + std::to_string(seq) + " from " + std::to_string(length) + " to " + std::to_string(to) +
         (lossy ? " lossy" : ""));
    const CacheConfig& c = cache_->config();
    const int64_t page = to / kPageTokens;
    bool all_high = true;
    for (int l = 0; l < c.layers; ++l)
      for (int h = 0; h < c.h_kv; ++h) {
        const Storage storage = c.storage_at(l, h);
        all_high &= storage == Storage::high_only || storage == Storage::dual;
      }
    const bool in_window = page < c.sink || page >= full - c.recent;
    const bool exact = to % kPageTokens == 0 || to == length || page == full || all_high;
    const Status status = cache_->truncate(seq, to, lossy);
    if (!status.ok()) {
      EXPECT_EQ(status.code(), Code::unsupported) << status.message();
      EXPECT_FALSE(lossy || exact || (k.grown_alone() && in_window)) << status.message();
      EXPECT_EQ(cache_->length(seq), length);
      return;
    }
    EXPECT_TRUE(lossy || exact || in_window || !k.grown_alone()) << "a cut that cannot be exact was made";
    cut(seq, to, lossy);
    k.was_cut = true;
  }

  // The sequence has been truncated. An exact cut leaves every value; a lossy one may change those of its new tail.
  void cut(SeqId seq, int64_t to, bool lossy) {
    EXPECT_EQ(cache_->length(seq), to);
    for (int l = 0; l < cache_->config().layers; ++l) {
      Tokens& x = known_[seq].layers[static_cast<size_t>(l)];
      x.s = to;
      x.k.resize(static_cast<size_t>(to * shape_.h_kv * shape_.d));
      x.v.resize(static_cast<size_t>(to * shape_.h_kv * shape_.d_v));
      const int64_t first = to / kPageTokens * kPageTokens, n = to - first;
      if (n == 0) continue;
      Tokens tail{shape_, n, {}, {}, {}};
      tail.k.resize(static_cast<size_t>(n * shape_.h_kv * shape_.d));
      tail.v.resize(static_cast<size_t>(n * shape_.h_kv * shape_.d_v));
      ASSERT_OK(cache_->read(seq, l, first, mutable_view(tail.k.data(), n, shape_.h_kv, shape_.d),
                             mutable_view(tail.v.data(), n, shape_.h_kv, shape_.d_v)));
      if (!lossy) {
        EXPECT_TRUE(std::equal(tail.k.begin(), tail.k.end(), x.k_at(first))) << "layer " << l;
        EXPECT_TRUE(std::equal(tail.v.begin(), tail.v.end(), x.v_at(first))) << "layer " << l;
      }
      std::copy(tail.k.begin(), tail.k.end(), x.k_at(first));
      std::copy(tail.v.begin(), tail.v.end(), x.v_at(first));
    }
  }

  // `n` tokens whose keys and values the 16-bit form holds exactly.
  Tokens fresh(int64_t n) {
    Tokens x = attention_like(shape_, n, static_cast<uint32_t>(random_()));
    const DType type = cache_->config().high_dtype;
    for (auto* values : {&x.k, &x.v})
      for (float& value : *values) value = high_decode(type, high_encode(type, value));
    return x;
  }

  // One step of a model: some sequences grow by some tokens each, in every layer, and attend.
  void model_step() {
    const Phase phase = one_in(2) ? Phase::decode : Phase::prefill;
    std::vector<SeqId> seqs;
    for (const auto& [seq, k] : known_)
      if (k.length() < kLongest && (seqs.empty() || one_in(2))) seqs.push_back(seq);
    if (seqs.empty()) return;
    std::vector<int64_t> grow, rows;
    std::string line = phase == Phase::decode ? "decode" : "prefill";
    for (const SeqId seq : seqs) {
      const int64_t length = known_[seq].length();
      int64_t n = phase == Phase::decode ? 1 + below(kMaxDecodeRows) : 1 + below(one_in(3) ? 250 : 90);
      if (one_in(8)) n = 0;
      n = std::min(n, kLongest - length);
      const int64_t most = phase == Phase::decode ? kMaxDecodeRows : 100;
      grow.push_back(n);
      rows.push_back(one_in(4) ? below(most + 1) : n);
      rows.back() = std::min({rows.back(), most, length + n});
      line += " " + std::to_string(seq) + "+" + std::to_string(n) + "(" + std::to_string(rows.back()) + ")";
    }
    note(line);
    for (int layer = 0; layer < cache_->config().layers; ++layer) {
      for (size_t i = 0; i < seqs.size(); ++i) {
        const Tokens x = fresh(grow[i]);
        const Status status = cache_->append(seqs[i], layer, x.k_view(0, grow[i]), x.v_view(0, grow[i]), *pool_);
        if (!status.ok()) return take_back(seqs, status);
        Tokens& all = known_[seqs[i]].layers[static_cast<size_t>(layer)];
        all.k.insert(all.k.end(), x.k.begin(), x.k.end());
        all.v.insert(all.v.end(), x.v.begin(), x.v.end());
        all.s += grow[i];
      }
      attend(phase, layer, seqs, rows, grow);
      for (const SeqId seq : seqs) {
        EXPECT_OK(cache_->settle(seq, layer));
        expect_window(seq, layer);
      }
      if (one_in(4)) attend(phase, layer, seqs, rows, {});
      if (HasFailure()) return;
    }
  }

  // Between steps, the window is in 16 bit and nothing else is.
  void expect_window(SeqId seq, int layer) {
    const CacheState& s = cache_->state();
    const CacheConfig& c = s.config;
    const Known& k = known_[seq];
    const int64_t full = k.layers[static_cast<size_t>(layer)].s / kPageTokens;
    for (int64_t p = 0; p < full; ++p)
      for (int h = 0; h < c.h_kv; ++h) {
        const bool there = s.forms_of(s.find(seq)->pages[static_cast<size_t>(p)], layer)[h].high >= 0;
        const bool in_window = s.stored(layer, h).all_high || p < c.sink || p >= full - c.recent;
        EXPECT_TRUE(there ? in_window || k.was_shared : !in_window || k.was_cut)
            << "sequence " << seq << ", layer " << layer << ", page " << p << " of " << full << ", KV head " << h
            << (there ? " is" : " is not") << " stored in 16 bit";
      }
  }

  // The cache is full: what the step has appended so far goes again.
  void take_back(const std::vector<SeqId>& seqs, const Status& status) {
    note("  no memory");
    EXPECT_EQ(status.code(), Code::out_of_memory) << status.message();
    EXPECT_GT(cache_->config().max_bytes, 0);
    for (const SeqId seq : seqs) {
      int64_t shortest = kLongest;
      for (const Tokens& x : known_[seq].layers) shortest = std::min(shortest, x.s);
      EXPECT_EQ(cache_->length(seq), shortest);
      EXPECT_OK(cache_->truncate(seq, shortest, true));
      cut(seq, shortest, true);
      known_[seq].was_cut = true;
    }
  }

  // Every KV head that a method of one storage serves, in one call over all sequences.
  void attend(Phase phase, int layer, const std::vector<SeqId>& seqs, const std::vector<int64_t>& rows,
              const std::vector<int64_t>& appended) {
    const CacheConfig& c = cache_->config();
    const int begin = static_cast<int>(below(c.h_kv));
    const Storage storage = c.storage_at(layer, begin);
    std::vector<int> heads;
    for (int g = 0; g < c.h_kv; ++g)
      if (c.storage_at(layer, g) == storage && (g == begin || !one_in(8))) heads.push_back(g);
    const bool all_heads = std::ssize(heads) == c.h_kv;

    Problem p;
    p.phase = phase;
    p.b = static_cast<int>(seqs.size()) + static_cast<int>(below(2));
    p.max_s_q = *std::max_element(rows.begin(), rows.end());
    p.max_s_kv = 1;
    for (const SeqId seq : seqs) p.max_s_kv = std::max(p.max_s_kv, cache_->length(seq, layer));
    p.h_q = shape_.h_q;
    p.h_kv = shape_.h_kv;
    p.d = shape_.d;
    p.d_v = shape_.d_v;
    p.causal = causal_;
    p.window = token_window_;
    p.softcap = softcap_;
    p.method = method_for(storage, phase);
    p.cache = c;
    p.stats = one_in(3);
    note("  layer " + std::to_string(layer) + " " + to_string(p.method) + (all_heads ? "" : ", some heads"));
    const auto planned = plan(p, Machine::here(pool_->size()));
    ASSERT_TRUE(planned.ok()) << planned.status().message();
    auto workspace = Workspace::create(*planned);
    ASSERT_TRUE(workspace.ok()) << workspace.status().message();

    int64_t total = 0;
    for (const int64_t n : rows) total += n;
    const Tokens queries = attention_like(shape_, std::max<int64_t>(total, 1), static_cast<uint32_t>(random_()));
    std::vector<float> out(static_cast<size_t>(total * shape_.h_q * shape_.d_v), NAN), lse(total * shape_.h_q, NAN);
    Stats stats;
    AttendArgs args;
    args.cache = &*cache_;
    args.layer = layer;
    args.seqs = seqs;
    args.s_q = rows;
    if (!all_heads) args.kv_heads = heads;
    args.q = queries.q_view(0, total);
    args.out = mutable_view(out.data(), total, shape_.h_q, shape_.d_v);
    args.lse = lse.data();
    args.sinks = has_sinks_ ? sinks_.data() : nullptr;
    const auto selected = select(*planned, *workspace, *pool_, args);
    ASSERT_TRUE(selected.ok()) << selected.status().message();
    args.stats = &stats;
    ASSERT_OK(thriftattn::run(*planned, *workspace, *pool_, args));
    ++calls_;

    int64_t row = 0;
    size_t block = 0;
    for (size_t i = 0; i < seqs.size(); ++i) {
      const Tokens& x = known_[seqs[i]].layers[static_cast<size_t>(layer)];
      oracle::Input in;
      in.q = queries.q.data() + row * shape_.h_q * shape_.d;
      in.k = x.k.data();
      in.v = x.v.data();
      in.s_q = rows[i];
      in.s_kv = x.s;
      in.h_q = shape_.h_q;
      in.h_kv = shape_.h_kv;
      in.d = shape_.d;
      in.d_v = shape_.d_v;
      in.causal = causal_;
      in.window = token_window_;
      in.sm_scale = static_cast<double>(planned->problem.sm_scale);
      in.softcap = static_cast<double>(softcap_);
      in.sinks = args.sinks;
      in.phase = phase;
      in.method = planned->problem.method;
      in.high_dtype = c.high_dtype;
      in.appended = appended.empty() ? 0 : appended[i];
      const size_t blocks = oracle::query_blocks(in).size();
      Selection of_sequence;
      for (size_t b = block; b <= block + blocks; ++b)
        of_sequence.first.push_back(selected->first[b] - selected->first[block]);
      of_sequence.pages.assign(selected->pages.begin() + selected->first[block],
                               selected->pages.begin() + selected->first[block + blocks]);
      block += blocks;
      const std::string what = "sequence " + std::to_string(seqs[i]) + ", layer " + std::to_string(layer) + ", " +
                               to_string(p.method) + ", " + std::to_string(in.s_q) + " of " + std::to_string(in.s_kv);
      if (in.s_q > 0 && one_in(2)) {  // the oracle is slow: half of the sequences, their selections half as often
        if (all_heads && one_in(2) && holds_what_the_oracle_thinks(seqs[i], layer, in)) {
          expect_same_selection(of_sequence, in, what);
        }
        expect_rows(out, lse, row, heads, oracle::attend(in, of_sequence), in, x, what);
      }
      row += rows[i];
    }
  }

  // The oracle derives from length and window which pages are there in 16 bit; after cuts and forks it is others.
  bool holds_what_the_oracle_thinks(SeqId seq, int layer, const oracle::Input& in) const {
    const CacheState& s = cache_->state();
    const CacheConfig& c = s.config;
    const int64_t before = (in.s_kv - in.appended) / kPageTokens;
    for (int64_t p = 0; p < in.s_kv / kPageTokens; ++p)
      for (int h = 0; h < c.h_kv; ++h) {
        const bool there = s.forms_of(s.find(seq)->pages[static_cast<size_t>(p)], layer)[h].high >= 0;
        const bool thought = s.stored(layer, h).all_high || p < c.sink || p >= before - c.recent;
        if (there != thought) return false;
      }
    return true;
  }

  // The rows of one sequence, of the heads that were computed; the others must have been let alone.
  void expect_rows(const std::vector<float>& out, const std::vector<float>& lse, int64_t first_row,
                   const std::vector<int>& heads, const oracle::Output& want, const oracle::Input& in, const Tokens& x,
                   const std::string& what) {
    Ran got;
    oracle::Output of_heads;
    const int group = shape_.h_q / shape_.h_kv;
    for (int64_t r = 0; r < in.s_q; ++r)
      for (int h = 0; h < shape_.h_q; ++h) {
        const auto at = static_cast<size_t>((first_row + r) * shape_.h_q + h), d_v = static_cast<size_t>(shape_.d_v);
        if (std::find(heads.begin(), heads.end(), h / group) == heads.end()) {
          EXPECT_TRUE(std::isnan(lse[at]) && std::isnan(out[at * d_v])) << what << ": head " << h << " was written";
          continue;
        }
        const auto from = static_cast<size_t>(r * shape_.h_q + h);
        got.lse.push_back(lse[at]);
        of_heads.lse.push_back(want.lse[from]);
        for (size_t e = 0; e < d_v; ++e) {
          got.out.push_back(out[at * d_v + e]);
          of_heads.out.push_back(want.out[from * d_v + e]);
        }
      }
    expect_output(got, of_heads, x, in, what);
  }

  std::mt19937 random_;
  std::vector<std::string> history_;
  Shape shape_;
  std::string form_, window_;
  bool causal_ = true, has_sinks_ = false;
  int64_t token_window_ = 0;
  float softcap_ = 0;
  std::vector<float> sinks_;
  std::unique_ptr<ThreadPool> pool_;
  std::optional<KvCache> cache_;
  std::map<SeqId, Known> known_;
  int calls_ = 0;
};

int64_t from_environment(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoll(text, nullptr, 10) : otherwise;
}

TEST(Soak, ManySequencesAgreeWithTheOracle) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::seconds(from_environment("THRIFTATTN_SOAK_SECONDS", 3));
  auto seed = static_cast<uint32_t>(from_environment("THRIFTATTN_SOAK_SEED", 1));
  int episodes = 0, calls = 0;
  for (; (Clock::now() < end || episodes == 0) && !HasFailure(); ++seed, ++episodes) {
    Episode episode(seed);
    episode.run(60);
    calls += episode.calls();
    if (HasFailure()) {
      ADD_FAILURE() << "THRIFTATTN_SOAK_SEED=" << seed << " THRIFTATTN_SOAK_SECONDS=0 repeats this:\n"
                    << episode.history();
    }
  }
  RecordProperty("episodes", episodes);
  RecordProperty("calls", calls);
  EXPECT_GT(calls, 0);
}

}  // namespace
}  // namespace thriftattn::testing
