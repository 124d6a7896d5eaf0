// PT1: y' = y + s sum_g 2 sigmoid(gate_w stats(x) / temperature + bias)_g B_g A_g x_g

#include "gradients.h"

namespace {

using namespace bem;

// natural logarithm of positive, normal numbers, to some 2 ulp
vf vlog(vf x) {
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

// PT1's statistics of one token's heads; each (heads rounded up to 16, filled with ones)
struct HeadStatistics {
  float *energy, *evenness, *norm, *cosine;  // log (|o|^2 / sum |o|^2), cosine^2; |o|, sum(o) / |o|
  float largest = 0.0f, total = 0.0f;  // of the norms; sum of their squares relative to it
};

template <typename T>
void head_statistics(const T* x, int64_t heads, int64_t head_dim, HeadStatistics& found) {
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
void gate_row(const HeadStatistics& stats, int64_t heads, const float* w, const float* bias, int64_t padded,
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

// z_g = scaling 2 sigmoid(gate_w stats(x) + bias)_g A_g x_g; statistics of each head's output
void head_gating(const View& x, const View& y, const View& a, const View& b, const View& gate_w, const View& gate_bias,
                 int64_t heads, Whole ranks, double scaling, const View& out) {
  check_rows(x, y);
  const int64_t in = x.columns, width = y.columns, gate_padded = gate_w.columns, padded_heads = whole_vectors(heads);
  const int64_t groups = ranks.count, rank = b.rows;
  check(std::accumulate(ranks.begin(), ranks.end(), int64_t{0}) == rank, "the ranks do not add up to b's rows");
  check(heads > 0 && groups > 0 && heads % groups == 0 && in % heads == 0, "heads do not fit");
  const int64_t head_dim = in / heads, group_dim = in / groups;
  const float* pw = weight<float>(gate_w, 2 * heads, gate_padded, "gate_w");
  const float* pbias = weight<float>(gate_bias, 1, gate_padded, "gate_bias");
  check(gate_padded % kLanes == 0 && groups <= gate_padded, "gate_w must be padded to 16 columns");
  const float s = static_cast<float>(scaling) * 2.0f;
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = result<T>(out, y.count(), "y'");
    const T *pa = weight<T>(a, rank, group_dim, "a"), *pb = weight<T>(b, rank, width, "b");
    over_rows(y.rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.assign(ROWS * rank + 4 * padded_heads + gate_padded, 1.0f);
      float *z = scratch.data(), *room = z + ROWS * rank, *gates = room + 4 * padded_heads;
      HeadStatistics stats{room, room + padded_heads, room + 2 * padded_heads, room + 3 * padded_heads};
      for (int64_t g = 0, start = 0; g < groups; start += ranks[g++])
        dots<ROWS>(px + row * in + g * group_dim, in, group_dim, pa + start * group_dim, ranks[g], z + start, rank);
      for (int i = 0; i < ROWS; ++i) {
        head_statistics(px + (row + i) * in, heads, head_dim, stats);
        gate_row(stats, heads, pw, pbias, gate_padded, s, gates);
        for (int64_t g = 0, start = 0; g < groups; start += ranks[g++])
          for (int64_t j = 0; j < ranks[g]; ++j) z[i * rank + start + j] *= gates[g];
      }
      up<ROWS>(Rows<T, T>{py + row * width, po + row * width, width, z, rank, rank, pb});
    });
  });
}

template <typename T>
struct HeadGating {
  int64_t heads, groups, rank, head_dim, group_dim, padded_heads, padded_groups;
  Floats a, b, gate_t, bias;

  HeadGating(const View& a_, const View& b_, const View& gate_w, const View& gate_bias, int64_t in, int64_t width,
             int64_t heads_, Whole ranks, double temperature) {
    heads = heads_, groups = ranks.count, rank = a_.rows;
    check(heads > 0 && groups > 0 && in % heads == 0 && heads % groups == 0 &&
              std::accumulate(ranks.begin(), ranks.end(), int64_t{0}) == rank,
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
void head_gating_train(const View& x, const View& y, const View& a, const View& b, const View& gate_w,
                       const View& gate_bias, int64_t heads, Whole ranks, double temperature, double scaling,
                       const View& out, const View& low, const View& half) {
  check_rows(x, y);
  const int64_t in = x.columns, width = y.columns, rows = y.rows, rank = a.rows, padded = whole_vectors(ranks.count);
  float *pl = result<float>(low, rows * rank, "A x"), *ph = result<float>(half, rows * padded, "the gates");
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const HeadGating<T> w(a, b, gate_w, gate_bias, in, width, heads, ranks, temperature);
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = result<T>(out, y.count(), "y'");
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
}

// gradients of x, a, b, gate_w, gate_bias; that of y is `gradient`
void head_gating_backward(const View& gradient, const View& x, const View& a, const View& b, const View& gate_w,
                          const View& gate_bias, const View& low, const View& half, int64_t heads, Whole ranks,
                          double temperature, double scaling, bool needs_x, const View& gx, const View& ga, const View& gb,
                          const View& ggate, const View& gbias) {
  check_rows(x, gradient);
  const int64_t in = x.columns, width = gradient.columns, rows = gradient.rows, rank = a.rows, padded = half.columns;
  const int64_t stats_width = whole_vectors(2 * heads);
  const float *pl = master(low, rows, rank, "A x"), *ph = master(half, rows, padded, "the gates");
  for_type(gradient, [&](auto zero) {
    using T = decltype(zero);
    const HeadGating<T> w(a, b, gate_w, gate_bias, in, width, heads, ranks, temperature);
    const float inverse = static_cast<float>(1.0 / temperature), twice = 2.0f * static_cast<float>(scaling);
    const Floats gate_rows = widened_rows(gate_w.as<float>(), w.groups, 2 * heads, stats_width, inverse);
    const T *px = x.as<T>(), *p = gradient.as<T>();
    T* pgx = needs_x ? result<T>(gx, x.count(), "a gradient") : nullptr;
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
    turn_back(sum_over_rows(gated.data(), rank, rank, p, rows, width), rank, width, gb);
    // the rows of A of a group meet its columns of x alone
    float* pga = result<float>(ga, rank * w.group_dim, "a gradient");
    for (int64_t g = 0, start = 0; g < w.groups; start += ranks[g++]) {
      const Floats part = sum_over_part(&of_low[start], rank, ranks[g], px, rows, in, g * w.group_dim, w.group_dim);
      std::copy(part.begin(), part.end(), pga + start * w.group_dim);
    }
    const Floats control = sum_over_rows(of_logits.data(), padded, w.groups, all_stats.data(), rows, stats_width);
    float* pgate = result<float>(ggate, w.groups * 2 * heads, "a gradient");
    for (int64_t g = 0; g < w.groups; ++g)
      for (int64_t j = 0; j < 2 * heads; ++j) pgate[g * 2 * heads + j] = inverse * control[g * stats_width + j];
    Floats sums = column_sums(of_logits, rows, padded, w.groups);
    for (float& value : sums) value *= inverse;
    copy(sums, gbias);
  });
}

[[maybe_unused]] const bool is_added = add_operator<head_gating>("head_gating") &&
                                       add_operator<head_gating_train>("head_gating_train") &&
                                       add_operator<head_gating_backward>("head_gating_backward");

}  // namespace
