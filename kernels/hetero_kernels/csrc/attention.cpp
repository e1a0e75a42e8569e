// Decode attention over two kinds of memory: token slots (resident heads) and blocks (compressed
// heads).
//
// Each (request, KV head) is cut into spans of tokens, which threads take one after the other. A
// span runs in tiles small enough for the first-level cache: row offsets from the index tables,
// scores of all queries of the group, softmax weights, weighted sum of the values. While one tile's
// keys are scored its values are prefetched, and during the weighted sum the next tile's keys, so
// that scattered rows stream at the speed of contiguous ones. Spans of one head leave (maximum, sum,
// accumulator) and whoever finishes last merges them.
//
// T tokens, G queries of a KV head, D head dimension.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>

#include "api.h"
#include "simd.h"
#include "threads.h"

namespace hk {
namespace {

constexpr int kMaxTile = 64;
constexpr int64_t kTileBytes = 8192;
constexpr int64_t kMinSpan = 256;
constexpr int64_t kMaxSpan = 1024;
// Below this many token rows a second thread costs more than it takes off. With warm threads the
// two are even at 60 rows of 64 fp32; cold threads have to be woken, and on a busy machine waited for.
constexpr int64_t kMinParallelRows = 128;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// How rows become fp32 vectors: kVectors at a time, in an order of elements that is the type's own
// but the same for keys, queries and values, so that only load and store know it.
template <class E>
struct InOrder {
  typedef typename E::type type;
  static constexpr int kVectors = 1;
  static HK_INLINE void load(const type* p, vf* out) { out[0] = E::load(p); }
  static HK_INLINE void store(type* p, const vf* in) { E::store(p, in[0]); }
};

// Two bf16 in each 32-bit lane: the even ones need a shift and the odd ones a mask, where widening
// in order needs a shuffle for each vector. For head dimensions that are multiples of 2 kLanes.
struct Bf16Pairs {
  typedef uint16_t type;
  static constexpr int kVectors = 2;
  static HK_INLINE void load(const type* p, vf* out) {
    const vu pairs = load_u32(p);
    out[0] = (vf)(pairs << 16);
    out[1] = (vf)(pairs & 0xffff0000u);
  }
  static HK_INLINE void store(type* p, const vf* in) {
    const vu pairs = BF16::round(in[0]) | BF16::round(in[1]) << 16;
    memcpy(p, &pairs, sizeof pairs);
  }
};

struct Span {
  int64_t begin;
  int64_t end;
  int32_t request;
  int32_t head;
  int32_t first;  // index of the head's first span
  int32_t count;  // spans of the head
};

// Where the rows of one head lie: element offset of token t = base + row(t).
struct RowMap {
  const int32_t* table;
  int64_t base;
  int64_t stride;        // of a slot or of a row in a block
  int64_t block_stride;  // 0: `table` holds token slots
  int32_t block_tokens;

