// PT2: y' = y + s B (m * (1 + tanh(C u)) * z),  z = A x,  u = sqrt(R) z / |z|,  m: the k largest logits M u

#include "gradients.h"

namespace {

using namespace bem;

// the orthonormal Walsh-Hadamard transform along the rows of (rows, width); rows a power of two
void hadamard(float* w, int64_t rows, int64_t width) {
  for (int64_t half = 1; half < rows; half *= 2)
    for (int64_t start = 0; start < rows; start += 2 * half)
      for (int64_t i = start; i < start + half; ++i)
        for (int64_t j = 0; j < width; ++j) {
          const float low = w[i * width + j], high = w[(i + half) * width + j];
          w[i * width + j] = low + high;
          w[(i + half) * width + j] = low - high;
        }
  const float scale = 1.0f / std::sqrt(static_cast<float>(rows));
  for (int64_t i = 0; i < rows * width; ++i) w[i] *= scale;
}

// A (rank, in / count): as many rows in turn read one of the equal parts of x. `is_mixed`: z is H (A x), which one part
// folds into A
struct Blocks {
  int64_t count, rank, width;
  bool is_mixed;

  Blocks(const View& a, int64_t in, bool has_hadamard) : rank(a.rows), width(a.columns) {
    check(width > 0 && in % width == 0 && rank % (in / width) == 0, "a ", a, " must be of equal parts of ", in, " columns");
    count = in / width;
    is_mixed = has_hadamard && count > 1;
  }
  int64_t own() const { return rank / count; }
};

// z (ROWS, padded) of rows of x
template <int ROWS, typename T, typename W>
void project(const Blocks& of, const T* x, int64_t in, const W* a, float* z, int64_t padded) {
  const int64_t own = of.own();
  for (int64_t g = 0; g < of.count; ++g)
    dots<ROWS>(x + g * of.width, in, of.width, a + g * own * of.width, own, z + g * own, padded);
  if (of.is_mixed)
    for (int i = 0; i < ROWS; ++i) hadamard(z + i * padded, of.rank, 1);
}

// PT2's control of one token: c_t, m_t (rank, padded), or m_t (1, padded) the logits of a task's mask
struct Control {
  const float *c_t, *m_t;
  bool has_gate, is_task_mask;
  int64_t rank, padded, active;
};

// unit = z / |z|, gate = tanh(C unit), logits = M unit, kept in {0, 1}: exactly `active` ones; all (padded). Returns |z|.
float control_row(const Control& w, const float* z, float* unit, float* gate, float* logits, float* kept) {
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

// z = scaling m (1 + tanh(C u)) a, a = A x, u = sqrt(R) a / |a|; m: the k largest logits M u (or of the task)
void rank_mask(const View& x, const View& y, const View& a, const View& b, const View& gate_t, const View& mask_t,
               int64_t active, bool is_task_mask, bool has_hadamard, double scaling, const View& out) {
  check_rows(x, y);
  const int64_t in = x.columns, width = y.columns, padded = mask_t.columns, rank = b.rows;
  const bool has_gate = gate_t.rows > 0;
  const float* pc = weight<float>(gate_t, has_gate ? rank : 0, padded, "gate_t");
  const float* pm = weight<float>(mask_t, is_task_mask ? 1 : rank, padded, "mask_t");
  check(padded % kLanes == 0 && rank <= padded, "mask_t must be padded to 16 columns");
  const Control control{pc, pm, has_gate, is_task_mask, rank, padded, active};
  const Blocks blocks(a, in, has_hadamard);
  const float s = static_cast<float>(scaling);
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = result<T>(out, y.count(), "y'");
    const T *pa = weight<T>(a, rank, blocks.width, "a"), *pb = weight<T>(b, rank, width, "b");
    over_rows(y.rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.assign((ROWS + 4) * padded, 0.0f);
      float *z = scratch.data(), *unit = z + ROWS * padded, *gate = unit + padded, *logits = gate + padded;
      float* kept = logits + padded;
      project<ROWS>(blocks, px + row * in, in, pa, z, padded);
      for (int i = 0; i < ROWS; ++i) {
        float* line = z + i * padded;
        control_row(control, line, unit, gate, logits, kept);
        for (int64_t at = 0; at < padded; at += kLanes)
          store(line + at, load(line + at) * (s * load(kept + at)) * (1.0f + load(gate + at)));
      }
      up<ROWS>(Rows<T, T>{py + row * width, po + row * width, width, z, rank, padded, pb});
    });
  });
}

