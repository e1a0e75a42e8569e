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

void hk_set_parallel(HkParallel parallel) { hk::g_parallel = parallel; }
