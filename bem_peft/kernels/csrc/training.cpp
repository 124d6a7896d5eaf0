// One operator a site for a training step on a CPU, forward and backward; the torch forms are the specification.
//
// They read the masters (float32, as they are saved) and round them to the dtype of the rows, so that nothing in Python
// folds a weight. Kept for the backward: the inputs and a few float32 coefficients a token; gates, masks and what stands
// between the factors are computed again. Gradients of weights sum over 64 rows at a time, in an order that does not
// depend on the number of threads. A backward that is differentiated again, or whose gradient is no plain tensor, goes
// through the torch form (`by_torch_form`).

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "gradients.h"
#include "plain.h"

#include <atomic>

namespace {

using namespace bem;

// the orthonormal Walsh-Hadamard transform along the rows of (rows, width); rows a power of two
void hadamard(Floats& w, int64_t rows, int64_t width) {
  for (int64_t half = 1; half < rows; half *= 2)
    for (int64_t start = 0; start < rows; start += 2 * half)
      for (int64_t i = start; i < start + half; ++i)
        for (int64_t j = 0; j < width; ++j) {
          const float low = w[i * width + j], high = w[(i + half) * width + j];
          w[i * width + j] = low + high;
          w[(i + half) * width + j] = low - high;
        }
  const float scale = 1.0f / std::sqrt(static_cast<float>(rows));
  for (float& value : w) value *= scale;
}

// ---- PT4: y' = y (1 + gamma) + beta rho

// G^T (units, out), a row of coefficients bounded as a whole: bound s w / (1 + s |w|_1), rounded to T
template <typename T>
Floats bounded(const Maybe& weight, int64_t width, float scaling, float bound) {
  if (!weight.has_value()) return {};
  const int64_t units = weight->size(1);
  const float* w = master(*weight, width, units, "gamma or beta");
  const float eps = std::is_same_v<T, float> ? 0x1p-23f : 0x1p-7f;
  const float kept = bound * (1.0f - 2.0f * eps);
  Floats out(units * width);
  for (int64_t i = 0; i < width; ++i) {
    float total = 1.0f;
    for (int64_t u = 0; u < units; ++u) total += std::abs(scaling * w[i * units + u]);
    const float factor = scaling * kept / total;
    for (int64_t u = 0; u < units; ++u) out[u * width + i] = factor * w[i * units + u];
  }
  round_to_type<T>(out);
  return out;
}

// gradient of w (out, units) from that of G^T (units, out)
template <typename T>
Tensor bounded_backward(const Floats& gradient, const Tensor& weight, float scaling, float bound) {
  const int64_t width = weight.size(0), units = weight.size(1);
  const float* w = weight.const_data_ptr<float>();
  const float eps = std::is_same_v<T, float> ? 0x1p-23f : 0x1p-7f;
  const float kept = bound * (1.0f - 2.0f * eps);
  Tensor out = at::empty({width, units}, at::kFloat);
  float* p = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < width; ++i) {
    float total = 1.0f, shared = 0.0f;
    for (int64_t u = 0; u < units; ++u) {
      const float scaled = scaling * w[i * units + u];
      total += std::abs(scaled);
      shared += gradient[u * width + i] * scaled;
    }
    const float factor = scaling * kept / total, along = shared / total;
    for (int64_t u = 0; u < units; ++u) {
      const float value = scaling * w[i * units + u];
      const float sign = static_cast<float>(value > 0.0f) - static_cast<float>(value < 0.0f);
      p[i * units + u] = factor * (gradient[u * width + i] - sign * along);
    }
  }
  return out;
}

template <typename T>
bool is_within(const T* values, int64_t count, float bound) {
  vi beyond = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vf value = load(values + i);
    beyond |= ~((value <= bound) & (value >= -bound));
  }
  bool is_beyond = false;
  for (int64_t lane = 0; lane < kLanes; ++lane) is_beyond |= beyond[lane] != 0;
  for (; i < count; ++i) is_beyond |= !(std::abs(static_cast<float>(values[i])) <= bound);
  return !is_beyond;
}

// y', c (N, units padded) and rho (N), empty where it is 1
std::tuple<Tensor, Tensor, Tensor> film_forward(
    const Tensor& x, const Tensor& y, const Tensor& w, const Tensor& bias, const Maybe& gamma, const Maybe& beta,
    double scaling, double clamp_range, double max_beta, bool is_rms, const Maybe& unstable, double threshold) {
  check_rows(x, y);
  const int64_t in = x.size(-1), width = y.size(-1), rows = rows_of(y), units = w.size(0), padded = whole_vectors(units);
  const int64_t gamma_dim = gamma.has_value() ? gamma->size(1) : 0, beta_dim = beta.has_value() ? beta->size(1) : 0;
  TORCH_CHECK(gamma_dim <= units && beta_dim <= units, "gamma and beta read at most the ", units, " units");
  Tensor out = at::empty_like(y), c = at::zeros({rows, padded}, at::kFloat);
  Tensor rms = at::empty({is_rms && beta_dim > 0 ? rows : 0}, at::kFloat);
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(w, units, in, "controller_weight");
    Floats pw(from, from + units * in), pb = widened_rows(master(bias, 1, units, "controller_bias"), 1, units, padded);
    round_to_type<T>(pw);
    round_to_type<T>(pb);
    const Floats pg = bounded<T>(gamma, width, scaling, clamp_range), pt = bounded<T>(beta, width, scaling, max_beta);
    const T *px = x.const_data_ptr<T>(), *py = y.const_data_ptr<T>();
    T* po = out.mutable_data_ptr<T>();
    float *pc = c.mutable_data_ptr<float>(), *pr = rms.mutable_data_ptr<float>();
    std::atomic<bool> is_sound{true};
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.resize(ROWS * padded);
      float *mine = pc + row * padded, *z = scratch.data();
      dots<ROWS>(px + row * in, in, in, pw.data(), units, mine, padded);
      for (int i = 0; i < ROWS; ++i) {
        float factor = 1.0f;
        if (rms.numel() > 0) pr[row + i] = factor = root_mean_square(py + (row + i) * width, width);
        for (int64_t at = 0; at < padded; at += kLanes) {
          const vf value = vtanh(load(mine + i * padded + at) + load(pb.data() + at));
          store(mine + i * padded + at, value);
          store(z + i * padded + at, value * factor);
        }
      }
      up<ROWS>(Rows<T, float>{py + row * width, po + row * width, width, z, beta_dim, padded, pt.data(), mine, gamma_dim,
                              padded, pg.data()});
      if (unstable.has_value() && !is_within(po + row * width, ROWS * width, static_cast<float>(threshold)))
        is_sound.store(false, std::memory_order_relaxed);
    });
    if (!is_sound.load()) unstable->fill_(true);
  });
  return {out, c, rms};
}

