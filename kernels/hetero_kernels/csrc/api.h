// The C ABI between the kernels and hetero_kernels.native, which mirrors these structs in ctypes.
//
// Sizes and strides are in elements unless a name says bytes. The contents of index tables are
// trusted: whoever fills them guarantees that they stay inside the pools. No function keeps a
// pointer after it returns. Raise HK_ABI_VERSION with every change in this file.
#pragma once

#include <cstdint>

#define HK_ABI_VERSION 4

#if defined(_WIN32)
#define HK_EXPORT extern "C" __declspec(dllexport)
#else
#define HK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The last two are keys only: small integers with a bf16 scale for each group of elements.
enum HkDtype { HK_F32 = 0, HK_BF16 = 1, HK_F16 = 2, HK_I8 = 3, HK_I4 = 4 };

// What does not change from step to step: one for each layer of the model.
struct HkLayer {
  int32_t dtype;
  int32_t head_dim;
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t block_tokens;
  int32_t num_steps;  // S of pivot_queries, 0 without
  float scale;
  int32_t reserved;
  void* k_resident;  // [num_planes, num_slots, head_dim]
  void* v_resident;
  int64_t resident_plane_stride;
  int64_t resident_slot_stride;
  void* k_blocks;  // [num_blocks, block_tokens, head_dim]
  void* v_blocks;
  int64_t block_stride;
  int64_t block_row_stride;
  int32_t* block_positions;  // [num_blocks, block_tokens], may be null in attention
  int64_t block_positions_stride;
  const int32_t* block_table;  // [R, C, max_blocks]
  int64_t block_table_row_stride;
  int64_t block_table_head_stride;
  const int32_t* kept_lens;  // [R, C]
  int64_t kept_lens_row_stride;
  int64_t kept_lens_head_stride;
  const int32_t* prompt_lens;   // [R]
  const int32_t* req_to_token;  // [R, max_context], may be null in append
  int64_t req_to_token_stride;
  const int32_t* head_map;   // [num_kv_heads]: plane, or ~compressed head
  const int32_t* pivot_map;  // [num_kv_heads]: pivot or -1; null without
  void* pivot_queries;       // [R, P, num_steps, group_size, head_dim]; null without
  int64_t pivot_row_stride;
  int64_t pivot_head_stride;
};

// What is the same for all layers of one decode step.
struct HkBatch {
  int64_t size;
  const int64_t* rows;
  const int64_t* seq_lens;
  const int64_t* token_ids;  // null where only attention is wanted
  int32_t num_threads;
  int32_t reserved;
};

// Pooled scores of num_items groups of queries, each against the keys of one KV head.
struct HkScore {
  int32_t dtype;
  int32_t head_dim;
  int32_t num_queries;  // S: query groups of an item
  int32_t group_size;
  int32_t num_threads;
  float scale;
  int32_t key_dtype;   // dtype, HK_I8 or HK_I4
  int32_t num_groups;  // scales of a key; 0 without
  int64_t num_items;
  const void* queries;  // [num_items, S, G, D], contiguous
  const void* keys;     // HK_I4: byte j of a row holds element j below and element j + D / 2 above
  int64_t plane_stride;
  int64_t slot_stride;
  const void* scales;  // bf16 [num_planes, num_slots, num_groups]; null without
  int64_t scales_plane_stride;
  int64_t scales_slot_stride;
  const int32_t* planes;  // [num_items]; null: item i reads plane i
  const int32_t* slots;   // key row of each position; null: row = position
  int64_t slots_stride;
  const int64_t* rows;          // [num_items], row of slots, negative: padding; null: row 0
  const int32_t* prompt_lens;   // [num_items]
  const int32_t* top_k;         // [num_items]; null without overlap
  const int32_t* reference;     // bit sets [num_items, reference_stride]; null without overlap
  int64_t reference_stride;
  float* overlap;               // [num_items, S]; null without overlap
  float* newest_scores;         // [num_items, newest_stride], of query group S - 1
  int64_t newest_stride;
};

// A chunk of new tokens of one request against all its tokens.
struct HkExtend {
  int32_t dtype;
  int32_t head_dim;
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t num_threads;
  float scale;
  int64_t num_new;
  int64_t prefix_len;
  const void* q;  // [num_new, num_kv_heads * group_size, head_dim]
  int64_t q_stride;
  const void* k;  // [num_kv_heads, prefix_len + num_new, head_dim]
  int64_t k_head_stride;
  int64_t k_row_stride;
  const void* v;
  int64_t v_head_stride;
  int64_t v_row_stride;
  void* out;  // like q
  int64_t out_stride;
};

typedef void (*HkParallel)(void (*)(void*), void*, unsigned, unsigned);

HK_EXPORT int32_t hk_abi_version();
HK_EXPORT const char* hk_source_digest();
// Bytes of HkLayer (0), HkBatch (1), HkScore (2) and HkExtend (3).
HK_EXPORT int64_t hk_struct_bytes(int32_t which);
// GOMP_parallel of the OpenMP library that torch runs on; null: everything runs on one thread.
HK_EXPORT void hk_set_parallel(HkParallel parallel);

HK_EXPORT void hk_append_rows(const HkLayer*, const HkBatch*, const void* k, int64_t k_stride,
                              const void* v, int64_t v_stride, const void* q, int64_t q_stride);
HK_EXPORT void hk_decode_attention(const HkLayer*, const HkBatch*, const void* q, int64_t q_stride,
                                   void* out, int64_t out_stride);
HK_EXPORT void hk_extend_attention(const HkExtend*);
HK_EXPORT void hk_score(const HkScore*);

// The `counts[i]` best positions of each row: ascending in `positions` (order 0), best first
// (order 1), the rest of a row -1; or as bit sets (zeroed here) where `bits` is given.
HK_EXPORT void hk_top_positions(const float* scores, int64_t num_rows, int64_t length,
                                int64_t stride, const int32_t* counts, int32_t order,
                                int32_t* positions, int64_t positions_stride, int32_t* bits,
                                int64_t bits_stride, int32_t num_threads);

// Rows of `row_bytes`: out[i] = source[index[i]], or out[index[i]] = source[i].
HK_EXPORT void hk_gather_rows(const void* source, int64_t source_stride_bytes, const int64_t* index,
                              int64_t num_rows, int64_t row_bytes, void* out,
                              int64_t out_stride_bytes, int32_t num_threads);
HK_EXPORT void hk_scatter_rows(const void* source, int64_t source_stride_bytes, const int64_t* index,
                               int64_t num_rows, int64_t row_bytes, void* out,
                               int64_t out_stride_bytes, int32_t num_threads);
