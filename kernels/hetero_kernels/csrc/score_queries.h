// Scores with a query in each lane: an element of a key is broadcast against that element of all
// queries, so keys are read as they lie and nothing is transposed but the finished scores.
//
// For numbers of queries that fill enough of the lanes. Exponentials are taken as soon as a score is
// there, relative to the best score of the first tile instead of the best of all, which cancels out;
// should a later score be higher by more than floats can hold, the item is done again.
//
// A row of lanes is kRow = QV * kLanes wide: QV vectors hold the M queries, the rest are zeros.
#pragma once

#include <algorithm>

#include "api.h"
#include "score_groups.h"
#include "score_keys.h"
#include "simd.h"
#include "threads.h"

namespace hk {
namespace {

// What is broadcast at a time, always 32 bits: one fp32 element ...
struct FloatUnits {
  static constexpr int kElements = 1;
  static HK_INLINE vf multiply_add(vf acc, vu queries, uint32_t key) {
    return acc + (vf)queries * (vf)(vu{} + key);
  }
  static HK_INLINE void store(vf elements, uint32_t* to) { memcpy(to, &elements, sizeof elements); }
  static HK_INLINE void store(vf low, vf high, uint32_t* to) {
    store(low, to);
    store(high, to + kLanes);
  }
};

#if defined(__AVX512BF16__)
// ... or two bf16 ones, whose products are exact and summed in fp32. Only for elements that are bf16
// numbers or integers of 8 bits.
struct PairUnits {
  static constexpr int kElements = 2;
  static HK_INLINE vf multiply_add(vf acc, vu queries, uint32_t key) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)queries, (__m512bh)(vu{} + key));
  }
  static HK_INLINE void store(vf elements, uint32_t* to) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)elements));
  }
  static HK_INLINE void store(vf low, vf high, uint32_t* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
};
#endif

constexpr int kQueryTile = 32;       // tokens
constexpr int kMaxQueryVectors = 4;  // largest QV
constexpr int kEdge = 2;             // tokens of probability 0 before and after the prompt
constexpr int kMaxHeadDim = 256;
constexpr int kTileStride = kMaxHeadDim + 16;  // units from key to key of a tile, no power of two
constexpr int64_t kAheadBytes = 12288;         // how far ahead keys are asked for

constexpr int vectors_of(int num_queries) { return (num_queries + kLanes - 1) / kLanes; }

// Tokens whose scores are in registers at once.
constexpr int tokens_at_once(int QV) {
  const int fit = (kLanes == 16 ? 24 : 12) / QV;
  return fit >= 16 ? 16 : fit >= 8 ? 8 : fit >= 4 ? 4 : 2;
}

// Empty lanes cost as much as queries. Measured: worth it from three fifths of the lanes on, and from
// half of that where two elements are multiplied at once.
template <class Units>
bool suits_query_lanes(int num_queries, int head_dim) {
  const int QV = vectors_of(num_queries);
  return QV <= kMaxQueryVectors && head_dim <= kMaxHeadDim &&
         5 * num_queries * Units::kElements >= 3 * QV * kLanes;
}

inline int64_t query_lanes_floats(int num_queries, int head_dim, int64_t N) {
  const int64_t row = int64_t{vectors_of(num_queries)} * kLanes;
  return row * head_dim + row * kLanes + row * (round_up(N, kQueryTile) + 2 * kEdge);
}

// Memory that will be read soon. It is asked for a line at a time, between products: what is asked
// for all at once is dropped as soon as the core waits for more lines than it can keep track of.
struct Ahead {
  const char* next;
  int64_t step;
};

// x[t] (+)= factors[t] * keys[t] . queries, for the units `from` .. `to` of kQueryTile keys; null
// factors are 1. STRIDE says how far apart keys lie where the compiler may know, which saves it
// registers.
template <class Units, int QV, int STRIDE>
void multiply_tile(const uint32_t* keys, int64_t any_stride, const uint32_t* queries, int from,
                   int to, const float* factors, bool add, Ahead* ahead, vf* x) {
  constexpr int TT = tokens_at_once(QV);
  const int64_t stride = STRIDE > 0 ? STRIDE : any_stride;
  const char* next = ahead->next;
  for (int t = 0; t < kQueryTile; t += TT) {
    // Unrolled by name: else the accumulators go through memory before and after the loop.
    vf acc[TT * QV];
#pragma GCC unroll 32
    for (int i = 0; i < TT * QV; ++i) acc[i] = vf{};
    const uint32_t* k = keys + t * stride;
    for (int u = from; u < to; ++u) {
      __builtin_prefetch(next, 0, 3);
      next += ahead->step;
      vu q[QV];
      for (int v = 0; v < QV; ++v) q[v] = load_u32(queries + (int64_t{u} * QV + v) * kLanes);
#pragma GCC unroll 32
      for (int i = 0; i < TT * QV; ++i) {
        acc[i] = Units::multiply_add(acc[i], q[i % QV], k[i / QV * stride + u]);
      }
    }
    vf* out = x + t * QV;
    if (factors == nullptr) {
#pragma GCC unroll 32
      for (int i = 0; i < TT * QV; ++i) out[i] = acc[i];
    } else {
#pragma GCC unroll 32
      for (int i = 0; i < TT * QV; ++i) {
        out[i] = acc[i] * factors[t + i / QV] + (add ? out[i] : vf{});
      }
    }
  }
  ahead->next = next;
}