// the gradient (ROWS, in) of rows of x from that of A x, z (ROWS, padded)
template <int ROWS, typename T>
void project_back(const Blocks& of, const float* z, int64_t padded, const float* a, T* gx, int64_t in) {
  if (of.count == 1) return up<ROWS>(Rows<T, float>{nullptr, gx, in, z, of.rank, padded, a});
  thread_local std::vector<T> part;
  part.resize(ROWS * of.width);
  const int64_t own = of.own();
  for (int64_t g = 0; g < of.count; ++g) {
    up<ROWS>(Rows<T, float>{nullptr, part.data(), of.width, z + g * own, own, padded, a + g * own * of.width});
    for (int i = 0; i < ROWS; ++i) std::copy_n(&part[i * of.width], of.width, gx + i * in + g * of.width);
  }
}

template <typename T>
struct RankMask {
  Blocks blocks;
  Floats a, b, c_t, m_t;
  Control control;

  RankMask(const View& a_, const View& b_, const View& c_, const View& m_, int64_t in, int64_t width, int64_t active,
           bool is_task_mask, bool has_hadamard)
      : blocks(a_, in, has_hadamard) {
    const int64_t rank = a_.rows, padded = whole_vectors(rank);
    const float *from = master(a_, rank, blocks.width, "A"), root = std::sqrt(static_cast<float>(rank));
    a = Floats(from, from + rank * blocks.width);
    b = turned(master(b_, width, rank, "B"), width, rank, width);
    if (has_hadamard && !blocks.is_mixed) hadamard(a.data(), rank, in);
    if (has_hadamard) hadamard(b.data(), rank, width);
    round_to_type<T>(a);
    round_to_type<T>(b);
    if (c_.is_there()) c_t = turned(master(c_, rank, rank, "C"), rank, rank, padded, root);
    m_t = is_task_mask ? widened_rows(master(m_, 1, rank, "mask_weight"), 1, rank, padded)
                       : turned(master(m_, rank, rank, "mask_weight"), rank, rank, padded, root);
    control = Control{c_t.data(), m_t.data(), c_.is_there(), is_task_mask, rank, padded, active};
  }
};

