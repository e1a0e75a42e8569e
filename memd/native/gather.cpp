// Rows from anywhere to one run of rows.
//
// A row is a few cache lines and the next one lies anywhere, so the processor cannot guess what to
// read ahead; but the list of rows is known, and each row is asked for some kilobytes of copying
// before its turn. A row size that the compiler knows makes the copy a few wide moves without a
// branch, which leaves room for more rows in flight.

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef MEMD_LEVELS
// One function for each instruction level; the loader of the library picks what the processor has.
#define MEMD_TARGETS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MEMD_TARGETS
#endif

#define MEMD_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kLineBytes = 64;

// 4 to 16 KiB were measured with rows of 256 and 512 bytes: less hides too little of a memory access,
// more falls out of the first cache before it is read.
constexpr int64_t kAheadBytes = 12288;

typedef char Line __attribute__((vector_size(kLineBytes), aligned(1), may_alias));

template <int64_t kBytes>
using Bytes = std::integral_constant<int64_t, kBytes>;

// RowBytes is int64_t, or Bytes<n> for a size that the compiler may use.
template <class RowBytes>
inline __attribute__((always_inline)) void gather(char* landing, const char* source,
                                                  const int64_t* rows, int64_t num_rows,
                                                  RowBytes row_bytes) {
  const int64_t ahead = kAheadBytes / row_bytes + 1;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (i + ahead < num_rows) {
      const char* next = source + rows[i + ahead] * row_bytes;
      // To be read, once: what the other caches hold (page tables, the landing) is worth more there.
      for (int64_t at = 0; at < row_bytes; at += kLineBytes) __builtin_prefetch(next + at, 0, 0);
    }
    const char* from = source + rows[i] * row_bytes;
    char* to = landing + i * row_bytes;
    int64_t at = 0;
    for (; at + kLineBytes <= row_bytes; at += kLineBytes) {
      *reinterpret_cast<Line*>(to + at) = *reinterpret_cast<const Line*>(from + at);
    }
    if (at < row_bytes) memcpy(to + at, from + at, row_bytes - at);
  }
}

}  // namespace

// landing: num_rows * row_bytes bytes, none of them in a row that is read.
// rows: indices counted in rows from source; the caller has checked them.
MEMD_EXPORT MEMD_TARGETS void memd_gather(char* landing, const char* source, const int64_t* rows,
                                          int64_t num_rows, int64_t row_bytes) {
  switch (row_bytes) {
    case 128: return gather(landing, source, rows, num_rows, Bytes<128>{});
    case 256: return gather(landing, source, rows, num_rows, Bytes<256>{});
    case 512: return gather(landing, source, rows, num_rows, Bytes<512>{});
    case 1024: return gather(landing, source, rows, num_rows, Bytes<1024>{});
    default: return gather(landing, source, rows, num_rows, row_bytes);
  }
}

MEMD_EXPORT const char* memd_source_digest() { return MEMD_SOURCE_DIGEST; }
