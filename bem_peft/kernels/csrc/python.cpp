// The module: operators called from Python, by the limited API alone, so that one library serves every Python from 3.11
// on, and every torch: of a tensor it asks, as any program in Python would, for its type, dtype, shape and address.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <array>
#include <memory>
#include <vector>

#include "operator.h"
#include "threads.h"

namespace {

using namespace bem;

struct PythonError {};  // Python knows which

struct Ref {
  PyObject* object;
  explicit Ref(PyObject* object) : object(object) {
    if (object == nullptr) throw PythonError();
  }
  Ref(const Ref&) = delete;
  ~Ref() { Py_DecRef(object); }
  operator PyObject*() const { return object; }
};

// what `setup` was given, of torch
enum Known { kTensor, kParameter, kEmptyLike, kThreads, kForwardAd, kFirstDtype, kKnown = kFirstDtype + 5 };
PyObject* known[kKnown];
std::vector<PyObject*> watchers;  // each says, called, whether the thread is anything but plain
PyObject *s_version, *s_address, *s_dtype, *s_shape, *s_is_contiguous, *s_is_cpu, *s_is_neg, *s_level;

PyObject* named(PyObject* object, PyObject* name) { return PyObject_GetAttr(object, name); }
PyObject* called(PyObject* object, PyObject* method) { return PyObject_CallMethodObjArgs(object, method, nullptr); }

int64_t whole(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

void* address(PyObject* tensor) {
  void* found = PyLong_AsVoidPtr(Ref(called(tensor, s_address)));
  if (found == nullptr && PyErr_Occurred()) throw PythonError();
  return found;
}

void read_shape(PyObject* tensor, View& view) {
  const Ref shape(named(tensor, s_shape));
  const Py_ssize_t axes = PyTuple_Size(shape);
  if (axes < 0) throw PythonError();
  view.rows = view.columns = 1;
  for (Py_ssize_t i = 0; i < axes; ++i) (i + 1 < axes ? view.rows : view.columns) *= whole(PyTuple_GetItem(shape, i));
}

Type type_named(PyObject* dtype) {
  static constexpr Type types[] = {Type::float32, Type::bfloat16, Type::float64, Type::float16, Type::boolean};
  for (int i = 0; i < 5; ++i)
    if (dtype == known[kFirstDtype + i]) return types[i];
  return Type::other;
}

View view_of(PyObject* tensor) {
  View view;
  if (tensor == Py_None) return view;
  view.type = type_named(Ref(named(tensor, s_dtype)));
  read_shape(tensor, view);
  check(Ref(named(tensor, s_is_cpu)).object == Py_True, "a tensor must be on the CPU: ", view);
  check(Ref(called(tensor, s_is_contiguous)).object == Py_True, "a tensor must be contiguous: ", view);
  view.data = address(tensor);
  check(view.data != nullptr || view.count() == 0, "a tensor has no numbers: ", view);
  return view;
}

// The values of `objects`, by an operator's kinds from argument `first` on. `lists` holds the numbers of lists.
void read(const std::string& kinds, size_t first, PyObject* objects, std::vector<Value>& values,
          std::vector<std::vector<int64_t>>& lists) {
  const Py_ssize_t count = PyTuple_Size(objects);
  if (count < 0) throw PythonError();
  check(first + count <= kinds.size(), "an operator of ", static_cast<int64_t>(kinds.size()), " arguments was given more");
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* object = PyTuple_GetItem(objects, i);
    Value value;
    switch (kinds[first + i]) {
      case 't':
        value.view = view_of(object);
        break;
      case 'b':
        value.whole = object == Py_True;
        check(PyBool_Check(object), "argument ", static_cast<int64_t>(first + i), " must be a bool");
        break;
      case 'i':
        value.whole = whole(object);
        break;
      case 'd':
        value.number = PyFloat_AsDouble(object);
        if (PyErr_Occurred()) throw PythonError();
        break;
      default: {
        const Py_ssize_t size = PySequence_Size(object);
        if (size < 0) throw PythonError();
        lists.emplace_back();
        for (Py_ssize_t j = 0; j < size; ++j) lists.back().push_back(whole(Ref(PySequence_GetItem(object, j))));
        value.list = Whole{lists.back().data(), static_cast<int64_t>(size)};
      }
    }
    values.push_back(value);
  }
}

const Operator& operator_named(PyObject* name) {
  const char* found = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (found == nullptr) throw PythonError();
  const auto at = operators().find(found);
  check(at != operators().end(), "no operator is named ", found);
  return at->second;
}

// torch gives each thread its number of threads at its first question
void ask_for_threads() {
  thread_local bool has_asked = false;
  check(threads.parallel != nullptr, "`setup` comes first");
  if (!has_asked) Ref(PyObject_CallNoArgs(known[kThreads]));
  has_asked = true;
}

void compute(const Operator& found, const Value* values) {
  ask_for_threads();
  PyThreadState* state = PyEval_SaveThread();
  try {
    found.run(values);
  } catch (...) {
    PyEval_RestoreThread(state);
    throw;
  }
  PyEval_RestoreThread(state);
}

PyObject* none() {
  Py_IncRef(Py_None);
  return Py_None;
}

template <PyObject* (*F)(PyObject* const* args), Py_ssize_t COUNT>
PyObject* guarded(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    check(count == COUNT, "takes ", static_cast<int64_t>(COUNT), " arguments");
    return F(args);
  } catch (const PythonError&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// setup((addresses of five functions of OpenMP), (what is known of torch), (watchers))
PyObject* setup(PyObject* const* args) {
  void* found[5];
  for (int i = 0; i < 5; ++i) {
    found[i] = PyLong_AsVoidPtr(PyTuple_GetItem(args[0], i));
    if (PyErr_Occurred()) throw PythonError();
  }
  check(PyTuple_Size(args[1]) == kKnown, "setup: what is known of torch");
  for (int i = 0; i < kKnown; ++i) {
    known[i] = PyTuple_GetItem(args[1], i);
    Py_IncRef(known[i]);
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(args[2]); ++i) {
    watchers.push_back(PyTuple_GetItem(args[2], i));
    Py_IncRef(watchers.back());
  }
  threads = Threads{reinterpret_cast<decltype(Threads::parallel)>(found[0]), reinterpret_cast<int (*)()>(found[1]),
                    reinterpret_cast<int (*)()>(found[2]), reinterpret_cast<int (*)()>(found[3]),
                    reinterpret_cast<int (*)()>(found[4])};
  return none();
}

// run(name, arguments)
PyObject* run(PyObject* const* args) {
  const Operator& found = operator_named(args[0]);
  std::vector<Value> values;
  std::vector<std::vector<int64_t>> lists;
  lists.reserve(found.kinds.size());  // so that none moves
  read(found.kinds, 0, args[1], values, lists);
  check(values.size() == found.kinds.size(), "an operator of ", static_cast<int64_t>(found.kinds.size()),
        " arguments was given ", static_cast<int64_t>(values.size()));
  compute(found, values.data());
  return none();
}

// ---- a decoding step: one call from Python, past the dispatcher
//
// Between two sites all of Python's objects have left the caches, so that what is touched is what is paid: the check
// that no master has changed, and the call, are one function. It answers None, and the caller takes the way through the
// dispatcher, where anything but plain tensors is seen: a mode, a profiler, a functional transform, a changed master.

struct Master {
  PyObject *name, *object, *alias;  // the alias keeps the storage: no new one can stand at the same address
  int64_t version;
  void* address;
};

struct Site {
  const Operator* run = nullptr;
  PyObject* parameters = nullptr;  // the module's dict
  PyObject* packed = nullptr;  // keeps the weights
  PyObject* dtype = nullptr;
  std::vector<Master> masters;
  std::vector<Value> values;  // all but x, y and y'
  std::vector<std::vector<int64_t>> lists;

  ~Site() {
    for (const Master& master : masters)
      for (PyObject* object : {master.name, master.object, master.alias}) Py_DecRef(object);
    for (PyObject* object : {parameters, packed, dtype}) Py_DecRef(object);
  }
};

constexpr const char* kSite = "bem_peft.Site";
constexpr size_t kMostValues = 16;
void end_site(PyObject* capsule) { delete static_cast<Site*>(PyCapsule_GetPointer(capsule, kSite)); }

PyObject* kept(PyObject* object) {
  Py_IncRef(object);
  return object;
}

int64_t version(PyObject* tensor) { return whole(Ref(named(tensor, s_version))); }

// site(name, module._parameters, packed, options, dtype of y): what `run_site` wants, for the masters as they are now
PyObject* make_site(PyObject* const* args) {
  auto site = std::make_unique<Site>();
  site->run = &operator_named(args[0]);
  const std::string& kinds = site->run->kinds;
  const Py_ssize_t given = PyTuple_Size(args[2]) + PyTuple_Size(args[3]);
  check(static_cast<size_t>(given) + 3 == kinds.size() && kinds.size() <= kMostValues && kinds.compare(0, 2, "tt") == 0 &&
            kinds.back() == 't',
        "a site of ", PyUnicode_AsUTF8AndSize(args[0], nullptr), " with ", PyTuple_Size(args[2]), " weights and ",
        PyTuple_Size(args[3]), " options does not fit its operator");
  site->parameters = kept(args[1]);
  site->packed = kept(args[2]);
  site->dtype = kept(args[4]);
  site->lists.reserve(kinds.size());
  read(kinds, 2, args[2], site->values, site->lists);
  read(kinds, 2 + PyTuple_Size(args[2]), args[3], site->values, site->lists);
  PyObject *name, *object;
  static PyObject* const s_detach = PyUnicode_InternFromString("detach");
  for (Py_ssize_t at = 0; PyDict_Next(args[1], &at, &name, &object);) {
    if (object == Py_None) continue;
    PyObject* alias = called(object, s_detach);
    if (alias == nullptr) throw PythonError();
    site->masters.push_back(Master{kept(name), kept(object), alias, 0, nullptr});
    site->masters.back().version = version(object);
    site->masters.back().address = address(object);
  }
  PyObject* capsule = PyCapsule_New(site.get(), kSite, end_site);
  if (capsule != nullptr) site.release();
  return capsule;
}

bool is_plain_thread() {
  for (PyObject* watcher : watchers) {
    const Ref answer(PyObject_CallNoArgs(watcher));
    if (answer != Py_None && PyObject_IsTrue(answer) != 0) return false;
  }
  return whole(Ref(named(known[kForwardAd], s_level))) < 0;
}

bool is_current(const Site& site, PyObject* parameters) {
  if (parameters != site.parameters) return false;
  for (const Master& master : site.masters)
    if (PyDict_GetItemWithError(parameters, master.name) != master.object || version(master.object) != master.version ||
        address(master.object) != master.address)
      return false;
  return true;
}

// a tensor and no subclass, of the site's dtype, contiguous on the CPU, with numbers of its own
bool read_plain(const Site& site, PyObject* tensor, View& view) {
  if (Py_TYPE(tensor) != reinterpret_cast<PyTypeObject*>(known[kTensor]) &&
      Py_TYPE(tensor) != reinterpret_cast<PyTypeObject*>(known[kParameter]))
    return false;
  const Ref dtype(named(tensor, s_dtype));
  if (dtype != site.dtype || Ref(named(tensor, s_is_cpu)) != Py_True ||
      Ref(called(tensor, s_is_contiguous)) != Py_True || Ref(called(tensor, s_is_neg)) != Py_False)
    return false;
  view.type = type_named(dtype);
  read_shape(tensor, view);
  view.data = address(tensor);
  return view.data != nullptr;
}

// run_site(site, module._parameters, x, y, may_overwrite): y', or None
PyObject* run_site(PyObject* const* args) {
  const auto* site = static_cast<const Site*>(PyCapsule_GetPointer(args[0], kSite));
  if (site == nullptr) throw PythonError();
  std::array<Value, kMostValues> values;
  try {
    if (!is_plain_thread() || !read_plain(*site, args[2], values[0].view) || !read_plain(*site, args[3], values[1].view) ||
        !is_current(*site, args[1])) {
      PyErr_Clear();
      return none();
    }
  } catch (const PythonError&) {  // a tensor without an address, a shape or a version: not a plain one
    PyErr_Clear();
    return none();
  }
  PyObject* y = args[3];
  PyObject* out =
      args[4] == Py_True ? kept(y) : PyObject_CallFunctionObjArgs(known[kEmptyLike], y, nullptr);
  if (out == nullptr) throw PythonError();
  try {
    std::copy(site->values.begin(), site->values.end(), values.begin() + 2);
    View& to = values[site->values.size() + 2].view;
    to = values[1].view;
    if (out != y) to.data = address(out);
    compute(*site->run, values.data());
  } catch (...) {
    Py_DecRef(out);
    throw;
  }
  return out;
}

template <PyObject* (*F)(PyObject* const* args), Py_ssize_t COUNT>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(guarded<F, COUNT>)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<setup, 3>("setup"), method<run, 2>("run"), method<make_site, 5>("site"),
                         method<run_site, 5>("run_site"), {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "bem_peft_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_bem_peft_cpu(void) {
  s_version = PyUnicode_InternFromString("_version");
  s_address = PyUnicode_InternFromString("data_ptr");
  s_dtype = PyUnicode_InternFromString("dtype");
  s_shape = PyUnicode_InternFromString("shape");
  s_is_contiguous = PyUnicode_InternFromString("is_contiguous");
  s_is_cpu = PyUnicode_InternFromString("is_cpu");
  s_is_neg = PyUnicode_InternFromString("is_neg");
  s_level = PyUnicode_InternFromString("_current_level");
  return PyModule_Create(&module);
}
