// One vector type per build level and the few operations the kernels need.
//
// Written with the vector extensions of GCC (>= 12) and Clang, so the same source serves AVX-512,
// AVX2 and whatever baseline the compiler targets. Everything here is internal to one library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__F16C__) || defined(__AVX512F__))
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define HK_LANES 16
#elif defined(__AVX2__)
#define HK_LANES 8
#else
#define HK_LANES 4
#endif

#define HK_INLINE inline __attribute__((always_inline))

namespace hk {
namespace {

constexpr int kLanes = HK_LANES;

typedef float vf __attribute__((vector_size(4 * HK_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * HK_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * HK_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * HK_LANES)));

HK_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
HK_INLINE vu load_u32(const void* p) {
  vu v;
  memcpy(&v, p, sizeof v);
  return v;
}
HK_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
HK_INLINE vf splat(float x) { return vf{} + x; }
// The second of the two where one is NaN.
HK_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);  // GCC makes a comparison and a blend of the line below
#else
  return a > b ? a : b;
#endif
}

HK_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + b, 0, 3);
  }
}

HK_INLINE vi lane_ids() {
#if HK_LANES == 16
  return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif HK_LANES == 8
  return vi{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return vi{0, 1, 2, 3};
#endif
}

// Across lanes by halves: one lane after the other would wait for each result before.
#if HK_LANES == 16
#define HK_FOLD(fold, v)                                                                       \
  v = fold(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  v = fold(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
  v = fold(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
  v = fold(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif HK_LANES == 8
#define HK_FOLD(fold, v)                                              \
  v = fold(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)); \
  v = fold(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)); \
  v = fold(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#define HK_FOLD(fold, v)                                  \
  v = fold(v, __builtin_shufflevector(v, v, 2, 3, 0, 1)); \
  v = fold(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
#endif
HK_INLINE vf add(vf a, vf b) { return a + b; }
HK_INLINE vi add(vi a, vi b) { return a + b; }
HK_INLINE float hmax(vf v) {
  HK_FOLD(vmax, v)
  return v[0];
}
HK_INLINE float hsum(vf v) {
  HK_FOLD(add, v)
  return v[0];
}
HK_INLINE int32_t hsum(vi v) {
  HK_FOLD(add, v)
  return v[0];
}

// A bit for each lane of a comparison's result.
HK_INLINE uint32_t mask_of(vi truth) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)truth);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)truth));
#else
  return static_cast<uint32_t>(hsum(truth & (vi{} + 1) << lane_ids()));
#endif
}

// e^x for x <= 0 (about 1 ulp); 0 below -87.3, where the result would be subnormal; NaN of NaN.
HK_INLINE vf exp_nonpositive(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf lowest = splat(-87.336540f);
  const vf clamped = vmax(lowest, x);
  const vf shifted = clamped * splat(1.44269504f) + magic;
  const vf n = shifted - magic;
  vf r = n * splat(-0.693359375f) + clamped;
  r = n * splat(2.12194440e-4f) + r;
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const vu scale = ((vu)shifted << 23) + (127u << 23);  // the magic's own bits leave at the top
  p = p * (vf)scale;
  return x <= lowest ? vf{} : p;
}

constexpr float kLog2e = 1.44269504f;

// 2^x for x < 126 (relative error 1e-7); 2^-125 below -125, where a sum with a 1 in it cannot see it;
// NaN of NaN.
// A third cheaper than exp_nonpositive: whoever scales queries multiplies kLog2e in.
HK_INLINE vf exp2_clamped(vf x) {
  const vf clamped = vmax(splat(-125.0f), x);
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)clamped, _MM_FROUND_TO_NEAREST_INT);
#else
  const vf magic = splat(12582912.0f);  // as above
  const vf shifted = clamped + magic;
  const vf n = shifted - magic;
#endif
  const vf r = clamped - n;
  vf p = splat(1.326472690e-3f);
  p = p * r + splat(9.671512661e-3f);
  p = p * r + splat(5.550733744e-2f);
  p = p * r + splat(2.402224208e-1f);
  p = p * r + splat(6.931469776e-1f);
  p = p * r + splat(1.0f);
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (vf)(((vu)shifted << 23) + (127u << 23));
#endif
}

// kLanes bytes, widened. GCC 12 takes __builtin_convertvector of bytes apart, element by element.
HK_INLINE vi load_i8(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef int8_t vb __attribute__((vector_size(HK_LANES)));
  vb b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vi);
#endif
}
HK_INLINE vi load_u8(const uint8_t* p) { return load_i8(p) & 255; }

// ---- element types -------------------------------------------------------------------------

struct F32 {
  typedef float type;
  static HK_INLINE vf load(const type* p) { return hk::load(p); }
  static HK_INLINE void store(type* p, vf v) { hk::store(p, v); }
};

struct BF16 {
  typedef uint16_t type;
  static HK_INLINE vf load(const type* p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
  }
  // Bits of the nearest bf16, ties to even, in the lower half of each lane; a NaN stays a NaN.
  static HK_INLINE vu round(vf v) {
    const vu u = (vu)v;
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vu nan = vu{} + 0x7fc0u;
    return v == v ? rounded : nan;
  }
  static HK_INLINE void store(type* p, vf v) {
    const vh h = __builtin_convertvector(round(v), vh);
    memcpy(p, &h, sizeof h);
  }
};

