// Where scores read their keys: dense rows, or small integers with scales.
//
// A reader knows one plane. row(slot) is cheap; load(row, d) gives kLanes elements from d on, fp32,
// still to be multiplied with the factor of their group of elements where there is one.
#pragma once

#include <cstdint>
#include <cstring>

#include "api.h"
#include "simd.h"

namespace hk {
namespace {

// Null slots: position p lies in slot p.
HK_INLINE int64_t slot_of(const int32_t* slots, int64_t position) {
  return slots != nullptr ? slots[position] : position;
}

template <class E>
class DenseKeys {
 public:
  typedef const typename E::type* Row;
  static constexpr bool kHasFactors = false;
  DenseKeys(const HkScore& args, int64_t plane)
      : keys_(static_cast<Row>(args.keys) + plane * args.plane_stride),
        stride_(args.slot_stride),
        head_dim_(args.head_dim),
        row_bytes_(args.head_dim * sizeof(typename E::type)) {}
  HK_INLINE Row row(int64_t slot) const { return keys_ + slot * stride_; }
  HK_INLINE vf load(Row row, int d) const { return E::load(row + d); }
  int group_dim() const { return head_dim_; }
  HK_INLINE float factor(Row, int) const { return 1.0f; }
  // A row as units of 32 bits, if it is that; `stride` units to the row of the next slot.
  template <class Units>
  HK_INLINE bool as_it_lies(int64_t slot, const uint32_t** units, int64_t* stride) const {
    if (Units::kElements * sizeof(typename E::type) != 4 || stride_ % Units::kElements != 0) {
      return false;
    }
    *units = reinterpret_cast<const uint32_t*>(row(slot));
    *stride = stride_ / Units::kElements;
    return true;
  }
  HK_INLINE void prefetch(int64_t slot) const { hk::prefetch(row(slot), row_bytes_); }
  HK_INLINE void prefetch_factors(int64_t) const {}
  const void* address(int64_t slot) const { return row(slot); }
  int64_t slot_bytes() const { return stride_ * sizeof(typename E::type); }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  Row keys_;
  int64_t stride_;
  int head_dim_;
  int64_t row_bytes_;
};

// BITS 8: element d is byte d. BITS 4: byte j holds element j (plus 8) in its lower half and element
// j + D / 2 (plus 8) in its upper one, so a vector never mixes the halves.
template <int BITS>
class QuantizedKeys {
 public:
  struct Row {
    const uint8_t* data;
    const uint16_t* scales;
  };
  static constexpr bool kHasFactors = true;
  QuantizedKeys(const HkScore& args, int64_t plane)
      : data_(static_cast<const uint8_t*>(args.keys) + plane * args.plane_stride),
        scales_(static_cast<const uint16_t*>(args.scales) + plane * args.scales_plane_stride),
        stride_(args.slot_stride),
        scales_stride_(args.scales_slot_stride),
        half_(args.head_dim / 2),
        group_dim_(args.head_dim / args.num_groups),
        row_bytes_(args.head_dim * BITS / 8) {}
  HK_INLINE Row row(int64_t slot) const {
    return {data_ + slot * stride_, scales_ + slot * scales_stride_};
  }
  HK_INLINE vf load(Row row, int d) const {
    if constexpr (BITS == 8) return __builtin_convertvector(load_i8(row.data + d), vf);
    const vi both = load_u8(row.data + (d < half_ ? d : d - half_));
    return __builtin_convertvector((d < half_ ? both & 15 : both >> 4) - 8, vf);
  }
  int group_dim() const { return group_dim_; }
  template <class Units>
  HK_INLINE bool as_it_lies(int64_t, const uint32_t**, int64_t*) const {
    return false;
  }
  HK_INLINE float factor(Row row, int group) const {
    const uint32_t bits = static_cast<uint32_t>(row.scales[group]) << 16;
    float factor;
    memcpy(&factor, &bits, 4);
    return factor;
  }
  HK_INLINE vf factors(const Row* rows, int group) const {
    vu bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = rows[i].scales[group];
    return (vf)(bits << 16);
  }
  HK_INLINE void prefetch(int64_t slot) const {
    hk::prefetch(row(slot).data, row_bytes_);
    prefetch_factors(slot);
  }
  HK_INLINE void prefetch_factors(int64_t slot) const {
    __builtin_prefetch(row(slot).scales, 0, 3);
  }
  const void* address(int64_t slot) const { return row(slot).data; }
  int64_t slot_bytes() const { return stride_; }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  const uint8_t* data_;
  const uint16_t* scales_;
  int64_t stride_;
  int64_t scales_stride_;
  int half_;
  int group_dim_;
  int64_t row_bytes_;
};

}  // namespace
}  // namespace hk
