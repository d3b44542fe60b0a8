// The inner loops of the search for the instruction set MAECT_SIMD.

#include "cpu_simd.h"

#include "../_common/simd.h"

namespace maect_fast::queue_topk {
namespace {

#if defined(__AVX512VNNI__)
using Math = Int8;
constexpr Word kQueryFlip = 0x80808080;  // int8 to uint8
// Measured: 512 candidates instead of 128, 512 x 65,536 in 23.5 ms instead of 30.0 (Zen 5).
constexpr int kCrowding = 4;
#elif defined(__AVX512BF16__)
using Math = Bf16;
constexpr Word kQueryFlip = 0;
constexpr int kCrowding = 1;
#else
using Math = Fp32;
constexpr Word kQueryFlip = 0;
constexpr int kCrowding = 1;
#endif

// Items that fill a vector of fp32 features once they are rounded, in words.
constexpr int kRoundedWords = kVector / Math::kItems;

// Rounds a vector of features into kRoundedWords words and adds up what the row's `Rounded` tells.
#if defined(__AVX512VNNI__)

struct Rounder {
  Floats scale, inverse, norm2{}, residual2{};
  Ints total{};

  Rounder(const float* row, const int64_t dim) {
    Floats most{};
    int64_t d = 0;
    for (; d + kVector <= dim; d += kVector) {
      const Floats x = load<Floats>(row + d);
      most = larger(most, larger(x, -x));
    }
    float largest = maximum(most);
    for (; d < dim; ++d) largest = __builtin_fmaxf(largest, __builtin_fabsf(row[d]));
    // A row too small to have a scale becomes zero, which its residual tells.
    scale = broadcast(largest > 1e-30f ? largest / 127 : 1);
    inverse = 1 / scale;
  }

  MAECT_INLINE void round(const Floats x, Word* words) {
    const Ints integers = (Ints)_mm512_cvtps_epi32(x * inverse);
    const Floats residual = x - scale * __builtin_convertvector(integers, Floats);
    norm2 += x * x;
    residual2 += residual * residual;
    // Wraps, as in finish(), where the row is not finite and the result not used.
    total = (Ints)_mm512_add_epi32((__m512i)total, (__m512i)integers);
    store(words, _mm512_cvtsepi32_epi8((__m512i)integers));
  }

  Rounded finish() const {
    const uint32_t integers = static_cast<uint32_t>(_mm512_reduce_add_epi32((__m512i)total));
    return {sum(norm2), sum(residual2), scale[0], static_cast<int32_t>(-128u * integers)};
  }
};

#elif defined(__AVX512BF16__)

struct Rounder {
  Floats norm2{}, residual2{};

  Rounder(const float*, int64_t) {}

  MAECT_INLINE void round(const Floats x, Word* words) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(x);
    const Ints wide = (Ints)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
    const Floats residual = x - reinterpret_cast<Floats>(wide);
    norm2 += x * x;
    residual2 += residual * residual;
    store(words, halves);
  }

  Rounded finish() const { return {sum(norm2), sum(residual2), 1, 0}; }
};

#else

struct Rounder {
  Floats norm2{};

  Rounder(const float*, int64_t) {}

  MAECT_INLINE void round(const Floats x, Word* words) {
    norm2 += x * x;
    store(words, x);
  }

