#include "api.h"

#include "threads.h"

#ifndef HK_SOURCE_DIGEST
#define HK_SOURCE_DIGEST "unknown"
#endif

namespace hk {
HkParallel g_parallel = nullptr;
}

int32_t hk_abi_version() { return HK_ABI_VERSION; }

const char* hk_source_digest() { return HK_SOURCE_DIGEST; }

int64_t hk_struct_bytes(int32_t which) {
  switch (which) {
    case 0:
      return sizeof(HkLayer);
    case 1:
      return sizeof(HkBatch);
    case 2:
      return sizeof(HkScore);
    default:
      return sizeof(HkExtend);
  }
}

void hk_set_parallel(HkParallel parallel) { hk::g_parallel = parallel; }
