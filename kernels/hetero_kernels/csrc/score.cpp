// Pooled attention scores of query groups against a prompt's keys, and what is chosen by them.
//
// An item is one KV head with S groups of G queries. Its keys are read once: tiles are transposed in
// the first-level cache and all S * G queries run against them, each lane one token, so nothing is
// summed across lanes. The definition (softmax over exactly the prompt, average pool of 5 with zero
// padding, maximum over the group) is in the reference next door.
//
// M = S * G queries, N prompt tokens, D head dimension.
#include <algorithm>
#include <atomic>
#include <utility>

#include "api.h"
#include "select.h"
#include "simd.h"
#include "threads.h"

namespace hk {
namespace {

constexpr int kTile = 64;
constexpr int kPad = kLanes;  // zeros (probability 0) before and after each row of probabilities

// QT queries against the kTile transposed keys [kTile / kLanes, D, kLanes]; TT vectors at once.
template <int QT, int TT>
void multiply(const float* keys, const float* query, int D, float scale, float* out,
              int64_t out_stride) {
  for (int t = 0; t < kTile / kLanes; t += TT) {
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

// ---- where keys come from ------------------------------------------------------------------
//
// A reader knows one plane. row(slot) is cheap; load(row, d) gives kLanes elements from d on, fp32,
// still to be multiplied with the row's factor where there is one: kLanes rows' factors are one
// vector once their elements are transposed.

template <class E>
class DenseKeys {
 public:
  typedef const typename E::type* Row;
  static constexpr bool kHasFactors = false;
  DenseKeys(const HkScore& args, int64_t plane)
      : keys_(static_cast<Row>(args.keys) + plane * args.plane_stride),
        stride_(args.slot_stride),
        row_bytes_(args.head_dim * sizeof(typename E::type)) {}
  HK_INLINE Row row(int64_t slot) const { return keys_ + slot * stride_; }
  HK_INLINE vf load(Row row, int d) const { return E::load(row + d); }
  HK_INLINE void prefetch(int64_t slot) const {
    const char* p = reinterpret_cast<const char*>(row(slot));
    for (int64_t b = 0; b < row_bytes_; b += 64) __builtin_prefetch(p + b, 0, 3);
  }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  Row keys_;
  int64_t stride_;
  int64_t row_bytes_;
};

// BITS 8: element d is byte d. BITS 4: byte j holds element j (plus 8) in its lower half and element
// j + D / 2 (plus 8) in its upper one, so a vector never mixes the halves.
template <int BITS>
class QuantizedKeys {
 public:
  struct Row {
    const uint8_t* data;
    const uint16_t* scales;
  };
  static constexpr bool kHasFactors = true;
  QuantizedKeys(const HkScore& args, int64_t plane)
      : data_(static_cast<const uint8_t*>(args.keys) + plane * args.plane_stride),
        scales_(static_cast<const uint16_t*>(args.scales) + plane * args.scales_plane_stride),
        stride_(args.slot_stride),
        scales_stride_(args.scales_slot_stride),
        half_(args.head_dim / 2),
        group_dim_(args.head_dim / args.num_groups),
        row_bytes_(args.head_dim * BITS / 8) {}
  HK_INLINE Row row(int64_t slot) const {
    return {data_ + slot * stride_, scales_ + slot * scales_stride_};
  }
  HK_INLINE vf load(Row row, int d) const {
    if constexpr (BITS == 8) return __builtin_convertvector(load_i8(row.data + d), vf);
    const vi both = load_u8(row.data + (d < half_ ? d : d - half_));
    return __builtin_convertvector((d < half_ ? both & 15 : both >> 4) - 8, vf);
  }
  int group_dim() const { return group_dim_; }
  HK_INLINE vf factors(const Row* rows, int group) const {
    vu bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = rows[i].scales[group];
    return (vf)(bits << 16);
  }
  HK_INLINE void prefetch(int64_t slot) const {
    const Row r = row(slot);
    for (int64_t b = 0; b < row_bytes_; b += 64) __builtin_prefetch(r.data + b, 0, 3);
    __builtin_prefetch(r.scales, 0, 3);
  }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  const uint8_t* data_;
  const uint16_t* scales_;
  int64_t stride_;
  int64_t scales_stride_;
  int half_;
  int group_dim_;
  int64_t row_bytes_;
};

// Raw scores [M, N] (rows `stride` apart) of one item, in units of log2(e).
template <class Keys>
void raw_scores(const HkScore& args, int64_t item, int64_t N, const float* query, float* tile_keys,
                float* out, int64_t stride) {
  const int D = args.head_dim;
  const int M = args.num_queries * args.group_size;
  const Keys keys(args, args.planes != nullptr ? args.planes[item] : item);
  const int32_t* slots = args.slots;
  if (slots != nullptr && args.rows != nullptr) slots += args.rows[item] * args.slots_stride;
  const int64_t ahead = std::max<int64_t>(kLanes, 8192 / keys.row_bytes());
  for (int64_t begin = 0; begin < N; begin += kTile) {
    for (int part = 0; part < kTile / kLanes; ++part) {
      typename Keys::Row rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        // Past the end the last row stands in; its scores fall into the padding or are overwritten.
        const int64_t position = std::min<int64_t>(begin + part * kLanes + i, N - 1);
        rows[i] = keys.row(slots != nullptr ? slots[position] : position);
        const int64_t later = std::min(position + ahead, N - 1);
        keys.prefetch(slots != nullptr ? slots[later] : later);
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
    vf e = exp2_nonpositive(load(row + i) - maximum);
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

thread_local Scratch t_score;

template <class E, class Keys>
void score(const HkScore& args) {
  const int S = args.num_queries;
  const int G = args.group_size;
  const int D = args.head_dim;
  const int M = S * G;
  std::atomic<int64_t> next{0};
  auto body = [&](int) {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= args.num_items) return;
      const int64_t N = args.prompt_lens[item];
      float* newest =
          args.newest_scores == nullptr ? nullptr : args.newest_scores + item * args.newest_stride;
      if (N == 0) {
        for (int s = 0; s < S && args.overlap != nullptr; ++s) {
          args.overlap[item * S + s] = 0.0f;
        }
        if (newest != nullptr) std::fill(newest, newest + args.newest_stride, 0.0f);
        continue;
      }
      const int64_t stride = round_up(N, kTile) + 2 * kPad;
      const int64_t floats = int64_t{M} * D + int64_t{kTile} * D + M * stride + stride;
      float* query = static_cast<float*>(
          t_score.get((round_up(floats, 16) + round_up(M, 16)) * sizeof(float) + select_bytes(N)));
      float* tile_keys = query + int64_t{M} * D;
      float* raw = tile_keys + int64_t{kTile} * D;
      float* scores = raw + M * stride;
      float* factors = query + round_up(floats, 16);
      void* select_scratch = factors + round_up(M, 16);

      const auto* q = static_cast<const typename E::type*>(args.queries) + item * M * D;
      for (int i = 0; i < M * D; i += kLanes) store(query + i, E::load(q + i));
      raw_scores<Keys>(args, item, N, query, tile_keys, raw + kPad, stride);
      for (int m = 0; m < M; ++m) {
        float* row = raw + m * stride;
        std::fill(row, row + kPad, 0.0f);
        factors[m] = soften(row + kPad, N);
        std::fill(row + kPad + N, row + stride, 0.0f);
      }
      // Steps that follow each other mostly cut near the same score.
      uint32_t guess = 0;
      for (int s = 0; s < S; ++s) {
        if (args.overlap == nullptr && s != S - 1) continue;
        pool_group(raw + s * G * stride + kPad, stride, factors + s * G, G, N, scores);
        if (args.overlap != nullptr) {
          const int64_t K = std::min<int64_t>(args.top_k[item], N);
          const Cut cut = find_cut(scores, N, K, guess, select_scratch);
          guess = cut.threshold;
          const int64_t common =
              count_common(scores, N, cut, args.reference + item * args.reference_stride);
          args.overlap[item * S + s] =
              K > 0 ? static_cast<float>(common) / static_cast<float>(args.top_k[item]) : 0.0f;
        }
      }
      if (newest != nullptr) {
        std::copy(scores, scores + N, newest);
        std::fill(newest + N, newest + args.newest_stride, 0.0f);
      }
    }
  };
  parallel(static_cast<int>(std::min<int64_t>(args.num_threads, args.num_items)), body);
}

template <class E>
void score_keys(const HkScore& args) {
  if (args.key_dtype == HK_I8) {
    score<E, QuantizedKeys<8>>(args);
  } else if (args.key_dtype == HK_I4) {
    score<E, QuantizedKeys<4>>(args);
  } else {
    score<E, DenseKeys<E>>(args);
  }
}

}  // namespace
}  // namespace hk

void hk_score(const HkScore* args) {
  switch (args->dtype) {
    case HK_F32:
      hk::score_keys<hk::F32>(*args);
      break;
    case HK_BF16:
      hk::score_keys<hk::BF16>(*args);
      break;
    default:
      hk::score_keys<hk::F16>(*args);
  }
}
