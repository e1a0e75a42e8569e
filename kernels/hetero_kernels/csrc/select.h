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
  return (2 * kBins + static_cast<size_t>(N) + 32) * sizeof(uint32_t);
}

// Walks the bins from the top; returns the bin in which the k-th best lies and leaves in k its rank
// inside that bin.
inline int find_bin(const uint32_t* bins, int num_bins, int64_t* k) {
  int bin = num_bins - 1;
  while (bin > 0 && static_cast<int64_t>(bins[bin]) < *k) *k -= bins[bin--];
  return bin;
}

// Appends the lanes of `values` that are wanted to `out`, which has room for a whole vector; returns
// how many.
HK_INLINE int append_wanted(vu values, vi wanted, uint32_t* out) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)wanted);
  // Not straight to memory: a masked store of so few elements is slow on AMD.
  const __m512i packed = _mm512_maskz_compress_epi32(mask, (__m512i)values);
  _mm512_storeu_si512(out, packed);
  return __builtin_popcount(mask);
#else
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    out[count] = values[i];
    count -= wanted[i];
  }
  return count;
#endif
}

// Copies those of low <= ordered(score) <= high to `out`, which has room for N + kLanes, and counts
// those that are higher; returns how many were copied.
inline int64_t take_between(const float* scores, int64_t N, uint32_t low, uint32_t high,
                            uint32_t* out, int64_t* num_higher) {
  const vu from = vu{} + low;
  const vu to = vu{} + high;
  vi higher = vi{};
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kLanes <= N; i += kLanes) {
    const vu u = ordered(load(scores + i));
    higher -= (vi)(u > to);
    count += append_wanted(u, (vi)(u >= from) & (vi)(u <= to), out + count);
  }
  *num_higher = hsum(higher);
  for (; i < N; ++i) {
    const uint32_t u = ordered(scores[i]);
    *num_higher += u > high;
    out[count] = u;
    count += u >= low && u <= high;
  }
  return count;
}

// Leaves in `values` those of low <= value <= high; returns how many.
inline int64_t keep_between(uint32_t* values, int64_t count, uint32_t low, uint32_t high) {
  const vu from = vu{} + low;
  const vu to = vu{} + high;
  int64_t kept = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vu u = load_u32(values + i);
    kept += append_wanted(u, (vi)(u >= from) & (vi)(u <= to), values + kept);
  }
  for (; i < count; ++i) {
    const uint32_t u = values[i];
    values[kept] = u;
    kept += u >= low && u <= high;
  }
  return kept;
}

// The k-th best (k >= 1) of `count` ordered values that agree in the upper 11 bits; they are lost.
inline Cut find_cut_below(uint32_t* values, int64_t count, int64_t k, uint32_t* bins) {
  uint32_t prefix = values[0] & ~((1u << 21) - 1);
  memset(bins, 0, kBins * sizeof(uint32_t));
  for (int64_t i = 0; i < count; ++i) ++bins[(values[i] >> 10) & 2047];
  prefix |= static_cast<uint32_t>(find_bin(bins, kBins, &k)) << 10;
  count = keep_between(values, count, prefix, prefix | 1023u);
  memset(bins, 0, 1024 * sizeof(uint32_t));
  for (int64_t i = 0; i < count; ++i) ++bins[values[i] & 1023];
  prefix |= static_cast<uint32_t>(find_bin(bins, 1024, &k));
  return {prefix, k};
}

// As find_cut, where the k-th best lies near `guess`: values of the guess's bin of 11 bits and its
// neighbours are taken out in one vectorised pass. {0, -1} if it is not among them.
inline Cut find_cut_near(const float* scores, int64_t N, int64_t k, uint32_t guess, void* scratch) {
  constexpr uint32_t kBinValues = 1u << 21;
  constexpr Cut nowhere = {0, -1};
  uint32_t* bins = static_cast<uint32_t*>(scratch);
  uint32_t* candidates = bins + 2 * kBins;
  const uint32_t first = guess & ~(kBinValues - 1);
  if (first < kBinValues || first > 0xffffffffu - 2 * kBinValues) return nowhere;
  const uint32_t low = first - kBinValues;
  int64_t higher = 0;
  const int64_t count = take_between(scores, N, low, low + 3 * kBinValues - 1, candidates, &higher);
  k -= higher;
  if (k < 1 || k > count) return nowhere;
  // From the highest of the three bins down to the one that holds it.
  uint32_t bin = low + 2 * kBinValues;
  for (; bin > low; bin -= kBinValues) {
    int32_t in_bin = 0;
    for (int64_t i = 0; i < count; ++i) in_bin += candidates[i] - bin < kBinValues;
    if (in_bin >= k) break;
    k -= in_bin;
  }
  const int64_t kept = keep_between(candidates, count, bin, bin + (kBinValues - 1));
  return find_cut_below(candidates, kept, k, bins);
}

// scratch: select_bytes(N). k in 0 .. N. guess: threshold of a cut that is thought to be similar; 0
// for none.
inline Cut find_cut(const float* scores, int64_t N, int64_t k, uint32_t guess, void* scratch) {
  if (k <= 0) return {0xffffffffu, 0};
  if (k >= N) return {0, 0};
  const Cut near = find_cut_near(scores, N, k, guess, scratch);
  if (near.num_ties >= 0) return near;
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
  const uint32_t low = static_cast<uint32_t>(find_bin(bins, kBins, &k)) << 21;
  int64_t higher = 0;
  const int64_t count = take_between(scores, N, low, low | ((1u << 21) - 1), candidates, &higher);
  return find_cut_below(candidates, count, k, bins);
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