// gradients of x, y, w, bias, gamma, beta
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> film_backward(
    const Tensor& given, const Tensor& x, const Tensor& y, const Tensor& w, const Maybe& gamma, const Maybe& beta,
    const Tensor& c, const Tensor& rms, double scaling, double clamp_range, double max_beta, bool needs_x) {
  const Tensor gradient = given.contiguous();
  const int64_t in = x.size(-1), width = y.size(-1), rows = rows_of(y), units = w.size(0), padded = c.size(1);
  const int64_t gamma_dim = gamma.has_value() ? gamma->size(1) : 0, beta_dim = beta.has_value() ? beta->size(1) : 0;
  Tensor gx = needs_x ? at::empty_like(x) : Tensor(), gy = at::empty_like(y), gw, gbias, ggamma, gbeta;
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(w, units, in, "controller_weight");
    Floats pw(from, from + units * in);
    round_to_type<T>(pw);
    const Floats pg = bounded<T>(gamma, width, scaling, clamp_range), pt = bounded<T>(beta, width, scaling, max_beta);
    const T *px = x.const_data_ptr<T>(), *py = y.const_data_ptr<T>(), *p = gradient.const_data_ptr<T>();
    T *pgx = needs_x ? gx.mutable_data_ptr<T>() : nullptr, *pgy = gy.mutable_data_ptr<T>();
    const float *pc = c.const_data_ptr<float>(), *pr = rms.const_data_ptr<float>();
    Floats before(rows * padded, 0.0f), units_of_beta(beta_dim > 0 ? rows * padded : 0, 0.0f);
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.resize(ROWS * (width + 2 * padded + 1));
      float *product = scratch.data(), *of_gamma = product + ROWS * width, *of_beta = of_gamma + ROWS * padded;
      float* k = of_beta + ROWS * padded;
      std::fill(of_gamma, k, 0.0f);
      if (gamma_dim > 0) {
        const T *g = p + row * width, *mine = py + row * width;
        int64_t at = 0;
        for (; at + kLanes <= ROWS * width; at += kLanes) store(product + at, load(g + at) * load(mine + at));
        for (; at < ROWS * width; ++at) product[at] = static_cast<float>(g[at]) * static_cast<float>(mine[at]);
        dots<ROWS>(product, width, width, pg.data(), gamma_dim, of_gamma, padded);
      }
      dots<ROWS>(p + row * width, width, width, pt.data(), beta_dim, of_beta, padded);
      for (int i = 0; i < ROWS; ++i) {
        const float factor = rms.numel() > 0 ? pr[row + i] : 1.0f;
        const float* mine = pc + (row + i) * padded;
        float of_rms = 0.0f;
        for (int64_t u = 0; u < beta_dim; ++u) {
          of_rms += mine[u] * of_beta[i * padded + u];
          units_of_beta[(row + i) * padded + u] = factor * mine[u];
        }
        k[i] = rms.numel() > 0 && factor > 0.0f ? of_rms / (factor * static_cast<float>(width)) : 0.0f;
        for (int64_t u = 0; u < units; ++u) {
          const float whole = of_gamma[i * padded + u] + factor * of_beta[i * padded + u];
          before[(row + i) * padded + u] = whole * (1.0f - mine[u] * mine[u]);
        }
      }
      up<ROWS>(Rows<T, float>{p + row * width, pgy + row * width, width, nullptr, 0, 0, nullptr, pc + row * padded,
                              gamma_dim, padded, pg.data(), py + row * width, k});
      if (needs_x)
        up<ROWS>(Rows<T, float>{nullptr, pgx + row * in, in, &before[row * padded], units, padded, pw.data()});
    });
    gw = as_tensor(sum_over_rows(before.data(), padded, units, px, rows, in), {units, in});
    gbias = as_tensor(column_sums(before, rows, padded, units), {units});
    if (gamma_dim > 0)
      ggamma = bounded_backward<T>(sum_over_rows(pc, padded, gamma_dim, p, rows, width, py), *gamma, scaling, clamp_range);
    if (beta_dim > 0)
      gbeta = bounded_backward<T>(sum_over_rows(units_of_beta.data(), padded, beta_dim, p, rows, width), *beta, scaling, max_beta);
  });
  return {gx, gy, gw, gbias, ggamma, gbeta};
}

// ---- PT3: y' = y + s B vec(U X V^T)

// y' and s z (N, u_rank v_rank)
std::tuple<Tensor, Tensor> kronecker_forward(const Tensor& x, const Tensor& y, const Tensor& u, const Tensor& v,
                                             const Tensor& b, double scaling) {
  check_rows(x, y);
  const int64_t in = x.size(-1), width = y.size(-1), rows = rows_of(y), u_rank = u.size(0), u_dim = u.size(1);
  const int64_t v_rank = v.size(0), v_dim = v.size(1), rank = u_rank * v_rank, padded = whole_vectors(v_rank);
  TORCH_CHECK(u_dim * v_dim == in, "u and v do not fit x");
  Tensor out = at::empty_like(y), z = at::empty({rows, rank}, at::kFloat);
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(u, u_rank, u_dim, "U");
    Floats pu(from, from + u_rank * u_dim), pv = turned(master(v, v_rank, v_dim, "V"), v_rank, v_dim, padded);
    Floats pb = turned(master(b, width, rank, "B"), width, rank, width);
    for (Floats* w : {&pu, &pv, &pb}) round_to_type<T>(*w);
    const T *px = x.const_data_ptr<T>(), *py = y.const_data_ptr<T>();
    T* po = out.mutable_data_ptr<T>();
    float* pz = z.mutable_data_ptr<float>();
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.resize(in + u_rank * v_dim + padded);
      float *wide = scratch.data(), *left = wide + in, *one = left + u_rank * v_dim, *mine = pz + row * rank;
      for (int i = 0; i < ROWS; ++i)
        kronecker_row(widened(px + (row + i) * in, in, wide), pu.data(), u_rank, u_dim, pv.data(), v_rank, v_dim, padded,
                      scaling, left, one, mine + i * rank);
      up<ROWS>(Rows<T, float>{py + row * width, po + row * width, width, mine, rank, rank, pb.data()});
    });
  });
  return {out, z};
}

