// thriftattn generate: reads the prompt in one prefill, then takes one decode step per token and writes its text.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "commands.h"
#include "input.h"
#include "model/sampling.h"
#include "progress.h"
#include "runner.h"

namespace thriftattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// A sequence that holds the beginning of the prompt, out of a file. Its length is the page that holds the prompt's last
// token or the first one that the file lacks: query blocks begin there, so that reading on equals reading at once.
Result<SeqId> resume(model::Session& session, const std::string& path, const std::vector<int32_t>& prompt) {
  const auto too_long = [&](int64_t tokens) {
    return invalid_argument(
        fmt::format("{}: holds {} tokens, more than the {} of the prompt", path, tokens, prompt.size()));
  };
  THRIFTATTN_ASSIGN_OR_RETURN(header, inspect_saved(path));
  if (header.tokens > std::ssize(prompt)) return too_long(header.tokens);
  THRIFTATTN_ASSIGN_OR_RETURN(seq, session.load(path));
  const auto saved = session.tokens(seq);
  const auto [differs, at] = std::mismatch(saved.begin(), saved.end(), prompt.begin(), prompt.end());
  if (differs != saved.end() && at == prompt.end()) return too_long(std::ssize(saved));
  if (differs != saved.end()) {
    return invalid_argument(fmt::format("{}: the prompt's token {} is {}, the saved one is {}", path,
                                        differs - saved.begin(), *at, *differs));
  }
  const int64_t keep = std::min(std::ssize(saved), std::ssize(prompt) - 1);
  THRIFTATTN_RETURN_IF_ERROR(session.truncate(seq, keep / kPageTokens * kPageTokens));
  return seq;
}

double rate(int64_t tokens, double seconds) { return static_cast<double>(tokens) / std::max(seconds, 1e-9); }

}  // namespace

Status generate(const GenerateOptions& options) {
  THRIFTATTN_ASSIGN_OR_RETURN(schedule, parse_schedule(options.method, options.run.model));
  std::string text;
  if (options.prompt) {
    text = *options.prompt;
    if (text.empty()) return invalid_argument("the prompt is empty");
    if (valid_utf8(text) != text.size()) return invalid_argument("the prompt is not UTF-8");
  } else {
    THRIFTATTN_ASSIGN_OR_RETURN(file, read_text(options.prompt_file));
    text = std::move(file);
  }
  if (!options.save_cache.empty()) {
    THRIFTATTN_RETURN_IF_ERROR(check_writable(options.save_cache, {options.prompt_file}));
    std::error_code error;
    const auto there = std::filesystem::status(options.save_cache, error);
    if (std::filesystem::exists(there) && !std::filesystem::is_regular_file(there)) {
      return invalid_argument(fmt::format("{} is not a regular file", options.save_cache));
    }
  }
  THRIFTATTN_ASSIGN_OR_RETURN(runner, Runner::load(options.run));
  if (runner.tokenizer.has_chat_template() && !options.quiet) {
    fmt::print(stderr, "the model has a chat template, which is not applied: the prompt is read as it is\n");
  }
  const std::vector<int32_t> prompt = runner.tokens(text);
  const int64_t positions = std::ssize(prompt) + options.max_tokens;
  THRIFTATTN_RETURN_IF_ERROR(runner.check_positions(
      positions, fmt::format("a prompt of {} tokens and {} more", prompt.size(), options.max_tokens)));

  model::SessionOptions session_options;
  session_options.max_tokens = positions;
  session_options.max_step = std::ssize(prompt);
  THRIFTATTN_ASSIGN_OR_RETURN(session, model::Session::create(*runner.model, schedule, session_options, *runner.pool));
  model::Sampler sampler(options.temperature, options.top_p, options.run.seed);
  model::TextStream stream(runner.tokenizer);

  int32_t token = 0;
  const auto pick = [&](int64_t, int64_t, const float* logits) { token = sampler.pick(logits, session.vocab()); };
  THRIFTATTN_ASSIGN_OR_RETURN(
      seq, options.load_cache.empty() ? session.new_sequence() : resume(session, options.load_cache, prompt));
  const std::span<const int32_t> unread = std::span(prompt).subspan(session.length(seq));
  Progress progress(!options.quiet);
  progress.begin(fmt::format("reading {} tokens", unread.size()));
  auto begin = Clock::now();
  THRIFTATTN_RETURN_IF_ERROR(session.forward(seq, unread, Phase::prefill, model::LogitRows::last, pick,
                                             [&](double fraction) { return progress.update(fraction); }));
  progress.clear();
  const double prefill_seconds = seconds_since(begin);
  const Stats read = session.stats();
  if (!options.save_cache.empty()) THRIFTATTN_RETURN_IF_ERROR(session.save(seq, options.save_cache));

  begin = Clock::now();
  int64_t count = 0, steps = 0;
  while (!runner.model->config().is_eos(token)) {
    const std::string piece = stream.push(token);
    if (std::fwrite(piece.data(), 1, piece.size(), stdout) != piece.size() || std::fflush(stdout) != 0) {
      return Status(Code::io, "cannot write to stdout");
    }
    if (++count == options.max_tokens) break;
    THRIFTATTN_RETURN_IF_ERROR(session.forward(seq, {&token, 1}, Phase::decode, model::LogitRows::last, pick,
                                               [](double) { return !interrupted(); }));
    ++steps;
  }
  // The text alone, but a terminal's prompt belongs on a line of its own.
  const std::string rest = stream.finish() + (isatty(STDOUT_FILENO) ? "\n" : "");
  std::fwrite(rest.data(), 1, rest.size(), stdout);
  std::fflush(stdout);
  if (options.quiet) return {};
  const std::string method = options.method.starts_with('@') ? options.method : to_string(schedule.methods[0]);
  const Stats& stats = session.stats();
  const double decode_seconds = seconds_since(begin);
  // The first token came with the prompt: one alone took no step that could be timed.
  const std::string decoded =
      steps == 0
          ? ""
          : fmt::format(" at {:.1f} tokens/s ({:.1f}% promoted)", rate(steps, decode_seconds),
                        100 * share_promoted(schedule, stats.promoted - read.promoted, stats.pairs - read.pairs));
  fmt::print(
      stderr,
      "{}: {}read {} tokens at {:.0f} tokens/s ({:.1f}% promoted), wrote {}{}; KV {:.1f} MiB, {:.0f} bytes per token\n",
      method, unread.size() < prompt.size() ? fmt::format("loaded {} tokens, ", prompt.size() - unread.size()) : "",
      unread.size(), rate(std::ssize(unread), prefill_seconds),
      100 * share_promoted(schedule, read.promoted, read.pairs), count, decoded,
      static_cast<double>(session.cache().bytes().total()) / (1 << 20),
      static_cast<double>(session.cache().bytes().total()) / static_cast<double>(session.length(seq)));
  return {};
}

}  // namespace thriftattn::cli
