// Rows of bytes from and to places named by an index; a negative one is padding and moves nowhere.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "api.h"
#include "threads.h"

namespace {

// What a thread takes at a time, and what is worth a second thread.
constexpr int64_t kChunkBytes = 128 * 1024;
constexpr int64_t kMinParallelBytes = 512 * 1024;

template <class Copy>
void move_rows(int64_t num_rows, int64_t row_bytes, int32_t num_threads, Copy copy) {
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, row_bytes));
  const int64_t num_chunks = (num_rows + chunk - 1) / chunk;
  std::atomic<int64_t> next{0};
  auto body = [&] {
    for (;;) {
      const int64_t begin = next.fetch_add(1, std::memory_order_relaxed) * chunk;
      if (begin >= num_rows) return;
      const int64_t end = std::min(num_rows, begin + chunk);
      for (int64_t i = begin; i < end; ++i) copy(i);
    }
  };
  const bool small = num_rows * row_bytes < kMinParallelBytes;
  hk::parallel(static_cast<int>(std::min<int64_t>(small ? 1 : num_threads, num_chunks)), body);
}

}  // namespace

void hk_gather_rows(const void* source, int64_t source_stride_bytes, const int64_t* index,
                    int64_t num_rows, int64_t row_bytes, void* out, int64_t out_stride_bytes,
                    int32_t num_threads) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(out);
  move_rows(num_rows, row_bytes, num_threads, [=](int64_t i) {
    if (index[i] < 0) return;
    memcpy(to + i * out_stride_bytes, from + index[i] * source_stride_bytes, row_bytes);
  });
}

void hk_scatter_rows(const void* source, int64_t source_stride_bytes, const int64_t* index,
                     int64_t num_rows, int64_t row_bytes, void* out, int64_t out_stride_bytes,
                     int32_t num_threads) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(out);
  move_rows(num_rows, row_bytes, num_threads, [=](int64_t i) {
    if (index[i] < 0) return;
    memcpy(to + index[i] * out_stride_bytes, from + i * source_stride_bytes, row_bytes);
  });
}
