// Puts the new token's K and V where each head keeps them, and the queries of pivots in their ring.
#include <cstring>

#include "api.h"

namespace {

int item_bytes(int32_t dtype) { return dtype == HK_F32 ? 4 : 2; }

}  // namespace

void hk_append_rows(const HkLayer* layer, const HkBatch* batch, const void* k, int64_t k_stride,
                    const void* v, int64_t v_stride, const void* q, int64_t q_stride) {
  const int64_t item = item_bytes(layer->dtype);
  const int64_t row_bytes = layer->head_dim * item;
  const int64_t group_bytes = layer->group_size * row_bytes;
  const bool watch = q != nullptr && layer->pivot_map != nullptr && layer->pivot_queries != nullptr;
  for (int64_t b = 0; b < batch->size; ++b) {
    const int64_t row = batch->rows[b];
    if (row < 0 || batch->seq_lens[b] <= 0) continue;  // padding
    const int64_t position = batch->seq_lens[b] - 1;
    const int64_t generated = position - layer->prompt_lens[row];
    const char* k_rows = static_cast<const char*>(k) + b * k_stride * item;
    const char* v_rows = static_cast<const char*>(v) + b * v_stride * item;
    for (int32_t h = 0; h < layer->num_kv_heads; ++h) {
      const int32_t place = layer->head_map[h];
      char* k_pool;
      char* v_pool;
      int64_t offset;
      if (place >= 0) {
        k_pool = static_cast<char*>(layer->k_resident);
        v_pool = static_cast<char*>(layer->v_resident);
        offset = place * layer->resident_plane_stride +
                 batch->token_ids[b] * layer->resident_slot_stride;
      } else {
        const int64_t head = ~place;
        const int64_t index = layer->kept_lens[row * layer->kept_lens_row_stride +
                                               head * layer->kept_lens_head_stride] +
                              generated;
        const int64_t block =
            layer->block_table[row * layer->block_table_row_stride +
                               head * layer->block_table_head_stride + index / layer->block_tokens];
        const int64_t in_block = index % layer->block_tokens;
        k_pool = static_cast<char*>(layer->k_blocks);
        v_pool = static_cast<char*>(layer->v_blocks);
        offset = block * layer->block_stride + in_block * layer->block_row_stride;
        if (layer->block_positions != nullptr) {
          layer->block_positions[block * layer->block_positions_stride + in_block] =
              static_cast<int32_t>(position);
        }
      }
      memcpy(k_pool + offset * item, k_rows + h * row_bytes, row_bytes);
      memcpy(v_pool + offset * item, v_rows + h * row_bytes, row_bytes);
      if (watch && layer->pivot_map[h] >= 0) {
        const int64_t step = generated % layer->num_steps;
        char* ring = static_cast<char*>(layer->pivot_queries) +
                     (row * layer->pivot_row_stride + layer->pivot_map[h] * layer->pivot_head_stride) *
                         item +
                     step * group_bytes;
        memcpy(ring, static_cast<const char*>(q) + b * q_stride * item + h * group_bytes,
               group_bytes);
      }
    }
  }
}
