// What the program does: one function per command, its options as data.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "thriftattn/status.h"

namespace thriftattn::cli {

// What every command needs to run a model.
struct RunOptions {
  std::string model;    // folder: config.json, safetensors, tokenizer.json
  std::string compute;  // f32, bf16, or empty: bf16 where the processor has it
  int threads = 0;      // 0 = the processors this process may use
  uint64_t seed = 0;
};

struct EvalOptions {
  RunOptions run;
  std::vector<std::string> texts;    // files
  std::string questions;             // file; instead of texts
  std::vector<std::string> methods;  // specs
  int64_t context = 0;               // predictions per text
  int64_t decode_chunk = 0;          // tokens of one step through the cache; 0 = one-shot prefill
  std::string prefill;               // questions: method that reads the contexts; "method" = each method its own
  int64_t limit = 0;                 // questions to ask; 0 = all
  std::string json;                  // file; "-" = stdout, instead of the table; empty = none
};

struct GenerateOptions {
  RunOptions run;
  std::optional<std::string> prompt;
  std::string prompt_file;
  std::string method;
  int64_t max_tokens = 0;
  double temperature = 0;  // 0 = greedy
  double top_p = 1;
  bool quiet = false;      // no summary
  std::string save_cache;  // file for the prompt's keys and values; empty = none
  std::string load_cache;  // file that holds those of the prompt's first tokens; empty = none
};

// The loss of each method on each text: a table on stdout, JSON in a file.
Status eval_texts(const EvalOptions& options);

// The loss of each method on the answers to questions about long contexts.
Status eval_questions(const EvalOptions& options);

// Continues a prompt: the text alone on stdout.
Status generate(const GenerateOptions& options);

}  // namespace thriftattn::cli
