// Whether a call is nothing but the values of its tensors: no subclass, no transform, no tracer, no mode, no tangent.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

namespace bem {

// a strided tensor on the CPU with no other keys than such a one has: not batched, not functional, no sign to be taken
// (`torch._neg_view`), nothing of Python's, and without a tangent of forward-mode differentiation
inline bool is_plain(const at::Tensor& tensor) {
  static const uint64_t usual = [] {
    const c10::InferenceMode off(false);
    return at::empty({0}, at::kCPU).key_set().raw_repr();
  }();
  auto keys = tensor.key_set();  // not const: torch before 2.9 reads no representation of a const one
  return keys.has(c10::DispatchKey::CPU) && (keys.raw_repr() & ~usual) == 0 && !tensor._fw_grad(0).defined();
}

// no mode of Python's, no functional transform, no tracer: each adds a key to the thread's
inline bool is_plain_thread() {
  auto included = c10::impl::tls_local_dispatch_key_set().included_;
  auto usual = c10::default_included_set;
  return (included.raw_repr() & ~usual.raw_repr()) == 0 && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

}  // namespace bem
