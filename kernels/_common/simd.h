// Vectors and the matrix product of one instruction set, for the files cpu_simd.cpp that CMake
// compiles once per instruction set (with -m flags; MAECT_SIMD names the set).
//
// Such a file must not instantiate a template of the standard library: the linker keeps one of all
// equal inline functions, perhaps the copy that an old CPU cannot run. What is here has internal
// linkage for the same reason.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MAECT_INLINE inline __attribute__((always_inline))
// Loops over accumulators become straight code: otherwise the compiler keeps them in memory.
#define MAECT_UNROLL _Pragma("GCC unroll 16")

namespace {

// kVector: fp32 numbers in a register. kTileRows: rows of a tile of accumulators, which is
// 2 * kVector wide. On Zen 5, 12 x 2 are no faster with 32 registers, 6 x 2 by 10 % with 16; but
// lanes, which the loss takes tile by tile, are a multiple of neither.
#if defined(__AVX512F__)
constexpr int kVector = 16, kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kVector = 8, kTileRows = 4;
#elif defined(__aarch64__)
constexpr int kVector = 4, kTileRows = 8;
#else
constexpr int kVector = 4, kTileRows = 4;
#endif
constexpr int kLanes = 2 * kVector;

// Operands are made of words of 32 bits: one fp32, two bf16 or four 8-bit integers, whose products
// are added up in one lane.
using Word = uint32_t;
using Floats = float __attribute__((vector_size(4 * kVector)));
using Ints = int32_t __attribute__((vector_size(4 * kVector)));

template <class Vector>
MAECT_INLINE Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
MAECT_INLINE void store(void* to, const Vector vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

MAECT_INLINE Floats broadcast(const float x) { return x - Floats{}; }

MAECT_INLINE Floats larger(const Floats a, const Floats b) { return a > b ? a : b; }

MAECT_INLINE float sum(Floats x) {
  for (int half = kVector / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

MAECT_INLINE float maximum(const Floats x) {
  float most = x[0];
  for (int i = 1; i < kVector; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// acc + a * b, where `a` is one word for all lanes.
struct Fp32 {
  using Acc = Floats;
  static constexpr int kItems = 1;
  static MAECT_INLINE Acc multiply_add(const Acc acc, const Word a, const Ints b) {
    float x;
    __builtin_memcpy(&x, &a, sizeof x);
    return acc + x * reinterpret_cast<Floats>(b);
  }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  using Acc = Floats;
  static constexpr int kItems = 2;
  static MAECT_INLINE Acc multiply_add(const Acc acc, const Word a, const Ints b) {
    const __m512i x = _mm512_set1_epi32(static_cast<int32_t>(a));
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)b);
  }
};
#endif

#if defined(__AVX512VNNI__)
// `a` is signed, `b` unsigned.
struct Int8 {
  using Acc = Ints;
  static constexpr int kItems = 4;
  static MAECT_INLINE Acc multiply_add(const Acc acc, const Word a, const Ints b) {
    const __m512i x = _mm512_set1_epi32(static_cast<int32_t>(a));
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)b, x);
  }
};
#endif

// acc[r][lane] += sum over w of a[r * a_row + w * a_word] * b[w * b_word + lane].
template <class Math>
MAECT_INLINE void multiply(const Word* a, const ptrdiff_t a_row, const ptrdiff_t a_word,
                           const Word* b, const ptrdiff_t b_word, const ptrdiff_t num_words,
                           typename Math::Acc (&acc)[kTileRows][2]) {
  for (ptrdiff_t w = 0; w < num_words; ++w, a += a_word, b += b_word) {
    const Ints b0 = load<Ints>(b), b1 = load<Ints>(b + kVector);
    MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const Word x = a[r * a_row];
      acc[r][0] = Math::multiply_add(acc[r][0], x, b0);
      acc[r][1] = Math::multiply_add(acc[r][1], x, b1);
    }
  }
}

// Eight fp32 numbers in double.
using Doubles = double __attribute__((vector_size(64)));

MAECT_INLINE Doubles widen(const float* from) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_loadu_ps(from));
#else
  using Singles = float __attribute__((vector_size(32)));
  return __builtin_convertvector(load<Singles>(from), Doubles);
#endif
}

// In an order that no instruction set changes.
double dot(const float* a, const float* b, const int64_t dim) {
  // Two fp32 numbers have an exact product in double, so fused multiplication changes nothing.
  Doubles even{}, odd{};
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16) {
    even += widen(a + d) * widen(b + d);
    odd += widen(a + d + 8) * widen(b + d + 8);
  }
  for (; d + 8 <= dim; d += 8) even += widen(a + d) * widen(b + d);
  for (int i = 0; d + i < dim; ++i) odd[i] += static_cast<double>(a[d + i]) * b[d + i];
  const Doubles total = even + odd;
  return ((total[0] + total[4]) + (total[2] + total[6])) +
         ((total[1] + total[5]) + (total[3] + total[7]));
}

}  // namespace
