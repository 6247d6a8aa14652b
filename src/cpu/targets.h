// One table of functions per instruction set, for each file that Highway compiles once per target.
#pragma once

#include <hwy/highway.h>

#include <mutex>
#include <vector>

namespace thriftattn::cpu {

inline std::mutex choice_of_target;

// The tables that `table` (a HWY_DYNAMIC_DISPATCH of an exported function) gives for every target that this machine
// runs, best first, each with its target's name. Highway's tables are indexed by the chosen target, so each target is
// chosen once, here, and never again; the lock is there because the choice is one for the whole process.
template <class Table, class Choose>
std::vector<Table> tables_of_targets(Choose table) {
  const std::lock_guard lock(choice_of_target);
  std::vector<Table> tables;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    tables.push_back(*table());
    tables.back().target = hwy::TargetName(target);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return tables;
}

}  // namespace thriftattn::cpu
