// What the methods' training operators share.
//
// They read the masters (float32, as they are saved) and round them to the dtype of the rows, so that nothing in Python
// folds a weight. Kept for the backward: the inputs and a few float32 coefficients a token; gates, masks and what stands
// between the factors are computed again. Gradients of weights sum over 64 rows at a time, in an order that does not
// depend on the number of threads.

#pragma once

#include "rows.h"

namespace bem {

typedef std::vector<float> Floats;

constexpr int64_t kChunk = 64;

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline void round_to(const float*, float*, int64_t) {}
inline void round_to(const bfloat16*, float* values, int64_t count) {
  bfloat16 rounded[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(rounded, load(values + i));
    store(values + i, load(rounded));
  }
  for (; i < count; ++i) values[i] = static_cast<float>(static_cast<bfloat16>(values[i]));
}
template <typename T>
void round_to_type(Floats& values) { round_to(static_cast<const T*>(nullptr), values.data(), values.size()); }

inline const float* master(const View& w, int64_t rows, int64_t columns, const char* name) {
  check(w.type == Type::float32 && w.count() == rows * columns, name, " must be float32 with ", rows, " x ", columns,
        " numbers, is ", w);
  return w.as<float>();
}

// where a result of `count` numbers goes
template <typename T>
T* result(const View& to, int64_t count, const char* name) {
  check(to.type == type_of<T>() && to.count() == count, "no room for ", name, ": ", to);
  return to.as<T>();
}

// (rows, columns) -> (rows, stride), zeros in the new columns
inline Floats widened_rows(const float* w, int64_t rows, int64_t columns, int64_t stride, float factor = 1.0f) {
  Floats out(rows * stride, 0.0f);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[i * stride + j] = factor * w[i * columns + j];
  return out;
}

// (rows, columns) -> (columns, stride), zeros in the new columns
inline Floats turned(const float* w, int64_t rows, int64_t columns, int64_t stride, float factor = 1.0f) {
  Floats out(columns * stride, 0.0f);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[j * stride + i] = factor * w[i * columns + j];
  return out;
}

// (rows, columns) -> `to` (columns, rows)
inline void turn_back(const Floats& w, int64_t rows, int64_t columns, const View& to) {
  float* p = result<float>(to, rows * columns, "a gradient");
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) p[j * rows + i] = w[i * columns + j];
}

inline void copy(const Floats& w, const View& to) {
  std::copy(w.begin(), w.end(), result<float>(to, static_cast<int64_t>(w.size()), "a gradient"));
}

// numbers that were rounded to T, as T
template <typename T, typename Values>
void write_as(const Values& values, int64_t count, const View& to, const char* name) {
  T* p = result<T>(to, count, name);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(values[i]);
}

// sum (RANKS, VECTORS) over `rows` rows of z (rows, z_stride) times x (rows, width), and times `times` if it is there
template <int RANKS, int VECTORS, typename T>
inline void sum_block(const float* z, int64_t z_stride, const T* x, const T* times, int64_t rows, int64_t width, float* out) {
  vf sums[RANKS][VECTORS];
  for (int r = 0; r < RANKS; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = vf{};
  for (int64_t n = 0; n < rows; ++n)
    for (int v = 0; v < VECTORS; ++v) {
      vf value = load(x + n * width + v * kLanes);
      if (times != nullptr) value *= load(times + n * width + v * kLanes);
      for (int r = 0; r < RANKS; ++r) sums[r][v] += z[n * z_stride + r] * value;
    }
  for (int r = 0; r < RANKS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(out + r * width + v * kLanes, load(out + r * width + v * kLanes) + sums[r][v]);
}

// (ranks, width) = z^T x, z (rows, z_stride), x (rows, width), x times `times` if it is there
template <typename T>
Floats sum_over_rows(const float* z, int64_t z_stride, int64_t ranks, const T* x, int64_t rows, int64_t width,
                     const T* times = nullptr) {
  Floats found(ranks * width, 0.0f);
  constexpr int kWide = 2;
  const int64_t step = kWide * kLanes, blocks = (width + step - 1) / step;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, rows * ranks));
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t start = 0; start < rows; start += kChunk) {
      const int64_t count = std::min(kChunk, rows - start);
      const float* z0 = z + start * z_stride;
      for (int64_t block = begin; block < end; ++block) {
        int64_t at = block * step;
        const int64_t stop = std::min(width, at + step);
        const T *x0 = x + start * width, *t0 = times == nullptr ? nullptr : times + start * width;
        for (; at + step <= stop; at += step) {
          int64_t r = 0;
          const auto sums = [&](auto many) {
            constexpr int RANKS = decltype(many)::value;
            sum_block<RANKS, kWide>(z0 + r, z_stride, x0 + at, t0 ? t0 + at : t0, count, width, &found[r * width + at]);
            r += RANKS;
          };
          while (r + 8 <= ranks) sums(std::integral_constant<int, 8>());
          if (r + 6 <= ranks) sums(std::integral_constant<int, 6>());
          if (r + 4 <= ranks) sums(std::integral_constant<int, 4>());
          while (r + 2 <= ranks) sums(std::integral_constant<int, 2>());
          if (r < ranks) sums(std::integral_constant<int, 1>());
        }
        for (; at + kLanes <= stop; at += kLanes)
          for (int64_t r = 0; r < ranks; ++r)
            sum_block<1, 1>(z0 + r, z_stride, x0 + at, t0 ? t0 + at : t0, count, width, &found[r * width + at]);
        for (; at < stop; ++at)
          for (int64_t r = 0; r < ranks; ++r) {
            float total = 0.0f;
            for (int64_t n = 0; n < count; ++n) {
              const float factor = t0 == nullptr ? 1.0f : static_cast<float>(t0[n * width + at]);
              total += z0[n * z_stride + r] * (static_cast<float>(x0[n * width + at]) * factor);
            }
            found[r * width + at] += total;
          }
      }
    }
  });
  return found;
}

// (ranks, width) = z^T of the `width` columns of x (rows, in) from `from` on
template <typename T>
Floats sum_over_part(const float* z, int64_t z_stride, int64_t ranks, const T* x, int64_t rows, int64_t in, int64_t from,
                     int64_t width) {
  if (width == in) return sum_over_rows(z, z_stride, ranks, x, rows, width);
  std::vector<T> part(rows * width);
  for (int64_t n = 0; n < rows; ++n) std::copy_n(x + n * in + from, width, &part[n * width]);
  return sum_over_rows(z, z_stride, ranks, part.data(), rows, width);
}

// the column sums of z (rows, z_stride)
inline Floats column_sums(const Floats& z, int64_t rows, int64_t z_stride, int64_t columns) {
  Floats found(columns, 0.0f), part(columns);
  for (int64_t start = 0; start < rows; start += kChunk) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t n = start; n < std::min(rows, start + kChunk); ++n)
      for (int64_t j = 0; j < columns; ++j) part[j] += z[n * z_stride + j];
    for (int64_t j = 0; j < columns; ++j) found[j] += part[j];
  }
  return found;
}

}  // namespace bem
