// The module: what belongs to no method. Each method has a file of its own, which registers its operators itself.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/record_function.h>

#include "gradients.h"
#include "plain.h"
#include "site.h"

#include <memory>

// ---- a decoding step: one call from Python, past the dispatcher
//
// Between two sites all of Python's objects have left the caches, so that what is touched is what is paid: the check
// that no master has changed, and the call, are one function. It answers None, and the caller takes the way through the
// dispatcher, where anything but plain tensors is seen: a mode, a profiler, a functional transform, a changed master.

namespace {

using namespace bem;

struct Site {
  PyObject* parameters;  // the module's dict
  std::vector<PyObject*> names, objects;
  std::vector<at::Tensor> masters, aliases;  // the aliases keep the storages: no new one can stand at the same address
  std::vector<uint32_t> versions;
  std::vector<const void*> addresses;
  at::ScalarType dtype;
  SiteForm run;

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
  const size_t options = PyTuple_GET_SIZE(args[3]);
  const auto found = site_kinds().find(kind);
  TORCH_CHECK(found != site_kinds().end() && found->second.weights == w.size() && found->second.options == options,
              "site: unknown kind ", kind, " with ", w.size(), " weights and ", options, " options");
  site->run = found->second.bind(w, args[3]);
  site->dtype = w[found->second.wide].scalar_type();
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

// ---- autograd, and who is asked where a backward is differentiated again

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

struct Training : torch::autograd::Function<Training> {
  static Tensor forward(Context* ctx, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&,
                        const std::function<Tensor(Context*)>& run, Backward back) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor out = run(ctx);
    ctx->saved_data["backward"] = reinterpret_cast<int64_t>(back);
    ctx->saved_data["caller"] = next_caller.number;
    ctx->saved_data["is_training"] = next_caller.is_training;
    next_caller = Caller{};
    return out;
  }
  static Tensors backward(Context* ctx, const Tensors& gradients) {
    Tensors found = reinterpret_cast<Backward>(ctx->saved_data["backward"].toInt())(ctx, gradients[0]);
    found.resize(std::tuple_size_v<Inputs> + 2);
    return found;
  }
};

Tensor differentiable(const Inputs& inputs, const std::function<Tensor(Context*)>& forward, Backward backward) {
  return std::apply([&](const auto&... input) { return Training::apply(input..., forward, backward); }, inputs);
}

void keep(Context* ctx, Tensors tensors) { ctx->save_for_backward(std::move(tensors)); }
void keep(Context* ctx, const char* name, const c10::IValue& option) { ctx->saved_data[name] = option; }
Tensors kept(Context* ctx) { return ctx->get_saved_variables(); }
const c10::IValue& kept(Context* ctx, const char* name) { return ctx->saved_data.at(name); }
bool needs_x(Context* ctx) { return ctx->needs_input_grad(0); }

Tensors by_torch_form(Context* ctx, const Tensors& inputs, const Tensor& gradient) {
  if (!at::GradMode::is_enabled() && is_plain(gradient)) return {};
  Tensors gradients;
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