// gradients of x, u, v, b; that of y is `given`
std::tuple<Tensor, Tensor, Tensor, Tensor> kronecker_backward(const Tensor& given, const Tensor& x, const Tensor& u,
                                                              const Tensor& v, const Tensor& b, const Tensor& z,
                                                              double scaling, bool needs_x) {
  const Tensor gradient = given.contiguous();
  const int64_t in = x.size(-1), width = gradient.size(-1), rows = rows_of(gradient), u_rank = u.size(0), u_dim = u.size(1);
  const int64_t v_rank = v.size(0), v_dim = v.size(1), rank = u_rank * v_rank, stride = whole_vectors(v_dim);
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  Tensor gx = needs_x ? at::empty_like(x) : Tensor(), gu, gv, gb;
  for_type(gradient, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(u, u_rank, u_dim, "U");
    Floats pu(from, from + u_rank * u_dim), pv = widened_rows(master(v, v_rank, v_dim, "V"), v_rank, v_dim, stride);
    Floats pb = turned(master(b, width, rank, "B"), width, rank, width);
    for (Floats* w : {&pu, &pv, &pb}) round_to_type<T>(*w);
    const T *px = x.const_data_ptr<T>(), *p = gradient.const_data_ptr<T>();
    T* pgx = needs_x ? gx.mutable_data_ptr<T>() : nullptr;
    Floats of_z(rows * rank), of_u(chunks * u_rank * u_dim), of_v(chunks * v_rank * stride, 0.0f);
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      dots<ROWS>(p + row * width, width, width, pb.data(), rank, &of_z[row * rank], rank);
    });
    for (float& value : of_z) value *= static_cast<float>(scaling);
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      thread_local Floats scratch;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        scratch.assign(u_dim * stride + 2 * u_rank * stride + u_rank * u_dim * kLanes + stride, 0.0f);
        float *wide = scratch.data(), *left = wide + u_dim * stride, *of_left = left + u_rank * stride;
        float *lanes = of_left + u_rank * stride, *line = lanes + u_rank * u_dim * kLanes;
        float* mine_v = &of_v[chunk * v_rank * stride];
        for (int64_t n = chunk * kChunk; n < std::min(rows, (chunk + 1) * kChunk); ++n) {
          for (int64_t i = 0; i < u_dim; ++i) {
            const T* from_x = px + n * in + i * v_dim;
            int64_t j = 0;
            for (; j + kLanes <= v_dim; j += kLanes) store(wide + i * stride + j, load(from_x + j));
            for (; j < v_dim; ++j) wide[i * stride + j] = static_cast<float>(from_x[j]);
          }
          int64_t a = 0;
          for (; a + 4 <= u_rank; a += 4) left_rows<4>(wide, pu.data() + a * u_dim, u_dim, stride, left + a * stride);
          for (; a < u_rank; ++a) left_rows<1>(wide, pu.data() + a * u_dim, u_dim, stride, left + a * stride);
          for (a = 0; a < u_rank; ++a) {
            const float* g = &of_z[n * rank + a * v_rank];
            small_product(g, v_rank, pv.data(), stride, of_left + a * stride);
            for (int64_t j = 0; j < v_rank; ++j)
              for (int64_t at = 0; at < stride; at += kLanes)
                store(mine_v + j * stride + at, load(mine_v + j * stride + at) + g[j] * load(left + a * stride + at));
          }
          for (int64_t i = 0; i < u_dim; ++i)
            for (a = 0; a < u_rank; ++a) {
              vf total = load(lanes + (a * u_dim + i) * kLanes);
              for (int64_t at = 0; at < stride; at += kLanes)
                total += load(of_left + a * stride + at) * load(wide + i * stride + at);
              store(lanes + (a * u_dim + i) * kLanes, total);
            }
          if (needs_x) {
            for (int64_t i = 0; i < u_dim; ++i) {
              T* to = pgx + n * in + i * v_dim;
              for (int64_t at = 0; at < stride; at += kLanes) {
                vf total = {};
                for (a = 0; a < u_rank; ++a) total += pu[a * u_dim + i] * load(of_left + a * stride + at);
                if (at + kLanes <= v_dim) {
                  store(to + at, total);
                } else {
                  store(line, total);
                  for (int64_t j = at; j < v_dim; ++j) to[j] = static_cast<T>(line[j - at]);
                }
              }
            }
          }
        }
        for (int64_t i = 0; i < u_rank * u_dim; ++i) of_u[chunk * u_rank * u_dim + i] = sum(load(lanes + i * kLanes));
      }
    });
    gb = turned_back(sum_over_rows(z.const_data_ptr<float>(), rank, rank, p, rows, width), rank, width);
    gu = as_tensor(column_sums(of_u, chunks, u_rank * u_dim, u_rank * u_dim), {u_rank, u_dim});
    const Floats total_v = column_sums(of_v, chunks, v_rank * stride, v_rank * stride);
    gv = at::empty({v_rank, v_dim}, at::kFloat);
    for (int64_t j = 0; j < v_rank; ++j)
      std::copy_n(&total_v[j * stride], v_dim, gv.mutable_data_ptr<float>() + j * v_dim);
  });
  return {gx, gu, gv, gb};
}

// ---- PT2: y' = y + s B (m * (1 + tanh(C u)) * z),  z = A x,  u = sqrt(R) z / |z|,  m: the k largest logits M u

template <typename T>
struct RankMask {
  Floats a, b, c_t, m_t;
  Control control;

  RankMask(const Tensor& a_, const Tensor& b_, const Maybe& c_, const Tensor& m_, int64_t in, int64_t width, int64_t active,
           bool is_task_mask, bool has_hadamard) {
    const int64_t rank = a_.size(0), padded = whole_vectors(rank);
    const float *from = master(a_, rank, in, "A"), root = std::sqrt(static_cast<float>(rank));
    a = Floats(from, from + rank * in);
    b = turned(master(b_, width, rank, "B"), width, rank, width);
    if (has_hadamard) {
      hadamard(a, rank, in);
      hadamard(b, rank, width);
    }
    round_to_type<T>(a);
    round_to_type<T>(b);
    if (c_.has_value()) c_t = turned(master(*c_, rank, rank, "C"), rank, rank, padded, root);
    m_t = is_task_mask ? widened_rows(master(m_, 1, rank, "mask_weight"), 1, rank, padded)
                       : turned(master(m_, rank, rank, "mask_weight"), rank, rank, padded, root);
    control = Control{c_t.data(), m_t.data(), c_.has_value(), is_task_mask, rank, padded, active};
  }
};

