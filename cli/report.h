// What an evaluation found: rows of figures per method and text, their means, a table for people and JSON for programs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/schedule.h"
#include "thriftattn/status.h"

namespace thriftattn::cli {

// The mean loss over predictions [from, to) of a text.
struct Bucket {
  int64_t from = 0, to = 0;
  double nll = 0;  // nats per token
};

// What one method did on one text, or the mean over the texts.
struct Figures {
  int64_t tokens = 0;                   // predictions that `nll` is the mean of
  double nll = 0;                       // nats per token
  std::optional<double> delta_nll;      // nll - nll of fp16
  std::optional<double> recovery;       // 1 - delta_nll / delta_nll of paper-fp4; none where no page is read in FP4
  std::optional<double> recovery_like;  // the same against the fp4 of the same arithmetic, centring, format and scales
  double share_promoted = 0;            // (query block, page, head) triples read above FP4, of those seen
  double kv_bytes_per_token = 0;        // bytes of the cache after the text / tokens, all layers
  double seconds = 0;
  std::optional<double> exact;  // questions: the share of answers whose every token is the greedy one
  std::vector<Bucket> nll_by_position;
};

// The options a method ran with, after the plans resolved what was `auto`, for the phases that took place.
struct ResolvedOptions {
  std::vector<std::pair<std::string, std::string>> prefill, decode;  // key, value; empty = no such phase
  bool operator==(const ResolvedOptions&) const = default;
};

struct Row {
  std::string name;          // as it is shown: the method's spec, or @FILE
  model::Schedule schedule;  // of @FILE, or the method everywhere
  bool from_file = false;
  bool reference = false;   // run for comparison only, not asked for
  int fp4 = -1;             // the row of paper-fp4 that `recovery` is taken from; -1 = no page is read in FP4
  int like = -1;            // the row of the fp4 that `recovery_like` is taken from; -1 as above, or there are several
  int twin = -1;            // an earlier row that resolves to the same options, whose figures are this row's too
  ResolvedOptions options;  // none of a file, whose methods have their own
  std::vector<Figures> texts;  // one per text
  Figures mean;
};

struct MachineInfo {
  std::string cpu;       // the processor's name
  int cores = 0;         // processors this process may use
  int threads = 0;       // threads used
  std::string target;    // instruction set of the attention kernels
  std::string compute;   // f32 or bf16: the model's matrix products
  std::string gpu;       // the GPU's name where the model runs on one
  std::string compiler;  // with its version
};

// `text` with what would break its line, or what a terminal would obey, as spaces: names out of files hold anything.
std::string one_line(std::string text);

// Lines of cells, the first column to the left and the others to the right.
std::string align(const std::vector<std::vector<std::string>>& lines);

// The machine this runs on: cpu, cores and compiler; the rest is the run's to fill.
MachineInfo machine_info();

struct Report {
  std::string model;               // folder
  bool questions = false;          // nll is that of the answers
  std::optional<int64_t> context;  // tokens of every text; none for questions, whose contexts have lengths of their own
  int64_t decode_chunk = 0;        // tokens of one step through the cache; 0 = one-shot prefill
  std::optional<std::string> prefill;  // questions: the method that read the contexts, where it is not the row's own
  uint64_t seed = 0;
  MachineInfo machine;
  std::vector<std::string> texts;
  std::vector<Row> rows;
  int fp16 = -1;  // the row that delta_nll is taken from
};

// The schedule that `spec` names for the model in `dir`: that of @FILE, or a method everywhere.
Result<model::Schedule> parse_schedule(const std::string& spec, const std::string& dir);

// Sets the rows of `specs` for the report's model in the order given, equal methods once, then the references that are
// missing: fp16, paper-fp4 and for each method that reads FP4 the fp4 that is like it. Errors are parse_schedule's.
Status set_rows(const std::vector<std::string>& specs, Report* report);

// Takes a row that nothing needs but comparisons out of the report: what was compared with it has no such figure.
void leave_out(Report* report, size_t row);

// Fills delta_nll, recovery and recovery_like of every row, and the means. A mean recovery is a ratio of means,
// 1 - mean(delta_nll) / mean(delta_nll of the reference), so that a text on which FP4 costs next to nothing does not
// drown the others. Where the reference loses nothing, there is nothing to recover: none.
void compare(Report* report);

std::string table(const Report& report);
std::string json(const Report& report);

// Fails where publish(..., path) would, and where it would replace one of `inputs`: worth knowing before the work, not
// after it.
Status check_writable(const std::string& path, const std::vector<std::string>& inputs);

// Writes beside `path` and renames: a reader sees the old file or the whole new one.
Status write_atomically(const std::string& path, std::string_view content);

// The table on stdout and the JSON in `path`, where one is named; "-": the JSON alone on stdout.
Status publish(const Report& report, const std::string& path);

}  // namespace thriftattn::cli
