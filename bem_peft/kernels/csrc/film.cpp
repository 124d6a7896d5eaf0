// PT4: y' = y (1 + gamma) + beta rho, gamma and beta from c = tanh(W x / r + b); r = rms(y) or 1, rho likewise

#include "gradients.h"

#include <atomic>
#include <tuple>

namespace {

using namespace bem;

template <typename T>
float root_mean_square(const T* line, int64_t width) {
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

constexpr float kSmallestRms = 1e-6f;  // that W x is divided by

// c = tanh(x w / r + bias); g = c[:gamma_dim]; z = c[:beta_dim] (rms(y))
void film(const View& x, const View& y, const View& w, const View& bias, const View& gamma, const View& beta,
          bool is_relative, bool is_rms, const View& out) {
  check_rows(x, y);
  const int64_t in = x.columns, width = y.columns, units = w.rows, padded = bias.columns;
  const int64_t gamma_dim = gamma.rows, beta_dim = beta.rows;
  const float* p_bias = weight<float>(bias, 1, padded, "bias");
  check(padded % kLanes == 0 && units <= padded && gamma_dim <= units && beta_dim <= units, "units do not fit");
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = result<T>(out, y.count(), "y'");
    const T *pw = weight<T>(w, units, in, "w"), *pg = weight<T>(gamma, gamma_dim, width, "gamma");
    const T* pt = weight<T>(beta, beta_dim, width, "beta");
    over_rows(y.rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.assign(2 * ROWS * padded, 0.0f);
      float *c = scratch.data(), *z = c + ROWS * padded;
      dots<ROWS>(px + row * in, in, in, pw, units, c, padded);
      for (int i = 0; i < ROWS; ++i) {
        const bool scales_beta = is_rms && beta_dim > 0;
        const float rms = is_relative || scales_beta ? root_mean_square(py + (row + i) * width, width) : 1.0f;
        const float factor = scales_beta ? rms : 1.0f, share = is_relative ? 1.0f / std::max(rms, kSmallestRms) : 1.0f;
        for (int64_t at = 0; at < padded; at += kLanes) {
          vf value = vtanh(fused(load(c + i * padded + at), splat(share), load(p_bias + at)));
          store(c + i * padded + at, value);
          store(z + i * padded + at, value * factor);
        }
      }
      up<ROWS>(Rows<T, T>{py + row * width, po + row * width, width, z, beta_dim, padded, pt, c, gamma_dim, padded, pg});
    });
  });
}

// G^T (units, out), a row of coefficients bounded as a whole: bound s w / (1 + s |w|_1), rounded to T
template <typename T>
Floats bounded(const View& weight, int64_t width, float scaling, float bound) {
  const int64_t units = weight.columns;
  if (!weight.is_there()) return {};
  const float* w = master(weight, width, units, "gamma or beta");
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
void bounded_backward(const Floats& gradient, const View& weight, float scaling, float bound, const View& to) {
  const int64_t width = weight.rows, units = weight.columns;
  const float* w = weight.as<float>();
  const float eps = std::is_same_v<T, float> ? 0x1p-23f : 0x1p-7f;
  const float kept = bound * (1.0f - 2.0f * eps);
  float* p = result<float>(to, width * units, "a gradient");
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

// y', c and, where that is not 1, W x / r, both (N, units padded), and rms(y) (N), empty where nothing reads it
void film_train(const View& x, const View& y, const View& w, const View& bias, const View& gamma, const View& beta,
                double scaling, double clamp_range, double max_beta, bool is_relative, bool is_rms, const View& unstable,
                double threshold, const View& out, const View& c, const View& read, const View& rms) {
  check_rows(x, y);
  const int64_t in = x.columns, width = y.columns, rows = y.rows, units = w.rows, padded = whole_vectors(units);
  const int64_t gamma_dim = gamma.columns, beta_dim = beta.columns;
  check(gamma_dim <= units && beta_dim <= units, "gamma and beta read at most the ", units, " units");
  const bool scales_beta = is_rms && beta_dim > 0, has_rms = is_relative || scales_beta;
  float *pc = result<float>(c, rows * padded, "c"), *pr = result<float>(rms, has_rms ? rows : 0, "rms(y)");
  float* pd = result<float>(read, is_relative ? rows * padded : 0, "W x / r");
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(w, units, in, "controller_weight");
    Floats pw(from, from + units * in), pb = widened_rows(master(bias, 1, units, "controller_bias"), 1, units, padded);
    round_to_type<T>(pw);
    round_to_type<T>(pb);
    const Floats pg = bounded<T>(gamma, width, scaling, clamp_range), pt = bounded<T>(beta, width, scaling, max_beta);
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = result<T>(out, y.count(), "y'");
    std::atomic<bool> is_sound{true};
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.resize(ROWS * padded);
      float *mine = pc + row * padded, *z = scratch.data();
      std::fill_n(mine, ROWS * padded, 0.0f);
      dots<ROWS>(px + row * in, in, in, pw.data(), units, mine, padded);
      for (int i = 0; i < ROWS; ++i) {
        float factor = 1.0f, share = 1.0f;
        if (has_rms) {
          const float found = pr[row + i] = root_mean_square(py + (row + i) * width, width);
          if (scales_beta) factor = found;
          if (is_relative) share = 1.0f / std::max(found, kSmallestRms);
        }
        for (int64_t at = 0; at < padded; at += kLanes) {
          const vf found = load(mine + i * padded + at);
          if (is_relative) store(pd + (row + i) * padded + at, found * share);
          const vf value = vtanh(fused(found, splat(share), load(pb.data() + at)));
          store(mine + i * padded + at, value);
          store(z + i * padded + at, value * factor);
        }
      }
      up<ROWS>(Rows<T, float>{py + row * width, po + row * width, width, z, beta_dim, padded, pt.data(), mine, gamma_dim,
                              padded, pg.data()});
      if (unstable.is_there() && !is_within(po + row * width, ROWS * width, static_cast<float>(threshold)))
        is_sound.store(false, std::memory_order_relaxed);
    });
    if (!is_sound.load()) *result<bool>(unstable, 1, "unstable") = true;
  });
}

