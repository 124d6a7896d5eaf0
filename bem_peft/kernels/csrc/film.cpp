// PT4: y' = y (1 + gamma) + beta rho, gamma and beta from c = tanh(W x / r + b); r = rms(y) or 1, rho likewise

#include "gradients.h"
#include "site.h"

#include <atomic>

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
Tensor film(bool overwrite, const Tensor& x, const Tensor& y, const Tensor& w, const Tensor& bias, const Tensor& gamma,
            const Tensor& beta, bool is_relative, bool is_rms) {
  const int64_t in = x.size(-1), width = y.size(-1), units = w.size(0), padded = bias.size(1);
  const int64_t gamma_dim = gamma.size(0), beta_dim = beta.size(0);
  const float* p_bias = weight<float>(bias, 1, padded, "bias");
  TORCH_CHECK(padded % kLanes == 0 && units <= padded && gamma_dim <= units && beta_dim <= units, "units do not fit");
  return for_dtype(x, y, overwrite, [&](auto px, auto py, auto po) {
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
        const bool scales_beta = is_rms && beta_dim > 0;
        const float rms = is_relative || scales_beta ? root_mean_square(py + (row + i) * width, width) : 1.0f;
        const float factor = scales_beta ? rms : 1.0f, share = is_relative ? 1.0f / std::max(rms, kSmallestRms) : 1.0f;
        for (int64_t at = 0; at < padded; at += kLanes) {
          vf value = vtanh(load(c + i * padded + at) * share + load(p_bias + at));
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

// y', c and, where that is not 1, W x / r, both (N, units padded), and rms(y) (N), empty where nothing reads it
std::tuple<Tensor, Tensor, Tensor, Tensor> film_forward(
    const Tensor& x, const Tensor& y, const Tensor& w, const Tensor& bias, const Maybe& gamma, const Maybe& beta,
    double scaling, double clamp_range, double max_beta, bool is_relative, bool is_rms, const Maybe& unstable,
    double threshold) {
  check_rows(x, y);
  const int64_t in = x.size(-1), width = y.size(-1), rows = rows_of(y), units = w.size(0), padded = whole_vectors(units);
  const int64_t gamma_dim = gamma.has_value() ? gamma->size(1) : 0, beta_dim = beta.has_value() ? beta->size(1) : 0;
  TORCH_CHECK(gamma_dim <= units && beta_dim <= units, "gamma and beta read at most the ", units, " units");
  Tensor out = at::empty_like(y), c = at::zeros({rows, padded}, at::kFloat);
  const bool scales_beta = is_rms && beta_dim > 0;
  Tensor rms = at::empty({is_relative || scales_beta ? rows : 0}, at::kFloat);
  Tensor read = at::zeros({is_relative ? rows : 0, padded}, at::kFloat);
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(w, units, in, "controller_weight");
    Floats pw(from, from + units * in), pb = widened_rows(master(bias, 1, units, "controller_bias"), 1, units, padded);
    round_to_type<T>(pw);
    round_to_type<T>(pb);
    const Floats pg = bounded<T>(gamma, width, scaling, clamp_range), pt = bounded<T>(beta, width, scaling, max_beta);
    const T *px = x.const_data_ptr<T>(), *py = y.const_data_ptr<T>();
    T* po = out.mutable_data_ptr<T>();
    float *pc = c.mutable_data_ptr<float>(), *pr = rms.mutable_data_ptr<float>(), *pd = read.mutable_data_ptr<float>();
    std::atomic<bool> is_sound{true};
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.resize(ROWS * padded);
      float *mine = pc + row * padded, *z = scratch.data();
      dots<ROWS>(px + row * in, in, in, pw.data(), units, mine, padded);
      for (int i = 0; i < ROWS; ++i) {
        float factor = 1.0f, share = 1.0f;
        if (rms.numel() > 0) {
          const float found = pr[row + i] = root_mean_square(py + (row + i) * width, width);
          if (scales_beta) factor = found;
          if (is_relative) share = 1.0f / std::max(found, kSmallestRms);
        }
        for (int64_t at = 0; at < padded; at += kLanes) {
          const vf divided = load(mine + i * padded + at) * share;
          if (is_relative) store(pd + (row + i) * padded + at, divided);
          const vf value = vtanh(divided + load(pb.data() + at));
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
  return {out, c, read, rms};
}

// gradients of x, y, w, bias, gamma, beta
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> film_backward(
    const Tensor& given, const Tensor& x, const Tensor& y, const Tensor& w, const Maybe& gamma, const Maybe& beta,
    const Tensor& c, const Tensor& read, const Tensor& rms, double scaling, double clamp_range, double max_beta, bool is_rms,
    bool needs_x) {
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
    const float *pc = c.const_data_ptr<float>(), *pr = rms.const_data_ptr<float>(), *pd = read.const_data_ptr<float>();
    const bool is_relative = read.numel() > 0, scales_beta = is_rms && beta_dim > 0;
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
        const float found = rms.numel() > 0 ? pr[row + i] : 1.0f, factor = scales_beta ? found : 1.0f;
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
        k[i] = rms.numel() > 0 && found > 0.0f ? of_rms / (found * static_cast<float>(width)) : 0.0f;
      }
      up<ROWS>(Rows<T, float>{p + row * width, pgy + row * width, width, nullptr, 0, 0, nullptr, pc + row * padded,
                              gamma_dim, padded, pg.data(), py + row * width, k});
      if (needs_x)
        up<ROWS>(Rows<T, float>{nullptr, pgx + row * in, in, &before[row * padded], units, padded, pw.data()});
    });
    gw = as_tensor(sum_over_rows(before.data(), padded, units, px, rows, in), {units, in});
    gbias = as_tensor(column_sums(is_relative ? inner : before, rows, padded, units), {units});
    if (gamma_dim > 0)
      ggamma = bounded_backward<T>(sum_over_rows(pc, padded, gamma_dim, p, rows, width, py), *gamma, scaling, clamp_range);
    if (beta_dim > 0)
      gbeta = bounded_backward<T>(sum_over_rows(units_of_beta.data(), padded, beta_dim, p, rows, width), *beta, scaling, max_beta);
  });
  return {gx, gy, gw, gbias, ggamma, gbeta};
}

Tensors film_gradients(Context* ctx, const Tensor& gradient) {
  const Tensors saved = kept(ctx);
  const Tensors inputs{saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]};
  if (Tensors found = by_torch_form(ctx, inputs, gradient); !found.empty()) return found;
  static const auto op = operation<decltype(film_backward)>("bem_peft_cpu::film_backward");
  auto [gx, gy, gw, gbias, ggamma, gbeta] = op.call(
      gradient, saved[0], saved[1], saved[2], or_none(saved[4]), or_none(saved[5]), saved[6], saved[7], saved[8],
      kept(ctx, "scaling").toDouble(), kept(ctx, "clamp_range").toDouble(), kept(ctx, "max_beta").toDouble(),
      kept(ctx, "is_rms").toBool(), needs_x(ctx));
  return {gx, gy, gw, gbias, ggamma, gbeta};
}

