// What the methods' training operators share.
//
// They read the masters (float32, as they are saved) and round them to the dtype of the rows, so that nothing in Python
// folds a weight. Kept for the backward: the inputs and a few float32 coefficients a token; gates, masks and what stands
// between the factors are computed again. Gradients of weights sum over 64 rows at a time, in an order that does not
// depend on the number of threads. A backward that is differentiated again, or whose gradient is no plain tensor, goes
// through the torch form (`by_torch_form`).

#pragma once

#include <torch/library.h>

#include "rows.h"

#include <array>
#include <functional>
#include <optional>
#include <tuple>

namespace torch::autograd {
struct AutogradContext;
}

namespace bem {

using at::Tensor;
typedef std::vector<Tensor> Tensors;
typedef std::optional<Tensor> Maybe;
typedef std::vector<float> Floats;

constexpr int64_t kChunk = 64;

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline void round_to(const float*, float*, int64_t) {}
inline void round_to(const at::BFloat16*, float* values, int64_t count) {
  at::BFloat16 rounded[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(rounded, load(values + i));
    store(values + i, load(rounded));
  }
  for (; i < count; ++i) values[i] = static_cast<float>(static_cast<at::BFloat16>(values[i]));
}
template <typename T>
void round_to_type(Floats& values) { round_to(static_cast<const T*>(nullptr), values.data(), values.size()); }

inline const float* master(const Tensor& w, int64_t rows, int64_t columns, const char* name) {
  TORCH_CHECK(w.scalar_type() == at::kFloat && w.is_contiguous() && w.numel() == rows * columns, name,
              " must be contiguous float32 with ", rows, " x ", columns, " numbers, is ", w.scalar_type(), " ", w.sizes());
  return w.const_data_ptr<float>();
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

// (rows, columns) as a tensor (columns, rows)
inline Tensor turned_back(const Floats& w, int64_t rows, int64_t columns) {
  Tensor out = at::empty({columns, rows}, at::kFloat);
  float* p = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) p[j * rows + i] = w[i * columns + j];
  return out;
}

inline Tensor as_tensor(const Floats& w, at::IntArrayRef sizes) {
  Tensor out = at::empty(sizes, at::kFloat);
  std::copy(w.begin(), w.end(), out.mutable_data_ptr<float>());
  return out;
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
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
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

// f(T()) for the dtype of y
template <typename F>
void for_type(const Tensor& y, const F& f) {
  if (y.scalar_type() == at::kFloat) {
    f(float());
  } else {
    TORCH_CHECK(y.scalar_type() == at::kBFloat16, "y must be float32 or bfloat16, is ", y.scalar_type());
    f(at::BFloat16());
  }
}

inline void check_rows(const Tensor& x, const Tensor& y) {
  TORCH_CHECK(x.scalar_type() == y.scalar_type() && x.is_contiguous() && y.is_contiguous() && x.dim() > 0 && y.dim() > 0 &&
                  x.numel() / std::max<int64_t>(1, x.size(-1)) == rows_of(y),
              "x ", x.scalar_type(), " ", x.sizes(), " and y ", y.scalar_type(), " ", y.sizes(),
              " must be contiguous, of one dtype, and have the same rows");
}

// ---- autograd
//
// One torch::autograd::Function (operators.cpp) stands for all methods: to the compiler, one costs as much as a method's
// maths.

typedef torch::autograd::AutogradContext Context;

// The operator of that name, called through the dispatcher.
template <typename Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What a call keeps for its backward: tensors, all at once, and options by name.
void keep(Context* ctx, Tensors tensors);
void keep(Context* ctx, const char* name, const c10::IValue& option);
Tensors kept(Context* ctx);
const c10::IValue& kept(Context* ctx, const char* name);
bool needs_x(Context* ctx);

// y' of `forward`, which runs below autograd. `inputs`: x, y and the masters; `backward` gives their gradients, in this order.
typedef std::array<Maybe, 6> Inputs;
typedef Tensors (*Backward)(Context* ctx, const Tensor& gradient);
Tensor differentiable(const Inputs& inputs, const std::function<Tensor(Context*)>& forward, Backward backward);

// The gradients of x, y and the masters (undefined where there is none) by autograd through the torch form: where this
// backward is differentiated again (create_graph), or runs under vmap, in a dual level or on tensors of a subclass.
// Empty: the operator may compute it.
Tensors by_torch_form(Context* ctx, const Tensors& inputs, const Tensor& gradient);

// stands for a y that is added and was not kept
inline Tensor like_output(const Tensor& x, const Tensor& gradient) { return at::zeros(gradient.sizes(), x.options()); }

inline Tensor or_nothing(const Maybe& tensor) { return tensor.has_value() ? *tensor : Tensor(); }
inline Maybe or_none(const Tensor& tensor) { return tensor.defined() ? Maybe(tensor) : std::nullopt; }

}  // namespace bem
