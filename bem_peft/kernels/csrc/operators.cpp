// One operator a site for inference on a CPU; the torch forms of the methods are the specification.
//
//   y' = y (1 + sum_u g_u G[u]) + sum_r z_r B[r]        g, z: a few coefficients a token, float32
//
// Every method differs in its coefficients alone. x, y and the wide weights are float32 or bfloat16, all of one dtype: in
// decoding the time goes into reading them. Sums and small weights are float32. No width need be a multiple of anything;
// where a small weight is "padded", its columns are filled up with zeros to whole vectors of 16 numbers.

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

namespace {

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

inline const float* widened(const float* x, int64_t, float*) { return x; }
inline const float* widened(const at::BFloat16* x, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(x + i));
  for (; i < count; ++i) to[i] = static_cast<float>(x[i]);
  return to;
}

// d (ROWS, RANKS) = x (ROWS, in) a^T, a (RANKS, in)
template <int ROWS, int RANKS, typename T>
inline void dot_block(const T* x, int64_t stride, int64_t in, const T* a, float* d, int64_t d_stride) {
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
template <int ROWS, typename T>
void dots(const T* x, int64_t stride, int64_t in, const T* a, int64_t ranks, float* d, int64_t d_stride) {
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

// out = y (1 + sum_u g_u gamma[u]) + sum_r z_r b[r] for ROWS rows
template <int ROWS, int VECTORS, typename T>
inline void up_block(const T* y, T* out, int64_t width, int64_t at, const float* z, int64_t rank, int64_t z_stride,
                     const T* b, const float* g, int64_t units, int64_t g_stride, const T* gamma) {
  vf sums[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) sums[row][v] = splat(1.0f);
  if (units > 0) {
    for (int64_t u = 0; u < units; ++u) {
      vf weight[VECTORS];
      for (int v = 0; v < VECTORS; ++v) weight[v] = load(gamma + u * width + at + v * kLanes);
      for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) sums[row][v] += g[row * g_stride + u] * weight[v];
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) sums[row][v] *= load(y + row * width + at + v * kLanes);
  for (int64_t r = 0; r < rank; ++r) {
    vf weight[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weight[v] = load(b + r * width + at + v * kLanes);
    for (int row = 0; row < ROWS; ++row)
      for (int v = 0; v < VECTORS; ++v) sums[row][v] += z[row * z_stride + r] * weight[v];
  }
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) store(out + row * width + at + v * kLanes, sums[row][v]);
}

template <int ROWS, typename T>
void up(const T* y, T* out, int64_t width, const float* z, int64_t rank, int64_t z_stride, const T* b, const float* g = nullptr,
        int64_t units = 0, int64_t g_stride = 0, const T* gamma = nullptr) {
  constexpr int kWide = ROWS == 1 ? 8 : 2;
  int64_t at = 0;
  for (; at + kWide * kLanes <= width; at += kWide * kLanes)
    up_block<ROWS, kWide>(y, out, width, at, z, rank, z_stride, b, g, units, g_stride, gamma);
  for (; at + kLanes <= width; at += kLanes)
    up_block<ROWS, 1>(y, out, width, at, z, rank, z_stride, b, g, units, g_stride, gamma);
  for (; at < width; ++at)
    for (int row = 0; row < ROWS; ++row) {
      float factor = 1.0f, added = 0.0f;
      for (int64_t u = 0; u < units; ++u) factor += g[row * g_stride + u] * static_cast<float>(gamma[u * width + at]);
      for (int64_t r = 0; r < rank; ++r) added += z[row * z_stride + r] * static_cast<float>(b[r * width + at]);
      out[row * width + at] = static_cast<T>(static_cast<float>(y[row * width + at]) * factor + added);
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

int64_t rows_of(const at::Tensor& y) { return y.numel() / std::max<int64_t>(1, y.size(-1)); }

template <typename T>
const T* weight(const at::Tensor& w, int64_t rows, int64_t columns, const char* name) {
  constexpr auto kType = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK(w.scalar_type() == kType && w.is_contiguous() && w.dim() == 2 && w.size(0) == rows && w.size(1) == columns,
              name, " must be a contiguous ", kType, " (", rows, ", ", columns, "), is ", w.scalar_type(), " ", w.sizes());
  return w.const_data_ptr<T>();
}

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

// PT4: c = tanh(x w + bias); g = c[:gamma_dim]; z = c[:beta_dim] (rms(y))
template <bool OVERWRITE>
at::Tensor film(const at::Tensor& x, const at::Tensor& y, const at::Tensor& w, const at::Tensor& bias,
                const at::Tensor& gamma, const at::Tensor& beta, bool is_rms) {
  const int64_t in = x.size(-1), width = y.size(-1), units = w.size(0), padded = bias.size(1);
  const int64_t gamma_dim = gamma.size(0), beta_dim = beta.size(0);
  const float* p_bias = weight<float>(bias, 1, padded, "bias");
  TORCH_CHECK(padded % kLanes == 0 && units <= padded && gamma_dim <= units && beta_dim <= units, "units do not fit");
  return for_dtype(x, y, OVERWRITE, [&](auto px, auto py, auto po) {
    using T = std::remove_pointer_t<decltype(po)>;
    const T *pw = weight<T>(w, units, in, "w"), *pg = weight<T>(gamma, gamma_dim, width, "gamma");
    const T* pt = weight<T>(beta, beta_dim, width, "beta");
    over_rows(rows_of(y), [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.assign(2 * ROWS * padded, 0.0f);
      float *c = scratch.data(), *z = c + ROWS * padded;
      dots<ROWS>(px + row * in, in, in, pw, units, c, padded);
      for (int i = 0; i < ROWS; ++i) {
        float factor = 1.0f;
        if (is_rms && beta_dim > 0) {
          const auto* line = py + (row + i) * width;
          vf squares[4] = {};
          int64_t at = 0;
          for (; at + 4 * kLanes <= width; at += 4 * kLanes)
            for (int v = 0; v < 4; ++v) {
              vf value = load(line + at + v * kLanes);
              squares[v] += value * value;
            }
          float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
          for (; at < width; ++at) total += static_cast<float>(line[at]) * static_cast<float>(line[at]);
          factor = std::sqrt(total / static_cast<float>(width));
        }
        for (int64_t at = 0; at < padded; at += kLanes) {
          vf value = vtanh(load(c + i * padded + at) + load(p_bias + at));
          store(c + i * padded + at, value);
          store(z + i * padded + at, value * factor);
        }
      }
      up<ROWS>(py + row * width, po + row * width, width, z, beta_dim, padded, pt, c, gamma_dim, padded, pg);
    });
  });
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

// PT3: z = scaling vec(U X V^T), X = x as (u_dim, v_dim)
template <bool OVERWRITE>
at::Tensor kronecker(const at::Tensor& x, const at::Tensor& y, const at::Tensor& u, const at::Tensor& v_t,
                     const at::Tensor& b, int64_t v_rank, double scaling) {
  const int64_t in = x.size(-1), width = y.size(-1), u_rank = u.size(0), u_dim = u.size(1), v_dim = v_t.size(0);
  const int64_t padded = v_t.size(1), rank = u_rank * v_rank;
  const float *pu = weight<float>(u, u_rank, u_dim, "u"), *pv = weight<float>(v_t, v_dim, padded, "v_t");
  TORCH_CHECK(u_dim * v_dim == in && padded % kLanes == 0 && v_rank <= padded, "u and v do not fit x");
  const float s = static_cast<float>(scaling);
  return for_dtype(x, y, OVERWRITE, [&](auto px, auto py, auto po) {
    const auto* pb = weight<std::remove_pointer_t<decltype(po)>>(b, rank, width, "b");
    over_rows(rows_of(y), [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.resize(in + u_rank * v_dim + padded + ROWS * rank);
      float *wide = scratch.data(), *left = wide + in, *one = left + u_rank * v_dim, *z = one + padded;
      for (int i = 0; i < ROWS; ++i) {
        const float* line = widened(px + (row + i) * in, in, wide);
        int64_t a = 0;
        for (; a + 4 <= u_rank; a += 4) left_rows<4>(line, pu + a * u_dim, u_dim, v_dim, left + a * v_dim);
        for (; a < u_rank; ++a) left_rows<1>(line, pu + a * u_dim, u_dim, v_dim, left + a * v_dim);
        for (a = 0; a < u_rank; ++a) {
          small_product(left + a * v_dim, v_dim, pv, padded, one);
          for (int64_t j = 0; j < v_rank; ++j) z[i * rank + a * v_rank + j] = s * one[j];
        }
      }
      up<ROWS>(py + row * width, po + row * width, width, z, rank, rank, pb);
    });
  });
}

// PT2: z = scaling m (1 + tanh(C u)) a, a = A x, u = sqrt(R) a / |a|; m: the k largest logits M u (or of the task)
template <bool OVERWRITE>
at::Tensor rank_mask(const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b,
                     const at::Tensor& gate_t, const at::Tensor& mask_t, int64_t active, bool is_task_mask,
                     double scaling) {
  const int64_t in = x.size(-1), width = y.size(-1), padded = mask_t.size(1), rank = b.size(0);
  const bool has_gate = gate_t.size(0) > 0;
  const float* pc = weight<float>(gate_t, has_gate ? rank : 0, padded, "gate_t");
  const float* pm = weight<float>(mask_t, is_task_mask ? 1 : rank, padded, "mask_t");
  TORCH_CHECK(padded % kLanes == 0 && rank <= padded, "mask_t must be padded to 16 columns");
  return for_dtype(x, y, OVERWRITE, [&](auto px, auto py, auto po) {
    using T = std::remove_pointer_t<decltype(po)>;
    const T *pa = weight<T>(a, rank, in, "a"), *pb = weight<T>(b, rank, width, "b");
    over_rows(rows_of(y), [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.assign((ROWS + 3) * padded, 0.0f);
      float *z = scratch.data(), *unit = z + ROWS * padded, *logits = unit + padded, *gate = logits + padded;
      dots<ROWS>(px + row * in, in, in, pa, rank, z, padded);
      for (int i = 0; i < ROWS; ++i) {
        float* line = z + i * padded;
        float squares = 0.0f;
        for (int64_t j = 0; j < rank; ++j) squares += line[j] * line[j];
        const float inverse = 1.0f / std::max(std::sqrt(squares), 1e-20f);
        for (int64_t j = 0; j < rank; ++j) unit[j] = line[j] * inverse;
        if (has_gate) small_product(unit, rank, pc, padded, gate);
        if (!is_task_mask) small_product(unit, rank, pm, padded, logits);
        const float* l = is_task_mask ? pm : logits;
        for (int64_t at = 0; at < padded; at += kLanes) {
          vf mine = load(l + at);
          vi index, before = {};
          for (int64_t lane = 0; lane < kLanes; ++lane) index[lane] = static_cast<int32_t>(at + lane);
          for (int64_t j = 0; j < rank; ++j) {
            vf other = splat(l[j]);
            before -= (other > mine) | ((other == mine) & (static_cast<int32_t>(j) < index));
          }
          vf factor = choose(before < static_cast<int32_t>(active), splat(static_cast<float>(scaling)), vf{});
          if (has_gate) factor *= 1.0f + vtanh(load(gate + at));
          store(line + at, load(line + at) * factor);
        }
      }
      up<ROWS>(py + row * width, po + row * width, width, z, rank, padded, pb);
    });
  });
}

// PT1: z_g = scaling 2 sigmoid(gate_w stats(x) + bias)_g A_g x_g; statistics of each head's output
template <bool OVERWRITE>
at::Tensor head_gating(const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b,
                       const at::Tensor& gate_w, const at::Tensor& gate_bias, int64_t heads,
                       at::IntArrayRef ranks, double scaling) {
  const int64_t in = x.size(-1), width = y.size(-1), gate_padded = gate_w.size(1);
  const int64_t padded_heads = (heads + kLanes - 1) / kLanes * kLanes;
  const int64_t groups = static_cast<int64_t>(ranks.size()), rank = b.size(0);
  const int64_t head_dim = in / heads, group_dim = in / groups;
  TORCH_CHECK(std::accumulate(ranks.begin(), ranks.end(), int64_t{0}) == rank, "the ranks do not add up to b's rows");
  const float* pw = weight<float>(gate_w, 2 * heads, gate_padded, "gate_w");
  const float* pbias = weight<float>(gate_bias, 1, gate_padded, "gate_bias");
  TORCH_CHECK(gate_padded % kLanes == 0 && groups <= gate_padded && heads % groups == 0 && in % heads == 0, "heads do not fit");
  const float s = static_cast<float>(scaling) * 2.0f;
  return for_dtype(x, y, OVERWRITE, [&](auto px, auto py, auto po) {
    using T = std::remove_pointer_t<decltype(po)>;
    const T *pa = weight<T>(a, rank, group_dim, "a"), *pb = weight<T>(b, rank, width, "b");
    over_rows(rows_of(y), [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.assign(ROWS * rank + 2 * padded_heads + gate_padded, 1.0f);
      float *z = scratch.data(), *stats = z + ROWS * rank;
      float* gates = stats + 2 * padded_heads;
      for (int64_t g = 0, start = 0; g < groups; start += ranks[g++])
        dots<ROWS>(px + row * in + g * group_dim, in, group_dim, pa + start * group_dim, ranks[g], z + start, rank);
      for (int i = 0; i < ROWS; ++i) {
        float *energy = stats, *evenness = stats + padded_heads, total = 0.0f;
        for (int64_t h = 0; h < heads; ++h) {
          const auto* line = px + (row + i) * in + h * head_dim;
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
          const float norm = std::max(std::sqrt(square), 1e-20f), cosine = added / norm;
          energy[h] = norm;
          evenness[h] = cosine * cosine;
        }
        // log (|o_h|^2 / sum |o|^2) = 2 log |o_h| - 2 log |o|, |o| from norms relative to the largest: no overflow
        float largest = 0.0f;
        for (int64_t h = 0; h < heads; ++h) largest = energy[h] > largest || energy[h] != energy[h] ? energy[h] : largest;
        for (int64_t h = 0; h < heads; ++h) total += (energy[h] / largest) * (energy[h] / largest);
        const float shift = 2.0f * std::log(largest) + std::log(total);
        for (int64_t at = 0; at < padded_heads; at += kLanes) store(energy + at, 2.0f * vlog(load(energy + at)) - shift);
        for (int64_t at = 0; at < gate_padded; at += kLanes) {
          vf logits = load(pbias + at);
          for (int64_t h = 0; h < heads; ++h) {
            logits += energy[h] * load(pw + h * gate_padded + at);
            logits += evenness[h] * load(pw + (heads + h) * gate_padded + at);
          }
          store(gates + at, s / (1.0f + vexp(-logits)));
        }
        for (int64_t g = 0, start = 0; g < groups; start += ranks[g++])
          for (int64_t j = 0; j < ranks[g]; ++j) z[i * rank + start + j] *= gates[g];
      }
      up<ROWS>(py + row * width, po + row * width, width, z, rank, rank, pb);
    });
  });
}

}  // namespace

TORCH_LIBRARY(bem_peft_cpu, m) {
  for (const std::string& end : {std::string("(Tensor x, Tensor y, "), std::string("_(Tensor x, Tensor(a!) y, ")}) {
    const std::string back = end[0] == '_' ? ") -> Tensor(a!)" : ") -> Tensor";
    m.def(torch::schema(("film" + end + "Tensor w, Tensor bias, Tensor gamma, Tensor beta, bool is_rms" + back).c_str()));
    m.def(torch::schema(("kronecker" + end + "Tensor u, Tensor v_t, Tensor b, int v_rank, float scaling" + back).c_str()));
    m.def(torch::schema(("rank_mask" + end +
          "Tensor a, Tensor b, Tensor gate_t, Tensor mask_t, int active, bool is_task_mask, float scaling" + back).c_str()));
    m.def(torch::schema(("head_gating" + end +
          "Tensor a, Tensor b, Tensor gate_w, Tensor gate_bias, int heads, int[] ranks, float scaling" + back).c_str()));
  }
}

TORCH_LIBRARY_IMPL(bem_peft_cpu, CPU, m) {
  m.impl("film", film<false>);
  m.impl("film_", film<true>);
  m.impl("kronecker", kronecker<false>);
  m.impl("kronecker_", kronecker<true>);
  m.impl("rank_mask", rank_mask<false>);
  m.impl("rank_mask_", rank_mask<true>);
  m.impl("head_gating", head_gating<false>);
  m.impl("head_gating_", head_gating<true>);
}
