// thriftattn: the command line. Exit codes: 0 good; 2 for what the user gave, a file that cannot be opened among it,
// with one line on stderr that names it; 130 after Ctrl-C; 1 for what the machine refused: memory, a full disk.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <iostream>
#include <new>
#include <string>
#include <utility>

#include "commands.h"
#include "progress.h"
#include "report.h"

namespace thriftattn::cli {
namespace {

int exit_code(Code code) {
  switch (code) {
    case Code::ok:
      return 0;
    case Code::invalid_argument:
    case Code::unsupported:
    case Code::not_found:
    case Code::data_loss:
      return 2;
    case Code::cancelled:
      return 130;
    case Code::out_of_memory:
    case Code::io:
      return 1;
  }
  return 1;
}

int fail(int code, std::string message) {
  fmt::print(stderr, "thriftattn: {}\n", one_line(std::move(message)));
  return code;
}

// The exit code of what went well: a full disk behind stdout shows only when the last bytes leave.
int flushed() {
  std::cout.flush();
  return std::fflush(stdout) == 0 && std::cout ? 0 : fail(1, "cannot write to stdout");
}

// A whole number of 64 bits. CLI11 takes -1 for the largest one, and what is too large too.
CLI::Validator whole_number() {
  return {[](std::string& text) {
            uint64_t value = 0;
            const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
            const bool good = error == std::errc() && end == text.data() + text.size();
            return good ? std::string() : fmt::format("{} is not a whole number from 0 to {}", text, UINT64_MAX);
          },
          ""};
}

// A number in [low, high]. CLI::Range lets NaN through.
CLI::Validator number_in(double low, double high) {
  return {[=](std::string& text) {
            double value = 0;
            if (CLI::detail::lexical_cast(text, value) && value >= low && value <= high) return std::string();
            return fmt::format("{} is not a number from {} to {}", text, low, high);
          },
          fmt::format("in [{} - {}]", low, high)};
}

// An unset variable of the user's shell; without this check it would pass for an option that was not given.
CLI::Validator not_empty() {
  return {[](std::string& text) { return text.empty() ? std::string("an empty name is no file") : std::string(); }, ""};
}

void add_run_options(CLI::App* command, RunOptions* run) {
  command->add_option("--model", run->model, "Hugging Face folder: config.json, *.safetensors, tokenizer.json")
      ->required()
      ->check(not_empty());
  command
      ->add_option("--compute", run->compute, "type of the model's products; default bf16 where the processor has it")
      ->check(CLI::IsMember({"f32", "bf16"}));
  command->add_option("--device", run->device, "cpu, cuda or cuda:N: where the model runs")->capture_default_str();
  command->add_option("--threads", run->threads, "0 = all processors")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  command->add_option("--seed", run->seed, "of everything random")->check(whole_number())->capture_default_str();
}

int run(int argc, char** argv) {
  CLI::App app("Long-context attention over a 4-bit cache: what it costs on your text, and what it gives back.",
               "thriftattn");
  app.set_version_flag("--version", "thriftattn " THRIFTATTN_VERSION);
  app.require_subcommand(1);

  EvalOptions eval;
  eval.methods = {"fp16", "paper-fp4", "paper", "fp4", "thrift"};
  eval.context = 4096;
  eval.prefill = "fp16";
  CLI::App* eval_command = app.add_subcommand("eval", "the loss of attention methods, side by side");
  add_run_options(eval_command, &eval.run);
  CLI::Option* text = eval_command->add_option("--text", eval.texts, "UTF-8 text files")->check(not_empty());
  CLI::Option* questions =
      eval_command
          ->add_option("--questions", eval.questions,
                       R"(lines of {"context": "", "questions": [{"ask": "", "answer": ""}]}, instead of --text)")
          ->check(not_empty())
          ->excludes(text);
  CLI::Option* context =
      eval_command->add_option("--context", eval.context, "predictions per text: BOS and the first N-1 tokens are read")
          ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
          ->capture_default_str();
  const CLI::Option* methods =
      eval_command
          ->add_option("--method", eval.methods,
                       "name[:key=value,...], or @FILE: a schedule; missing references are added")
          ->capture_default_str();
  CLI::Option* chunk =
      eval_command
          ->add_option("--decode-chunk", eval.decode_chunk,
                       "read the text through the cache in steps of N tokens; up to 16 are decode steps")
          ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  CLI::Option* prefill =
      eval_command
          ->add_option("--prefill", eval.prefill, "method that reads the contexts; 'method' = each method its own")
          ->capture_default_str();
  CLI::Option* limit = eval_command->add_option("--limit", eval.limit, "ask the first N questions only")
                           ->check(CLI::Range(int64_t{1}, int64_t{1} << 32));
  add_json(eval_command, &eval.json);
  questions->excludes(context)->excludes(chunk);
  prefill->needs(questions);
  limit->needs(questions);
  eval_command->footer(
      "Example: thriftattn eval --model models/pocket-8m --text book.txt --context 16384 \\\n"
      "           --method thrift thrift:budget=0.02,storage=dual --json out.json");

  GenerateOptions generation;
  generation.method = "thrift";
  generation.max_tokens = 128;
  CLI::App* generate_command = app.add_subcommand("generate", "continue a prompt; the text alone goes to stdout");
  add_run_options(generate_command, &generation.run);
  CLI::Option* prompt = generate_command->add_option(
      "--prompt", generation.prompt,
      "the prompt itself, read as it is: no chat template is applied, special tokens count");
  CLI::Option* prompt_file =
      generate_command->add_option("--prompt-file", generation.prompt_file, "a UTF-8 file that holds it")
          ->check(not_empty())
          ->excludes(prompt);
  generate_command->add_option("--method", generation.method, "name[:key=value,...], or @FILE: a schedule")
      ->capture_default_str();
  generate_command->add_option("--max-tokens", generation.max_tokens, "stop after so many tokens")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  CLI::Option* temperature = generate_command->add_option("--temperature", generation.temperature, "0 = greedy")
                                 ->check(number_in(0, 100))
                                 ->capture_default_str();
  generate_command
      ->add_option("--top-p", generation.top_p, "sample from the likeliest tokens of this total probability")
      ->check(number_in(1e-6, 1))
      ->needs(temperature)
      ->capture_default_str();
  generate_command
      ->add_option("--save-cache", generation.save_cache, "once the prompt is read, save its keys and values here")
      ->check(not_empty());
  generate_command
      ->add_option("--load-cache", generation.load_cache,
                   "the prompt begins with what was saved here: only the rest is read")
      ->check(not_empty());
  generate_command->add_flag("--quiet", generation.quiet, "no summary on stderr");
  generate_command->footer(
      "Example: thriftattn generate --model models/pocket-8m --prompt-file prompt.txt --max-tokens 64 --method thrift");

  const Command commands[] = {add_doctor(&app), add_inspect(&app), add_bench(&app), add_bench_model(&app),
                              add_completion(&app)};

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {  // --help and --version
      app.exit(error);
      return flushed();
    }
    const CLI::App* last = &app;  // the last command that was given
    while (!last->get_subcommands().empty()) last = last->get_subcommands().front();
    std::string names;
    for (const CLI::App* command : last->get_subcommands([](const CLI::App*) { return true; })) {
      names += (names.empty() ? "" : ", ") + command->get_name();
    }
    if (last == &app && argc > 1) return fail(2, fmt::format("'{}' is not a command: {} are", argv[1], names));
    if (!names.empty() && error.get_name() == "RequiredError") {
      return fail(2, fmt::format("{} needs a command: {}", last->get_name(), names));
    }
    return fail(2, error.what());
  }

