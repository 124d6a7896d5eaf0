// What the operators share: sixteen numbers at a time, and products of a few rows with a narrow matrix.
//
// No width need be a multiple of anything; where a small weight is "padded", its columns are filled up with zeros to
// whole vectors of 16 numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "operator.h"
#include "threads.h"

namespace bem {

constexpr int64_t kLanes = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2)));

inline vf splat(float value) { return value - vf{}; }

// a b + c, rounded once where the processor can: the same bits wherever it stands
inline vf fused(vf a, vf b, vf c) {
#if defined(__FMA__) || defined(__aarch64__)
  vf out;
  for (int64_t lane = 0; lane < kLanes; ++lane) out[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return out;
#else
  return a * b + c;
#endif
}

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline vf load(const bfloat16* p) {
  vu wide = __builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu) << 16;
  return (vf)wide;
}
inline void store(float* p, vf value) { *reinterpret_cast<vf_any*>(p) = value; }
inline void store(bfloat16* p, vf value) {
  vu bits = (vu)value;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  vu is_nan = (vu)(value != value);
  rounded = (is_nan & 0x7fc0u) | (~is_nan & rounded);
  *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(rounded, vh_any);
}

inline vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

// exp on [-87, 87], to some 2 ulp: 2^n e^r with r in [-ln2/2, ln2/2]
inline vf vexp(vf x) {
  x = choose(x > 87.0f, splat(87.0f), choose(x < -87.0f, splat(-87.0f), x));
  vf shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  vf n = shifted - 12582912.0f;
  vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * (vf)exponent;
}

inline vf vtanh(vf x) {
  vf square = x * x;
  vf series = x * (1.0f + square * (-0.333333333f + square * (0.133333333f + square * -0.0539682540f)));
  vf large = 1.0f - 2.0f / (vexp(2.0f * x) + 1.0f);
  vi is_small = (x < 0.15f) & (x > -0.15f);
  return choose(x == x, choose(is_small, series, large), x);  // NaN stays NaN
}

typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));

inline float sum(vf value) {
  vf8 eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  vf4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

inline const float* widened(const float* x, int64_t, float*) { return x; }
inline const float* widened(const bfloat16* x, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(x + i));
  for (; i < count; ++i) to[i] = static_cast<float>(x[i]);
  return to;
}

// d (ROWS, RANKS) = x (ROWS, in) a^T, a (RANKS, in)
template <int ROWS, int RANKS, typename T, typename W>
inline void dot_block(const T* x, int64_t stride, int64_t in, const W* a, float* d, int64_t d_stride) {
  vf sums[ROWS][RANKS] = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    vf weight[RANKS];
    for (int r = 0; r < RANKS; ++r) weight[r] = load(a + r * in + i);
    for (int row = 0; row < ROWS; ++row) {
      const vf value = load(x + row * stride + i);
      for (int r = 0; r < RANKS; ++r) sums[row][r] += value * weight[r];
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int r = 0; r < RANKS; ++r) {
      float total = sum(sums[row][r]);
      for (int64_t k = i; k < in; ++k) total += static_cast<float>(x[row * stride + k]) * static_cast<float>(a[r * in + k]);
      d[row * d_stride + r] = total;
    }
}

// d (ROWS, ranks) = x (ROWS, in) a^T, a (ranks, in)
template <int ROWS, typename T, typename W>
void dots(const T* x, int64_t stride, int64_t in, const W* a, int64_t ranks, float* d, int64_t d_stride) {
  constexpr int kBlock = ROWS == 1 ? 8 : 2;
  int64_t r = 0;
  for (; r + kBlock <= ranks; r += kBlock) dot_block<ROWS, kBlock>(x, stride, in, a + r * in, d + r, d_stride);
  for (; r < ranks; ++r) dot_block<ROWS, 1>(x, stride, in, a + r * in, d + r, d_stride);
}