// what the dispatcher calls where a gradient is asked for; the coefficients that are kept are of no use outside
std::tuple<Tensor, Tensor, Tensor, Tensor> film_autograd(
    const Tensor& x, const Tensor& y, const Tensor& w, const Tensor& bias, const Maybe& gamma, const Maybe& beta,
    double scaling, double clamp_range, double max_beta, bool is_relative, bool is_rms, const Maybe& unstable,
    double threshold) {
  const auto forward = [&](Context* ctx) {
    static const auto op = operation<decltype(film_forward)>("bem_peft_cpu::film_train");
    auto [out, c, read, rms] = op.call(
        x, y, w, bias, gamma, beta, scaling, clamp_range, max_beta, is_relative, is_rms, unstable, threshold);
    keep(ctx, {x, y, w, bias, or_nothing(gamma), or_nothing(beta), c, read, rms});
    keep(ctx, "scaling", scaling);
    keep(ctx, "clamp_range", clamp_range);
    keep(ctx, "max_beta", max_beta);
    keep(ctx, "is_rms", is_rms);
    return out;
  };
  return {differentiable({x, y, w, bias, gamma, beta}, forward, film_gradients), at::empty({0}), at::empty({0}), at::empty({0})};
}

[[maybe_unused]] const SiteKind& site_kind = add_site_kind<film>("film", /*wide=*/0);

}  // namespace

TORCH_LIBRARY_FRAGMENT(bem_peft_cpu, m) {
  define_inference(m, "film", "Tensor w, Tensor bias, Tensor gamma, Tensor beta, bool is_relative, bool is_rms");
  m.def("film_train(Tensor x, Tensor y, Tensor w, Tensor bias, Tensor? gamma, Tensor? beta, float scaling, "
        "float clamp_range, float max_beta, bool is_relative, bool is_rms, Tensor(a!)? unstable, float threshold) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("film_backward(Tensor gradient, Tensor x, Tensor y, Tensor w, Tensor? gamma, Tensor? beta, Tensor c, Tensor read, "
        "Tensor rms, float scaling, float clamp_range, float max_beta, bool is_rms, bool needs_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bem_peft_cpu, CPU, m) {
  implement_inference<film>(m, "film");
  m.impl("film_train", film_forward);
  m.impl("film_backward", film_backward);
}

TORCH_LIBRARY_IMPL(bem_peft_cpu, AutogradCPU, m) {
  m.impl("film_train", film_autograd);
}
