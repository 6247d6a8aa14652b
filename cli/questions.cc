// thriftattn eval --questions: a context is read once; every question continues a fork of it, and its answer is forced
// token by token through decode steps.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <span>
#include <utility>

#include "commands.h"
#include "input.h"
#include "model/nll.h"
#include "progress.h"
#include "report.h"
#include "runner.h"

namespace thriftattn::cli {
namespace {

using Tokens = std::vector<int32_t>;

struct TokenQuestion {
  Tokens ask, answer;
};
struct TokenExam {
  Tokens context;  // BOS in front
  std::vector<TokenQuestion> questions;
  int64_t longest = 0;  // tokens of the context and its longest question
};

// What one method has scored so far.
struct Score {
  double nll = 0;  // sum over answer tokens
  int64_t tokens = 0, answers = 0, exact = 0;
  int64_t pairs = 0, promoted = 0;
  double kv_bytes = 0, kv_tokens = 0;
  double seconds = 0;
};

Result<std::vector<TokenExam>> tokenise(const Runner& runner, const std::vector<Exam>& exams, int64_t limit) {
  std::vector<TokenExam> out;
  int64_t left = limit ? limit : INT64_MAX;
  for (const Exam& exam : exams) {
    if (left == 0) break;
    TokenExam tokens;
    tokens.context = runner.tokens(exam.context);
    for (const Question& question : exam.questions) {
      if (left-- == 0) break;
      tokens.questions.push_back({runner.tokenizer.encode(question.ask), runner.tokenizer.encode(question.answer)});
      const TokenQuestion& last = tokens.questions.back();
      if (last.ask.empty() || last.answer.empty())
        return invalid_argument(fmt::format("context {}, question {}: {} encodes to no tokens", out.size() + 1,
                                            tokens.questions.size(), last.ask.empty() ? "ask" : "answer"));
      tokens.longest = std::max(tokens.longest, std::ssize(last.ask) + std::ssize(last.answer));
    }
    left = std::max<int64_t>(left, 0);
    tokens.longest += std::ssize(tokens.context);
    THRIFTATTN_RETURN_IF_ERROR(
        runner.check_positions(tokens.longest, fmt::format("context {} with its questions", out.size() + 1)));
    out.push_back(std::move(tokens));
  }
  return out;
}

// A new sequence that holds `context`.
Result<SeqId> read(model::Session* session, const Tokens& context, Progress* progress) {
  const SeqId seq = session->new_sequence();
  THRIFTATTN_RETURN_IF_ERROR(session->forward(seq, context, Phase::prefill, model::LogitRows::none, nullptr,
                                              [&](double fraction) { return progress->update(fraction); }));
  return seq;
}

// One question on a fork of `context`.
Status ask(model::Session* session, SeqId context, const TokenQuestion& question, ThreadPool* pool, Score* score) {
  THRIFTATTN_ASSIGN_OR_RETURN(seq, session->fork(context));
  const std::span<const int32_t> ask(question.ask), answer(question.answer);
  int64_t scored = 0;
  bool exact = true;
  const auto take = [&](int64_t, int64_t, const float* logits) {
    const auto target = answer.subspan(scored++, 1);
    float loss = 0;
    model::nll(logits, session->vocab(), target, {&loss, 1}, *pool);
    score->nll += loss;
    exact = exact && model::argmax(logits, session->vocab()) == target[0];
  };
  const auto step = [&](std::span<const int32_t> tokens, bool last) {
    return session->forward(seq, tokens, Phase::decode, last ? model::LogitRows::last : model::LogitRows::none, take,
                            [](double) { return !interrupted(); });
  };
  for (size_t from = 0; from < ask.size(); from += kMaxDecodeRows) {
    const size_t count = std::min<size_t>(kMaxDecodeRows, ask.size() - from);
    THRIFTATTN_RETURN_IF_ERROR(step(ask.subspan(from, count), from + count == ask.size()));
  }
  for (size_t i = 0; i + 1 < answer.size(); ++i) THRIFTATTN_RETURN_IF_ERROR(step(answer.subspan(i, 1), true));
  score->tokens += std::ssize(answer);
  score->answers += 1;
  score->exact += exact;
  return session->free(seq);
}

Figures figures_of(const model::Schedule& schedule, const Score& score) {
  Figures figures;
  figures.tokens = score.tokens;
  figures.nll = score.nll / static_cast<double>(score.tokens);
  figures.exact = static_cast<double>(score.exact) / static_cast<double>(score.answers);
  figures.share_promoted = share_promoted(schedule, score.promoted, score.pairs);
  figures.kv_bytes_per_token = score.kv_bytes / score.kv_tokens;
  figures.seconds = score.seconds;
  return figures;
}

}  // namespace

Status eval_questions(const EvalOptions& options) {
  THRIFTATTN_ASSIGN_OR_RETURN(gpu, parse_device(options.run.device));
  if (gpu) {
    return unsupported(
        fmt::format("--questions is not supported with --device {}: every question continues a fork of its context, "
                    "which the runner makes on the CPU alone; --device cpu is",
                    options.run.device));
  }
  Report report;
  report.model = options.run.model;
  report.questions = true;
  report.seed = options.run.seed;
  report.texts = {options.questions};
  THRIFTATTN_RETURN_IF_ERROR(set_rows(options.methods, &report));
  std::optional<Method> prefill;  // none = each method its own
  if (options.prefill != "method") {
    THRIFTATTN_ASSIGN_OR_RETURN(method, parse_method(options.prefill));
    if (method.storage != Storage::high_only) {
      return invalid_argument(fmt::format(
          "prefill '{}' has storage {}: 'method', or a method with storage high_only such as fp16, is supported",
          options.prefill, to_string(method.storage)));
    }
    prefill = method;
    report.prefill = to_string(method);
  }
  THRIFTATTN_RETURN_IF_ERROR(check_writable(options.json, {options.questions}));
  THRIFTATTN_ASSIGN_OR_RETURN(exams, read_exams(options.questions));
  THRIFTATTN_ASSIGN_OR_RETURN(runner, Runner::load(options.run));
  THRIFTATTN_ASSIGN_OR_RETURN(tokens, tokenise(runner, exams, options.limit));

  const auto session_options = [&](const TokenExam& exam, bool reads) {
    model::SessionOptions out;
    out.max_tokens = exam.longest;
    // No step is longer than the context and its longest question, which may be shorter than a full decode step.
    const int64_t step = reads ? std::max<int64_t>(std::ssize(exam.context), kMaxDecodeRows) : kMaxDecodeRows;
    out.max_step = std::min(step, exam.longest);
    return out;
  };
  THRIFTATTN_RETURN_IF_ERROR(runner.resolve(session_options(tokens[0], !prefill), !prefill, true, &report));

  Progress progress;
  std::vector<Score> scores(report.rows.size());
  for (size_t e = 0; e < tokens.size(); ++e) {
    const TokenExam& exam = tokens[e];
    const std::string which = fmt::format("context {} of {}", e + 1, tokens.size());
    const auto open = [&](const auto& method, bool reads) {
      return model::Session::create(*runner.model, method, session_options(exam, reads), *runner.pool);
    };
    std::optional<model::Session> reader;
    SeqId read_context = -1;
    if (prefill) {
      THRIFTATTN_ASSIGN_OR_RETURN(session, open(*prefill, true));
      progress.begin(fmt::format("{}, read by {}", which, *report.prefill));
      THRIFTATTN_ASSIGN_OR_RETURN(seq, read(&session, exam.context, &progress));
      reader.emplace(std::move(session));
      read_context = seq;
    }
    for (size_t r = 0; r < report.rows.size(); ++r) {
      const Row& row = report.rows[r];
      if (row.twin >= 0) continue;
      progress.begin(fmt::format("{}, {} ({} of {})", which, row.name, r + 1, report.rows.size()));
      const auto begin = std::chrono::steady_clock::now();
      THRIFTATTN_ASSIGN_OR_RETURN(session, open(row.schedule, !prefill));
      THRIFTATTN_ASSIGN_OR_RETURN(
          context, prefill ? session.copy_from(*reader, read_context) : read(&session, exam.context, &progress));
      Score& score = scores[r];
      score.kv_bytes += static_cast<double>(session.cache().bytes().total());
      score.kv_tokens += static_cast<double>(exam.context.size());
      for (size_t q = 0; q < exam.questions.size(); ++q) {
        THRIFTATTN_RETURN_IF_ERROR(ask(&session, context, exam.questions[q], runner.pool.get(), &score));
        progress.update(static_cast<double>(q + 1) / static_cast<double>(exam.questions.size()));
      }
      score.pairs += session.stats().pairs;
      score.promoted += session.stats().promoted;
      score.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
  }
  progress.clear();
  for (size_t r = 0; r < report.rows.size(); ++r) {
    Row& row = report.rows[r];
    row.texts.push_back(figures_of(row.schedule, scores[row.twin >= 0 ? row.twin : static_cast<int>(r)]));
  }
  compare(&report);
  return publish(report, options.json);
}

}  // namespace thriftattn::cli
