// PT3: y' = y + s B vec(U X V^T)

#include "gradients.h"

namespace {

using namespace bem;

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
void kronecker_row(const float* x, const float* u, int64_t u_rank, int64_t u_dim, const float* v_t, int64_t v_rank,
                   int64_t v_dim, int64_t padded, float scaling, float* left, float* one, float* z) {
  int64_t a = 0;
  for (; a + 4 <= u_rank; a += 4) left_rows<4>(x, u + a * u_dim, u_dim, v_dim, left + a * v_dim);
  for (; a < u_rank; ++a) left_rows<1>(x, u + a * u_dim, u_dim, v_dim, left + a * v_dim);
  for (a = 0; a < u_rank; ++a) {
    small_product(left + a * v_dim, v_dim, v_t, padded, one);
    for (int64_t j = 0; j < v_rank; ++j) z[a * v_rank + j] = scaling * one[j];
  }
}

// z = scaling vec(U X V^T), X = x as (u_dim, v_dim)
void kronecker(const View& x, const View& y, const View& u, const View& v_t, const View& b, int64_t v_rank, double scaling,
               const View& out) {
  check_rows(x, y);
  const int64_t in = x.columns, width = y.columns, u_rank = u.rows, u_dim = u.columns, v_dim = v_t.rows;
  const int64_t padded = v_t.columns, rank = u_rank * v_rank;
  const float *pu = weight<float>(u, u_rank, u_dim, "u"), *pv = weight<float>(v_t, v_dim, padded, "v_t");
  check(u_dim * v_dim == in && padded % kLanes == 0 && v_rank <= padded, "u and v do not fit x");
  const float s = static_cast<float>(scaling);
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = result<T>(out, y.count(), "y'");
    const T* pb = weight<T>(b, rank, width, "b");
    over_rows(y.rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.resize(in + u_rank * v_dim + padded + ROWS * rank);
      float *wide = scratch.data(), *left = wide + in, *one = left + u_rank * v_dim, *z = one + padded;
      for (int i = 0; i < ROWS; ++i) {
        const float* line = widened(px + (row + i) * in, in, wide);
        kronecker_row(line, pu, u_rank, u_dim, pv, v_rank, v_dim, padded, s, left, one, z + i * rank);
      }
      up<ROWS>(Rows<T, T>{py + row * width, po + row * width, width, z, rank, rank, pb});
    });
  });
}

// y' and s z (N, u_rank v_rank)
void kronecker_train(const View& x, const View& y, const View& u, const View& v, const View& b, double scaling,
                     const View& out, const View& z) {
  check_rows(x, y);
  const int64_t in = x.columns, width = y.columns, rows = y.rows, u_rank = u.rows, u_dim = u.columns;
  const int64_t v_rank = v.rows, v_dim = v.columns, rank = u_rank * v_rank, padded = whole_vectors(v_rank);
  check(u_dim * v_dim == in, "u and v do not fit x");
  float* pz = result<float>(z, rows * rank, "z");
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(u, u_rank, u_dim, "U");
    Floats pu(from, from + u_rank * u_dim), pv = turned(master(v, v_rank, v_dim, "V"), v_rank, v_dim, padded);
    Floats pb = turned(master(b, width, rank, "B"), width, rank, width);
    for (Floats* w : {&pu, &pv, &pb}) round_to_type<T>(*w);
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = result<T>(out, y.count(), "y'");
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
}

// gradients of x, u, v, b; that of y is `gradient`
void kronecker_backward(const View& gradient, const View& x, const View& u, const View& v, const View& b, const View& z,
                        double scaling, bool needs_x, const View& gx, const View& gu, const View& gv, const View& gb) {
  check_rows(x, gradient);
  const int64_t in = x.columns, width = gradient.columns, rows = gradient.rows, u_rank = u.rows, u_dim = u.columns;
  const int64_t v_rank = v.rows, v_dim = v.columns, rank = u_rank * v_rank, stride = whole_vectors(v_dim);
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  for_type(gradient, [&](auto zero) {
    using T = decltype(zero);
    const float* from = master(u, u_rank, u_dim, "U");
    Floats pu(from, from + u_rank * u_dim), pv = widened_rows(master(v, v_rank, v_dim, "V"), v_rank, v_dim, stride);
    Floats pb = turned(master(b, width, rank, "B"), width, rank, width);
    for (Floats* w : {&pu, &pv, &pb}) round_to_type<T>(*w);
    const T *px = x.as<T>(), *p = gradient.as<T>();
    T* pgx = needs_x ? result<T>(gx, x.count(), "a gradient") : nullptr;
    Floats of_z(rows * rank), of_u(chunks * u_rank * u_dim), of_v(chunks * v_rank * stride, 0.0f);
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      dots<ROWS>(p + row * width, width, width, pb.data(), rank, &of_z[row * rank], rank);
    });
    for (float& value : of_z) value *= static_cast<float>(scaling);
    parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
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
    turn_back(sum_over_rows(master(z, rows, rank, "z"), rank, rank, p, rows, width), rank, width, gb);
    copy(column_sums(of_u, chunks, u_rank * u_dim, u_rank * u_dim), gu);
    const Floats total_v = column_sums(of_v, chunks, v_rank * stride, v_rank * stride);
    float* pgv = result<float>(gv, v_rank * v_dim, "a gradient");
    for (int64_t j = 0; j < v_rank; ++j) std::copy_n(&total_v[j * stride], v_dim, pgv + j * v_dim);
  });
}

[[maybe_unused]] const bool is_added = add_operator<kronecker>("kronecker") &&
                                       add_operator<kronecker_train>("kronecker_train") &&
                                       add_operator<kronecker_backward>("kronecker_backward");

}  // namespace
