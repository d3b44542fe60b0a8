// The inner loops of the search for the instruction set MAECT_SIMD.

#include "cpu_simd.h"

#include "../_common/simd.h"

namespace maect_fast::queue_topk {
namespace {

#if defined(__AVX512VNNI__)
using Math = Int8;
constexpr Word kQueryFlip = 0x80808080;  // int8 to uint8
#elif defined(__AVX512BF16__)
using Math = Bf16;
constexpr Word kQueryFlip = 0;
#else
using Math = Fp32;
constexpr Word kQueryFlip = 0;
#endif

// A vector of a row's features, zero beyond its end.
Floats load_features(const float* row, const int64_t dim, const int64_t d) {
  if (d + kVector <= dim) return load<Floats>(row + d);
  Floats x{};
  for (int64_t i = 0; d + i < dim; ++i) x[i] = row[d + i];
  return x;
}

#if defined(__AVX512VNNI__)

Rounded round_row(const float* row, const int64_t dim, Word* words, const int64_t num_words) {
  Floats most{}, norm2{};
  for (int64_t d = 0; d < dim; d += kVector) {
    const Floats x = load_features(row, dim, d);
    most = larger(most, larger(x, -x));
    norm2 += x * x;
  }
  const float largest = maximum(most);
  // Rows too small to have a scale round to zero, which their residual tells.
  const float scale = largest > 1e-30f ? largest / 127 : 1;
  Floats residual2{};
  Ints total{};
  for (int64_t w = 0; w < num_words; w += kVector / 4) {
    const Floats x = load_features(row, dim, 4 * w);
    const Ints rounded = (Ints)_mm512_cvtps_epi32(x / scale);
    const Floats residual = x - scale * __builtin_convertvector(rounded, Floats);
    residual2 += residual * residual;
    total += rounded;
    const __m128i bytes = _mm512_cvtsepi32_epi8((__m512i)rounded);
    __builtin_memcpy(words + w, &bytes,
                     sizeof(Word) * (num_words - w < kVector / 4 ? num_words - w : kVector / 4));
  }
  int32_t integers = 0;
  for (int i = 0; i < kVector; ++i) integers += total[i];
  return {sum(norm2), sum(residual2), scale, -128 * integers};
}

#elif defined(__AVX512BF16__)

Rounded round_row(const float* row, const int64_t dim, Word* words, const int64_t num_words) {
  Floats norm2{}, residual2{};
  for (int64_t w = 0; w < num_words; w += kVector / 2) {
    const Floats x = load_features(row, dim, 2 * w);
    const Ints rounded = round_to_bf16(x);
    const Floats residual = x - reinterpret_cast<Floats>(rounded);
    norm2 += x * x;
    residual2 += residual * residual;
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)rounded, 16));
    __builtin_memcpy(words + w, &halves,
                     sizeof(Word) * (num_words - w < kVector / 2 ? num_words - w : kVector / 2));
  }
  return {sum(norm2), sum(residual2), 1, 0};
}

#else

Rounded round_row(const float* row, const int64_t dim, Word* words, const int64_t num_words) {
  Floats norm2{};
  for (int64_t d = 0; d < dim; d += kVector) {
    const Floats x = load_features(row, dim, d);
    norm2 += x * x;
    if (d + kVector <= num_words) store(words + d, x);
  }
  const int64_t whole = num_words / kVector * kVector;
  __builtin_memcpy(words + whole, row + whole, sizeof(Word) * (num_words - whole));
  return {sum(norm2), 0, 1, 0};
}

#endif

void score(const Word* rows, [[maybe_unused]] const float* scale,
           [[maybe_unused]] const int32_t* start, const int num_rows, const Word* queries,
           const int64_t num_words, float* strip) {
  for (int row = 0; row < num_rows; row += kTileRows) {
    Math::Acc acc[kTileRows][2] = {};
#if defined(__AVX512VNNI__)
    MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = start[row + r] - Ints{};
#endif
    multiply<Math>(rows + row * num_words, num_words, 1, queries, kLanes, num_words, acc);
    MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
      float* out = strip + (row + r) * kLanes;
#if defined(__AVX512VNNI__)
      store(out, scale[row + r] * __builtin_convertvector(acc[r][0], Floats));
      store(out + kVector, scale[row + r] * __builtin_convertvector(acc[r][1], Floats));
#else
      store(out, acc[r][0]);
      store(out + kVector, acc[r][1]);
#endif
    }
  }
}

#if defined(__AVX512F__)

int filter(const float* strip, const int num_rows, const float* threshold, Hits* hits) {
  const __m512 least0 = _mm512_loadu_ps(threshold), least1 = _mm512_loadu_ps(threshold + kVector);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int count = 0;
  const auto append = [&](const __mmask16 mask, const __m512 score, const int place) {
    // Compressing straight into memory takes over 100 cycles on Zen 4 (uops.info).
    const __m512i places = _mm512_add_epi32(lane, _mm512_set1_epi32(place));
    _mm512_storeu_ps(hits->score + count, _mm512_maskz_compress_ps(mask, score));
    _mm512_storeu_si512(hits->place + count, _mm512_maskz_compress_epi32(mask, places));
    count += __builtin_popcount(mask);
  };
  for (int row = 0; row < num_rows; ++row) {
    const int place = row * kLanes;
    const __m512 score0 = _mm512_loadu_ps(strip + place);
    const __m512 score1 = _mm512_loadu_ps(strip + place + kVector);
    const __mmask16 mask0 = _mm512_cmp_ps_mask(score0, least0, _CMP_GE_OQ);
    const __mmask16 mask1 = _mm512_cmp_ps_mask(score1, least1, _CMP_GE_OQ);
    if (__builtin_expect(_kortestz_mask16_u8(mask0, mask1), 1)) continue;
    append(mask0, score0, place);
    append(mask1, score1, place + kVector);
  }
  return count;
}

#else

int filter(const float* strip, const int num_rows, const float* threshold, Hits* hits) {
  const Floats least0 = load<Floats>(threshold), least1 = load<Floats>(threshold + kVector);
  int count = 0;
  for (int row = 0; row < num_rows; ++row) {
    const int place = row * kLanes;
    const float* scores = strip + place;
    const Ints reached =
        (load<Floats>(scores) >= least0) | (load<Floats>(scores + kVector) >= least1);
    int any = 0;
    for (int i = 0; i < kVector; ++i) any |= reached[i];
    if (__builtin_expect(any == 0, 1)) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (scores[lane] < threshold[lane]) continue;
      hits->score[count] = scores[lane];
      hits->place[count++] = place + lane;
    }
  }
  return count;
}

#endif

double dot(const float* a, const float* b, const int64_t dim) {
  // Two fp32 numbers have an exact product in double, so fused multiplication changes nothing.
  constexpr int kSums = 8;
  using Doubles = double __attribute__((vector_size(8 * kSums)));
  using Singles = float __attribute__((vector_size(4 * kSums)));
  Doubles total{};
  int64_t d = 0;
  for (; d + kSums <= dim; d += kSums) {
    total += __builtin_convertvector(load<Singles>(a + d), Doubles) *
             __builtin_convertvector(load<Singles>(b + d), Doubles);
  }
  for (int i = 0; d + i < dim; ++i) total[i] += static_cast<double>(a[d + i]) * b[d + i];
  return ((total[0] + total[4]) + (total[2] + total[6])) +
         ((total[1] + total[5]) + (total[3] + total[7]));
}

}  // namespace

const Simd MAECT_SIMD = {kLanes, Math::kItems, round_row, kQueryFlip, score, filter, dot};

}  // namespace maect_fast::queue_topk