// y' and z (N, R padded)
std::tuple<Tensor, Tensor> rank_mask_forward(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                                             const Maybe& c, const Tensor& m, int64_t active, bool is_task_mask,
                                             bool has_hadamard, double temperature, double scaling) {
  check_rows(x, y);
  const int64_t in = x.size(-1), width = y.size(-1), rows = rows_of(y), rank = a.size(0), padded = whole_vectors(rank);
  Tensor out = at::empty_like(y), z = at::zeros({rows, padded}, at::kFloat);
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const RankMask<T> w(a, b, c, m, in, width, active, is_task_mask, has_hadamard);
    const T *px = x.const_data_ptr<T>(), *py = y.const_data_ptr<T>();
    T* po = out.mutable_data_ptr<T>();
    float* pz = z.mutable_data_ptr<float>();
    const float s = static_cast<float>(scaling);
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.assign((ROWS + 4) * padded, 0.0f);
      float *h = scratch.data(), *unit = h + ROWS * padded, *gate = unit + padded, *logits = gate + padded;
      float* kept = logits + padded;
      dots<ROWS>(px + row * in, in, in, w.a.data(), rank, pz + row * padded, padded);
      for (int i = 0; i < ROWS; ++i) {
        const float* line = pz + (row + i) * padded;
        control_row(w.control, line, unit, gate, logits, kept);
        for (int64_t at = 0; at < padded; at += kLanes)
          store(h + i * padded + at, load(line + at) * (s * load(kept + at)) * (1.0f + load(gate + at)));
      }
      up<ROWS>(Rows<T, float>{py + row * width, po + row * width, width, h, rank, padded, w.b.data()});
    });
  });
  return {out, z};
}

// slope of the straight-through mask at each logit: that of sigmoid((l - t) / temperature), t midway between the k-th
// and the next largest logit; 0 where all are kept
inline void mask_slope(const float* logits, int64_t rank, int64_t active, float temperature, float* slope) {
  if (active == rank) {
    std::fill(slope, slope + rank, 0.0f);
    return;
  }
  float last = 0.0f, next = 0.0f;
  for (int64_t i = 0; i < rank; ++i) {
    int64_t before = 0;
    for (int64_t j = 0; j < rank; ++j) before += logits[j] > logits[i] || (logits[j] == logits[i] && j < i);
    if (before == active - 1) last = logits[i];
    if (before == active) next = logits[i];
  }
  const float threshold = (last + next) / 2.0f;
  for (int64_t i = 0; i < rank; ++i) {
    const float soft = 1.0f / (1.0f + std::exp((threshold - logits[i]) / temperature));
    slope[i] = soft * (1.0f - soft) / temperature;
  }
}

// gradients of x, a, b, c, m; that of y is `given`
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rank_mask_backward(
    const Tensor& given, const Tensor& x, const Tensor& a, const Tensor& b, const Maybe& c, const Tensor& m, const Tensor& z,
    int64_t active, bool is_task_mask, bool has_hadamard, double temperature, double scaling, bool needs_x) {
  const Tensor gradient = given.contiguous();
  const int64_t in = x.size(-1), width = gradient.size(-1), rows = rows_of(gradient), rank = a.size(0), padded = z.size(1);
  Tensor gx = needs_x ? at::empty_like(x) : Tensor(), ga, gb, gc, gm;
  for_type(gradient, [&](auto zero) {
    using T = decltype(zero);
    const RankMask<T> w(a, b, c, m, in, width, active, is_task_mask, has_hadamard);
    const float s = static_cast<float>(scaling), root = std::sqrt(static_cast<float>(rank));
    const Floats c_rows = c.has_value() ? widened_rows(c->const_data_ptr<float>(), rank, rank, padded, root) : Floats();
    const Floats m_rows = is_task_mask ? Floats() : widened_rows(m.const_data_ptr<float>(), rank, rank, padded, root);
    const T *px = x.const_data_ptr<T>(), *p = gradient.const_data_ptr<T>();
    const float* pz = z.const_data_ptr<float>();
    T* pgx = needs_x ? gx.mutable_data_ptr<T>() : nullptr;
    // a token each: s m (1 + g) z, the gradients of z, of C u and of the logits (or of the mask, for a task's), and u
    Floats h(rows * padded, 0.0f), of_z(rows * padded, 0.0f), of_c(rows * padded, 0.0f), of_m(rows * padded, 0.0f);
    Floats units(rows * padded, 0.0f);
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.assign((ROWS + 6) * padded, 0.0f);
      float *up_z = scratch.data(), *gate = up_z + ROWS * padded, *logits = gate + padded, *kept = logits + padded;
      float *slope = kept + padded, *of_unit = slope + padded, *part = of_unit + padded;
      dots<ROWS>(p + row * width, width, width, w.b.data(), rank, up_z, padded);
      for (int i = 0; i < ROWS; ++i) {
        const int64_t at = (row + i) * padded;
        const float* line = pz + at;
        float *unit = &units[at], *mine_z = &of_z[at], *mine_c = &of_c[at], *mine_m = &of_m[at];
        const float norm = control_row(w.control, line, unit, gate, logits, kept);
        if (!is_task_mask) mask_slope(logits, rank, active, static_cast<float>(temperature), slope);
        for (int64_t j = 0; j < rank; ++j) {
          const float g = s * up_z[i * padded + j], factor = 1.0f + gate[j];
          h[at + j] = s * kept[j] * factor * line[j];
          mine_z[j] = g * kept[j] * factor;
          mine_c[j] = g * kept[j] * line[j] * (1.0f - gate[j] * gate[j]);
          mine_m[j] = g * factor * line[j] * (is_task_mask ? 1.0f : slope[j]);
        }
        if (w.control.has_gate || !is_task_mask) {
          std::fill(of_unit, of_unit + padded, 0.0f);
          if (w.control.has_gate) small_product(mine_c, rank, c_rows.data(), padded, of_unit);
          if (!is_task_mask) {
            small_product(mine_m, rank, m_rows.data(), padded, part);
            for (int64_t j = 0; j < rank; ++j) of_unit[j] += part[j];
          }
          float along = 0.0f;
          if (norm > 1e-20f)
            for (int64_t j = 0; j < rank; ++j) along += of_unit[j] * unit[j];
          for (int64_t j = 0; j < rank; ++j) mine_z[j] += (of_unit[j] - unit[j] * along) / norm;
        }
      }
      if (needs_x)
        up<ROWS>(Rows<T, float>{nullptr, pgx + row * in, in, &of_z[row * padded], rank, padded, w.a.data()});
    });
    Floats sum_a = sum_over_rows(of_z.data(), padded, rank, px, rows, in);
    Floats sum_b = sum_over_rows(h.data(), padded, rank, p, rows, width);
    if (has_hadamard) {
      hadamard(sum_a, rank, in);
      hadamard(sum_b, rank, width);
    }
    ga = as_tensor(sum_a, {rank, in});
    gb = turned_back(sum_b, rank, width);
    const auto control_sum = [&](const Floats& of) {
      const Floats wide = sum_over_rows(of.data(), padded, rank, units.data(), rows, padded);
      Tensor out = at::empty({rank, rank}, at::kFloat);
      float* to = out.mutable_data_ptr<float>();
      for (int64_t i = 0; i < rank; ++i)
        for (int64_t j = 0; j < rank; ++j) to[i * rank + j] = root * wide[i * padded + j];
      return out;
    };
    if (c.has_value()) gc = control_sum(of_c);
    if (is_task_mask) {
      Floats total = column_sums(of_m, rows, padded, rank), slope(rank);
      mask_slope(w.m_t.data(), rank, active, static_cast<float>(temperature), slope.data());
      for (int64_t j = 0; j < rank; ++j) total[j] *= slope[j];
      gm = as_tensor(total, {rank});
    } else {
      gm = control_sum(of_m);
    }
  });
  return {gx, ga, gb, gc, gm};
}

