// thriftattn eval --text: every method reads the same tokens, and every prediction is scored.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <span>
#include <utility>

#include "commands.h"
#include "input.h"
#include "model/sequence.h"
#include "progress.h"
#include "report.h"
#include "runner.h"

namespace thriftattn::cli {
namespace {

constexpr int64_t kBuckets = 16;  // equal ranges of positions

// Means over equal ranges of positions; fewer where there are fewer losses.
std::vector<Bucket> by_position(std::span<const float> losses) {
  const int64_t n = std::ssize(losses), count = std::min(kBuckets, n);
  std::vector<Bucket> buckets;
  for (int64_t i = 0; i < count; ++i) {
    Bucket bucket{i * n / count, (i + 1) * n / count, 0};
    for (int64_t t = bucket.from; t < bucket.to; ++t) bucket.nll += losses[t];
    bucket.nll /= static_cast<double>(bucket.to - bucket.from);
    buckets.push_back(bucket);
  }
  return buckets;
}

// Reads tokens[0, n) in steps of `step` and scores the predictions of tokens[1, n].
Result<Figures> read_and_score(model::Sequence* sequence, const model::Schedule& schedule,
                               std::span<const int32_t> tokens, int64_t step, Phase phase, Progress* progress) {
  const int64_t n = std::ssize(tokens) - 1;
  const auto begin = std::chrono::steady_clock::now();
  std::vector<float> losses(n);
  for (int64_t from = 0; from < n; from += step) {
    const int64_t count = std::min(step, n - from);
    const model::Wanted wanted{tokens.subspan(from + 1, count), std::span(losses).subspan(from, count)};
    const auto advance = [&](double fraction) {
      return progress->update((static_cast<double>(from) + fraction * static_cast<double>(count)) /
                              static_cast<double>(n));
    };
    THRIFTATTN_RETURN_IF_ERROR(sequence->read(tokens.subspan(from, count), phase, wanted, advance));
  }
  Figures figures;
  figures.tokens = n;
  for (const float loss : losses) figures.nll += loss;
  figures.nll /= static_cast<double>(n);
  figures.nll_by_position = by_position(losses);
  const Stats stats = sequence->stats();
  figures.share_promoted = share_promoted(schedule, stats.promoted, stats.pairs);
  figures.kv_bytes_per_token = static_cast<double>(sequence->cache_bytes()) / static_cast<double>(n);
  figures.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return figures;
}

}  // namespace

Status eval_texts(const EvalOptions& options) {
  Report report;
  report.model = options.run.model;
  report.context = options.context;
  report.decode_chunk = options.decode_chunk;
  report.seed = options.run.seed;
  report.texts = options.texts;
  THRIFTATTN_RETURN_IF_ERROR(set_rows(options.methods, &report));
  THRIFTATTN_RETURN_IF_ERROR(check_writable(options.json, options.texts));
  std::vector<std::string> texts;
  for (const std::string& path : options.texts) {
    THRIFTATTN_ASSIGN_OR_RETURN(text, read_text(path));
    texts.push_back(std::move(text));
  }

  THRIFTATTN_ASSIGN_OR_RETURN(runner, Runner::load(options.run));
  THRIFTATTN_RETURN_IF_ERROR(runner.check_positions(options.context, "context"));
  std::vector<std::vector<int32_t>> tokens;
  for (size_t t = 0; t < texts.size(); ++t) {
    std::vector<int32_t> ids = runner.tokens(texts[t]);
    const int64_t needed = options.context + 1;  // the last one is only predicted
    if (std::ssize(ids) < needed) {
      return invalid_argument(fmt::format("{} is too short: {} tokens with BOS, context {} needs {}", options.texts[t],
                                          ids.size(), options.context, needed));
    }
    ids.resize(needed);
    tokens.push_back(std::move(ids));
  }

  const bool decode = options.decode_chunk && options.decode_chunk <= kMaxDecodeRows;
  model::SessionOptions session_options;
  session_options.max_tokens = options.context;
  session_options.max_step = options.decode_chunk ? std::min(options.decode_chunk, options.context) : options.context;
  THRIFTATTN_RETURN_IF_ERROR(runner.resolve(session_options, !decode, decode, &report));
  Progress progress;
  for (size_t t = 0; t < tokens.size(); ++t) {
    for (size_t r = 0; r < report.rows.size(); ++r) {
      Row& row = report.rows[r];
      if (row.twin >= 0) {
        row.texts.push_back(report.rows[row.twin].texts[t]);
        continue;
      }
      progress.begin(fmt::format("{}, {} ({} of {})", options.texts[t], row.name, t * report.rows.size() + r + 1,
                                 tokens.size() * report.rows.size()));
      THRIFTATTN_ASSIGN_OR_RETURN(sequence, runner.open(row.schedule, session_options));
      THRIFTATTN_ASSIGN_OR_RETURN(figures,
                                  read_and_score(sequence.get(), row.schedule, tokens[t], session_options.max_step,
                                                 decode ? Phase::decode : Phase::prefill, &progress));
      row.texts.push_back(std::move(figures));
    }
  }
  progress.clear();
  compare(&report);
  return publish(report, options.json);
}

}  // namespace thriftattn::cli
