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
#include "model/sequence.h"
#include "progress.h"
#include "runner.h"

namespace thriftattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

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
  session_options.max_decode = 1;
  THRIFTATTN_ASSIGN_OR_RETURN(sequence, runner.open(schedule, session_options));
  model::Sampler sampler(options.temperature, options.top_p, options.run.seed);
  model::TextStream stream(runner.tokenizer);

  std::vector<float> logits(runner.config().vocab);
  const auto pick = [&] { return sampler.pick(logits.data(), std::ssize(logits)); };
  if (!options.load_cache.empty()) THRIFTATTN_RETURN_IF_ERROR(sequence->resume(options.load_cache, prompt));
  const std::span<const int32_t> unread = std::span(prompt).subspan(sequence->length());
  Progress progress(!options.quiet);
  progress.begin(fmt::format("reading {} tokens", unread.size()));
  auto begin = Clock::now();
  THRIFTATTN_RETURN_IF_ERROR(sequence->read(unread, Phase::prefill, {.logits = logits},
                                            [&](double fraction) { return progress.update(fraction); }));
  progress.clear();
  const double prefill_seconds = seconds_since(begin);
  const Stats read = sequence->stats();
  if (!options.save_cache.empty()) THRIFTATTN_RETURN_IF_ERROR(sequence->save(options.save_cache));

  begin = Clock::now();
  int64_t count = 0, steps = 0;
  for (int32_t token = pick(); !runner.config().is_eos(token); token = pick()) {
    const std::string piece = stream.push(token);
    if (std::fwrite(piece.data(), 1, piece.size(), stdout) != piece.size() || std::fflush(stdout) != 0) {
      return Status(Code::io, "cannot write to stdout");
    }
    if (++count == options.max_tokens) break;
    THRIFTATTN_RETURN_IF_ERROR(
        sequence->read({&token, 1}, Phase::decode, {.logits = logits}, [](double) { return !interrupted(); }));
    ++steps;
  }
  // The text alone, but a terminal's prompt belongs on a line of its own.
  const std::string rest = stream.finish() + (isatty(STDOUT_FILENO) ? "\n" : "");
  std::fwrite(rest.data(), 1, rest.size(), stdout);
  std::fflush(stdout);
  if (options.quiet) return {};
  const std::string method = options.method.starts_with('@') ? options.method : to_string(schedule.methods[0]);
  const Stats stats = sequence->stats();
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
      static_cast<double>(sequence->cache_bytes()) / (1 << 20),
      static_cast<double>(sequence->cache_bytes()) / static_cast<double>(sequence->length()));
  return {};
}

}  // namespace thriftattn::cli
