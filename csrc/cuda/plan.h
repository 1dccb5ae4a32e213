// How the host cuts the work. Ranks are rounded up to one that there is a kernel for: rows and columns beyond are zeros.
// With DELTAMEM_USUAL_RANKS only R <= 16 in float32 is compiled, in a quarter of the time: a check, no library.
#pragma once

#include <type_traits>

#include "tile.h"

namespace deltamem {

template <int R>
using Known = std::integral_constant<int, R>;

template <class F>
int with_rank(const Problem& p, F&& f) {
#ifndef DELTAMEM_USUAL_RANKS
  if (p.double_precision) {
    if (p.R <= 32) return f(double{}, Known<32>{});
    return f(double{}, Known<128>{});
  }
  if (p.R > 64) return f(float{}, Known<128>{});
  if (p.R > 32) return f(float{}, Known<64>{});
  if (p.R > 16) return f(float{}, Known<32>{});
#endif
  if (p.R <= 4) return f(float{}, Known<4>{});
  if (p.R <= 8) return f(float{}, Known<8>{});
  return f(float{}, Known<16>{});
}

// Heads that have room in a warp.
inline int heads_in_block(int64_t H, int R) {
  int heads = 1;
  while (heads < H && 2 * heads * R <= kWarp) heads *= 2;
  return heads;
}

constexpr int64_t kNever = INT64_MAX;

inline bool same_dtype(const Problem& p) {
  for (const Operand& x : {p.k, p.v, p.beta, p.decay, p.write})
    if (x.data && x.dtype != p.q.dtype) return false;
  return true;
}

inline Plan plan_for(const Problem& p, int heads, int64_t chunked_from) {
  Plan plan;
  plan.heads = heads, plan.groups = (p.H + heads - 1) / heads;
  plan.chunked_from = chunked_from, plan.same_dtype = same_dtype(p);
  const int64_t segments = p.N + (p.T >= chunked_from ? p.B * (p.T / kChunk) : 0);
  plan.tasks = segments * plan.groups;
  return plan;
}

}  // namespace deltamem