// y' and z (N, R padded)
void rank_mask_train(const View& x, const View& y, const View& a, const View& b, const View& c, const View& m,
                     int64_t active, bool is_task_mask, bool has_hadamard, double /*temperature*/, double scaling,
                     const View& out, const View& z) {
  check_rows(x, y);
  const int64_t in = x.columns, width = y.columns, rows = y.rows, rank = a.rows, padded = whole_vectors(rank);
  float* pz = result<float>(z, rows * padded, "z");
  for_type(y, [&](auto zero) {
    using T = decltype(zero);
    const RankMask<T> w(a, b, c, m, in, width, active, is_task_mask, has_hadamard);
    const T *px = x.as<T>(), *py = y.as<T>();
    T* po = result<T>(out, y.count(), "y'");
    const float s = static_cast<float>(scaling);
    over_rows(rows, [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local Floats scratch;
      scratch.assign((ROWS + 4) * padded, 0.0f);
      float *h = scratch.data(), *unit = h + ROWS * padded, *gate = unit + padded, *logits = gate + padded;
      float* kept = logits + padded;
      std::fill_n(pz + row * padded, ROWS * padded, 0.0f);
      project<ROWS>(w.blocks, px + row * in, in, w.a.data(), pz + row * padded, padded);
      for (int i = 0; i < ROWS; ++i) {
        const float* line = pz + (row + i) * padded;
        control_row(w.control, line, unit, gate, logits, kept);
        for (int64_t at = 0; at < padded; at += kLanes)
          store(h + i * padded + at, load(line + at) * (s * load(kept + at)) * (1.0f + load(gate + at)));
      }
      up<ROWS>(Rows<T, float>{py + row * width, po + row * width, width, h, rank, padded, w.b.data()});
    });
  });
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

// gradients of x, a, b, c, m; that of y is `gradient`
void rank_mask_backward(const View& gradient, const View& x, const View& a, const View& b, const View& c, const View& m,
                        const View& z, int64_t active, bool is_task_mask, bool has_hadamard, double temperature,
                        double scaling, bool needs_x, const View& gx, const View& ga, const View& gb, const View& gc,
                        const View& gm) {
  check_rows(x, gradient);
  const int64_t in = x.columns, width = gradient.columns, rows = gradient.rows, rank = a.rows, padded = z.columns;
  const float* pz = master(z, rows, padded, "z");
  for_type(gradient, [&](auto zero) {
    using T = decltype(zero);
    const RankMask<T> w(a, b, c, m, in, width, active, is_task_mask, has_hadamard);
    const float s = static_cast<float>(scaling), root = std::sqrt(static_cast<float>(rank));
    const Floats c_rows = c.is_there() ? widened_rows(c.as<float>(), rank, rank, padded, root) : Floats();
    const Floats m_rows = is_task_mask ? Floats() : widened_rows(m.as<float>(), rank, rank, padded, root);
    const T *px = x.as<T>(), *p = gradient.as<T>();
    T* pgx = needs_x ? result<T>(gx, x.count(), "a gradient") : nullptr;
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
        if (w.blocks.is_mixed) hadamard(mine_z, rank, 1);  // H is its own inverse
      }
      if (needs_x) project_back<ROWS>(w.blocks, &of_z[row * padded], padded, w.a.data(), pgx + row * in, in);
    });
    float* pga = result<float>(ga, a.count(), "a gradient");
    const int64_t own = w.blocks.own(), part = w.blocks.width;
    for (int64_t g = 0; g < w.blocks.count; ++g) {
      Floats sum_a = sum_over_part(&of_z[g * own], padded, own, px, rows, in, g * part, part);
      if (has_hadamard && !w.blocks.is_mixed) hadamard(sum_a.data(), rank, in);
      std::copy(sum_a.begin(), sum_a.end(), pga + g * own * part);
    }
    Floats sum_b = sum_over_rows(h.data(), padded, rank, p, rows, width);
    if (has_hadamard) hadamard(sum_b.data(), rank, width);
    turn_back(sum_b, rank, width, gb);
    const auto control_sum = [&](const Floats& of, const View& out) {
      const Floats wide = sum_over_rows(of.data(), padded, rank, units.data(), rows, padded);
      float* to = result<float>(out, rank * rank, "a gradient");
      for (int64_t i = 0; i < rank; ++i)
        for (int64_t j = 0; j < rank; ++j) to[i * rank + j] = root * wide[i * padded + j];
    };
    if (c.is_there()) control_sum(of_c, gc);
    if (is_task_mask) {
      Floats total = column_sums(of_m, rows, padded, rank), slope(rank);
      mask_slope(w.m_t.data(), rank, active, static_cast<float>(temperature), slope.data());
      for (int64_t j = 0; j < rank; ++j) total[j] *= slope[j];
      copy(total, gm);
    } else {
      control_sum(of_m, gm);
    }
  });
}

// what `rank_mask` reads, of the masters as `rank_mask_train` folds them: H A, or A of blocks, and B^T H in the dtype of
// `like`, the control padded in float32
void rank_mask_pack(const View& like, const View& a, const View& b, const View& c, const View& m, int64_t num_blocks,
                    bool is_task_mask, bool has_hadamard, const View& to_a, const View& to_b, const View& to_c,
                    const View& to_m) {
  for_type(like, [&](auto zero) {
    using T = decltype(zero);
    const RankMask<T> w(a, b, c, m, num_blocks * a.columns, b.rows, 1, is_task_mask, has_hadamard);
    write_as<T>(w.a, a.count(), to_a, "H A");
    write_as<T>(w.b, b.count(), to_b, "B^T H");
    if (c.is_there()) copy(w.c_t, to_c);
    copy(w.m_t, to_m);
  });
}

[[maybe_unused]] const bool is_added = add_operator<rank_mask>("rank_mask") &&
                                       add_operator<rank_mask_train>("rank_mask_train") &&
                                       add_operator<rank_mask_backward>("rank_mask_backward") &&
                                       add_operator<rank_mask_pack>("rank_mask_pack");

}  // namespace
