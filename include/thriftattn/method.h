// A method is a named set of choices: how pages are ranked, how many are promoted, in which form the rest is read.
// It is written `name[:key=value,...]`, the same string in every language, e.g. "thrift:budget=0.02,storage=dual".
// docs/design.md, sections 1 to 3, defines every word used here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "thriftattn/export.h"
#include "thriftattn/status.h"

namespace thriftattn {

inline constexpr int kPageTokens = 64;     // tokens of one page; also the rows of one prefill query block
inline constexpr int kMaxDecodeRows = 16;  // rows of one decode or verify step

// The form of a page that a computation reads, in ascending order of quality.
enum class Tier : uint8_t { none, fp4, fp4x2, fp16 };

enum class Policy : uint8_t { none, automatic, block_mean, quest, second_moment, fp4_mass, recent, oracle };
enum class Arithmetic : uint8_t { automatic, kv4, mma8, mma4 };
enum class Storage : uint8_t { high_only, dual, residual, compact, fp4_only, offload };
enum class Fp4Format : uint8_t { nvfp4, mxfp4 };
enum class Scales : uint8_t { six, four_over_six };
enum class PQuant : uint8_t { two_level, constant };

// Pages to promote for one query block; `n` below is the number of full pages that the block can see.
struct Budget {
  enum class Kind : uint8_t {
    all,        // everything is read in 16 bit
    fraction,   // max(forced, floor(value * n + 1/2))
    paper,      // one k for all rows of the problem: the paper's equation
    top_k,      // value
    per64,      // floor(n / 64) in [1, n]
    mass,       // fewest pages whose estimated softmax mass reaches value
    tolerance,  // fewest pages until the error estimate is below value
  };
  Kind kind = Kind::fraction;
  double value = 0;
  bool operator==(const Budget&) const = default;
};

// Pages that are promoted whatever their rank, inside the budget, and read in 16 bit where that form is stored.
struct Force {
  int sink = 0;           // the first pages of the sequence
  bool diagonal = false;  // every page that holds a row of the query block
  int previous = 0;       // the pages before the first diagonal one
  bool operator==(const Force&) const = default;
};

struct Method {
  std::string name;
  Policy policy = Policy::none;
  Budget budget;
  Tier rest = Tier::fp4;  // fp4, none or fp16
  Force force;
  bool centring = true;    // FP4 planes encode k - k_mean
  bool page_scale = true;  // a power of two per page, head and plane
  Arithmetic arithmetic = Arithmetic::automatic;
  Storage storage = Storage::residual;
  Fp4Format format = Fp4Format::nvfp4;
  Scales scales = Scales::six;
  PQuant p_quant = PQuant::two_level;
  int recent = 2;  // full pages at the end of a sequence that keep their 16-bit form; at least force.previous + 1

  bool operator==(const Method&) const = default;

  // True where a page may be read in FP4, so that FP4 planes must be stored.
  bool reads_fp4() const { return rest == Tier::fp4 || policy == Policy::fp4_mass; }
};

// Parses a method. Errors name the unknown word and list the known ones; contradictions (rest=fp4 with
// storage=high_only, budget=mass with policy=recent, a budget outside [0, 1], ...) are refused with both values.
THRIFTATTN_API Result<Method> parse_method(std::string_view spec);

// The names that parse_method knows, in the order of docs/design.md.
THRIFTATTN_API std::vector<std::string> method_names();

// Every option as (key, value), in the grammar's own words: feeding them back gives the same method.
THRIFTATTN_API std::vector<std::pair<std::string, std::string>> options(const Method& method);

// The shortest spec that parses to `method`.
THRIFTATTN_API std::string to_string(const Method& method);

THRIFTATTN_API std::string to_string(Tier tier);
THRIFTATTN_API std::string to_string(Policy policy);
THRIFTATTN_API std::string to_string(Arithmetic arithmetic);
THRIFTATTN_API std::string to_string(Storage storage);
THRIFTATTN_API std::string to_string(Fp4Format format);
THRIFTATTN_API std::string to_string(const Budget& budget);
THRIFTATTN_API std::string to_string(const Force& force);

// The tier in which `storage` keeps the pages that a policy may promote; none where it keeps no such tier.
THRIFTATTN_API Tier high_tier(Storage storage);

}  // namespace thriftattn
