// What both loops over pages do to a page's scores, whatever made them. Included once per target by kernels.cc and
// decode.cc.
#if defined(THRIFTATTN_CPU_SCORES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THRIFTATTN_CPU_SCORES_INL_H_
#undef THRIFTATTN_CPU_SCORES_INL_H_
#else
#define THRIFTATTN_CPU_SCORES_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "cpu/block.h"
#include "cpu/kernels.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::cpu {
namespace HWY_NAMESPACE {

// The part of a row's scores that its mask hides becomes -inf.
inline void hide(const Visible& visible, float* row) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const VF hidden = hn::Set(df, kMinusInf);
  for (int64_t i = 0; i < visible.first; i += n) {
    const auto before = hn::FirstN(df, static_cast<size_t>(std::min(n, visible.first - i)));
    hn::StoreU(hn::IfThenElse(before, hidden, hn::LoadU(df, row + i)), df, row + i);
  }
  for (int64_t i = visible.end / n * n; i < kPageTokens; i += n) {
    const auto kept = hn::FirstN(df, static_cast<size_t>(std::max<int64_t>(0, visible.end - i)));
    hn::StoreU(hn::IfThenElse(kept, hn::LoadU(df, row + i), hidden), df, row + i);
  }
}

// s[rows, 64], products of page p, become scaled, masked scores in units of log2; the first row is row `first` of its
// head.
inline void finish_scores(const BlockTask& t, int64_t p, int first, int rows, float* s) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const VF scale = hn::Set(df, t.softcap > 0 ? t.sm_scale / t.softcap : t.sm_scale * kLog2e);
  const VF cap = hn::Set(df, t.softcap * kLog2e);
  for (int r = 0; r < rows; ++r) {
    float* row = s + r * kPageTokens;
    for (int64_t i = 0; i < kPageTokens; i += n) {
      VF x = hn::Mul(hn::LoadU(df, row + i), scale);
      if (t.softcap > 0) x = hn::Mul(hn::Tanh(df, x), cap);
      hn::StoreU(x, df, row + i);
    }
    const Visible visible = visible_tokens(t, p, first + r);
    if (visible.first > 0 || visible.end < kPageTokens) hide(visible, row);
  }
}

inline float row_max(const float* row) {
  const DF df;
  VF m = hn::LoadU(df, row);
  for (int64_t i = static_cast<int64_t>(hn::Lanes(df)); i < kPageTokens; i += static_cast<int64_t>(hn::Lanes(df)))
    m = hn::Max(m, hn::LoadU(df, row + i));
  return hn::GetLane(hn::MaxOfLanes(df, m));
}

// row = 2^(row - m); returns the sum. m is finite.
inline float exponentiate(float* row, float m) {
  const DF df;
  const VF vm = hn::Set(df, m);
  VF sum = hn::Zero(df);
  for (int64_t i = 0; i < kPageTokens; i += static_cast<int64_t>(hn::Lanes(df))) {
    const VF e = exp2_negative(hn::Sub(hn::LoadU(df, row + i), vm));
    hn::StoreU(e, df, row + i);
    sum = hn::Add(sum, e);
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn::cpu
HWY_AFTER_NAMESPACE();

#endif  // THRIFTATTN_CPU_SCORES_INL_H_
