// Causal attention of a chunk of new tokens over all tokens before it.
//
// An item is one KV head with a block of query tokens; its rows are (token, query of the group), so
// a group shares every key. Keys come in blocks: transposed and widened to fp32 once for all rows
// of the item, then two small matrix products whose accumulators stay in registers, with an online
// softmax between them. Blocks behind the diagonal are not touched.
//
// M rows of an item, D head dimension.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

#include "api.h"
#include "simd.h"
#include "threads.h"

namespace hk {
namespace {

constexpr int kKeys = 64;
constexpr int kRowsWanted = 384;
constexpr int kMinQueryTokens = 16;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Accumulators: score_rows holds kScoreRows x 2 vectors, weigh_rows kWeighRows x 4. AVX-512 has 32
// registers, everything else 16.
constexpr int kScoreRows = HK_LANES == 16 ? 12 : 6;
constexpr int kWeighRows = HK_LANES == 16 ? 6 : 3;

// scores[QT, kKeys] = query[QT, D] @ keys, keys [kKeys / kLanes, D, kLanes]; `vectors` is even.
template <int QT>
void score_rows(const float* query, int D, const float* keys, int vectors, float* scores) {
  for (int t = 0; t < vectors; t += 2) {
    vf acc[QT][2];
    for (int m = 0; m < QT; ++m) acc[m][0] = acc[m][1] = vf{};
    const float* k = keys + int64_t{t} * D * kLanes;
    const int64_t second = int64_t{D} * kLanes;
    for (int d = 0; d < D; ++d) {
      const vf k0 = load(k + d * kLanes);
      const vf k1 = load(k + second + d * kLanes);
      for (int m = 0; m < QT; ++m) {
        const vf q = splat(query[m * D + d]);
        acc[m][0] += q * k0;
        acc[m][1] += q * k1;
      }
    }
    for (int m = 0; m < QT; ++m) {
      store(scores + m * kKeys + t * kLanes, acc[m][0]);
      store(scores + m * kKeys + (t + 1) * kLanes, acc[m][1]);
    }
  }
}

// acc[QT, D] = acc * rescale + weights[QT, :count] @ values[count, D].
template <int QT, int CV>
void weigh_rows(const float* weights, int count, const float* values, int D, const float* rescale,
                float* acc) {
  for (int d = 0; d < D; d += CV * kLanes) {
    vf a[QT][CV];
    for (int m = 0; m < QT; ++m)
      for (int c = 0; c < CV; ++c) a[m][c] = load(acc + m * D + d + c * kLanes) * rescale[m];
    for (int k = 0; k < count; ++k) {
      vf v[CV];
      for (int c = 0; c < CV; ++c) v[c] = load(values + int64_t{k} * D + d + c * kLanes);
      for (int m = 0; m < QT; ++m) {
        const vf w = splat(weights[m * kKeys + k]);
        for (int c = 0; c < CV; ++c) a[m][c] += w * v[c];
      }
    }
    for (int m = 0; m < QT; ++m)
      for (int c = 0; c < CV; ++c) store(acc + m * D + d + c * kLanes, a[m][c]);
  }
}

typedef void (*ScoreRows)(const float*, int, const float*, int, float*);
typedef void (*WeighRows)(const float*, int, const float*, int, const float*, float*);

template <size_t... I>
ScoreRows pick_score(int rows, std::index_sequence<I...>) {
  static constexpr ScoreRows table[] = {score_rows<I + 1>...};
  return table[rows - 1];
}
template <int CV, size_t... I>
WeighRows pick_weigh(int rows, std::index_sequence<I...>) {
  static constexpr WeighRows table[] = {weigh_rows<I + 1, CV>...};
  return table[rows - 1];
}
WeighRows pick_weigh(int rows, int D) {
  constexpr auto counts = std::make_index_sequence<kWeighRows>{};
  if (D % (4 * kLanes) == 0) return pick_weigh<4>(rows, counts);
  if (D % (2 * kLanes) == 0) return pick_weigh<2>(rows, counts);
  return pick_weigh<1>(rows, counts);
}

// Online softmax of one row of scores in units of log2(e): weights in place, maximum and lane-wise
// sum updated; returns what the row's accumulator is to be multiplied with.
HK_INLINE float soften(float* row, int vectors, float* maximum, float* sums) {
  vf top = load(row);
  for (int t = 1; t < vectors; ++t) top = vmax(top, load(row + t * kLanes));
  const float new_max = std::max(*maximum, hmax(top));
  const float rescale = *maximum == new_max ? 1.0f : std::exp2(*maximum - new_max);
  vf total = load(sums) * rescale;
  for (int t = 0; t < vectors; ++t) {
    const vf e = exp2_clamped(load(row + t * kLanes) - new_max);
    total += e;
    store(row + t * kLanes, e);
  }
  *maximum = new_max;
  store(sums, total);
  return rescale;
}

// `count` rows of K and V, `stride` apart, to keys [kKeys / kLanes, D, kLanes] and values [., D].
template <class E>
void pack(const typename E::type* k, int64_t k_stride, const typename E::type* v, int64_t v_stride,
          int count, int vectors, int D, float* keys, float* values) {
  for (int t = 0; t < vectors; ++t) {
    for (int d = 0; d < D; d += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        // Past the end the last row stands in; its scores are masked.
        r[i] = E::load(k + std::min(t * kLanes + i, count - 1) * k_stride + d);
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) {
        store(keys + (int64_t{t} * D + d + i) * kLanes, r[i]);
      }
    }
  }
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < D; d += kLanes) store(values + i * D + d, E::load(v + i * v_stride + d));
}