// ---- PT1: y' = y + s sum_g 2 sigmoid(gate_w stats(x) / temperature + bias)_g B_g A_g x_g

template <typename T>
struct HeadGating {
  int64_t heads, groups, rank, head_dim, group_dim, padded_heads, padded_groups;
  Floats a, b, gate_t, bias;

  HeadGating(const Tensor& a_, const Tensor& b_, const Tensor& gate_w, const Tensor& gate_bias, int64_t in, int64_t width,
             int64_t heads_, at::IntArrayRef ranks, double temperature) {
    heads = heads_, groups = static_cast<int64_t>(ranks.size()), rank = a_.size(0);
    TORCH_CHECK(std::accumulate(ranks.begin(), ranks.end(), int64_t{0}) == rank && in % heads == 0 && heads % groups == 0,
                "heads, groups and ranks do not fit");
    head_dim = in / heads, group_dim = in / groups, padded_heads = whole_vectors(heads), padded_groups = whole_vectors(groups);
    const float *from = master(a_, rank, group_dim, "A"), inverse = static_cast<float>(1.0 / temperature);
    a = Floats(from, from + rank * group_dim);
    b = turned(master(b_, width, rank, "B"), width, rank, width);
    round_to_type<T>(a);
    round_to_type<T>(b);
    gate_t = turned(master(gate_w, groups, 2 * heads, "gate_weight"), groups, 2 * heads, padded_groups, inverse);
    bias = widened_rows(master(gate_bias, 1, groups, "gate_bias"), 1, groups, padded_groups, inverse);
  }
};

// y', A_g x_g (N, R) and sigmoid (N, G padded)
std::tuple<Tensor, Tensor, Tensor> head_gating_forward(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                                                       const Tensor& gate_w, const Tensor& gate_bias, int64_t heads,
                                                       at::IntArrayRef ranks, double temperature, double scaling) {
  check_rows(x, y);
  const int64_t in = x.size(-1), width = y.size(-1), rows = rows_of(y), rank = a.size(0);
  const int64_t padded = whole_vectors(static_cast<int64_t>(ranks.size()));
  Tensor out = at::empty_like(y), low = at::empty({rows, rank}, at::kFloat), half = at::empty({rows, padded}, at::kFloat);
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const HeadGating<T> w(a, b, gate_w, gate_bias, in, width, heads, ranks, temperature);
    const T *px = x.const_data_ptr<T>(), *py = y.const_data_ptr<T>();
    T* po = out.mutable_data_ptr<T>();
    float *pl = low.mutable_data_ptr<float>(), *ph = half.mutable_data_ptr<float>();
    const float twice = 2.0f * static_cast<float>(scaling);
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.assign(ROWS * rank + 4 * w.padded_heads, 1.0f);
      float *z = scratch.data(), *room = z + ROWS * rank, *mine = pl + row * rank;
      HeadStatistics stats{room, room + w.padded_heads, room + 2 * w.padded_heads, room + 3 * w.padded_heads};
      for (int64_t g = 0, start = 0; g < w.groups; start += ranks[g++])
        dots<ROWS>(px + row * in + g * w.group_dim, in, w.group_dim, w.a.data() + start * w.group_dim, ranks[g], mine + start,
                   rank);
      for (int i = 0; i < ROWS; ++i) {
        float* gates = ph + (row + i) * padded;
        head_statistics(px + (row + i) * in, heads, w.head_dim, stats);
        gate_row(stats, heads, w.gate_t.data(), w.bias.data(), padded, 1.0f, gates);
        for (int64_t g = 0, start = 0; g < w.groups; start += ranks[g++])
          for (int64_t j = start; j < start + ranks[g]; ++j) z[i * rank + j] = twice * gates[g] * mine[i * rank + j];
      }
      up<ROWS>(Rows<T, float>{py + row * width, po + row * width, width, z, rank, rank, w.b.data()});
    });
  });
  return {out, low, half};
}

