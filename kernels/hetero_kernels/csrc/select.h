// The k best of N scores, without sorting: a radix search for the smallest score that is still in.
//
// Order: higher score first, and of equal scores the lower position (a stable descending sort).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace hk {
namespace {

// Bits of a float that compare, unsigned, like the float; -0 equals 0. Not for NaN.
HK_INLINE uint32_t ordered(float x) {
  uint32_t u;
  x += 0.0f;
  memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
HK_INLINE vu ordered(vf x) {
  const vu u = (vu)(x + 0.0f);
  return (u >> 31) != 0 ? ~u : u | 0x80000000u;
}

// What is chosen: everything above `threshold`, and the first `num_ties` that equal it.
struct Cut {
  uint32_t threshold;
  int64_t num_ties;
};

constexpr int kBins = 2048;

inline size_t select_bytes(int64_t N) {
  return (2 * kBins + 2 * static_cast<size_t>(N) + 32) * sizeof(uint32_t);
}

// Walks the bins from the top; returns the bin in which the k-th best lies and leaves in k its rank
// inside that bin.
inline int find_bin(const uint32_t* bins, int num_bins, int64_t* k) {
  int bin = num_bins - 1;
  while (bin > 0 && static_cast<int64_t>(bins[bin]) < *k) *k -= bins[bin--];
  return bin;
}

// scratch: select_bytes(N). k in 0 .. N.
inline Cut find_cut(const float* scores, int64_t N, int64_t k, void* scratch) {
  if (k <= 0) return {0xffffffffu, 0};
  if (k >= N) return {0, 0};
  uint32_t* bins = static_cast<uint32_t*>(scratch);
  uint32_t* more_bins = bins + kBins;
  uint32_t* candidates = more_bins + kBins;
  memset(bins, 0, 2 * kBins * sizeof(uint32_t));
  // Two tables: neighbours often share a bin, and one counter would wait for itself.
  int64_t i = 0;
  for (; i + 2 <= N; i += 2) {
    ++bins[ordered(scores[i]) >> 21];
    ++more_bins[ordered(scores[i + 1]) >> 21];
  }
  if (i < N) ++bins[ordered(scores[i]) >> 21];
  for (int b = 0; b < kBins; ++b) bins[b] += more_bins[b];
  uint32_t prefix = static_cast<uint32_t>(find_bin(bins, kBins, &k)) << 21;

  int64_t count = 0;
  for (i = 0; i < N; ++i) {
    const uint32_t u = ordered(scores[i]);
    candidates[count] = u;
    count += (u >> 21) == (prefix >> 21);
  }
  memset(bins, 0, kBins * sizeof(uint32_t));
  for (i = 0; i < count; ++i) ++bins[(candidates[i] >> 10) & 2047];
  prefix |= static_cast<uint32_t>(find_bin(bins, kBins, &k)) << 10;

  memset(bins, 0, 1024 * sizeof(uint32_t));
  for (i = 0; i < count; ++i) bins[candidates[i] & 1023] += (candidates[i] >> 10) == (prefix >> 10);
  prefix |= static_cast<uint32_t>(find_bin(bins, 1024, &k));
  return {prefix, k};
}

// How many of the chosen are also in the bit set.
inline int64_t count_common(const float* scores, int64_t N, const Cut& cut, const int32_t* bits) {
  vi above = vi{};
  vi equal = vi{};
  const vu threshold = vu{} + cut.threshold;
  const vu lanes = (vu)lane_ids();
  int64_t i = 0;
  for (; i + kLanes <= N; i += kLanes) {
    const uint32_t word = static_cast<uint32_t>(bits[i >> 5]) >> (i & 31);
    const vi in = -(vi)(((vu{} + word) >> lanes) & 1u);
    const vu u = ordered(load(scores + i));
    above -= (vi)(u > threshold) & in;
    equal -= (vi)(u == threshold);
  }
  int64_t common = hsum(above);
  int64_t ties_seen = hsum(equal);
  for (; i < N; ++i) {
    const uint32_t u = ordered(scores[i]);
    common += u > cut.threshold && ((static_cast<uint32_t>(bits[i >> 5]) >> (i & 31)) & 1u);
    ties_seen += u == cut.threshold;
  }
  int64_t ties = cut.num_ties;
  if (ties_seen == 0) return common;
  for (i = 0; i < N && ties > 0; ++i) {
    if (ordered(scores[i]) == cut.threshold) {
      common += (static_cast<uint32_t>(bits[i >> 5]) >> (i & 31)) & 1u;
      --ties;
    }
  }
  return common;
}

// Calls take(position) for each chosen one, ascending.
template <class Take>
inline void for_each_chosen(const float* scores, int64_t N, const Cut& cut, Take take) {
  int64_t ties = cut.num_ties;
  for (int64_t i = 0; i < N; ++i) {
    const uint32_t u = ordered(scores[i]);
    if (u > cut.threshold) {
      take(i);
    } else if (u == cut.threshold && ties > 0) {
      take(i);
      --ties;
    }
  }
}

}  // namespace
}  // namespace hk