typedef void (*MultiplyTile)(const uint32_t*, int64_t, const uint32_t*, int, int, const float*,
                             bool, Ahead*, vf*);

template <class Units, int QV>
MultiplyTile pick_multiply_tile(int64_t stride) {
  switch (stride) {
    case 32:
      return multiply_tile<Units, QV, 32>;
    case 64:
      return multiply_tile<Units, QV, 64>;
    case 128:
      return multiply_tile<Units, QV, 128>;
    case kTileStride:
      return multiply_tile<Units, QV, kTileStride>;
    default:
      return multiply_tile<Units, QV, 0>;
  }
}

HK_INLINE bool are_adjacent(const int32_t* slots, int64_t begin, int count) {
  if (slots == nullptr) return true;
  int differ = 0;
  for (int t = 0; t < count; ++t) differ |= slots[begin + t] - slots[begin] - t;
  return differ == 0;
}

template <class Units, class Keys>
HK_INLINE void copy_key(const Keys& keys, typename Keys::Row row, int D, uint32_t* to) {
  int d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
    Units::store(keys.load(row, d), keys.load(row, d + kLanes), to);
    to += 2 * kLanes / Units::kElements;
  }
  if (d < D) Units::store(keys.load(row, d), to);
}

// Queries as units, [D / kElements, kRow].
template <class E, class Units>
void spread_queries(const typename E::type* q, int M, int kRow, int D, uint32_t* queries) {
  uint32_t units[kMaxHeadDim];
  for (int m = 0; m < kRow; ++m) {
    for (int d = 0; d < D; d += kLanes) {
      Units::store(m < M ? E::load(q + m * D + d) : vf{}, units + d / Units::kElements);
    }
    for (int u = 0; u < D / Units::kElements; ++u) queries[u * kRow + m] = units[u];
  }
}

// The products x [kQueryTile, QV] of queries and the keys of the tokens from `begin` on.
template <class Units, int QV, class Keys>
HK_INLINE void product_tile(const HkScore& args, const Keys& keys, const int32_t* slots, int64_t N,
                          int64_t begin, const uint32_t* queries, uint32_t* tile, vf* x) {
  const int D = args.head_dim;
  const int count = static_cast<int>(std::min<int64_t>(kQueryTile, N - begin));
  const int64_t distance =
      std::max<int64_t>(1, kAheadBytes / keys.row_bytes() / kQueryTile) * kQueryTile;
  const int64_t later = std::min(begin + distance, N - 1);
  const uint32_t* units = tile;
  int64_t stride = kTileStride;
  const int64_t first = slot_of(slots, begin);
  Ahead ahead = {static_cast<const char*>(keys.address(slot_of(slots, later))), 0};
  const bool adjacent = count == kQueryTile && are_adjacent(slots, begin, count);
  if (adjacent) {
    ahead.step = keys.slot_bytes() * tokens_at_once(QV) / (D / Units::kElements);
    keys.prefetch_factors(slot_of(slots, later));
  }
  if (!(adjacent && keys.template as_it_lies<Units>(first, &units, &stride))) {
    for (int t = 0; t < count; ++t) {
      if (!adjacent) keys.prefetch(slot_of(slots, std::min(later + t, N - 1)));
      const auto row = keys.row(adjacent ? first + t : slot_of(slots, begin + t));
      copy_key<Units>(keys, row, D, tile + t * kTileStride);
    }
    std::fill(tile + count * kTileStride, tile + kQueryTile * kTileStride, 0u);
  }
  const auto multiply = pick_multiply_tile<Units, QV>(stride);
  const int group_dim = keys.group_dim();
  for (int d = 0; d < D; d += group_dim) {
    float factors[kQueryTile] = {};
    for (int t = 0; t < count && Keys::kHasFactors; ++t) {
      factors[t] = keys.factor(keys.row(slot_of(slots, begin + t)), d / group_dim);
    }
    multiply(units, stride, queries, d / Units::kElements, (d + group_dim) / Units::kElements,
             Keys::kHasFactors ? factors : nullptr, d > 0, &ahead, x);
  }
}