// gradients of x, a, b, gate_w, gate_bias; that of y is `given`
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head_gating_backward(
    const Tensor& given, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& gate_w, const Tensor& gate_bias,
    const Tensor& low, const Tensor& half, int64_t heads, at::IntArrayRef ranks, double temperature, double scaling,
    bool needs_x) {
  const Tensor gradient = given.contiguous();
  const int64_t in = x.size(-1), width = gradient.size(-1), rows = rows_of(gradient), rank = a.size(0), padded = half.size(1);
  const int64_t stats_width = whole_vectors(2 * heads);
  Tensor gx = needs_x ? at::empty_like(x) : Tensor(), ga, gb, ggate, gbias;
  for_type(gradient, [&](auto zero) {
    using T = decltype(zero);
    const HeadGating<T> w(a, b, gate_w, gate_bias, in, width, heads, ranks, temperature);
    const float inverse = static_cast<float>(1.0 / temperature), twice = 2.0f * static_cast<float>(scaling);
    const Floats gate_rows = widened_rows(gate_w.const_data_ptr<float>(), w.groups, 2 * heads, stats_width, inverse);
    const T *px = x.const_data_ptr<T>(), *p = gradient.const_data_ptr<T>();
    const float *pl = low.const_data_ptr<float>(), *ph = half.const_data_ptr<float>();
    T* pgx = needs_x ? gx.mutable_data_ptr<T>() : nullptr;
    Floats gated(rows * rank), of_low(rows * rank), of_logits(rows * padded, 0.0f), all_stats(rows * stats_width, 0.0f);
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.assign(ROWS * rank + 4 * w.padded_heads + stats_width + 2 * ROWS * heads + in, 1.0f);
      float *up_z = scratch.data(), *room = up_z + ROWS * rank, *of_stats = room + 4 * w.padded_heads;
      float *along = of_stats + stats_width, *flat = along + ROWS * heads, *wide = flat + ROWS * heads;
      HeadStatistics stats{room, room + w.padded_heads, room + 2 * w.padded_heads, room + 3 * w.padded_heads};
      dots<ROWS>(p + row * width, width, width, w.b.data(), rank, up_z, rank);
      for (int i = 0; i < ROWS; ++i) {
        const int64_t n = row + i;
        head_statistics(px + n * in, heads, w.head_dim, stats);
        std::copy_n(stats.energy, heads, &all_stats[n * stats_width]);
        std::copy_n(stats.evenness, heads, &all_stats[n * stats_width + heads]);
        for (int64_t g = 0, start = 0; g < w.groups; start += ranks[g++]) {
          const float sigmoid = ph[n * padded + g], gate = twice * sigmoid;
          float of_gate = 0.0f;
          for (int64_t j = start; j < start + ranks[g]; ++j) {
            of_gate += up_z[i * rank + j] * pl[n * rank + j];
            of_low[n * rank + j] = up_z[i * rank + j] * gate;
            gated[n * rank + j] = gate * pl[n * rank + j];
          }
          of_logits[n * padded + g] = of_gate * gate * (1.0f - sigmoid);
        }
        if (!needs_x) continue;
        small_product(&of_logits[n * padded], w.groups, gate_rows.data(), stats_width, of_stats);
        float whole = 0.0f;
        for (int64_t h = 0; h < heads; ++h) whole += of_stats[h];
        for (int64_t h = 0; h < heads; ++h) {  // d stats / d x_h = along x_h + flat, in terms of x_h / |x_h|
          const float norm = stats.norm[h], energy = of_stats[h], even = of_stats[heads + h];
          const bool is_zero = !(norm > 1e-20f);
          const float unit = (2.0f * energy - 2.0f * stats.evenness[h] * even) / norm -
                             2.0f * whole * (norm / stats.largest) / (stats.largest * stats.total);
          along[i * heads + h] = is_zero ? 0.0f : unit / norm;
          flat[i * heads + h] = is_zero ? 0.0f : 2.0f * stats.cosine[h] * even / norm;
        }
      }
      if (!needs_x) return;
      for (int i = 0; i < ROWS; ++i) {
        const int64_t n = row + i;
        const float* line = widened(px + n * in, in, wide);
        for (int64_t h = 0; h < heads; ++h) {
          const float factor = along[i * heads + h], constant = flat[i * heads + h];
          int64_t at = h * w.head_dim;
          const int64_t stop = at + w.head_dim;
          for (; at + kLanes <= stop; at += kLanes) store(wide + at, factor * load(line + at) + constant);
          for (; at < stop; ++at) wide[at] = factor * line[at] + constant;
        }
        for (int64_t g = 0, start = 0; g < w.groups; start += ranks[g++])
          for (int64_t at = 0; at < w.group_dim; at += kLanes) {
            const int64_t left = std::min(kLanes, w.group_dim - at), place = g * w.group_dim + at;
            if (left == kLanes) {
              vf total = load(wide + place);
              for (int64_t j = start; j < start + ranks[g]; ++j)
                total += of_low[n * rank + j] * load(w.a.data() + j * w.group_dim + at);
              store(pgx + n * in + place, total);
              continue;
            }
            for (int64_t k = 0; k < left; ++k) {
              float total = wide[place + k];
              for (int64_t j = start; j < start + ranks[g]; ++j) total += of_low[n * rank + j] * w.a[j * w.group_dim + at + k];
              pgx[n * in + place + k] = static_cast<T>(total);
            }
          }
      }
    });
    gb = turned_back(sum_over_rows(gated.data(), rank, rank, p, rows, width), rank, width);
    // the rows of A of a group meet its columns of x alone
    ga = at::empty({rank, w.group_dim}, at::kFloat);
    float* pga = ga.mutable_data_ptr<float>();
    std::vector<T> columns(rows * w.group_dim);
    for (int64_t g = 0, start = 0; g < w.groups; start += ranks[g++]) {
      for (int64_t n = 0; n < rows; ++n)
        std::copy_n(px + n * in + g * w.group_dim, w.group_dim, &columns[n * w.group_dim]);
      const Floats part = sum_over_rows(&of_low[start], rank, ranks[g], columns.data(), rows, w.group_dim);
      std::copy(part.begin(), part.end(), pga + start * w.group_dim);
    }
    const Floats control = sum_over_rows(of_logits.data(), padded, w.groups, all_stats.data(), rows, stats_width);
    ggate = at::empty({w.groups, 2 * heads}, at::kFloat);
    float* pgate = ggate.mutable_data_ptr<float>();
    for (int64_t g = 0; g < w.groups; ++g)
      for (int64_t j = 0; j < 2 * heads; ++j) pgate[g * 2 * heads + j] = inverse * control[g * stats_width + j];
    Floats sums = column_sums(of_logits, rows, padded, w.groups);
    for (float& value : sums) value *= inverse;
    gbias = as_tensor(sums, {w.groups});
  });
  return {gx, ga, gb, ggate, gbias};
}