  Status status;
  if (eval_command->parsed()) {
    if (methods->empty() && eval.run.device != "cpu") eval.methods = {"fp16", "fp4", "thrift"};  // kv4, as GPUs have
    if (text->empty() && questions->empty()) return fail(2, "eval needs --text FILE... or --questions FILE.jsonl");
    status = questions->empty() ? eval_texts(eval) : eval_questions(eval);
  } else if (generate_command->parsed()) {
    if (prompt->empty() && prompt_file->empty()) return fail(2, "generate needs --prompt TEXT or --prompt-file FILE");
    status = generate(generation);
  }
  for (const Command& command : commands) {
    if (command.app->parsed()) status = command.run();
  }
  if (!status.ok()) return fail(exit_code(status.code()), status.message());
  return flushed();
}

}  // namespace

void add_json(CLI::App* command, std::string* path) {
  command->add_option("--json", *path, "write all figures to this file; - = to stdout, instead of the table")
      ->check(not_empty());
}

}  // namespace thriftattn::cli

int main(int argc, char** argv) {
  thriftattn::cli::handle_signals();
  try {
    return thriftattn::cli::run(argc, argv);
  } catch (const std::bad_alloc&) {
    return thriftattn::cli::fail(1, "out of memory");
  } catch (const std::exception& error) {
    return thriftattn::cli::fail(1, error.what());
  }
}
