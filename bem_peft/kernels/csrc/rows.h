// What the operators share: sixteen numbers at a time, and products of a few rows with a narrow matrix.
//
// No width need be a multiple of anything; where a small weight is "padded", its columns are filled up with zeros to
// whole vectors of 16 numbers.

#pragma once

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

namespace bem {

constexpr int64_t kLanes = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2)));

inline vf splat(float value) { return value - vf{}; }

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline vf load(const at::BFloat16* p) {
  vu wide = __builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu) << 16;
  return (vf)wide;
}
inline void store(float* p, vf value) { *reinterpret_cast<vf_any*>(p) = value; }
inline void store(at::BFloat16* p, vf value) {
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

// natural logarithm of positive, normal numbers, to some 2 ulp
inline vf vlog(vf x) {
  vi bits = (vi)x;
  vi exponent = ((bits - 0x3f3504f3) >> 23);  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  vf m = (vf)(bits - (exponent << 23)) - 1.0f;
  vf e = __builtin_convertvector(exponent, vf), square = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vf low = p * m * square + e * -2.12194440e-4f - 0.5f * square;
  return choose(x == x, (m + low) + e * 0.693359375f, x);
}

typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));

inline float sum(vf value) {
  vf8 eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  vf4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

template <typename T>
inline float root_mean_square(const T* line, int64_t width) {
  vf squares[4] = {};
  int64_t at = 0;
  for (; at + 4 * kLanes <= width; at += 4 * kLanes)
    for (int v = 0; v < 4; ++v) {
      const vf value = load(line + at + v * kLanes);
      squares[v] += value * value;
    }
  float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; at < width; ++at) total += static_cast<float>(line[at]) * static_cast<float>(line[at]);
  return std::sqrt(total / static_cast<float>(width));
}

inline const float* widened(const float* x, int64_t, float*) { return x; }
inline const float* widened(const at::BFloat16* x, int64_t count, float* to) {
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

// left (RANKS, v_dim) = U X for RANKS rows of U and one token's X (u_dim, v_dim)
template <int RANKS>
void left_rows(const float* x, const float* u, int64_t u_dim, int64_t v_dim, float* left) {
  int64_t at = 0;
  for (; at + kLanes <= v_dim; at += kLanes) {
    vf sums[2 * RANKS] = {};
    int64_t k = 0;
    for (; k + 2 <= u_dim; k += 2)
      for (int half = 0; half < 2; ++half) {
        const vf value = load(x + (k + half) * v_dim + at);
        for (int a = 0; a < RANKS; ++a) sums[2 * a + half] += u[a * u_dim + k + half] * value;
      }
    if (k < u_dim)
      for (int a = 0; a < RANKS; ++a) sums[2 * a] += u[a * u_dim + k] * load(x + k * v_dim + at);
    for (int a = 0; a < RANKS; ++a) store(left + a * v_dim + at, sums[2 * a] + sums[2 * a + 1]);
  }
  for (; at < v_dim; ++at)
    for (int a = 0; a < RANKS; ++a) {
      float total = 0.0f;
      for (int64_t k = 0; k < u_dim; ++k) total += u[a * u_dim + k] * x[k * v_dim + at];
      left[a * v_dim + at] = total;
    }
}

// z (u_rank v_rank) = scaling vec(U X V^T) of one token's X (u_dim, v_dim); left: room for (u_rank, v_dim), one: (padded)
inline void kronecker_row(const float* x, const float* u, int64_t u_rank, int64_t u_dim, const float* v_t, int64_t v_rank,
                          int64_t v_dim, int64_t padded, float scaling, float* left, float* one, float* z) {
  int64_t a = 0;
  for (; a + 4 <= u_rank; a += 4) left_rows<4>(x, u + a * u_dim, u_dim, v_dim, left + a * v_dim);
  for (; a < u_rank; ++a) left_rows<1>(x, u + a * u_dim, u_dim, v_dim, left + a * v_dim);
  for (a = 0; a < u_rank; ++a) {
    small_product(left + a * v_dim, v_dim, v_t, padded, one);
    for (int64_t j = 0; j < v_rank; ++j) z[a * v_rank + j] = scaling * one[j];
  }
}

// PT2's control of one token: c_t, m_t (rank, padded), or m_t (1, padded) the logits of a task's mask
struct Control {
  const float *c_t, *m_t;
  bool has_gate, is_task_mask;
  int64_t rank, padded, active;
};

// unit = z / |z|, gate = tanh(C unit), logits = M unit, kept in {0, 1}: exactly `active` ones; all (padded). Returns |z|.
inline float control_row(const Control& w, const float* z, float* unit, float* gate, float* logits, float* kept) {
  float squares = 0.0f;
  for (int64_t j = 0; j < w.rank; ++j) squares += z[j] * z[j];
  const float norm = std::max(std::sqrt(squares), 1e-20f), inverse = 1.0f / norm;
  for (int64_t j = 0; j < w.rank; ++j) unit[j] = z[j] * inverse;
  if (w.has_gate) small_product(unit, w.rank, w.c_t, w.padded, gate);
  if (w.is_task_mask) {
    std::copy(w.m_t, w.m_t + w.padded, logits);
  } else {
    small_product(unit, w.rank, w.m_t, w.padded, logits);
  }
  for (int64_t at = 0; at < w.padded; at += kLanes) {
    const vf mine = load(logits + at);
    vi index, before = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) index[lane] = static_cast<int32_t>(at + lane);
    for (int64_t j = 0; j < w.rank; ++j) {
      const vf other = splat(logits[j]);
      before -= (other > mine) | ((other == mine) & (static_cast<int32_t>(j) < index));
    }
    store(kept + at, choose(before < static_cast<int32_t>(w.active), splat(1.0f), vf{}));
    if (w.has_gate) store(gate + at, vtanh(load(gate + at)));
  }
  return norm;
}