thread_local Scratch t_extend;

template <class E>
void extend_item(const HkExtend& args, int head, int64_t first, int tokens) {
  typedef typename E::type T;
  const int G = args.group_size;
  const int D = args.head_dim;
  const int M = tokens * G;
  // query [M, D], acc [M, D], scores [M, kKeys], keys and values [kKeys, D], sums [M, kLanes],
  // maximum and rescale [M].
  const int64_t floats = M * (2 * int64_t{D} + kKeys + kLanes + 2) + 2 * kKeys * int64_t{D};
  float* query = static_cast<float*>(t_extend.get(floats * sizeof(float)));
  float* acc = query + int64_t{M} * D;
  float* scores = acc + int64_t{M} * D;
  float* keys = scores + int64_t{M} * kKeys;
  float* values = keys + kKeys * int64_t{D};
  float* sums = values + kKeys * int64_t{D};
  float* maximum = sums + int64_t{M} * kLanes;
  float* rescale = maximum + M;
  std::fill(acc, acc + int64_t{M} * D, 0.0f);
  std::fill(maximum, maximum + M, kNegInf);
  std::fill(sums, sums + int64_t{M} * kLanes, 0.0f);

  const T* q = static_cast<const T*>(args.q) + int64_t{head} * G * D;
  for (int i = 0; i < tokens; ++i) {
    const T* row = q + (first + i) * args.q_stride;
    float* to = query + int64_t{i} * G * D;
    for (int d = 0; d < G * D; d += kLanes) store(to + d, E::load(row + d) * (args.scale * kLog2e));
  }
  const T* k = static_cast<const T*>(args.k) + head * args.k_head_stride;
  const T* v = static_cast<const T*>(args.v) + head * args.v_head_stride;
  const int64_t end = args.prefix_len + first + tokens;
  for (int64_t begin = 0; begin < end; begin += kKeys) {
    const int count = static_cast<int>(std::min<int64_t>(kKeys, end - begin));
    const int vectors = static_cast<int>(round_up(count, 2 * kLanes)) / kLanes;
    pack<E>(k + begin * args.k_row_stride, args.k_row_stride, v + begin * args.v_row_stride,
            args.v_row_stride, count, vectors, D, keys, values);
    for (int m = 0; m < M; m += kScoreRows) {
      const int rows = std::min(kScoreRows, M - m);
      pick_score(rows, std::make_index_sequence<kScoreRows>{})(
          query + int64_t{m} * D, D, keys, vectors, scores + int64_t{m} * kKeys);
    }
    const int64_t unmasked = args.prefix_len + first + 1 - begin;  // keys that row 0 sees
    for (int m = 0; m < M; ++m) {
      float* row = scores + int64_t{m} * kKeys;
      const int64_t visible = unmasked + m / G;
      if (visible < vectors * kLanes) {
        for (int t = 0; t < vectors; ++t) {
          const vi keep = lane_ids() + t * kLanes < static_cast<int32_t>(visible);
          store(row + t * kLanes, keep ? load(row + t * kLanes) : splat(kNegInf));
        }
      }
      rescale[m] = soften(row, vectors, maximum + m, sums + int64_t{m} * kLanes);
    }
    for (int m = 0; m < M; m += kWeighRows) {
      const int rows = std::min(kWeighRows, M - m);
      pick_weigh(rows, D)(scores + int64_t{m} * kKeys, count, values, D, rescale + m,
                          acc + int64_t{m} * D);
    }
  }
  for (int i = 0; i < tokens; ++i) {
    T* row = static_cast<T*>(args.out) + (first + i) * args.out_stride + int64_t{head} * G * D;
    for (int g = 0; g < G; ++g) {
      const float factor = 1.0f / hsum(load(sums + (int64_t{i} * G + g) * kLanes));
      const float* from = acc + (int64_t{i} * G + g) * D;
      for (int d = 0; d < D; d += kLanes) E::store(row + g * D + d, load(from + d) * factor);
    }
  }
}

template <class E>
void extend(const HkExtend& args) {
  const int H = args.num_kv_heads;
  const int64_t wanted = std::max(kMinQueryTokens, kRowsWanted / args.group_size);
  // Short chunks in smaller blocks, so that every thread gets some.
  const int64_t shares = args.num_threads == 1 ? 1 : 4 * args.num_threads;
  const int64_t fair = std::max<int64_t>(kMinQueryTokens, args.num_new * H / shares);
  const int64_t block = std::min(wanted, fair);
  const int64_t num_blocks = (args.num_new + block - 1) / block;
  std::atomic<int64_t> next{0};
  auto body = [&] {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_blocks * H) return;
      // The last blocks see most keys and go first.
      const int64_t first = (num_blocks - 1 - item / H) * block;
      const int tokens = static_cast<int>(std::min(block, args.num_new - first));
      extend_item<E>(args, static_cast<int>(item % H), first, tokens);
    }
  };
  parallel(static_cast<int>(std::min<int64_t>(args.num_threads, num_blocks * H)), body);
}

}  // namespace
}  // namespace hk

void hk_extend_attention(const HkExtend* args) {
  switch (args->dtype) {
    case HK_F32:
      hk::extend<hk::F32>(*args);
      break;
    case HK_BF16:
      hk::extend<hk::BF16>(*args);
      break;
    default:
      hk::extend<hk::F16>(*args);
  }
}
