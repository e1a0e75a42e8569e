// Scores with a token in each lane: keys are transposed, in the first-level cache, and each query is
// broadcast against them. For any number of queries.
#pragma once

#include <algorithm>
#include <utility>

#include "api.h"
#include "score_groups.h"
#include "score_keys.h"
#include "simd.h"
#include "threads.h"

namespace hk {
namespace {

constexpr int kTokenTile = 64;
constexpr int kPad = kLanes;  // zeros (probability 0) before and after each row of probabilities

// QT queries against kTokenTile transposed keys [kTokenTile / kLanes, D, kLanes]; TT vectors at once.
template <int QT, int TT>
void multiply(const float* keys, const float* query, int D, float scale, float* out,
              int64_t out_stride) {
  for (int t = 0; t < kTokenTile / kLanes; t += TT) {
    vf acc[QT][TT];
    for (int m = 0; m < QT; ++m)
      for (int i = 0; i < TT; ++i) acc[m][i] = vf{};
    const float* k = keys + int64_t{t} * D * kLanes;
    for (int d = 0; d < D; ++d) {
      vf kv[TT];
      for (int i = 0; i < TT; ++i) kv[i] = load(k + (int64_t{i} * D + d) * kLanes);
      for (int m = 0; m < QT; ++m) {
        const vf q = splat(query[m * D + d]);
        for (int i = 0; i < TT; ++i) acc[m][i] += q * kv[i];
      }
    }
    for (int m = 0; m < QT; ++m)
      for (int i = 0; i < TT; ++i) {
        store(out + m * out_stride + (t + i) * kLanes, acc[m][i] * scale);
      }
  }
}

// AVX-512 has 32 registers, everything else 16; two vectors of keys for each broadcast query keep
// the multipliers busy and not the loads.
constexpr int kAccumulators = HK_LANES == 16 ? 30 : 12;
constexpr int kMaxQueries = kAccumulators / 2;

template <int QT>
constexpr int tiles_at_once() {
  return kAccumulators / QT >= 4 ? 4 : 2;
}

typedef void (*Multiply)(const float*, const float*, int, float, float*, int64_t);

template <size_t... I>
Multiply pick_multiply(int count, std::index_sequence<I...>) {
  static const Multiply table[] = {multiply<I + 1, tiles_at_once<I + 1>()>...};
  return table[count - 1];
}

// Raw scores [M, N] (rows `stride` apart) of one item, in units of log2(e).
template <class Keys>
void raw_scores(const HkScore& args, const Keys& keys, const int32_t* slots, int64_t N,
                const float* query, float* tile_keys, float* out, int64_t stride) {
  const int D = args.head_dim;
  const int M = args.num_queries * args.group_size;
  const int64_t ahead = std::max<int64_t>(kLanes, 8192 / keys.row_bytes());
  for (int64_t begin = 0; begin < N; begin += kTokenTile) {
    for (int part = 0; part < kTokenTile / kLanes; ++part) {
      typename Keys::Row rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        // Past the end the last row stands in; its scores fall into the padding or are overwritten.
        const int64_t position = std::min<int64_t>(begin + part * kLanes + i, N - 1);
        rows[i] = keys.row(slot_of(slots, position));
        keys.prefetch(slot_of(slots, std::min(position + ahead, N - 1)));
      }
      vf factors = vf{};
      for (int d = 0; d < D; d += kLanes) {
        vf r[kLanes];
        for (int i = 0; i < kLanes; ++i) r[i] = keys.load(rows[i], d);
        transpose(r);
        if constexpr (Keys::kHasFactors) {
          if (d % keys.group_dim() == 0) factors = keys.factors(rows, d / keys.group_dim());
          for (int i = 0; i < kLanes; ++i) r[i] *= factors;
        }
        float* to = tile_keys + (int64_t{part} * D + d) * kLanes;
        for (int i = 0; i < kLanes; ++i) store(to + i * kLanes, r[i]);
      }
    }
    for (int m = 0; m < M; m += kMaxQueries) {
      const int count = std::min(kMaxQueries, M - m);
      pick_multiply(count, std::make_index_sequence<kMaxQueries>{})(
          tile_keys, query + int64_t{m} * D, D, args.scale * kLog2e, out + m * stride + begin, stride);
    }
  }
}

// Turns a row of raw scores into 2^(x - max); returns 1 / (5 * sum), the pool's factor included.
float soften(float* row, int64_t N) {
  vf top = splat(row[0]);
  int64_t i = 0;
  for (; i + kLanes <= N; i += kLanes) top = vmax(top, load(row + i));
  float maximum = hmax(top);
  for (; i < N; ++i) maximum = std::max(maximum, row[i]);
  vf total = vf{};
  for (i = 0; i < N; i += kLanes) {
    vf e = exp2_clamped(load(row + i) - maximum);
    if (i + kLanes > N) e = lane_ids() + static_cast<int32_t>(i) < static_cast<int32_t>(N) ? e : vf{};
    total += e;
    store(row + i, e);
  }
  return 1.0f / (5.0f * hsum(total));
}

// out[N] = maximum over the group of the pooled probabilities; rows have kPad zeros on both sides.
template <int GT>
void pool(const float* rows, int64_t stride, const float* factors, int64_t N, float* out,
          bool first) {
  for (int64_t i = 0; i < N; i += kLanes) {
    vf best = first ? vf{} : load(out + i);
    for (int g = 0; g < GT; ++g) {
      const float* row = rows + g * stride + i;
      const vf sum = (load(row - 2) + load(row + 2)) + (load(row - 1) + load(row + 1)) + load(row);
      best = vmax(best, sum * factors[g]);
    }
    store(out + i, best);
  }
}

void pool_group(const float* rows, int64_t stride, const float* factors, int G, int64_t N,
                float* out) {
  for (int g = 0; g < G;) {
    const int left = G - g;
    const float* r = rows + g * stride;
    if (left >= 4) {
      pool<4>(r, stride, factors + g, N, out, g == 0);
      g += 4;
    } else if (left == 3) {
      pool<3>(r, stride, factors + g, N, out, g == 0);
      g += 3;
    } else if (left == 2) {
      pool<2>(r, stride, factors + g, N, out, g == 0);
      g += 2;
    } else {
      pool<1>(r, stride, factors + g, N, out, g == 0);
      g += 1;
    }
  }
}

inline int64_t token_lanes_floats(int num_queries, int head_dim, int64_t N) {
  const int64_t stride = round_up(N, kTokenTile) + 2 * kPad;
  return int64_t{num_queries} * head_dim + int64_t{kTokenTile} * head_dim +
         num_queries * (stride + 1);
}

// Pooled scores [S, out_stride] of one item; `scratch` has token_lanes_floats.
template <class E, class Keys>
void score_by_token_lanes(const HkScore& args, int64_t item, int64_t N, const Keys& keys,
                          const int32_t* slots, int64_t out_stride, float* scratch, float* scores) {
  const int S = args.num_queries;
  const int G = args.group_size;
  const int D = args.head_dim;
  const int M = S * G;
  const int64_t stride = round_up(N, kTokenTile) + 2 * kPad;
  float* query = scratch;
  float* tile_keys = query + int64_t{M} * D;
  float* raw = tile_keys + int64_t{kTokenTile} * D;
  float* factors = raw + M * stride;
  const auto* q = static_cast<const typename E::type*>(args.queries) + item * M * D;
  for (int i = 0; i < M * D; i += kLanes) store(query + i, E::load(q + i));
  raw_scores<Keys>(args, keys, slots, N, query, tile_keys, raw + kPad, stride);
  for (int m = 0; m < M; ++m) {
    float* row = raw + m * stride;
    std::fill(row, row + kPad, 0.0f);
    factors[m] = soften(row + kPad, N);
    std::fill(row + kPad + N, row + stride, 0.0f);
  }
  for (int s = 0; s < S; ++s) {
    pool_group(raw + s * G * stride + kPad, stride, factors + s * G, G, N, scores + s * out_stride);
  }
  keep_nan(factors, S, G, N, out_stride, scores);
}

}  // namespace
}  // namespace hk
