// What the two ways to score share about groups of queries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace hk {
namespace {

// A query that is no number has no sum, so no factor, and its whole row of probabilities is none. A
// maximum would drop it: the group's scores [S, stride] are made NaN. factors: [S * G].
inline void keep_nan(const float* factors, int S, int G, int64_t N, int64_t stride, float* scores) {
  for (int s = 0; s < S; ++s) {
    float sum = 0.0f;
    for (int g = 0; g < G; ++g) sum += factors[s * G + g];
    if (sum == sum) continue;
    std::fill(scores + s * stride, scores + s * stride + N, std::numeric_limits<float>::quiet_NaN());
  }
}

}  // namespace
}  // namespace hk
