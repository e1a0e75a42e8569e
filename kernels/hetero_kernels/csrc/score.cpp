// Pooled attention scores of query groups against a prompt's keys, and what is chosen by them.
//
// An item is one KV head with S groups of G queries, whose keys are read once. The definition
// (softmax over exactly the prompt, average pool of 5 with zero padding, maximum over the group) is
// in the reference next door.
//
// M = S * G queries, N prompt tokens, D head dimension.
#include <algorithm>
#include <atomic>

#include "api.h"
#include "score_keys.h"
#include "score_queries.h"
#include "score_tokens.h"
#include "select.h"
#include "simd.h"
#include "threads.h"

namespace hk {
namespace {

thread_local Scratch t_score;

// Scores of an item, [S, stride].
template <class E, class Units, class Keys>
void score_item(const HkScore& args, int64_t item, int64_t N, int64_t stride, float* scratch,
                float* scores) {
  const Keys keys(args, args.planes != nullptr ? args.planes[item] : item);
  const int32_t* slots = args.slots;
  if (slots != nullptr && args.rows != nullptr) slots += args.rows[item] * args.slots_stride;
  const int M = args.num_queries * args.group_size;
  if (!suits_query_lanes<Units>(M, args.head_dim)) {
    score_by_token_lanes<E>(args, item, N, keys, slots, stride, scratch, scores);
    return;
  }
  const auto score = vectors_of(M) == 1   ? score_by_query_lanes<E, Units, 1, Keys>
                     : vectors_of(M) == 2 ? score_by_query_lanes<E, Units, 2, Keys>
                     : vectors_of(M) == 3 ? score_by_query_lanes<E, Units, 3, Keys>
                                          : score_by_query_lanes<E, Units, 4, Keys>;
  score(args, item, N, keys, slots, stride, scratch, scores);
}

template <class E, class Units, class Keys>
void score(const HkScore& args) {
  const int S = args.num_queries;
  const int M = S * args.group_size;
  const bool has_sets = args.overlap != nullptr;
  std::atomic<int64_t> next{0};
  auto body = [&] {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= args.num_items) return;
      const bool is_padding = args.rows != nullptr && args.rows[item] < 0;
      const int64_t N = is_padding ? 0 : args.prompt_lens[item];
      float* newest =
          args.newest_scores == nullptr ? nullptr : args.newest_scores + item * args.newest_stride;
      if (N == 0) {
        if (has_sets) std::fill(args.overlap + item * S, args.overlap + (item + 1) * S, 0.0f);
        if (newest != nullptr) std::fill(newest, newest + args.newest_stride, 0.0f);
        continue;
      }
      const int64_t stride = round_up(N, kTokenTile);
      const int64_t work = round_up(suits_query_lanes<Units>(M, args.head_dim)
                                        ? query_lanes_floats(M, args.head_dim, N)
                                        : token_lanes_floats(M, args.head_dim, N),
                                    16);
      float* scratch = static_cast<float*>(
          t_score.get((work + S * stride) * sizeof(float) + select_bytes(N)));
      float* scores = scratch + work;
      void* select_scratch = scores + S * stride;
      score_item<E, Units, Keys>(args, item, N, stride, scratch, scores);
      for (int s = 0; s < S && has_sets; ++s) {
        const float* row = scores + s * stride;
        const int64_t K = std::min<int64_t>(args.top_k[item], N);
        const Cut cut = find_cut<NonNegative>(row, N, K, select_scratch);
        const int64_t common = count_common<NonNegative>(
            row, N, cut, args.reference + item * args.reference_stride);
        args.overlap[item * S + s] =
            K > 0 ? static_cast<float>(common) / static_cast<float>(args.top_k[item]) : 0.0f;
      }
      if (newest != nullptr) {
        const float* row = scores + (S - 1) * stride;
        std::copy(row, row + N, newest);
        std::fill(newest + N, newest + args.newest_stride, 0.0f);
      }
    }
  };
  parallel(static_cast<int>(std::min<int64_t>(args.num_threads, args.num_items)), body);
}

template <class E, class Units>
void score_keys(const HkScore& args) {
  if (args.key_dtype == HK_I8) {
    score<E, Units, QuantizedKeys<8>>(args);
  } else if (args.key_dtype == HK_I4) {
    score<E, Units, QuantizedKeys<4>>(args);
  } else {
    score<E, Units, DenseKeys<E>>(args);
  }
}

#if defined(__AVX512BF16__)
typedef PairUnits Bf16Units;
#else
typedef FloatUnits Bf16Units;
#endif

}  // namespace
}  // namespace hk

void hk_score(const HkScore* args) {
  switch (args->dtype) {
    case HK_F32:
      hk::score_keys<hk::F32, hk::FloatUnits>(*args);
      break;
    case HK_BF16:
      hk::score_keys<hk::BF16, hk::Bf16Units>(*args);
      break;
    default:
      hk::score_keys<hk::F16, hk::FloatUnits>(*args);
  }
}
