// How the host divides a call into tasks, and which kernel it launches. The rank is rounded up to the next one that has
// a kernel; the additional rows and columns are zeros. DELTAMEM_USUAL_RANKS compiles only R <= 16 in float32, in a
// quarter of the time; it is for checks and does not give a usable library.
#pragma once

#include <type_traits>

#include "scan_tiles.h"

namespace deltamem {

template <int R>
using Known = std::integral_constant<int, R>;

template <class F>
int with_rank(const ScanArgs& p, F&& f) {
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

// The number of heads that share a warp.
inline int heads_in_block(int64_t H, int R) {
  int heads = 1;
  while (heads < H && 2 * heads * R <= kWarp) heads *= 2;
  return heads;
}

constexpr int64_t kNever = INT64_MAX;  // a chunked_from that no sequence reaches

inline bool same_dtype(const ScanArgs& p) {
  for (const Operand& x : {p.k, p.v, p.beta, p.decay, p.write})
    if (x.data && x.dtype != p.q.dtype) return false;
  return true;
}

inline Plan plan_for(const ScanArgs& p, int heads, int64_t chunked_from) {
  Plan plan;
  plan.heads = heads, plan.groups = (p.H + heads - 1) / heads;
  plan.chunked_from = chunked_from, plan.same_dtype = same_dtype(p);
  const int64_t segments = p.N + (p.T >= chunked_from ? p.B * (p.T / kChunk) : 0);
  plan.tasks = segments * plan.groups;
  return plan;
}

}  // namespace deltamem
