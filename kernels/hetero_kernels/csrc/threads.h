// Threads and scratch memory.
//
// The library links no OpenMP: it is handed GOMP_parallel of the library that torch has loaded, so
// both share one pool of threads and never run two pools against each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "api.h"

namespace hk {

extern HkParallel g_parallel;

// Calls body() on up to num_threads threads and returns when all are done.
template <class Body>
void parallel(int num_threads, Body& body) {
  if (num_threads <= 1 || g_parallel == nullptr) {
    body();
    return;
  }
  const auto enter = [](void* it) { (*static_cast<Body*>(it))(); };
  g_parallel(enter, &body, static_cast<unsigned>(num_threads), 0);
}

// Memory of one thread, kept between calls and grown as needed; 64-byte aligned.
class Scratch {
 public:
  ~Scratch() { free(data_); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      const size_t size = (bytes + bytes / 2 + 4095) & ~size_t{4095};
      data_ = aligned_alloc(64, size);
      if (data_ == nullptr) abort();
      size_ = size;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace hk
