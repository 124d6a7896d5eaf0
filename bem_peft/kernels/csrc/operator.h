// What an operator is given, and the table in which it stands. Nothing here knows torch or Python.
//
// Inference:
//
//   y' = y (1 + sum_u g_u G[u]) + sum_r z_r B[r]        g, z: a few coefficients a token, float32
//
// Every method differs in its coefficients alone. x, y and the wide weights are float32 or bfloat16, all of one dtype: in
// decoding the time goes into reading them. Sums and small weights are float32. The torch forms of the methods are the
// specification.
//
// An operator is a function (x, y, weights..., options..., results...) and returns nothing: who calls makes room for the
// results. A row of y is read whole before that of y' is written, so that y may be where the result goes.

#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace bem {

struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float value) {  // to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    bits = value != value ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
  }
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

enum class Type { none, float32, bfloat16, float64, float16, boolean, other };

template <typename T>
constexpr Type type_of() {
  return std::is_same_v<T, float> ? Type::float32 : std::is_same_v<T, bfloat16> ? Type::bfloat16 : Type::boolean;
}

// A contiguous tensor: `columns` is its last axis, `rows` all others. Type::none: there is no tensor.
struct View {
  void* data = nullptr;
  Type type = Type::none;
  int64_t rows = 0, columns = 0;

  bool is_there() const { return type != Type::none; }
  int64_t count() const { return rows * columns; }
  template <typename T>
  T* as() const { return static_cast<T*>(data); }
};

struct Whole {  // numbers of a list
  const int64_t* first;
  int64_t count;
  int64_t operator[](int64_t i) const { return first[i]; }
  const int64_t* begin() const { return first; }
  const int64_t* end() const { return first + count; }
};

// ---- errors

inline std::string text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(const View& view) {
  static const char* const names[] = {"none", "float32", "bfloat16", "float64", "float16", "bool", "another dtype"};
  return std::string(names[static_cast<int>(view.type)]) + " (" + text(view.rows) + ", " + text(view.columns) + ")";
}

template <typename... Parts>
void check(bool is_right, const Parts&... parts) {
  if (!is_right) throw std::runtime_error((std::string() + ... + text(parts)));
}

// ---- the table

struct Value {
  View view;
  int64_t whole = 0;
  double number = 0.0;
  Whole list{nullptr, 0};
};

template <typename T>
struct Kind;
template <>
struct Kind<const View&> {
  static constexpr char kLetter = 't';
  static const View& of(const Value& value) { return value.view; }
};
template <>
struct Kind<bool> {
  static constexpr char kLetter = 'b';
  static bool of(const Value& value) { return value.whole != 0; }
};
template <>
struct Kind<int64_t> {
  static constexpr char kLetter = 'i';
  static int64_t of(const Value& value) { return value.whole; }
};
template <>
struct Kind<double> {
  static constexpr char kLetter = 'd';
  static double of(const Value& value) { return value.number; }
};
template <>
struct Kind<Whole> {
  static constexpr char kLetter = 'l';
  static Whole of(const Value& value) { return value.list; }
};

struct Operator {
  std::string kinds;  // a letter an argument
  void (*run)(const Value* values);
};

inline std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> table;
  return table;
}

template <auto OPERATOR>
struct Called;
template <typename... Args, void (*OPERATOR)(Args...)>
struct Called<OPERATOR> {
  static std::string kinds() { return {Kind<Args>::kLetter...}; }
  template <size_t... AT>
  static void each(const Value* values, std::index_sequence<AT...>) { OPERATOR(Kind<Args>::of(values[AT])...); }
  static void run(const Value* values) { each(values, std::index_sequence_for<Args...>()); }
};

template <auto OPERATOR>
bool add_operator(const char* name) {
  operators()[name] = Operator{Called<OPERATOR>::kinds(), Called<OPERATOR>::run};
  return true;
}

}  // namespace bem
