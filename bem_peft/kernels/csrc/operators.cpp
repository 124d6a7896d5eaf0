// One operator a site for inference on a CPU; the torch forms of the methods are the specification.
//
//   y' = y (1 + sum_u g_u G[u]) + sum_r z_r B[r]        g, z: a few coefficients a token, float32
//
// Every method differs in its coefficients alone. x, y and the wide weights are float32 or bfloat16, all of one dtype: in
// decoding the time goes into reading them. Sums and small weights are float32.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/record_function.h>

#include "gradients.h"
#include "plain.h"

#include <functional>
#include <memory>

namespace {

using namespace bem;

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
        const float factor = is_rms && beta_dim > 0 ? root_mean_square(py + (row + i) * width, width) : 1.0f;
        for (int64_t at = 0; at < padded; at += kLanes) {
          vf value = vtanh(load(c + i * padded + at) + load(p_bias + at));
          store(c + i * padded + at, value);
          store(z + i * padded + at, value * factor);
        }
      }
      up<ROWS>(Rows<T, T>{py + row * width, po + row * width, width, z, beta_dim, padded, pt, c, gamma_dim, padded, pg});
    });
  });
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
    using T = std::remove_pointer_t<decltype(po)>;
    const T* pb = weight<T>(b, rank, width, "b");
    over_rows(rows_of(y), [&](int64_t row, auto count) {
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
  const Control control{pc, pm, has_gate, is_task_mask, rank, padded, active};
  const float s = static_cast<float>(scaling);
  return for_dtype(x, y, OVERWRITE, [&](auto px, auto py, auto po) {
    using T = std::remove_pointer_t<decltype(po)>;
    const T *pa = weight<T>(a, rank, in, "a"), *pb = weight<T>(b, rank, width, "b");
    over_rows(rows_of(y), [&](int64_t row, auto count) {
      constexpr int ROWS = decltype(count)::value;
      thread_local std::vector<float> scratch;
      scratch.assign((ROWS + 4) * padded, 0.0f);
      float *z = scratch.data(), *unit = z + ROWS * padded, *gate = unit + padded, *logits = gate + padded;
      float* kept = logits + padded;
      dots<ROWS>(px + row * in, in, in, pa, rank, z, padded);
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

// ---- a decoding step: one call from Python, past the dispatcher
//
// Between two sites all of Python's objects have left the caches, so that what is touched is what is paid: the check
// that no master has changed, and the call, are one function. It answers None, and the caller takes the way through the
// dispatcher, where anything but plain tensors is seen: a mode, a profiler, a functional transform, a changed master.

namespace {

struct Site {
  PyObject* parameters;  // the module's dict
  std::vector<PyObject*> names, objects;
  std::vector<at::Tensor> masters, aliases;  // the aliases keep the storages: no new one can stand at the same address
  std::vector<uint32_t> versions;
  std::vector<const void*> addresses;
  at::ScalarType dtype;
  std::function<at::Tensor(const at::Tensor&, const at::Tensor&, bool)> run;

  ~Site() {
    for (PyObject* object : names) Py_DECREF(object);
    for (PyObject* object : objects) Py_DECREF(object);
    Py_XDECREF(parameters);
  }

  bool is_current(PyObject* now) const {
    if (now != parameters) return false;
    for (size_t i = 0; i < names.size(); ++i) {
      if (PyDict_GetItemWithError(now, names[i]) != objects[i]) return false;
      const at::Tensor& master = masters[i];
      if (master.unsafeGetTensorImpl()->version_counter().current_version() != versions[i]) return false;
      if (master.const_data_ptr() != addresses[i]) return false;
    }
    return true;
  }
};

constexpr const char* kSite = "bem_peft.Site";
void end_site(PyObject* capsule) { delete static_cast<Site*>(PyCapsule_GetPointer(capsule, kSite)); }

bool is_plain_object(PyObject* object) { return THPVariable_CheckExact(object) && is_plain(THPVariable_Unpack(object)); }

// site(kind, module._parameters, packed, options): what `run` wants, for the masters as they are now
PyObject* make_site(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4 && PyDict_Check(args[1]) && PyTuple_Check(args[2]) && PyTuple_Check(args[3]),
              "site(kind, parameters, packed, options)");
  const std::string kind = PyUnicode_AsUTF8(args[0]);
  auto site = std::make_unique<Site>();
  site->parameters = Py_NewRef(args[1]);
  PyObject *name, *object;
  for (Py_ssize_t at = 0; PyDict_Next(args[1], &at, &name, &object);) {
    if (object == Py_None) continue;
    site->names.push_back(Py_NewRef(name));
    site->objects.push_back(Py_NewRef(object));
    const at::Tensor& master = THPVariable_Unpack(object);
    site->masters.push_back(master);
    site->aliases.push_back(master.detach());
    site->versions.push_back(master._version());
    site->addresses.push_back(master.const_data_ptr());
  }
  std::vector<at::Tensor> w;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[2]); ++i) w.push_back(THPVariable_Unpack(PyTuple_GET_ITEM(args[2], i)));
  std::vector<PyObject*> o;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[3]); ++i) o.push_back(PyTuple_GET_ITEM(args[3], i));
  const auto fits = [&](size_t weights, size_t options) { return w.size() == weights && o.size() == options; };
  if (kind == "film" && fits(4, 1)) {
    const bool is_rms = o[0] == Py_True;
    site->run = [w, is_rms](const at::Tensor& x, const at::Tensor& y, bool over) {
      return (over ? film<true> : film<false>)(x, y, w[0], w[1], w[2], w[3], is_rms);
    };
    site->dtype = w[0].scalar_type();
  } else if (kind == "kronecker" && fits(3, 2)) {
    const int64_t v_rank = PyLong_AsLongLong(o[0]);
    const double scaling = PyFloat_AsDouble(o[1]);
    site->run = [w, v_rank, scaling](const at::Tensor& x, const at::Tensor& y, bool over) {
      return (over ? kronecker<true> : kronecker<false>)(x, y, w[0], w[1], w[2], v_rank, scaling);
    };
    site->dtype = w[2].scalar_type();
  } else if (kind == "rank_mask" && fits(4, 3)) {
    const int64_t active = PyLong_AsLongLong(o[0]);
    const bool is_task_mask = o[1] == Py_True;
    const double scaling = PyFloat_AsDouble(o[2]);
    site->run = [w, active, is_task_mask, scaling](const at::Tensor& x, const at::Tensor& y, bool over) {
      return (over ? rank_mask<true> : rank_mask<false>)(x, y, w[0], w[1], w[2], w[3], active, is_task_mask, scaling);
    };
    site->dtype = w[0].scalar_type();
  } else if (kind == "head_gating" && fits(4, 3) && PyList_Check(o[1])) {
    const int64_t heads = PyLong_AsLongLong(o[0]);
    std::vector<int64_t> ranks;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(o[1]); ++i) ranks.push_back(PyLong_AsLongLong(PyList_GET_ITEM(o[1], i)));
    const double scaling = PyFloat_AsDouble(o[2]);
    site->run = [w, heads, ranks, scaling](const at::Tensor& x, const at::Tensor& y, bool over) {
      return (over ? head_gating<true> : head_gating<false>)(x, y, w[0], w[1], w[2], w[3], heads, ranks, scaling);
    };
    site->dtype = w[0].scalar_type();
  } else {
    TORCH_CHECK(false, "site: unknown kind ", kind, " with ", w.size(), " weights and ", o.size(), " options");
  }
  if (PyErr_Occurred()) return nullptr;
  return PyCapsule_New(site.release(), kSite, end_site);
  END_HANDLE_TH_ERRORS
}

// run(site, module._parameters, x, y, may_overwrite): y', or None
PyObject* run_site(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 5, "run(site, parameters, x, y, may_overwrite)");
  const auto* site = static_cast<const Site*>(PyCapsule_GetPointer(args[0], kSite));
  if (site == nullptr) return nullptr;
  if (at::GradMode::is_enabled() || !is_plain_thread() || at::hasCallbacks() || !is_plain_object(args[2]) ||
      !is_plain_object(args[3]) || !site->is_current(args[1]))
    Py_RETURN_NONE;
  const at::Tensor &x = THPVariable_Unpack(args[2]), &y = THPVariable_Unpack(args[3]);
  if (y.scalar_type() != site->dtype || PyErr_Occurred()) Py_RETURN_NONE;
  at::AutoDispatchBelowADInplaceOrView guard;
  return THPVariable_Wrap(site->run(x, y, args[4] == Py_True && y.is_contiguous()));
  END_HANDLE_TH_ERRORS
}

}  // namespace

