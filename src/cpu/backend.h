// The CPU backend as dispatch sees it: plain functions over plain structs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "format/page_codec.h"
#include "format/params.h"
#include "thriftattn/attention.h"

namespace thriftattn::cpu {

// Instruction sets compiled in that this machine runs, best first: AMX, AVX3_BF16, then by Highway's names.
std::vector<std::string> targets();

// Targets that tests may force and that no plan chooses: AMX_EMULATED, and AVX3_BF16 where it would be slow.
std::vector<std::string> forced_targets();

// Why the CPU backend will not serve `problem`; empty where it will.
std::string refusal(const Problem& problem, const Machine& machine);

// Fills in kernel, target, tile, splits and workspace of a plan for a problem that it serves.
void plan(const Machine& machine, Plan& plan);

struct Scratch;
std::shared_ptr<Scratch> make_scratch(const Plan& plan);  // may throw std::bad_alloc

Status run(const Plan& plan, Scratch& scratch, ThreadPool& pool, const AttentionCall& call);

// Brings rows into a page on the best instruction set, and encodes it where they fill it. False where a value is NaN,
// Inf or beyond the 16-bit form's range; the records then hold anything.
bool append_rows(const PageAppend& append);

}  // namespace thriftattn::cpu
