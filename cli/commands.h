// What the program does: one function per command, its options as data.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "thriftattn/status.h"

namespace CLI {
class App;
}

namespace thriftattn::cli {

// A command that has put its options into the program's: what it does, once they are parsed.
struct Command {
  CLI::App* app = nullptr;
  std::function<Status()> run;
};

// What every command needs to run a model.
struct RunOptions {
  std::string model;           // folder: config.json, safetensors, tokenizer.json
  std::string compute;         // f32, bf16, or empty: bf16 where the processor has it
  std::string device = "cpu";  // cpu, cuda (= cuda:0) or cuda:N
  int threads = 0;             // 0 = the processors this process may use
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

struct DoctorOptions {
  std::string method = "thrift";
  int h_q = 32, h_kv = 8, d = 128;
  int64_t s_kv = 131072;
  int layers = 32;
  int batch = 1;
  int threads = 0;
  bool json = false;
};

struct InspectOptions {
  std::string path;  // a model's folder or a saved cache
  bool tensors = false;
  bool json = false;
};

struct BenchOptions {
  std::string phase = "decode";  // decode, prefill, append or rank
  std::vector<int64_t> s_kv = {16384};
  int64_t s_q = 0;  // rows of a prefill, tokens of an append: 0 = 512; rows of a decode step: 0 = 1
  int batch = 1;
  int h_q = 32, h_kv = 8, d = 128;
  std::vector<std::string> methods = {"fp16", "fp4", "thrift"};  // rank: thrift, where none is named
  int threads = 0;
  std::string device = "cpu";   // or "cuda", "cuda:N"
  std::string target;           // instruction set; empty = the best
  std::string compute = "f32";  // of a prefill's products: f32 or bf16
  std::string json;             // as in eval
  int reps = 5;                 // of one round
  int rounds = 1;               // over all methods
};

struct BenchModelOptions {
  std::string shape;  // of a model that is drawn ...
  bool random_weights = false;
  std::string model;  // ... or a folder
  int64_t context = 131072;
  int batch = 1;
  std::vector<std::string> methods = {"fp16", "thrift"};
  std::string compute = "bf16", device = "cuda";
  int steps = 32, rounds = 1;
  uint32_t seed = 0;
  std::string json;  // as in eval
};

// --json FILE of a command that prints a table otherwise.
void add_json(CLI::App* command, std::string* path);

Command add_doctor(CLI::App* app);
Command add_inspect(CLI::App* app);
Command add_bench(CLI::App* app);
Command add_bench_model(CLI::App* app);  // after add_bench, whose command it belongs to
Command add_completion(CLI::App* app);

// What this machine has and what would run on it.
Status doctor(const DoctorOptions& options);

// What a checkpoint or a saved cache is, without loading its weights or pages.
Status inspect(const InspectOptions& options);

// How long attention takes, beside what the machine could do; results are checked before they are timed.
Status bench_attention(const BenchOptions& options);

// The loss of each method on each text: a table on stdout, JSON in a file.
Status eval_texts(const EvalOptions& options);

// The loss of each method on the answers to questions about long contexts.
Status eval_questions(const EvalOptions& options);

// Continues a prompt: the text alone on stdout.
Status generate(const GenerateOptions& options);

}  // namespace thriftattn::cli