// ---- autograd

// Who calls: a number that Python knows an adapter by, and whether the adapter is in training. Python names the caller
// just before the call (`name_caller`); a call without one has no torch form.
struct Caller {
  int64_t number = 0;
  bool is_training = false;
};
thread_local Caller next_caller;
PyObject* torch_form = nullptr;  // (number, is_training, [x, y, masters], gradient) -> their gradients, or None

void remember_caller(AutogradContext* ctx) {
  ctx->saved_data["caller"] = next_caller.number;
  ctx->saved_data["is_training"] = next_caller.is_training;
  next_caller = Caller{};
}

// The gradients of x, y and the masters (undefined where there is none) by autograd through the torch form: where this
// backward is differentiated again (create_graph), or runs under vmap, in a dual level or on tensors of a subclass.
// `options` undefined ones follow. Empty: the operator may compute it.
variable_list by_torch_form(AutogradContext* ctx, const variable_list& inputs, const Tensor& gradient, int options) {
  if (!at::GradMode::is_enabled() && is_plain(gradient)) return {};
  variable_list gradients;
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject* given = PyList_New(0);
  for (const Tensor& input : inputs) {
    PyObject* item = input.defined() ? THPVariable_Wrap(input) : Py_NewRef(Py_None);
    PyList_Append(given, item);
    Py_DECREF(item);
  }
  PyObject* found = PyObject_CallFunction(
      torch_form, "LONN", static_cast<long long>(ctx->saved_data["caller"].toInt()),
      ctx->saved_data["is_training"].toBool() ? Py_True : Py_False, given, THPVariable_Wrap(gradient));
  if (found == nullptr) {
    python_error error;
    error.persist();
    PyGILState_Release(state);
    throw std::move(error);
  }
  if (found != Py_None) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(found); ++i) {
      PyObject* item = PyList_GET_ITEM(found, i);
      gradients.push_back(item == Py_None ? Tensor() : THPVariable_Unpack(item));
    }
    if (!inputs[1].requires_grad()) gradients[1] = gradient;  // y that was not kept: it is added, or wants no gradient
    gradients.resize(gradients.size() + options);
  }
  Py_DECREF(found);
  PyGILState_Release(state);
  return gradients;
}

struct Film : torch::autograd::Function<Film> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& w, const Tensor& bias,
                        const Maybe& gamma, const Maybe& beta, double scaling, double clamp_range, double max_beta,
                        bool is_rms, const Maybe& unstable, double threshold) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operation<decltype(film_forward)>("bem_peft_cpu::film_train");
    auto [out, c, rms] = op.call(x, y, w, bias, gamma, beta, scaling, clamp_range, max_beta, is_rms,
                                 unstable, threshold);
    remember_caller(ctx);
    ctx->save_for_backward({x, y, w, bias, or_nothing(gamma), or_nothing(beta), c, rms});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["clamp_range"] = clamp_range;
    ctx->saved_data["max_beta"] = max_beta;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const variable_list inputs{saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]};
    if (variable_list found = by_torch_form(ctx, inputs, gradients[0], 6); !found.empty()) return found;
    static const auto op = operation<decltype(film_backward)>("bem_peft_cpu::film_backward");
    auto [gx, gy, gw, gbias, ggamma, gbeta] = op.call(
        gradients[0], saved[0], saved[1], saved[2], or_none(saved[4]), or_none(saved[5]), saved[6], saved[7],
        ctx->saved_data["scaling"].toDouble(), ctx->saved_data["clamp_range"].toDouble(),
        ctx->saved_data["max_beta"].toDouble(), ctx->needs_input_grad(0));
    return {gx, gy, gw, gbias, ggamma, gbeta, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct Kronecker : torch::autograd::Function<Kronecker> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& u, const Tensor& v,
                        const Tensor& b, double scaling) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operation<decltype(kronecker_forward)>("bem_peft_cpu::kronecker_train");
    auto [out, z] = op.call(x, y, u, v, b, scaling);
    remember_caller(ctx);
    ctx->save_for_backward({x, u, v, b, z});
    ctx->saved_data["scaling"] = scaling;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const variable_list inputs{saved[0], like_output(saved[0], gradients[0]), saved[1], saved[2], saved[3]};
    if (variable_list found = by_torch_form(ctx, inputs, gradients[0], 1); !found.empty()) return found;
    static const auto op = operation<decltype(kronecker_backward)>("bem_peft_cpu::kronecker_backward");
    auto [gx, gu, gv, gb] = op.call(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                                    ctx->saved_data["scaling"].toDouble(), ctx->needs_input_grad(0));
    return {gx, gradients[0], gu, gv, gb, Tensor()};
  }
};

