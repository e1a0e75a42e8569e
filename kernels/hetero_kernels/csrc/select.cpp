// Positions of the best scores of each row, as lists or as bit sets.
#include "select.h"

#include <atomic>

#include "api.h"
#include "threads.h"

namespace hk {
namespace {

thread_local Scratch t_select;

// Scores that are worth a second thread: about 20 us of work.
constexpr int64_t kMinParallelScores = 16384;

}  // namespace
}  // namespace hk

void hk_top_positions(const float* scores, int64_t num_rows, int64_t length, int64_t stride,
                      const int32_t* counts, int32_t order, int32_t* positions,
                      int64_t positions_stride, int32_t* bits, int64_t bits_stride,
                      int32_t num_threads) {
  using namespace hk;
  std::atomic<int64_t> next{0};
  auto body = [&] {
    for (;;) {
      const int64_t row = next.fetch_add(1, std::memory_order_relaxed);
      if (row >= num_rows) return;
      const float* s = scores + row * stride;
      const int64_t k = std::min<int64_t>(std::max(counts[row], 0), length);
      // The selection's own scratch, then 64-bit sort keys.
      const size_t select = (select_bytes(length) + 63) & ~size_t{63};
      char* scratch = static_cast<char*>(t_select.get(select + k * sizeof(uint64_t) + 64));
      const Cut cut = find_cut<AnySign>(s, length, k, scratch);
      if (bits != nullptr) {
        int32_t* out = bits + row * bits_stride;
        std::fill(out, out + bits_stride, 0);
        for_each_chosen<AnySign>(s, length, cut, [&](int64_t i) {
          out[i >> 5] = static_cast<int32_t>(static_cast<uint32_t>(out[i >> 5]) | 1u << (i & 31));
        });
      }
      if (positions == nullptr) continue;
      int32_t* out = positions + row * positions_stride;
      int64_t count = 0;
      if (order == 0) {
        for_each_chosen<AnySign>(s, length, cut, [&](int64_t i) { out[count++] = static_cast<int32_t>(i); });
      } else {
        uint64_t* keys = reinterpret_cast<uint64_t*>(scratch + select);
        for_each_chosen<AnySign>(s, length, cut, [&](int64_t i) {
          keys[count++] = static_cast<uint64_t>(~AnySign::ordered(s[i])) << 32 | static_cast<uint32_t>(i);
        });
        std::sort(keys, keys + count);
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(keys[i] & 0xffffffffu);
      }
      std::fill(out + count, out + positions_stride, -1);
    }
  };
  const bool small = num_rows * length < kMinParallelScores;
  parallel(static_cast<int>(std::min<int64_t>(small ? 1 : num_threads, num_rows)), body);
}
