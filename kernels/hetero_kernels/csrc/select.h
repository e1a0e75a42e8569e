// The k best of N scores, without sorting: a sample brackets the smallest score that is still in,
// one pass takes out what lies in the bracket, and halving finds it among those.
//
// Order: higher score first, and of equal scores the lower position (a stable descending sort).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace hk {
namespace {

// Bits of a float that compare, unsigned, like the float; -0 equals 0. Not for NaN.
struct AnySign {
  static HK_INLINE uint32_t ordered(float x) {
    uint32_t u;
    x += 0.0f;
    memcpy(&u, &x, 4);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
  }
  static HK_INLINE vu ordered(vf x) {
    const vu u = (vu)(x + 0.0f);
    return (u >> 31) != 0 ? ~u : u | 0x80000000u;
  }
};

// The same where no score is below 0 (or -0): three operations cheaper.
struct NonNegative {
  static HK_INLINE uint32_t ordered(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
  }
  static HK_INLINE vu ordered(vf x) { return (vu)x; }
};

// What is chosen: everything above `threshold`, and the first `num_ties` that equal it.
struct Cut {
  uint32_t threshold;
  int64_t num_ties;
};

constexpr int kSample = 256;
constexpr int64_t kMinSampled = 1024;  // of fewer scores each is a candidate

inline size_t select_bytes(int64_t N) {
  return (static_cast<size_t>(N) + kLanes + kSample) * sizeof(uint32_t);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each mask of eight lanes the wanted ones, ascending; what follows them does not matter.
struct WantedLanes {
  uint8_t of[256][8];
  constexpr WantedLanes() : of{} {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (uint8_t lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) of[mask][count++] = lane;
      }
    }
  }
};
constexpr WantedLanes kWantedLanes;
#endif

// Appends the lanes of `values` that are wanted to `out`, which has room for a whole vector; returns
// how many.
HK_INLINE int append_wanted(vu values, vi wanted, uint32_t* out) {
#if defined(__AVX512F__)
  const uint32_t mask = mask_of(wanted);
  // Not straight to memory: a masked store of so few elements is slow on AMD.
  const __m512i packed = _mm512_maskz_compress_epi32(mask, (__m512i)values);
  _mm512_storeu_si512(out, packed);
  return __builtin_popcount(mask);
#elif defined(__AVX2__)
  const uint32_t mask = mask_of(wanted);
  const __m128i lanes = _mm_loadl_epi64((const __m128i*)kWantedLanes.of[mask]);
  const __m256i packed =
      _mm256_permutevar8x32_epi32((__m256i)values, _mm256_cvtepu8_epi32(lanes));
  _mm256_storeu_si256((__m256i*)out, packed);
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

inline int64_t count_above(const uint32_t* values, int64_t count, uint32_t limit) {
  const vu limits = vu{} + limit;
  vi above = vi{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) above -= (vi)(load_u32(values + i) > limits);
  int64_t total = hsum(above);
  for (; i < count; ++i) total += values[i] > limit;
  return total;
}

// Copies those of low <= ordered(score) <= high to `out`, which has room for N + kLanes, and counts
// those that are higher; returns how many were copied.
template <class Sign>
int64_t take_between(const float* scores, int64_t N, uint32_t low, uint32_t high, uint32_t* out,
                     int64_t* num_higher) {
  const vu from = vu{} + low;
  const vu to = vu{} + high;
  vi higher = vi{};
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kLanes <= N; i += kLanes) {
    const vu u = Sign::ordered(load(scores + i));
    higher -= (vi)(u > to);
    count += append_wanted(u, (vi)(u - from <= to - from), out + count);
  }
  *num_higher = hsum(higher);
  for (; i < N; ++i) {
    const uint32_t u = Sign::ordered(scores[i]);
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
    kept += append_wanted(u, (vi)(u - from <= to - from), values + kept);
  }
  for (; i < count; ++i) {
    const uint32_t u = values[i];
    values[kept] = u;
    kept += u >= low && u <= high;
  }
  return kept;
}

// The k-th best (1 <= k <= count) of values that all lie in low .. high; they are lost.
inline Cut find_nth(uint32_t* values, int64_t count, int64_t k, uint32_t low, uint32_t high) {
  int64_t above_high = 0;        // how many of `values` are higher than high
  int64_t from_low = count;      // how many are not lower than low
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const int64_t above = count_above(values, count, middle);
    if (above >= k) {
      low = middle + 1;
      from_low = above;
    } else {
      high = middle;
      above_high = above;
    }
    if (4 * (from_low - above_high) <= count && count > kLanes) {
      count = keep_between(values, count, low, high);
      k -= above_high;
      above_high = 0;
      from_low = count;
    }
  }
  return {low, k - above_high};
}