struct F16 {
  typedef uint16_t type;
  static HK_INLINE vf load(const type* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
    typedef __fp16 vfp16 __attribute__((vector_size(2 * HK_LANES)));
    vfp16 h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vf);
#else
    vh h;
    memcpy(&h, p, sizeof h);
    const vu w = __builtin_convertvector(h, vu);
    const vu sign = (w & 0x8000u) << 16;
    const vu magnitude = (w & 0x7fffu) << 13;
    // Exact for subnormals too: the exponent is rebased by a multiplication.
    const vu finite = (vu)((vf)magnitude * splat(0x1p112f));
    const vu special = magnitude | 0x7f800000u;
    return (vf)(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
  }
  static HK_INLINE void store(type* p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
#elif defined(__aarch64__)
    typedef __fp16 vfp16 __attribute__((vector_size(2 * HK_LANES)));
    const vfp16 h = __builtin_convertvector(v, vfp16);
    memcpy(p, &h, sizeof h);
#else
    for (int i = 0; i < kLanes; ++i) {
      uint32_t u;
      const float x = v[i];
      memcpy(&u, &x, 4);
      const uint32_t sign = (u >> 16) & 0x8000u;
      const uint32_t magnitude = u & 0x7fffffffu;
      uint32_t h;
      if (magnitude > 0x7f800000u) {
        h = 0x7e00u;
      } else if (magnitude >= 0x477ff000u) {
        h = 0x7c00u;
      } else if (magnitude < 0x38800000u) {
        float f;
        memcpy(&f, &magnitude, 4);
        f += 0.5f;  // the subnormal's bits end up at the bottom of the mantissa, rounded
        memcpy(&h, &f, 4);
        h -= 0x3f000000u;
      } else {
        h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
      }
      p[i] = (uint16_t)(sign | h);
    }
#endif
  }
};

// ---- sums across lanes ---------------------------------------------------------------------

#define HK_SHUFFLE __builtin_shufflevector

// Interleave 32-bit elements inside each 128-bit lane, as unpcklps and its kin do.
#if HK_LANES == 16
#define HK_UNPACK_LO(a, b) \
  HK_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HK_UNPACK_HI(a, b) \
  HK_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define HK_PAIRS_LO(a, b) \
  HK_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HK_PAIRS_HI(a, b) \
  HK_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif HK_LANES == 8
#define HK_UNPACK_LO(a, b) HK_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HK_UNPACK_HI(a, b) HK_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define HK_PAIRS_LO(a, b) HK_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HK_PAIRS_HI(a, b) HK_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define HK_UNPACK_LO(a, b) HK_SHUFFLE(a, b, 0, 4, 1, 5)
#define HK_UNPACK_HI(a, b) HK_SHUFFLE(a, b, 2, 6, 3, 7)
#define HK_PAIRS_LO(a, b) HK_SHUFFLE(a, b, 0, 1, 4, 5)
#define HK_PAIRS_HI(a, b) HK_SHUFFLE(a, b, 2, 3, 6, 7)
#endif

// In each 128-bit lane: the lane's sums of a, b, c and d.
HK_INLINE vf sum_quads(vf a, vf b, vf c, vf d) {
  const vf ab = HK_UNPACK_LO(a, b) + HK_UNPACK_HI(a, b);
  const vf cd = HK_UNPACK_LO(c, d) + HK_UNPACK_HI(c, d);
  return HK_PAIRS_LO(ab, cd) + HK_PAIRS_HI(ab, cd);
}

// Joins kLanes / 4 results of sum_quads into the full sums of kLanes vectors, in their order.
HK_INLINE vf join_quads(const vf* quads) {
#if HK_LANES == 16
  const vf p = HK_SHUFFLE(quads[0], quads[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               HK_SHUFFLE(quads[0], quads[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const vf q = HK_SHUFFLE(quads[2], quads[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               HK_SHUFFLE(quads[2], quads[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return HK_SHUFFLE(p, q, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         HK_SHUFFLE(p, q, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif HK_LANES == 8
  return HK_SHUFFLE(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         HK_SHUFFLE(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return quads[0];
#endif
}

// Transposes kLanes vectors of kLanes elements in place.
HK_INLINE void transpose(vf* r) {
  vf t[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    const vf ab_lo = HK_UNPACK_LO(r[i], r[i + 1]);
    const vf ab_hi = HK_UNPACK_HI(r[i], r[i + 1]);
    const vf cd_lo = HK_UNPACK_LO(r[i + 2], r[i + 3]);
    const vf cd_hi = HK_UNPACK_HI(r[i + 2], r[i + 3]);
    t[i] = HK_PAIRS_LO(ab_lo, cd_lo);
    t[i + 1] = HK_PAIRS_HI(ab_lo, cd_lo);
    t[i + 2] = HK_PAIRS_LO(ab_hi, cd_hi);
    t[i + 3] = HK_PAIRS_HI(ab_hi, cd_hi);
  }
  // t[4 j + i] holds, in its 128-bit lane l, column 4 l + i of rows 4 j .. 4 j + 3.
#if HK_LANES == 16
  for (int i = 0; i < 4; ++i) {
    const vf a = HK_SHUFFLE(t[i], t[4 + i], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const vf b = HK_SHUFFLE(t[i], t[4 + i], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    const vf c = HK_SHUFFLE(t[8 + i], t[12 + i], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const vf d = HK_SHUFFLE(t[8 + i], t[12 + i], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    r[i] = HK_SHUFFLE(a, c, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    r[4 + i] = HK_SHUFFLE(b, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    r[8 + i] = HK_SHUFFLE(a, c, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    r[12 + i] = HK_SHUFFLE(b, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#elif HK_LANES == 8
  for (int i = 0; i < 4; ++i) {
    r[i] = HK_SHUFFLE(t[i], t[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
    r[4 + i] = HK_SHUFFLE(t[i], t[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  for (int i = 0; i < 4; ++i) r[i] = t[i];
#endif
}

}  // namespace
}  // namespace hk
