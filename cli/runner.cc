#include "runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "input.h"

namespace thriftattn::cli {

Result<Runner> Runner::load(const RunOptions& options) {
  THRIFTATTN_ASSIGN_OR_RETURN(gpu, parse_device(options.device));
  const bool bf16 = options.compute.empty() ? gpu || model::has_native_bf16() : options.compute == "bf16";
  const model::Compute compute = bf16 ? model::Compute::bf16 : model::Compute::f32;
  auto pool = std::make_unique<ThreadPool>(options.threads);
  std::unique_ptr<model::Model> on_cpu;
  std::unique_ptr<model::DeviceModel> on_gpu;
  if (gpu) {
    THRIFTATTN_ASSIGN_OR_RETURN(loaded, model::DeviceModel::load(options.model, compute, *gpu));
    on_gpu = std::move(loaded);
  } else {
    THRIFTATTN_ASSIGN_OR_RETURN(loaded, model::Model::load(options.model, compute, *pool));
    on_cpu = std::make_unique<model::Model>(std::move(loaded));
  }
  THRIFTATTN_ASSIGN_OR_RETURN(tokenizer, model::Tokenizer::load(options.model));
  return Runner{std::move(pool), std::move(on_cpu), std::move(on_gpu), std::move(tokenizer)};
}

Result<std::unique_ptr<model::Sequence>> Runner::open(const model::Schedule& schedule,
                                                      const model::SessionOptions& options) const {
  if (!device_model) return model::open_sequence(*model, schedule, options, *pool);
  THRIFTATTN_ASSIGN_OR_RETURN(batch, device_model->open(schedule, options, 1));
  return std::unique_ptr<model::Sequence>(std::move(batch));
}

std::vector<int32_t> Runner::tokens(const std::string& text) const {
  std::vector<int32_t> ids = tokenizer.encode(text), prefix;
  if (tokenizer.prefix()) {
    prefix = *tokenizer.prefix();
  } else if (config().bos) {
    prefix = {*config().bos};
  }
  if (ids.size() < prefix.size() || !std::equal(prefix.begin(), prefix.end(), ids.begin())) {
    ids.insert(ids.begin(), prefix.begin(), prefix.end());
  }
  return ids;
}

Status Runner::check_positions(int64_t needed, const std::string& what) const {
  const int64_t positions = config().max_positions;
  if (needed <= positions) return {};
  return invalid_argument(fmt::format("{} needs {} positions, the model has {}", what, needed, positions));
}

Status Runner::resolve(const model::SessionOptions& options, bool prefill, bool decode, Report* report) const {
  const auto refused = [](const Row& row, const Status& status) {
    return Status(status.code(), fmt::format("method '{}': {}", row.name, status.message()));
  };
  std::vector<Phase> phases;
  if (prefill) phases.push_back(Phase::prefill);
  if (decode) phases.push_back(Phase::decode);
  for (size_t r = 0; r < report->rows.size(); ++r) {
    Row& row = report->rows[r];
    const auto sequence = open(row.schedule, options);
    Status status = sequence.status();
    for (size_t i = 0; i < phases.size() && status.ok(); ++i) status = (*sequence)->plan(phases[i]).status();
    if (status.code() == Code::unsupported && row.reference) {
      leave_out(report, r--);
      continue;
    }
    if (!status.ok()) return refused(row, status);
    for (const Phase phase : phases) {
      const Result<Plan>& plan = (*sequence)->plan(phase);
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
  report->machine.compute = to_string(device_model ? device_model->compute() : model->compute());
  if (device_model) report->machine.gpu = device_model->gpu().name;
  return {};
}

double share_promoted(const model::Schedule& schedule, int64_t promoted, int64_t pairs) {
  if (pairs) return static_cast<double>(promoted) / static_cast<double>(pairs);
  return std::all_of(schedule.methods.begin(), schedule.methods.end(),
                     [](const Method& m) { return m.budget.kind == Budget::Kind::all; });
}

}  // namespace thriftattn::cli
