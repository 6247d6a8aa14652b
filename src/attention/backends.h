// The one interface between attention and its backends: plain functions over plain structs. dispatch.cc lists them.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "format/page_codec.h"
#include "format/params.h"
#include "thriftattn/attention.h"

namespace thriftattn {

struct Backend {
  const char* name;
  std::string (*refusal)(const Problem& problem, const Machine& machine);  // empty = it will serve the problem
  void (*plan)(const Machine& machine, Plan& plan);                        // fills in what the backend decides
  // Both null for a backend that runs over caches of its own.
  std::shared_ptr<void> (*scratch)(const Plan& plan);  // may throw std::bad_alloc
  // May throw std::bad_alloc where the call wants a selection or Problem::stats.
  Status (*run)(const Plan& plan, void* scratch, ThreadPool& pool, const AttentionCall& call);
};

// What `method`, with policy and arithmetic resolved, reads and heads of this storage do not keep.
Status check_stored(const Method& method, const CacheConfig& cache, Storage storage);

// Whether the pages of two caches are alike, whatever their number of layers, windows and limits.
bool pages_alike(const CacheConfig& a, const CacheConfig& b);

// Whether scratch memory made for one plan serves the other: all sizes that it follows from.
bool sizes_alike(const Plan& a, const Plan& b);

// Brings rows into a page in this machine's memory. False where a value is NaN, Inf or beyond the 16-bit form's range;
// the records then hold anything.
bool append_rows(const PageAppend& append);

// In order of preference.
std::span<const Backend> backends();

}  // namespace thriftattn