// ---- whose backward is differentiated again

namespace {

// Who calls: a number that Python knows an adapter by, and whether the adapter is in training. Python names the caller
// just before the call (`name_caller`); a call without one has no torch form.
struct Caller {
  int64_t number = 0;
  bool is_training = false;
};
thread_local Caller next_caller;
PyObject* torch_form = nullptr;  // (number, is_training, [x, y, masters], gradient) -> their gradients, or None

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

}  // namespace

namespace bem {

void remember_caller(AutogradContext* ctx) {
  ctx->saved_data["caller"] = next_caller.number;
  ctx->saved_data["is_training"] = next_caller.is_training;
  next_caller = Caller{};
}

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

}  // namespace bem

namespace {

PyMethodDef methods[] = {
    {"site", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(make_site)), METH_FASTCALL, nullptr},
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run_site)), METH_FASTCALL, nullptr},
    {"name_caller", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(name_caller)), METH_FASTCALL, nullptr},
    {"set_torch_form", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(set_torch_form)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "bem_peft_cpu", nullptr, -1, methods};

}  // namespace

#define NAME_OF_INIT_(name) PyInit_##name
#define NAME_OF_INIT(name) NAME_OF_INIT_(name)
PyMODINIT_FUNC NAME_OF_INIT(TORCH_EXTENSION_NAME)(void) { return PyModule_Create(&module); }