struct RankMasking : torch::autograd::Function<RankMasking> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                        const Maybe& c, const Tensor& m, int64_t active, bool is_task_mask, bool has_hadamard,
                        double temperature, double scaling) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operation<decltype(rank_mask_forward)>("bem_peft_cpu::rank_mask_train");
    auto [out, z] = op.call(x, y, a, b, c, m, active, is_task_mask, has_hadamard, temperature, scaling);
    remember_caller(ctx);
    ctx->save_for_backward({x, a, b, or_nothing(c), m, z});
    ctx->saved_data["active"] = active;
    ctx->saved_data["is_task_mask"] = is_task_mask;
    ctx->saved_data["has_hadamard"] = has_hadamard;
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["scaling"] = scaling;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const variable_list inputs{saved[0], like_output(saved[0], gradients[0]), saved[1], saved[2], saved[3], saved[4]};
    if (variable_list found = by_torch_form(ctx, inputs, gradients[0], 5); !found.empty()) return found;
    static const auto op = operation<decltype(rank_mask_backward)>("bem_peft_cpu::rank_mask_backward");
    auto [gx, ga, gb, gc, gm] = op.call(
        gradients[0], saved[0], saved[1], saved[2], or_none(saved[3]), saved[4], saved[5], ctx->saved_data["active"].toInt(),
        ctx->saved_data["is_task_mask"].toBool(), ctx->saved_data["has_hadamard"].toBool(),
        ctx->saved_data["temperature"].toDouble(), ctx->saved_data["scaling"].toDouble(), ctx->needs_input_grad(0));
    return {gx, gradients[0], ga, gb, gc, gm, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct HeadGates : torch::autograd::Function<HeadGates> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                        const Tensor& gate_w, const Tensor& gate_bias, int64_t heads, at::IntArrayRef ranks,
                        double temperature, double scaling) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operation<decltype(head_gating_forward)>("bem_peft_cpu::head_gating_train");
    auto [out, low, half] = op.call(x, y, a, b, gate_w, gate_bias, heads, ranks, temperature, scaling);
    remember_caller(ctx);
    ctx->save_for_backward({x, a, b, gate_w, gate_bias, low, half});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["ranks"] = ranks.vec();
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["scaling"] = scaling;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const variable_list inputs{saved[0], like_output(saved[0], gradients[0]), saved[1], saved[2], saved[3], saved[4]};
    if (variable_list found = by_torch_form(ctx, inputs, gradients[0], 4); !found.empty()) return found;
    static const auto op = operation<decltype(head_gating_backward)>("bem_peft_cpu::head_gating_backward");
    const auto ranks = ctx->saved_data["ranks"].toIntVector();
    auto [gx, ga, gb, ggate, gbias] = op.call(
        gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], ctx->saved_data["heads"].toInt(),
        ranks, ctx->saved_data["temperature"].toDouble(), ctx->saved_data["scaling"].toDouble(), ctx->needs_input_grad(0));
    return {gx, gradients[0], ga, gb, ggate, gbias, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// what the dispatcher calls where a gradient is asked for; the coefficients that are kept are of no use outside
std::tuple<Tensor, Tensor, Tensor> film_autograd(
    const Tensor& x, const Tensor& y, const Tensor& w, const Tensor& bias, const Maybe& gamma, const Maybe& beta,
    double scaling, double clamp_range, double max_beta, bool is_rms, const Maybe& unstable, double threshold) {
  Tensor out = Film::apply(x, y, w, bias, gamma, beta, scaling, clamp_range, max_beta, is_rms,
                           unstable, threshold);
  return {out, at::empty({0}), at::empty({0})};
}
std::tuple<Tensor, Tensor> kronecker_autograd(const Tensor& x, const Tensor& y, const Tensor& u, const Tensor& v,
                                              const Tensor& b, double scaling) {
  return {Kronecker::apply(x, y, u, v, b, scaling), at::empty({0})};
}
std::tuple<Tensor, Tensor> rank_mask_autograd(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                                              const Maybe& c, const Tensor& m, int64_t active, bool is_task_mask,
                                              bool has_hadamard, double temperature, double scaling) {
  return {RankMasking::apply(x, y, a, b, c, m, active, is_task_mask, has_hadamard, temperature, scaling),
          at::empty({0})};
}
std::tuple<Tensor, Tensor, Tensor> head_gating_autograd(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                                                        const Tensor& gate_w, const Tensor& gate_bias, int64_t heads,
                                                        at::IntArrayRef ranks, double temperature, double scaling) {
  return {HeadGates::apply(x, y, a, b, gate_w, gate_bias, heads, ranks, temperature, scaling), at::empty({0}), at::empty({0})};
}

}  // namespace

namespace bem {

// name_caller(number, is_training)
PyObject* name_caller(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 2, "name_caller(number, is_training)");
  next_caller = Caller{PyLong_AsLongLong(args[0]), args[1] == Py_True};
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// set_torch_form(function)
PyObject* set_torch_form(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 1, "set_torch_form(function)");
  Py_XSETREF(torch_form, Py_NewRef(args[0]));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace bem

TORCH_LIBRARY_FRAGMENT(bem_peft_cpu, m) {
  m.def("film_train(Tensor x, Tensor y, Tensor w, Tensor bias, Tensor? gamma, Tensor? beta, float scaling, "
        "float clamp_range, float max_beta, bool is_rms, Tensor(a!)? unstable, float threshold) -> (Tensor, Tensor, Tensor)");
  m.def("film_backward(Tensor gradient, Tensor x, Tensor y, Tensor w, Tensor? gamma, Tensor? beta, Tensor c, Tensor rms, "
        "float scaling, float clamp_range, float max_beta, bool needs_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("kronecker_train(Tensor x, Tensor y, Tensor u, Tensor v, Tensor b, float scaling) -> (Tensor, Tensor)");
  m.def("kronecker_backward(Tensor gradient, Tensor x, Tensor u, Tensor v, Tensor b, Tensor z, float scaling, bool needs_x) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rank_mask_train(Tensor x, Tensor y, Tensor a, Tensor b, Tensor? c, Tensor m, int active, bool is_task_mask, "
        "bool has_hadamard, float temperature, float scaling) -> (Tensor, Tensor)");
  m.def("rank_mask_backward(Tensor gradient, Tensor x, Tensor a, Tensor b, Tensor? c, Tensor m, Tensor z, int active, "
        "bool is_task_mask, bool has_hadamard, float temperature, float scaling, bool needs_x) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("head_gating_train(Tensor x, Tensor y, Tensor a, Tensor b, Tensor gate_w, Tensor gate_bias, int heads, int[] ranks, "
        "float temperature, float scaling) -> (Tensor, Tensor, Tensor)");
  m.def("head_gating_backward(Tensor gradient, Tensor x, Tensor a, Tensor b, Tensor gate_w, Tensor gate_bias, Tensor low, "
        "Tensor half, int heads, int[] ranks, float temperature, float scaling, bool needs_x) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bem_peft_cpu, CPU, m) {
  m.impl("film_train", film_forward);
  m.impl("film_backward", film_backward);
  m.impl("kronecker_train", kronecker_forward);
  m.impl("kronecker_backward", kronecker_backward);
  m.impl("rank_mask_train", rank_mask_forward);
  m.impl("rank_mask_backward", rank_mask_backward);
  m.impl("head_gating_train", head_gating_forward);
  m.impl("head_gating_backward", head_gating_backward);
}

TORCH_LIBRARY_IMPL(bem_peft_cpu, AutogradCPU, m) {
  m.impl("film_train", film_autograd);
  m.impl("kronecker_train", kronecker_autograd);
  m.impl("rank_mask_train", rank_mask_autograd);
  m.impl("head_gating_train", head_gating_autograd);
}
