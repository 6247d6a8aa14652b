#include "model/sequence.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "model/nll.h"

namespace thriftattn::model {
namespace {

class CpuSequence : public Sequence {
 public:
  CpuSequence(Session session, ThreadPool& pool)
      : session_(std::move(session)), pool_(pool), seq_(session_.new_sequence()) {}

  Status read(std::span<const int32_t> tokens, Phase phase, const Wanted& wanted, const Advance& advance) override {
    const int64_t last = std::ssize(tokens) - 1, vocab = session_.vocab();
    const LogitRows rows = !wanted.losses.empty()   ? LogitRows::all
                           : !wanted.logits.empty() ? LogitRows::last
                                                    : LogitRows::none;
    const auto take = [&](int64_t first, int64_t count, const float* logits) {
      if (!wanted.losses.empty()) {
        nll(logits, vocab, wanted.targets.subspan(first, count), wanted.losses.subspan(first, count), pool_);
      }
      if (!wanted.logits.empty() && first + count > last) {
        std::copy_n(logits + (last - first) * vocab, vocab, wanted.logits.begin());
      }
    };
    return session_.forward(seq_, tokens, phase, rows, take, advance);
  }

  int64_t length() const override { return session_.length(seq_); }
  const Result<Plan>& plan(Phase phase) const override { return session_.plan(phase); }
  Stats stats() const override { return session_.stats(); }
  int64_t cache_bytes() const override { return session_.cache().bytes().total(); }
  Status save(const std::string& path) const override { return session_.save(seq_, path); }

  Status resume(const std::string& path, std::span<const int32_t> prompt) override {
    const auto too_long = [&](int64_t tokens) {
      return invalid_argument(
          fmt::format("{}: holds {} tokens, more than the {} of the prompt", path, tokens, prompt.size()));
    };
    THRIFTATTN_ASSIGN_OR_RETURN(header, inspect_saved(path));
    if (header.tokens > std::ssize(prompt)) return too_long(header.tokens);
    THRIFTATTN_ASSIGN_OR_RETURN(seq, session_.load(path));
    THRIFTATTN_RETURN_IF_ERROR(session_.free(std::exchange(seq_, seq)));
    const auto saved = session_.tokens(seq);
    const auto [differs, at] = std::mismatch(saved.begin(), saved.end(), prompt.begin(), prompt.end());
    if (differs != saved.end() && at == prompt.end()) return too_long(std::ssize(saved));
    // Query blocks begin at the page that holds the prompt's last token or the first one that the file lacks. The last
    // tokens behind that may differ: where a text goes on within a word, they are merged with what follows.
    constexpr int64_t kMerged = 4;
    const int64_t keep = std::min(std::ssize(saved), std::ssize(prompt) - 1) / kPageTokens * kPageTokens;
    if (differs - saved.begin() < std::max(keep, std::ssize(saved) - kMerged))
      return invalid_argument(fmt::format("{}: the prompt's token {} is {}, the saved one is {}", path,
                                          differs - saved.begin(), *at, *differs));
    return session_.truncate(seq, keep);
  }

 private:
  Session session_;
  ThreadPool& pool_;
  SeqId seq_;
};

}  // namespace

Result<std::unique_ptr<Sequence>> open_sequence(const Model& model, const Schedule& schedule,
                                                const SessionOptions& options, ThreadPool& pool) {
  THRIFTATTN_ASSIGN_OR_RETURN(session, Session::create(model, schedule, options, pool));
  return std::unique_ptr<Sequence>(std::make_unique<CpuSequence>(std::move(session), pool));
}

}  // namespace thriftattn::model