// Narrows low .. high, which hold all scores, to where the k-th best of N most likely lies: three
// standard errors of its rank in a sample to both sides.
template <class Sign>
void guess_range(const float* scores, int64_t N, int64_t k, uint32_t* sample, uint32_t* low,
                 uint32_t* high) {
  for (int64_t i = 0; i < kSample; ++i) sample[i] = Sign::ordered(scores[i * N / kSample]);
  const double share = static_cast<double>(k) / static_cast<double>(N);
  const double rank = share * kSample;
  const double margin = 3.0 * std::sqrt(rank * (1.0 - share)) + 1.0;
  vu least = load_u32(sample);
  vu most = least;
  for (int i = kLanes; i < kSample; i += kLanes) {
    const vu u = load_u32(sample + i);
    least = u < least ? u : least;
    most = u > most ? u : most;
  }
  uint32_t from = least[0];
  uint32_t to = most[0];
  for (int i = 1; i < kLanes; ++i) {
    from = std::min<uint32_t>(from, least[i]);
    to = std::max<uint32_t>(to, most[i]);
  }
  // Halving until a limit is about as far out as it should be.
  const auto limit = [&](double wanted) {
    uint32_t a = from;
    uint32_t b = to;
    while (a < b) {
      const uint32_t middle = a + (b - a) / 2;
      const double above = static_cast<double>(count_above(sample, kSample, middle));
      if (above > wanted + 2.0) {
        a = middle + 1;
      } else if (above < wanted - 2.0) {
        b = middle;
      } else {
        return middle;
      }
    }
    return a;
  };
  if (rank - margin > 2.0) *high = limit(rank - margin);
  if (rank + margin < kSample - 2.0) *low = std::min(*high, limit(rank + margin));
}

// scratch: select_bytes(N). k in 0 .. N.
template <class Sign>
Cut find_cut(const float* scores, int64_t N, int64_t k, void* scratch) {
  if (k <= 0) return {0xffffffffu, 0};
  if (k >= N) return {0, N};  // also those whose order is that of the threshold
  uint32_t* sample = static_cast<uint32_t*>(scratch);
  uint32_t* candidates = sample + kSample;
  uint32_t low = 0;
  uint32_t high = 0xffffffffu;
  if (N >= kMinSampled) guess_range<Sign>(scores, N, k, sample, &low, &high);
  int64_t higher = 0;
  int64_t count = take_between<Sign>(scores, N, low, high, candidates, &higher);
  if (k <= higher) {
    low = high + 1;
    high = 0xffffffffu;
    count = take_between<Sign>(scores, N, low, high, candidates, &higher);
  } else if (k > higher + count) {
    high = low - 1;
    low = 0;
    count = take_between<Sign>(scores, N, low, high, candidates, &higher);
  }
  return find_nth(candidates, count, k - higher, low, high);
}

// How many of the chosen are also in the bit set.
template <class Sign>
int64_t count_common(const float* scores, int64_t N, const Cut& cut, const int32_t* bits) {
  const auto is_in = [&](int64_t i) {
    return static_cast<int64_t>(static_cast<uint32_t>(bits[i >> 5]) >> (i & 31) & 1u);
  };
  int64_t common = 0;
  int64_t ties = cut.num_ties;
  int64_t i = 0;
  const vu threshold = vu{} + cut.threshold;
  for (; i + kLanes <= N; i += kLanes) {
    const uint32_t word = static_cast<uint32_t>(bits[i >> 5]) >> (i & 31);
    const vu u = Sign::ordered(load(scores + i));
    common += __builtin_popcount(mask_of((vi)(u > threshold)) & word);
    uint32_t equal = mask_of((vi)(u == threshold));
    for (; equal != 0 && ties > 0; equal &= equal - 1, --ties) {
      common += word >> __builtin_ctz(equal) & 1u;
    }
  }
  for (; i < N; ++i) {
    const uint32_t u = Sign::ordered(scores[i]);
    if (u > cut.threshold) {
      common += is_in(i);
    } else if (u == cut.threshold && ties > 0) {
      common += is_in(i);
      --ties;
    }
  }
  return common;
}

// Calls take(position) for each chosen one, ascending.
template <class Sign, class Take>
void for_each_chosen(const float* scores, int64_t N, const Cut& cut, Take take) {
  int64_t ties = cut.num_ties;
  for (int64_t i = 0; i < N; ++i) {
    const uint32_t u = Sign::ordered(scores[i]);
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
