// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The Python module torchrl_vecnorm._C: the eager hot path, which allocates the outputs
// here and calls typed dispatcher handles (about half of what torch.ops costs a call),
// and the mutex that lives in a tensor. torchrl_vecnorm/_C.pyi describes it.

#include <ATen/Functions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "ops.h"
#include "shared/mutex.h"

namespace py = pybind11;

namespace vecnorm {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// Integers and bools come out in the default dtype, as everywhere in torch.
Tensors outputs_like(const Tensors& x) {
  Tensors y;
  y.reserve(x.size());
  for (const Tensor& t : x) {
    const at::ScalarType dtype = t.is_floating_point()
                                     ? t.scalar_type()
                                     : c10::get_default_dtype_as_scalartype();
    y.push_back(at::empty_like(t, t.options().dtype(dtype)));
  }
  return y;
}

Tensors update_and_normalize(const Tensors& x, const Tensors& sum, const Tensors& ssq,
                             const Tensors& count, const Tensors& nonfinite,
                             const Tensors& mask, double keep, double weight,
                             double eps, std::optional<Tensors> out) {
  Tensors y = out.has_value() ? std::move(*out) : outputs_like(x);
  update(x, sum, ssq, count, nonfinite, y, mask, keep, weight, eps);
  return y;
}

Tensors normalized(const Tensors& x, const Tensors& sum, const Tensors& ssq,
                   const Tensors& count, const Tensors& nonfinite, double eps,
                   std::optional<Tensors> out) {
  Tensors y = out.has_value() ? std::move(*out) : outputs_like(x);
  normalize(x, sum, ssq, count, nonfinite, y, eps);
  return y;
}

void* memory_of(const Tensor& t) {
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && t.scalar_type() == at::kByte && t.is_contiguous() &&
          static_cast<size_t>(t.numel()) >= shared::mutex_size(),
      "expected a contiguous uint8 CPU tensor of ", shared::mutex_size(),
      " bytes, got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
  void* memory = t.data_ptr();
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(memory) % shared::mutex_alignment() == 0,
      "expected memory aligned to ", shared::mutex_alignment(), " bytes");
  return memory;
}

void* mutex_of(const Tensor& t) {
  void* memory = memory_of(t);
  TORCH_CHECK(shared::is_mutex(memory),
              "the tensor holds no lock of this build of torchrl_vecnorm");
  return memory;
}

bool mutex_acquire(const Tensor& t, double timeout) {
  void* memory = mutex_of(t);
  if (shared::mutex_try_lock(memory)) {
    return true;
  }
  // Whoever holds it may be a thread that waits for the GIL.
  py::gil_scoped_release no_gil;
  return shared::mutex_lock(memory, timeout);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("update", &update_and_normalize, py::arg("x"), py::arg("sum"), py::arg("ssq"),
        py::arg("count"), py::arg("nonfinite"), py::arg("mask"), py::arg("keep"),
        py::arg("weight"), py::arg("eps"), py::arg("out") = py::none());
  m.def("normalize", &normalized, py::arg("x"), py::arg("sum"), py::arg("ssq"),
        py::arg("count"), py::arg("nonfinite"), py::arg("eps"),
        py::arg("out") = py::none());
#ifdef VECNORM_WITH_CUDA
  m.def("cuda_path", &set_cuda_path, py::arg("name"));
  m.def("last_cuda_path", &last_cuda_path);
#endif
  m.def("mutex_size", &shared::mutex_size);
  m.def("mutex_init", [](const Tensor& t) { shared::mutex_init(memory_of(t)); });
  m.def("mutex_acquire", &mutex_acquire, py::arg("mutex"), py::arg("timeout"));
  m.def("mutex_release", [](const Tensor& t) { shared::mutex_unlock(mutex_of(t)); });
}

}  // namespace vecnorm