// out [kEdge + N + kEdge and more, kRow]: e^(scale * (product - base)) of each token, zeros around
// them; totals: their sums. Returns false, and a better `base`, where that went out of range. `base`
// is chosen here unless has_base.
template <class Units, class Keys, int QV>
bool exponentials(const HkScore& args, const Keys& keys, const int32_t* slots, int64_t N,
                  const uint32_t* queries, bool has_base, vf* base, float* out, vf* totals) {
  constexpr int kRow = QV * kLanes;
  constexpr float kRoom = 60.0f;  // 2^60 for each of 2^32 tokens is still a float
  const float unit = args.scale * kLog2e;
  alignas(64) uint32_t tile[kQueryTile * kTileStride];
  vf x[kQueryTile * QV];
  // Local, so that stores to `out` cannot change them in the compiler's eyes.
  vf top[QV], from[QV], total[QV];
  for (int v = 0; v < QV; ++v) total[v] = vf{};
  std::fill(out, out + kEdge * kRow, 0.0f);
  for (int64_t begin = 0; begin < N; begin += kQueryTile) {
    const int count = static_cast<int>(std::min<int64_t>(kQueryTile, N - begin));
    product_tile<Units, QV>(args, keys, slots, N, begin, queries, tile, x);
    if (begin == 0) {
      for (int v = 0; v < QV; ++v) {
        top[v] = x[v];
        for (int t = 1; t < count; ++t) top[v] = vmax(top[v], x[t * QV + v]);
        from[v] = (has_base ? base[v] : top[v]) * unit;
      }
    }
    float* to = out + (begin + kEdge) * kRow;
    for (int v = 0; v < QV; ++v) {
      int t = 0;
      for (; t + 4 <= count; t += 4) {  // four at once share the loads of coefficients
        vf e[4];
        for (int i = 0; i < 4; ++i) e[i] = x[(t + i) * QV + v];
        top[v] = vmax(top[v], vmax(vmax(e[0], e[1]), vmax(e[2], e[3])));
        for (int i = 0; i < 4; ++i) e[i] = exp2_clamped(e[i] * unit - from[v]);
        total[v] += (e[0] + e[1]) + (e[2] + e[3]);
        for (int i = 0; i < 4; ++i) store(to + (t + i) * kRow + v * kLanes, e[i]);
      }
      for (; t < count; ++t) {
        top[v] = vmax(top[v], x[t * QV + v]);
        const vf e = exp2_clamped(x[t * QV + v] * unit - from[v]);
        total[v] += e;
        store(to + t * kRow + v * kLanes, e);
      }
    }
  }
  std::fill(out + (N + kEdge) * kRow, out + (round_up(N, kQueryTile) + 2 * kEdge) * kRow, 0.0f);
  bool fits = true;
  for (int v = 0; v < QV; ++v) {
    fits = fits && hmax(top[v] * unit - from[v]) <= kRoom;
    base[v] = top[v];
    totals[v] = total[v];
  }
  return fits;
}

// scores [S, stride]: the maximum over the group of the pooled probabilities.
template <int QV>
void pool_lanes(const float* probabilities, const vf* totals, int S, int G, int64_t N,
                int64_t stride, float* columns, float* scores) {
  constexpr int kRow = QV * kLanes;
  vf factors[QV];
  for (int v = 0; v < QV; ++v) factors[v] = 1.0f / (5.0f * totals[v]);
  for (int64_t begin = 0; begin < N; begin += kLanes) {
    for (int v = 0; v < QV; ++v) {
      const float* row = probabilities + begin * kRow + v * kLanes;  // kEdge tokens before `begin`
      vf c = load(row + 2 * kRow);
      vf d = load(row + 3 * kRow);
      vf ab = load(row) + load(row + kRow);
      vf bc = load(row + kRow) + c;
      vf r[kLanes];
      for (int t = 0; t < kLanes; ++t) {
        const vf cd = c + d;
        const vf e = load(row + (t + 4) * kRow);
        r[t] = (ab + cd + e) * factors[v];
        ab = bc;
        bc = cd;
        c = d;
        d = e;
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) store(columns + (v * kLanes + i) * kLanes, r[i]);
    }
    for (int s = 0; s < S; ++s) {
      vf best = load(columns + s * G * kLanes);
      for (int g = 1; g < G; ++g) best = vmax(best, load(columns + (s * G + g) * kLanes));
      store(scores + s * stride + begin, best);
    }
  }
  for (int v = 0; v < QV; ++v) store(columns + v * kLanes, factors[v]);
  keep_nan(columns, S, G, N, stride, scores);
}

// Pooled scores [S, stride] of one item; `scratch` has query_lanes_floats.
template <class E, class Units, int QV, class Keys>
void score_by_query_lanes(const HkScore& args, int64_t item, int64_t N, const Keys& keys,
                          const int32_t* slots, int64_t stride, float* scratch,
                          float* scores) {
  constexpr int kRow = QV * kLanes;
  const int D = args.head_dim;
  const int M = args.num_queries * args.group_size;
  uint32_t* queries = reinterpret_cast<uint32_t*>(scratch);
  float* columns = scratch + int64_t{kRow} * D;
  float* probabilities = columns + kRow * kLanes;
  const auto* q = static_cast<const typename E::type*>(args.queries) + item * M * D;
  spread_queries<E, Units>(q, M, kRow, D, queries);
  vf base[QV], totals[QV];
  if (!exponentials<Units, Keys, QV>(args, keys, slots, N, queries, false, base, probabilities,
                                     totals)) {
    exponentials<Units, Keys, QV>(args, keys, slots, N, queries, true, base, probabilities, totals);
  }
  pool_lanes<QV>(probabilities, totals, args.num_queries, args.group_size, N, stride,
                 columns, scores);
}

}  // namespace
}  // namespace hk