// d (padded) = x (in) a, a (in, padded): for a few inputs
inline void small_product(const float* x, int64_t in, const float* a, int64_t padded, float* d) {
  for (int64_t panel = 0; panel < padded; panel += kLanes) {
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= in; i += 4)
      for (int j = 0; j < 4; ++j) sums[j] += x[i + j] * load(a + (i + j) * padded + panel);
    for (; i < in; ++i) sums[0] += x[i] * load(a + i * padded + panel);
    store(d + panel, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// out = y (1 + sum_u g_u gamma[u]) + k y2 + sum_r z_r b[r], on rows of `width`; y, gamma, y2 may be absent
template <typename T, typename W>
struct Rows {
  const T* y;
  T* out;
  int64_t width;
  const float* z = nullptr;  // (rows, z_stride)
  int64_t rank = 0, z_stride = 0;
  const W* b = nullptr;  // (rank, width)
  const float* g = nullptr;  // (rows, g_stride)
  int64_t units = 0, g_stride = 0;
  const W* gamma = nullptr;  // (units, width)
  const T* y2 = nullptr;
  const float* k = nullptr;  // (rows)
};

template <int ROWS, int VECTORS, typename T, typename W>
inline void up_block(const Rows<T, W>& f, int64_t at) {
  vf sums[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) sums[row][v] = splat(1.0f);
  if (f.units > 0) {
    for (int64_t u = 0; u < f.units; ++u) {
      vf weight[VECTORS];
      for (int v = 0; v < VECTORS; ++v) weight[v] = load(f.gamma + u * f.width + at + v * kLanes);
      for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) sums[row][v] += f.g[row * f.g_stride + u] * weight[v];
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v)
      sums[row][v] = f.y == nullptr ? vf{} : sums[row][v] * load(f.y + row * f.width + at + v * kLanes);
  if (f.y2 != nullptr) {
    for (int row = 0; row < ROWS; ++row)
      for (int v = 0; v < VECTORS; ++v) sums[row][v] += f.k[row] * load(f.y2 + row * f.width + at + v * kLanes);
  }
  for (int64_t r = 0; r < f.rank; ++r) {
    vf weight[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weight[v] = load(f.b + r * f.width + at + v * kLanes);
    for (int row = 0; row < ROWS; ++row)
      for (int v = 0; v < VECTORS; ++v) sums[row][v] += f.z[row * f.z_stride + r] * weight[v];
  }
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) store(f.out + row * f.width + at + v * kLanes, sums[row][v]);
}

template <int ROWS, typename T, typename W>
void up(const Rows<T, W>& f) {
  constexpr int kWide = ROWS == 1 ? 8 : 2;
  const int64_t width = f.width;
  int64_t at = 0;
  for (; at + kWide * kLanes <= width; at += kWide * kLanes) up_block<ROWS, kWide>(f, at);
  for (; at + kLanes <= width; at += kLanes) up_block<ROWS, 1>(f, at);
  for (; at < width; ++at)
    for (int row = 0; row < ROWS; ++row) {
      float factor = 1.0f, added = 0.0f;
      for (int64_t u = 0; u < f.units; ++u) factor += f.g[row * f.g_stride + u] * static_cast<float>(f.gamma[u * width + at]);
      for (int64_t r = 0; r < f.rank; ++r) added += f.z[row * f.z_stride + r] * static_cast<float>(f.b[r * width + at]);
      if (f.y2 != nullptr) added += f.k[row] * static_cast<float>(f.y2[row * width + at]);
      if (f.y != nullptr) added += static_cast<float>(f.y[row * width + at]) * factor;
      f.out[row * width + at] = static_cast<T>(added);
    }
}

// Blocks of rows on all threads: f(first row, number of rows), 8 rows or 1.
template <typename F>
void over_rows(int64_t rows, const F& f) {
  parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + 8 <= end; row += 8) f(row, std::integral_constant<int, 8>());
    for (; row < end; ++row) f(row, std::integral_constant<int, 1>());
  });
}

template <typename T>
const T* weight(const View& w, int64_t rows, int64_t columns, const char* name) {
  check(w.type == type_of<T>() && w.rows == rows && w.columns == columns, name, " must be ",
        View{nullptr, type_of<T>(), rows, columns}, ", is ", w);
  return w.as<T>();
}

inline void check_rows(const View& x, const View& y) {
  check(x.type == y.type && x.rows == y.rows, "x ", x, " and y ", y, " must have the same rows and one dtype");
}

// f(T()) for the dtype of y
template <typename F>
void for_type(const View& y, const F& f) {
  if (y.type == Type::float32) {
    f(float());
  } else {
    check(y.type == Type::bfloat16, "y must be float32 or bfloat16, is ", y);
    f(bfloat16());
  }
}

}  // namespace bem
