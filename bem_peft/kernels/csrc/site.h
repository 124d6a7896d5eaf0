// The operators for inference, and what a site is made of; the torch forms of the methods are the specification.
//
//   y' = y (1 + sum_u g_u G[u]) + sum_r z_r B[r]        g, z: a few coefficients a token, float32
//
// Every method differs in its coefficients alone. x, y and the wide weights are float32 or bfloat16, all of one dtype: in
// decoding the time goes into reading them. Sums and small weights are float32.
//
// An operator is a function (overwrite, x, y, weights..., options...). The dispatcher knows two forms of it: `name`, and
// `name_`, which writes into y; `site` (operators.cpp) binds one to the weights and options of an adapter.

#pragma once

#include <torch/csrc/python_headers.h>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace bem {

typedef std::function<at::Tensor(const at::Tensor& x, const at::Tensor& y, bool overwrite)> SiteForm;

struct SiteKind {
  size_t weights, options;  // how many
  size_t wide;  // the number of a weight that comes in the dtype of y
  SiteForm (*bind)(const std::vector<at::Tensor>& weights, PyObject* options);
};

// each method's file adds its own
inline std::map<std::string, SiteKind>& site_kinds() {
  static std::map<std::string, SiteKind> kinds;
  return kinds;
}

inline void read(PyObject* object, bool& value) { value = object == Py_True; }
inline void read(PyObject* object, int64_t& value) { value = PyLong_AsLongLong(object); }
inline void read(PyObject* object, double& value) { value = PyFloat_AsDouble(object); }
inline void read(PyObject* object, std::vector<int64_t>& values) {
  TORCH_CHECK(PyList_Check(object), "site: an option must be a list");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) values.push_back(PyLong_AsLongLong(PyList_GET_ITEM(object, i)));
}

// what an argument is kept as
template <typename T>
struct Kept { typedef T type; };
template <>
struct Kept<const at::Tensor&> { typedef at::Tensor type; };
template <>
struct Kept<at::IntArrayRef> { typedef std::vector<int64_t> type; };

template <auto OPERATOR>
struct Inference;

template <typename... Args, at::Tensor (*OPERATOR)(bool, const at::Tensor&, const at::Tensor&, Args...)>
struct Inference<OPERATOR> {
  static constexpr size_t kWeights = (size_t{0} + ... + size_t{std::is_same_v<Args, const at::Tensor&>});
  static constexpr size_t kOptions = sizeof...(Args) - kWeights;

  static at::Tensor fresh(const at::Tensor& x, const at::Tensor& y, Args... args) { return OPERATOR(false, x, y, args...); }
  static at::Tensor into_y(const at::Tensor& x, const at::Tensor& y, Args... args) { return OPERATOR(true, x, y, args...); }

  static SiteForm bind(const std::vector<at::Tensor>& weights, PyObject* options) {
    std::tuple<typename Kept<Args>::type...> kept;
    size_t weight = 0, option = 0;
    const auto take = [&](auto& part) {
      if constexpr (std::is_same_v<decltype(part), at::Tensor&>) {
        part = weights[weight++];
      } else {
        read(PyTuple_GET_ITEM(options, option++), part);
      }
    };
    std::apply([&](auto&... part) { (take(part), ...); }, kept);
    return [kept](const at::Tensor& x, const at::Tensor& y, bool overwrite) {
      return std::apply([&](const auto&... part) { return OPERATOR(overwrite, x, y, part...); }, kept);
    };
  }
};

template <auto OPERATOR>
const SiteKind& add_site_kind(const char* name, size_t wide) {
  typedef Inference<OPERATOR> Form;
  return site_kinds()[name] = SiteKind{Form::kWeights, Form::kOptions, wide, Form::bind};
}

// `arguments`: those after x and y, as a schema writes them
inline void define_inference(torch::Library& m, const std::string& name, const std::string& arguments) {
  m.def(torch::schema((name + "(Tensor x, Tensor y, " + arguments + ") -> Tensor").c_str()));
  m.def(torch::schema((name + "_(Tensor x, Tensor(a!) y, " + arguments + ") -> Tensor(a!)").c_str()));
}

template <auto OPERATOR>
void implement_inference(torch::Library& m, const std::string& name) {
  m.impl(name.c_str(), Inference<OPERATOR>::fresh);
  m.impl((name + "_").c_str(), Inference<OPERATOR>::into_y);
}

}  // namespace bem
