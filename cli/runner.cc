#include "runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace thriftattn::cli {

Result<Runner> Runner::load(const RunOptions& options) {
  auto pool = std::make_unique<ThreadPool>(options.threads);
  const bool bf16 = options.compute.empty() ? model::has_native_bf16() : options.compute == "bf16";
  THRIFTATTN_ASSIGN_OR_RETURN(
      loaded, model::Model::load(options.model, bf16 ? model::Compute::bf16 : model::Compute::f32, *pool));
  THRIFTATTN_ASSIGN_OR_RETURN(tokenizer, model::Tokenizer::load(options.model));
  return Runner{std::move(pool), std::make_unique<model::Model>(std::move(loaded)), std::move(tokenizer)};
}

std::vector<int32_t> Runner::tokens(const std::string& text) const {
  std::vector<int32_t> ids = tokenizer.encode(text), prefix;
  if (tokenizer.prefix()) {
    prefix = *tokenizer.prefix();
  } else if (model->config().bos) {
    prefix = {*model->config().bos};
  }
  if (ids.size() < prefix.size() || !std::equal(prefix.begin(), prefix.end(), ids.begin())) {
    ids.insert(ids.begin(), prefix.begin(), prefix.end());
  }
  return ids;
}

Status Runner::check_positions(int64_t needed, const std::string& what) const {
  const int64_t positions = model->config().max_positions;
  if (needed <= positions) return {};
  return invalid_argument(fmt::format("{} needs {} positions, the model has {}", what, needed, positions));
}

Status Runner::resolve(const model::SessionOptions& options, bool prefill, bool decode, Report* report) const {
  const auto refused = [](const Row& row, const Status& status) {
    return Status(status.code(), fmt::format("method '{}': {}", row.name, status.message()));
  };
  for (size_t r = 0; r < report->rows.size(); ++r) {
    Row& row = report->rows[r];
    const auto session = model::Session::create(*model, row.schedule, options, *pool);
    if (!session.ok()) return refused(row, session.status());
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      if (!(phase == Phase::prefill ? prefill : decode)) continue;
      const Result<Plan>& plan = session->plan(phase);
      if (!plan.ok()) return refused(row, plan.status());
      report->machine.target = plan->target;
      if (row.from_file) continue;
      (phase == Phase::prefill ? row.options.prefill : row.options.decode) = thriftattn::options(plan->problem.method);
    }
    for (size_t i = 0; i < r && row.twin < 0 && !row.from_file; ++i) {
      if (report->rows[i].options == row.options) row.twin = static_cast<int>(i);
    }
  }
  const std::string target = std::move(report->machine.target);
  report->machine = machine_info();
  report->machine.target = target;
  report->machine.threads = pool->size();
  report->machine.compute = to_string(model->compute());
  return {};
}

double share_promoted(const model::Schedule& schedule, int64_t promoted, int64_t pairs) {
  if (pairs) return static_cast<double>(promoted) / static_cast<double>(pairs);
  return std::all_of(schedule.methods.begin(), schedule.methods.end(),
                     [](const Method& m) { return m.budget.kind == Budget::Kind::all; });
}

}  // namespace thriftattn::cli