// gradients of x, y, w, bias, gamma, beta
void film_backward(const View& gradient, const View& x, const View& y, const View& w, const View& gamma, const View& beta,
                   const View& c, const View& read, const View& rms, double scaling, double clamp_range, double max_beta,
                   bool is_rms, bool needs_x, const View& gx, const View& gy, const View& gw, const View& gbias,
                   const View& ggamma, const View& gbeta) {
  check_rows(x, y);
  check_rows(gradient, y);
  const int64_t in = x.columns, width = y.columns, rows = y.rows, units = w.rows, padded = c.columns;
  const int64_t gamma_dim = gamma.columns, beta_dim = beta.columns;
  const float *pc = master(c, rows, padded, "c"), *pr = rms.as<float>(), *pd = read.as<float>();
  const bool is_relative = read.count() > 0, has_rms = rms.count() > 0, scales_beta = is_rms && beta_dim > 0;
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(w, units, in, "controller_weight");
    Floats pw(from, from + units * in);
    round_to_type<T>(pw);
    const Floats pg = bounded<T>(gamma, width, scaling, clamp_range), pt = bounded<T>(beta, width, scaling, max_beta);
    const T *px = x.as<T>(), *py = y.as<T>(), *p = gradient.as<T>();
    T *pgx = needs_x ? result<T>(gx, x.count(), "a gradient") : nullptr, *pgy = result<T>(gy, y.count(), "a gradient");
    // gradients of W x, and of the argument of tanh, which is the same where r is 1
    Floats before(rows * padded, 0.0f), inner(is_relative ? rows * padded : 0, 0.0f);
    Floats units_of_beta(beta_dim > 0 ? rows * padded : 0, 0.0f);
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
        const float found = has_rms ? pr[row + i] : 1.0f, factor = scales_beta ? found : 1.0f;
        const float share = is_relative ? 1.0f / std::max(found, kSmallestRms) : 1.0f;
        const float* mine = pc + (row + i) * padded;
        float of_rms = 0.0f;
        for (int64_t u = 0; u < beta_dim; ++u) {
          if (scales_beta) of_rms += mine[u] * of_beta[i * padded + u];
          units_of_beta[(row + i) * padded + u] = factor * mine[u];
        }
        for (int64_t u = 0; u < units; ++u) {
          const int64_t at = (row + i) * padded + u;
          const float whole = of_gamma[i * padded + u] + factor * of_beta[i * padded + u];
          const float of_sum = whole * (1.0f - mine[u] * mine[u]);
          before[at] = of_sum * share;
          if (is_relative) {
            inner[at] = of_sum;
            if (found > kSmallestRms) of_rms -= of_sum * pd[at] * share;
          }
        }
        k[i] = has_rms && found > 0.0f ? of_rms / (found * static_cast<float>(width)) : 0.0f;
      }
      up<ROWS>(Rows<T, float>{p + row * width, pgy + row * width, width, nullptr, 0, 0, nullptr, pc + row * padded,
                              gamma_dim, padded, pg.data(), py + row * width, k});
      if (needs_x)
        up<ROWS>(Rows<T, float>{nullptr, pgx + row * in, in, &before[row * padded], units, padded, pw.data()});
    });
    copy(sum_over_rows(before.data(), padded, units, px, rows, in), gw);
    copy(column_sums(is_relative ? inner : before, rows, padded, units), gbias);
    if (gamma_dim > 0)
      bounded_backward<T>(sum_over_rows(pc, padded, gamma_dim, p, rows, width, py), gamma, scaling, clamp_range, ggamma);
    if (beta_dim > 0)
      bounded_backward<T>(sum_over_rows(units_of_beta.data(), padded, beta_dim, p, rows, width), beta, scaling, max_beta,
                          gbeta);
  });
}

// what `film` reads, of the masters as `film_train` rounds and bounds them: W and the bounded rows in the dtype of `like`,
// the bias padded in float32
void film_pack(const View& like, const View& w, const View& bias, const View& gamma, const View& beta, double scaling,
               double clamp_range, double max_beta, const View& to_w, const View& to_bias, const View& to_gamma,
               const View& to_beta) {
  const int64_t units = w.rows;
  for_type(like, [&](auto zero) {
    using T = decltype(zero);
    write_as<T>(master(w, units, w.columns, "controller_weight"), w.count(), to_w, "w");
    Floats pb = widened_rows(master(bias, 1, units, "controller_bias"), 1, units, whole_vectors(units));
    round_to_type<T>(pb);
    copy(pb, to_bias);
    for (const auto& [rows, bound, to] : {std::tuple(&gamma, clamp_range, &to_gamma), std::tuple(&beta, max_beta, &to_beta)})
      if (rows->is_there()) write_as<T>(bounded<T>(*rows, rows->rows, scaling, bound), rows->count(), *to, "gamma or beta");
  });
}

[[maybe_unused]] const bool is_added = add_operator<film>("film") && add_operator<film_train>("film_train") &&
                                       add_operator<film_backward>("film_backward") &&
                                       add_operator<film_pack>("film_pack");

}  // namespace