  void offsets(int64_t begin, int count, int64_t* out) const {
    if (block_stride == 0) {
      for (int i = 0; i < count; ++i) out[i] = base + table[begin + i] * stride;
      return;
    }
    int64_t block = begin / block_tokens;
    int64_t in_block = begin % block_tokens;
    for (int i = 0; i < count;) {
      const int64_t start = table[block] * block_stride;
      for (; i < count && in_block < block_tokens; ++i, ++in_block) {
        out[i] = start + in_block * stride;
      }
      in_block = 0;
      ++block;
    }
  }
};

// Scores of `count` rows for GT queries, and the softmax update of (maximum, sum).
// weights: [GT, kMaxTile]; scale_old: what the accumulators are to be multiplied with.
template <class E, int GT, int DT>
void score_tile(const typename E::type* keys, const int64_t* offsets, int count, const float* query,
                int dim, const typename E::type* next, float* maximum, float* sum, float* weights,
                float* scale_old) {
  const int D = DT > 0 ? DT : dim;
  const int64_t row_bytes = D * sizeof(typename E::type);
  vf tile_max[GT];
  for (int g = 0; g < GT; ++g) tile_max[g] = splat(kNegInf);
  for (int t = 0; t < count; t += kLanes) {
    vf quads[GT][kLanes / 4];
    for (int part = 0; part < kLanes / 4; ++part) {
      const typename E::type* rows[4];
      for (int i = 0; i < 4; ++i) {
        // Past the end the last row is read again and its score thrown away below.
        const int token = std::min(t + part * 4 + i, count - 1);
        rows[i] = keys + offsets[token];
        prefetch(next + offsets[token], row_bytes);
      }
      vf acc[GT][4];
      for (int g = 0; g < GT; ++g)
        for (int i = 0; i < 4; ++i) acc[g][i] = vf{};
#pragma GCC unroll 8
      for (int d = 0; d < D; d += E::kVectors * kLanes) {
        vf k[4][E::kVectors];
        for (int i = 0; i < 4; ++i) E::load(rows[i] + d, k[i]);
        for (int n = 0; n < E::kVectors; ++n) {
          for (int g = 0; g < GT; ++g) {
            const vf q = load(query + g * D + d + n * kLanes);
            for (int i = 0; i < 4; ++i) acc[g][i] += k[i][n] * q;
          }
        }
      }
      for (int g = 0; g < GT; ++g) {
        quads[g][part] = sum_quads(acc[g][0], acc[g][1], acc[g][2], acc[g][3]);
      }
    }
    const vi valid = lane_ids() + t < count;
    for (int g = 0; g < GT; ++g) {
      const vf s = valid ? join_quads(quads[g]) : splat(kNegInf);
      tile_max[g] = vmax(tile_max[g], s);
      store(weights + g * kMaxTile + t, s);
    }
  }
  for (int g = 0; g < GT; ++g) {
    const float old_max = maximum[g];
    const float new_max = std::max(old_max, hmax(tile_max[g]));
    const float rescale = old_max == new_max ? 1.0f : std::exp(old_max - new_max);
    vf total = vf{};
    float* w = weights + g * kMaxTile;
    for (int t = 0; t < count; t += kLanes) {
      const vf e = exp_nonpositive(load(w + t) - new_max);
      total += e;
      store(w + t, e);
    }
    maximum[g] = new_max;
    sum[g] = sum[g] * rescale + hsum(total);
    scale_old[g] = rescale;
  }
}

// acc[GT, D] = acc * scale_old + weights @ values, CV vectors of D at a time. On the way the rows of
// `next` are prefetched, one with each token.
template <class E, int GT, int CV>
void weigh_tile(const typename E::type* values, const int64_t* offsets, int count,
                const typename E::type* next, const int64_t* next_offsets, int next_count, int D,
                const float* weights, const float* scale_old, float* acc) {
  const int64_t row_bytes = D * sizeof(typename E::type);
  for (int d = 0; d < D; d += CV * kLanes) {
    vf a[GT][CV];
    for (int g = 0; g < GT; ++g)
      for (int c = 0; c < CV; ++c) a[g][c] = load(acc + g * D + d + c * kLanes) * scale_old[g];
    for (int t = 0; t < count; ++t) {
      const typename E::type* row = values + offsets[t] + d;
      if (t < next_count) prefetch(next + next_offsets[t], row_bytes);
      vf v[CV];
      for (int c = 0; c < CV; c += E::kVectors) E::load(row + c * kLanes, v + c);
      for (int g = 0; g < GT; ++g) {
        const vf w = splat(weights[g * kMaxTile + t]);
        for (int c = 0; c < CV; ++c) a[g][c] += w * v[c];
      }
    }
    for (int g = 0; g < GT; ++g)
      for (int c = 0; c < CV; ++c) store(acc + g * D + d + c * kLanes, a[g][c]);
    next_count = 0;
  }
}

template <class E, int GT>
void tile(const typename E::type* keys, const typename E::type* values, const int64_t* offsets,
          int count, const int64_t* next_offsets, int next_count, const float* query, int D,
          float* maximum, float* sum, float* acc) {
  alignas(64) float weights[GT * kMaxTile];
  float scale_old[GT];
  if (D == 64) {
    score_tile<E, GT, 64>(keys, offsets, count, query, D, values, maximum, sum, weights, scale_old);
  } else if (D == 128) {
    score_tile<E, GT, 128>(keys, offsets, count, query, D, values, maximum, sum, weights, scale_old);
  } else {
    score_tile<E, GT, 0>(keys, offsets, count, query, D, values, maximum, sum, weights, scale_old);
  }
  if (D % (4 * kLanes) == 0) {
    weigh_tile<E, GT, 4>(values, offsets, count, keys, next_offsets, next_count, D, weights,
                         scale_old, acc);
  } else if (D % (2 * kLanes) == 0) {
    weigh_tile<E, GT, 2>(values, offsets, count, keys, next_offsets, next_count, D, weights,
                         scale_old, acc);
  } else if constexpr (E::kVectors == 1) {
    weigh_tile<E, GT, 1>(values, offsets, count, keys, next_offsets, next_count, D, weights,
                         scale_old, acc);
  }
}

// One span: (maximum, sum) [2, G] and acc [G, D], written from scratch.
template <class E>
void attend_span(const typename E::type* keys, const typename E::type* values, const RowMap& map,
                 int64_t begin, int64_t end, const float* query, int G, int D, float* state,
                 float* acc) {
  float* maximum = state;
  float* sum = state + G;
  std::fill(maximum, maximum + G, kNegInf);
  std::fill(sum, sum + G, 0.0f);
  std::fill(acc, acc + int64_t{G} * D, 0.0f);
  const int64_t row_bytes = D * sizeof(typename E::type);
  const int step = static_cast<int>(
      std::min<int64_t>(kMaxTile, std::max<int64_t>(kLanes, kTileBytes / row_bytes / kLanes * kLanes)));
  int64_t buffers[2][kMaxTile];
  int64_t* offsets = buffers[0];
  int64_t* next_offsets = buffers[1];
  int count = static_cast<int>(std::min<int64_t>(step, end - begin));
  if (count > 0) map.offsets(begin, count, offsets);
  while (count > 0) {
    begin += count;
    const int next_count = static_cast<int>(std::min<int64_t>(step, end - begin));
    if (next_count > 0) map.offsets(begin, next_count, next_offsets);
    for (int g = 0; g < G;) {
      const float* q = query + int64_t{g} * D;
      float* a = acc + int64_t{g} * D;
      const int left = G - g;
      // Next keys are wanted once, after the last queries of the group.
      const int next = left <= 4 ? next_count : 0;
      if (left >= 4) {
        tile<E, 4>(keys, values, offsets, count, next_offsets, next, q, D, maximum + g, sum + g, a);
        g += 4;
      } else if (left == 3) {
        tile<E, 3>(keys, values, offsets, count, next_offsets, next, q, D, maximum + g, sum + g, a);
        g += 3;
      } else if (left == 2) {
        tile<E, 2>(keys, values, offsets, count, next_offsets, next, q, D, maximum + g, sum + g, a);
        g += 2;
      } else {
        tile<E, 1>(keys, values, offsets, count, next_offsets, next, q, D, maximum + g, sum + g, a);
        g += 1;
      }
    }
    std::swap(offsets, next_offsets);
    count = next_count;
  }
}

// Merges `count` partial results, [2 G + G D] each, and writes the G output rows.
template <class E>
void finish_head(const float* partials, int count, int G, int D, typename E::type* out) {
  const int64_t stride = 2 * int64_t{G} + int64_t{G} * D;
  for (int g = 0; g < G; ++g) {
    float maximum = kNegInf;
    for (int i = 0; i < count; ++i) maximum = std::max(maximum, partials[i * stride + g]);
    float total = 0.0f;
    // A part without rows has a sum of 0 (and no maximum); a NaN is nobody's to swallow.
    for (int i = 0; i < count; ++i) {
      const float* p = partials + i * stride;
      if (p[G + g] != 0.0f) total += p[G + g] * std::exp(p[g] - maximum);
    }
    for (int d = 0; d < D; d += E::kVectors * kLanes) {
      vf value[E::kVectors] = {};
      for (int i = 0; i < count; ++i) {
        const float* p = partials + i * stride;
        if (p[G + g] == 0.0f) continue;
        const float share = std::exp(p[g] - maximum) / total;
        for (int n = 0; n < E::kVectors; ++n) {
          value[n] += load(p + 2 * G + int64_t{g} * D + d + n * kLanes) * share;
        }
      }
      E::store(out + int64_t{g} * D + d, value);
    }
  }
}

// Rows that a head attends to; none of a request that is padding.
int64_t head_length(const HkLayer& layer, const HkBatch& batch, int64_t request, int32_t head) {
  const int64_t row = batch.rows[request];
  const int64_t seq_len = batch.seq_lens[request];
  if (row < 0 || seq_len <= 0) return 0;
  const int32_t place = layer.head_map[head];
  if (place >= 0) return seq_len;
  const int64_t kept = layer.kept_lens[row * layer.kept_lens_row_stride +
                                       ~place * layer.kept_lens_head_stride];
  return std::max<int64_t>(0, kept + seq_len - layer.prompt_lens[row]);
}

RowMap head_rows(const HkLayer& layer, const HkBatch& batch, int64_t request, int32_t head) {
  const int64_t row = batch.rows[request];
  const int32_t place = layer.head_map[head];
  if (place >= 0) {
    return {layer.req_to_token + row * layer.req_to_token_stride, place * layer.resident_plane_stride,
            layer.resident_slot_stride, 0, 1};
  }
  return {layer.block_table + row * layer.block_table_row_stride +
              ~place * layer.block_table_head_stride,
          0, layer.block_row_stride, layer.block_stride, layer.block_tokens};
}

thread_local Scratch t_plan;
thread_local Scratch t_query;

template <class E>
void decode(const HkLayer& layer, const HkBatch& batch, const typename E::type* q, int64_t q_stride,
            typename E::type* out, int64_t out_stride) {
  const int H = layer.num_kv_heads;
  const int G = layer.group_size;
  const int D = layer.head_dim;
  const int64_t num_heads = batch.size * H;

  int64_t total = 0;
  for (int64_t b = 0; b < batch.size; ++b)
    for (int h = 0; h < H; ++h) total += head_length(layer, batch, b, h);
  const int num_threads = total < kMinParallelRows ? 1 : batch.num_threads;
  const int64_t span_tokens =
      num_threads == 1
          ? std::numeric_limits<int64_t>::max() / 2
          : round_up(std::min(kMaxSpan, std::max(kMinSpan, total / (num_threads * 8))), kMaxTile);
  const int64_t max_spans = num_heads + (num_threads == 1 ? 0 : total / span_tokens + 1);

  const int64_t partial = 2 * int64_t{G} + int64_t{G} * D;
  const size_t spans_bytes = round_up(max_spans * sizeof(Span), 64);
  const size_t counters_bytes = round_up(num_heads * sizeof(std::atomic<int32_t>), 64);
  char* plan = static_cast<char*>(
      t_plan.get(spans_bytes + counters_bytes + max_spans * partial * sizeof(float)));
  Span* spans = reinterpret_cast<Span*>(plan);
  std::atomic<int32_t>* finished = reinterpret_cast<std::atomic<int32_t>*>(plan + spans_bytes);
  float* partials = reinterpret_cast<float*>(plan + spans_bytes + counters_bytes);

  int32_t num_spans = 0;
  for (int64_t b = 0; b < batch.size; ++b) {
    for (int h = 0; h < H; ++h) {
      new (&finished[b * H + h]) std::atomic<int32_t>(0);
      const int64_t length = head_length(layer, batch, b, h);
      const int32_t count =
          static_cast<int32_t>(std::max<int64_t>(1, (length + span_tokens - 1) / span_tokens));
      const int64_t each = round_up((length + count - 1) / count, kLanes);
      const int32_t first = num_spans;
      for (int32_t i = 0; i < count; ++i) {
        spans[num_spans++] = {std::min(length, i * each), std::min(length, (i + 1) * each),
                              static_cast<int32_t>(b), h, first, count};
      }
    }
  }

  std::atomic<int32_t> next{0};
  auto body = [&] {
    float* query = static_cast<float*>(t_query.get(int64_t{G} * D * sizeof(float)));
    for (;;) {
      const int32_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= num_spans) return;
      const Span& span = spans[index];
      const typename E::type* q_rows = q + span.request * q_stride + int64_t{span.head} * G * D;
      for (int i = 0; i < G * D; i += E::kVectors * kLanes) {
        vf values[E::kVectors];
        E::load(q_rows + i, values);
        for (int n = 0; n < E::kVectors; ++n) {
          store(query + i + n * kLanes, values[n] * layer.scale);
        }
      }
      const RowMap map = head_rows(layer, batch, span.request, span.head);
      const bool resident = map.block_stride == 0;
      const auto* keys =
          static_cast<const typename E::type*>(resident ? layer.k_resident : layer.k_blocks);
      const auto* values =
          static_cast<const typename E::type*>(resident ? layer.v_resident : layer.v_blocks);
      float* state = partials + index * partial;
      attend_span<E>(keys, values, map, span.begin, span.end, query, G, D, state, state + 2 * G);
      const int64_t head = int64_t{span.request} * H + span.head;
      if (finished[head].fetch_add(1, std::memory_order_acq_rel) + 1 == span.count) {
        finish_head<E>(partials + span.first * partial, span.count, G, D,
                       out + span.request * out_stride + int64_t{span.head} * G * D);
      }
    }
  };
  parallel(std::min<int64_t>(num_threads, num_spans), body);
}

}  // namespace
}  // namespace hk

void hk_decode_attention(const HkLayer* layer, const HkBatch* batch, const void* q, int64_t q_stride,
                         void* out, int64_t out_stride) {
  const auto run = [&](auto type) {
    typedef decltype(type) E;
    typedef typename E::type T;
    hk::decode<E>(*layer, *batch, static_cast<const T*>(q), q_stride, static_cast<T*>(out),
                  out_stride);
  };
  if (layer->dtype == HK_F32) {
    run(hk::InOrder<hk::F32>{});
  } else if (layer->dtype == HK_F16) {
    run(hk::InOrder<hk::F16>{});
  } else if (layer->head_dim % (2 * hk::kLanes) == 0) {
    run(hk::Bf16Pairs{});
  } else {
    run(hk::InOrder<hk::BF16>{});
  }
}