  Rounded finish() const { return {sum(norm2), 0, 1, 0}; }
};

#endif

Rounded round_row(const float* row, const int64_t dim, Word* words, const int64_t num_words) {
  Rounder rounder(row, dim);
  int64_t d = 0;
  for (; d + kVector <= dim; d += kVector) {
    rounder.round(load<Floats>(row + d), words);
    words += kRoundedWords;
  }
  if (d < dim) {
    float features[kVector] = {};
    Word last[kRoundedWords];
    __builtin_memcpy(features, row + d, sizeof(float) * (dim - d));
    rounder.round(load<Floats>(features), last);
    const int64_t num_last = num_words - d / Math::kItems;
    __builtin_memcpy(words, last,
                     sizeof(Word) * (num_last < kRoundedWords ? num_last : kRoundedWords));
  }
  return rounder.finish();
}

// Appends those of a row's scores that reach their lane's threshold.
MAECT_INLINE void filter(const Floats (&score)[2], const float* threshold, const int place,
                         Hits* hits) {
#if defined(__AVX512F__)
  const __mmask16 reached[2] = {
      _mm512_cmp_ps_mask(score[0], _mm512_loadu_ps(threshold), _CMP_GE_OQ),
      _mm512_cmp_ps_mask(score[1], _mm512_loadu_ps(threshold + kVector), _CMP_GE_OQ)};
  if (__builtin_expect(_kortestz_mask16_u8(reached[0], reached[1]), 1)) return;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int half = 0; half < 2; ++half) {
    // Compressing straight into memory takes over 100 cycles on Zen 4 (uops.info).
    const __m512i places = _mm512_add_epi32(lane, _mm512_set1_epi32(place + half * kVector));
    _mm512_storeu_ps(hits->score + hits->count,
                     _mm512_maskz_compress_ps(reached[half], score[half]));
    _mm512_storeu_si512(hits->place + hits->count,
                        _mm512_maskz_compress_epi32(reached[half], places));
    hits->count += __builtin_popcount(reached[half]);
  }
#else
  const Ints reached =
      (score[0] >= load<Floats>(threshold)) | (score[1] >= load<Floats>(threshold + kVector));
  int any = 0;
  for (int i = 0; i < kVector; ++i) any |= reached[i];
  if (__builtin_expect(any == 0, 1)) return;
  float scores[kLanes];
  store(scores, score[0]);
  store(scores + kVector, score[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (scores[lane] < threshold[lane]) continue;
    hits->score[hits->count] = scores[lane];
    hits->place[hits->count++] = place + lane;
  }
#endif
}

#if defined(__AMX_BF16__)

// Tiles of 16 rows of 16 words. A: rows of the panel as they lie there. B: queries as they are
// stored for the other instruction sets, which is the order that pairs of bf16 need. C = A B.
constexpr int kTile = 16, kStripRows = 2 * kTile;
constexpr int kWordMultiple = kTile;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void score(const Panel& panel, const int64_t num_words, const Word* queries, const float* threshold,
           Hits* hits) {
  static_assert(kPanelRows % kStripRows == 0 && kLanes == 2 * kTile);
  const TileConfig config;
  _tile_loadconfig(&config);
  hits->count = 0;
  float strip[kStripRows][kLanes];
  const int64_t row_bytes = num_words * sizeof(Word), lane_bytes = kLanes * sizeof(Word);
  for (int row = 0; row < panel.num_rows; row += kStripRows) {
    const Word *upper = panel.words + row * num_words, *lower = upper + kTile * num_words;
    const Word* block = queries;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t w = 0; w < num_words; w += kTile, block += kTile * kLanes) {
      _tile_loadd(4, upper + w, row_bytes);
      _tile_loadd(5, lower + w, row_bytes);
      _tile_loadd(6, block, lane_bytes);
      _tile_loadd(7, block + kTile, lane_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, strip[0], lane_bytes);
    _tile_stored(1, strip[0] + kTile, lane_bytes);
    _tile_stored(2, strip[kTile], lane_bytes);
    _tile_stored(3, strip[kTile] + kTile, lane_bytes);
    for (int r = 0; r < kStripRows; ++r) {
      const Floats scores[2] = {load<Floats>(strip[r]), load<Floats>(strip[r] + kVector)};
      filter(scores, threshold, (row + r) * kLanes, hits);
    }
  }
  _tile_release();
}

#else

constexpr int kWordMultiple = 1;

void score(const Panel& panel, const int64_t num_words, const Word* queries, const float* threshold,
           Hits* hits) {
  hits->count = 0;
  for (int row = 0; row < panel.num_rows; row += kTileRows) {
    Math::Acc acc[kTileRows][2] = {};
#if defined(__AVX512VNNI__)
    MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
      acc[r][0] = acc[r][1] = panel.start[row + r] - Ints{};
    }
#endif
    multiply<Math>(panel.words + row * num_words, num_words, 1, queries, kLanes, num_words, acc);
    MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
#if defined(__AVX512VNNI__)
      const float scale = panel.scale[row + r];
      const Floats scores[2] = {scale * __builtin_convertvector(acc[r][0], Floats),
                                scale * __builtin_convertvector(acc[r][1], Floats)};
      filter(scores, threshold, (row + r) * kLanes, hits);
#else
      filter(acc[r], threshold, (row + r) * kLanes, hits);
#endif
    }
  }
}

#endif

// Order of fp32 numbers as an order of integers, its own inverse.
int32_t flip_negative(const int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

float kth_largest(const float* scores, const int64_t count, const int64_t k) {
  Floats most = load<Floats>(scores), least = most;
  for (int64_t i = kVector; i < count; i += kVector) {
    const Floats x = load<Floats>(scores + i);
    most = larger(most, x);
    least = x < least ? x : least;
  }
  const float bounds[2] = {-maximum(-least), maximum(most)};
  int32_t bits[2];
  __builtin_memcpy(bits, bounds, sizeof bits);
  // Bisection: branches that cannot be predicted cost more than some 25 passes over the scores.
  int64_t low = flip_negative(bits[0]), high = flip_negative(bits[1]);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const int32_t middle_bits = flip_negative(static_cast<int32_t>(middle));
    float candidate;
    __builtin_memcpy(&candidate, &middle_bits, sizeof candidate);
    Ints reached{};
    for (int64_t i = 0; i < count; i += kVector) reached -= load<Floats>(scores + i) >= candidate;
    int num_reached = 0;
    for (int i = 0; i < kVector; ++i) num_reached += reached[i];
    if (num_reached >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int32_t found_bits = flip_negative(static_cast<int32_t>(low));
  float found;
  __builtin_memcpy(&found, &found_bits, sizeof found);
  return found;
}

int64_t keep(float* scores, int32_t* slots, const int64_t count, const float threshold) {
  int64_t kept = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < count; i += kVector) {
    const __m512 score = _mm512_loadu_ps(scores + i);
    const __m512i slot = _mm512_loadu_si512(slots + i);
    const __mmask16 inside = count - i < kVector ? (1u << (count - i)) - 1 : 0xffff;
    const __mmask16 reached =
        _mm512_mask_cmp_ps_mask(inside, score, _mm512_set1_ps(threshold), _CMP_GE_OQ);
    // What is overwritten has been read.
    _mm512_storeu_ps(scores + kept, _mm512_maskz_compress_ps(reached, score));
    _mm512_storeu_si512(slots + kept, _mm512_maskz_compress_epi32(reached, slot));
    kept += __builtin_popcount(reached);
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    scores[kept] = scores[i];
    slots[kept] = slots[i];
    kept += scores[i] >= threshold;
  }
#endif
  return kept;
}

}  // namespace

const Simd MAECT_SIMD = {kLanes,     Math::kItems, kWordMultiple, kCrowding, round_row,
                         kQueryFlip, score,        kth_largest,   keep,      dot};

}  // namespace maect_fast::queue_topk