// PT1's statistics of one token's heads; each (heads rounded up to 16, filled with ones)
struct HeadStatistics {
  float *energy, *evenness, *norm, *cosine;  // log (|o|^2 / sum |o|^2), cosine^2; |o|, sum(o) / |o|
  float largest, total;  // of the norms; sum of their squares relative to it
};

template <typename T>
inline void head_statistics(const T* x, int64_t heads, int64_t head_dim, HeadStatistics& found) {
  for (int64_t h = 0; h < heads; ++h) {
    const T* line = x + h * head_dim;
    vf squares = {}, sums = {};
    int64_t at = 0;
    for (; at + kLanes <= head_dim; at += kLanes) {
      const vf value = load(line + at);
      squares += value * value;
      sums += value;
    }
    float square = sum(squares), added = sum(sums);
    for (; at < head_dim; ++at) {
      const float value = static_cast<float>(line[at]);
      square += value * value;
      added += value;
    }
    found.norm[h] = std::max(std::sqrt(square), 1e-20f);
    found.cosine[h] = added / found.norm[h];
    found.evenness[h] = found.cosine[h] * found.cosine[h];
  }
  // log (|o_h|^2 / sum |o|^2) = 2 log |o_h| - 2 log |o|, |o| from norms relative to the largest: no overflow
  float largest = 0.0f, total = 0.0f;
  for (int64_t h = 0; h < heads; ++h)
    largest = found.norm[h] > largest || found.norm[h] != found.norm[h] ? found.norm[h] : largest;
  for (int64_t h = 0; h < heads; ++h) total += (found.norm[h] / largest) * (found.norm[h] / largest);
  const float shift = 2.0f * std::log(largest) + std::log(total);
  for (int64_t at = 0; at < heads; at += kLanes) store(found.energy + at, 2.0f * vlog(load(found.norm + at)) - shift);
  found.largest = largest;
  found.total = total;
}

// gates (padded) = factor sigmoid(W stats + bias), w (2 heads, padded)
inline void gate_row(const HeadStatistics& stats, int64_t heads, const float* w, const float* bias, int64_t padded,
                     float factor, float* gates) {
  for (int64_t at = 0; at < padded; at += kLanes) {
    vf logits = load(bias + at);
    for (int64_t h = 0; h < heads; ++h) {
      logits += stats.energy[h] * load(w + h * padded + at);
      logits += stats.evenness[h] * load(w + (heads + h) * padded + at);
    }
    store(gates + at, factor / (1.0f + vexp(-logits)));
  }
}

// Blocks of rows on all threads: f(first row, number of rows), 8 rows or 1.
template <typename F>
void over_rows(int64_t rows, const F& f) {
  at::parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + 8 <= end; row += 8) f(row, std::integral_constant<int, 8>());
    for (; row < end; ++row) f(row, std::integral_constant<int, 1>());
  });
}

inline int64_t rows_of(const at::Tensor& y) { return y.numel() / std::max<int64_t>(1, y.size(-1)); }

template <typename T>
const T* weight(const at::Tensor& w, int64_t rows, int64_t columns, const char* name) {
  constexpr auto kType = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK(w.scalar_type() == kType && w.is_contiguous() && w.dim() == 2 && w.size(0) == rows && w.size(1) == columns,
              name, " must be a contiguous ", kType, " (", rows, ", ", columns, "), is ", w.scalar_type(), " ", w.sizes());
  return w.const_data_ptr<T>();
}

// f(x, y, where the result goes) as pointers of y's dtype; the result is y itself where it may be overwritten
template <typename F>
at::Tensor for_dtype(const at::Tensor& given_x, const at::Tensor& given_y, bool overwrite, const F& f) {
  const at::Tensor y = given_y.contiguous(), x = given_x.to(y.scalar_type()).contiguous();
  TORCH_CHECK(x.dim() > 0 && y.dim() > 0 && x.numel() / std::max<int64_t>(1, x.size(-1)) == rows_of(y),
              "x ", x.sizes(), " and y ", y.sizes(), " must have the same rows");
  // a row is read whole before it is written, so that y may be where the result goes
  TORCH_CHECK(!overwrite || given_y.is_contiguous(), "only a contiguous y can be overwritten");
  at::Tensor out = overwrite ? given_y : at::empty(y.sizes(), y.options());
  if (x.scalar_type() == at::kFloat) {
    f(x.const_data_ptr<float>(), y.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "y must be float32 or bfloat16, is ", x.scalar_type());
    f(x.const_data_ptr<at::BFloat16>(), y.const_data_ptr<at::BFloat16>(), out.mutable_data_ptr<at::BFloat16>());
  }
  return out;
}

}  // namespace bem
