// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The operators: schemas, checks, autograd and the CPU registration.
//
// Every operator takes all keys of a call as lists. Key i has
//
//   x[i]       [*samples, *features]  values, any real dtype
//   sum[i]     [*features]            Σ x, float64 (float32 in the reference's layout)
//   ssq[i]     [*features]            Σ x²
//   count[i]   [1]                    number of samples
//   finite[i]  [2, *features]         float64: values used; values left out. No
//                                     elements: the state keeps no such counter
//   y[i]       like x[i]              floating point; x's own dtype where x is
//   mask[i]    [samples]              bool: which samples count. No elements: all
//
// `finite`, `y` and `mask` may be empty lists. Outputs are mutated and nothing is
// returned: a mutating schema that returns a list of tensors cannot be compiled.

#include "ops.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pthread.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <functional>
#include <vector>

#include "cpu/kernels.h"
#include "key.h"

namespace vecnorm {
namespace {

using at::Tensor;
using at::TensorList;

// ------------------------------------------------------------------------- checks

// The state lists of a call, each with one entry a key.
struct States {
  TensorList sum;
  TensorList ssq;
  TensorList count;
  TensorList finite;
};

bool has(TensorList list, size_t i) { return !list.empty() && list[i].numel() > 0; }

void check_length(TensorList list, size_t n, const char* name, bool optional) {
  TORCH_CHECK_VALUE(list.size() == n || (optional && list.empty()), "expected ", n,
                    " tensors in ", name, ", one for each key, got ", list.size());
}

bool is_state_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat;
}

void check_state(const States& s, size_t i) {
  const Tensor& sum = s.sum[i];
  TORCH_CHECK_VALUE(s.ssq[i].sizes() == sum.sizes(), "key ", i,
                    ": expected ssq of shape ", sum.sizes(), " as sum, got ",
                    s.ssq[i].sizes());
  TORCH_CHECK_VALUE(s.count[i].numel() == 1, "key ", i,
                    ": expected count with one element, got shape ",
                    s.count[i].sizes());
  for (const Tensor* t : {&sum, &s.ssq[i], &s.count[i]}) {
    TORCH_CHECK_TYPE(is_state_dtype(t->scalar_type()), "key ", i,
                     ": expected a float64 or float32 state, got ", t->scalar_type());
    TORCH_CHECK_VALUE(t->is_contiguous(), "key ", i, ": expected a contiguous state");
  }
  if (has(s.finite, i)) {
    const Tensor& finite = s.finite[i];
    TORCH_CHECK_TYPE(finite.scalar_type() == at::kDouble, "key ", i,
                     ": expected finite as float64, got ", finite.scalar_type());
    TORCH_CHECK_VALUE(finite.dim() == sum.dim() + 1 && finite.size(0) == 2 &&
                          finite.sizes().slice(1) == sum.sizes() &&
                          finite.is_contiguous(),
                      "key ", i, ": expected a contiguous finite of shape [2, *",
                      sum.sizes(), "], got ", finite.sizes());
  }
}

void check_states(const States& s) {
  const size_t n = s.sum.size();
  check_length(s.ssq, n, "ssq", false);
  check_length(s.count, n, "count", false);
  check_length(s.finite, n, "finite", true);
  for (size_t i = 0; i < n; ++i) {
    check_state(s, i);
  }
}

void check_values(TensorList x, TensorList y, const States& s) {
  check_states(s);
  check_length(x, s.sum.size(), "x", false);
  check_length(y, s.sum.size(), "y", true);
  for (size_t i = 0; i < x.size(); ++i) {
    const Tensor& value = x[i];
    const at::IntArrayRef features = s.sum[i].sizes();
    TORCH_CHECK_TYPE(!value.is_complex() && value.layout() == at::kStrided, "key ", i,
                     ": expected dense real values, got ", value.scalar_type(), " ",
                     value.layout());
    const int64_t leading = value.dim() - static_cast<int64_t>(features.size());
    TORCH_CHECK_VALUE(leading >= 0 && value.sizes().slice(leading) == features, "key ",
                      i, ": expected features of shape ", features,
                      ", got values of shape ", value.sizes());
    if (has(y, i)) {
      TORCH_CHECK_VALUE(y[i].sizes() == value.sizes(), "key ", i,
                        ": expected an output of shape ", value.sizes(), ", got ",
                        y[i].sizes());
      TORCH_CHECK_TYPE(
          y[i].is_floating_point() &&
              (!value.is_floating_point() || value.scalar_type() == y[i].scalar_type()),
          "key ", i, ": ", value.scalar_type(), " values cannot be written to a ",
          y[i].scalar_type(), " output");
    }
  }
}

// ---------------------------------------------------------------------------- CPU

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kChar:
      return Dtype::kInt8;
    case at::kShort:
      return Dtype::kInt16;
    case at::kInt:
      return Dtype::kInt32;
    case at::kLong:
      return Dtype::kInt64;
    case at::kByte:
      return Dtype::kUInt8;
    case at::kBool:
      return Dtype::kBool;
    default:
      TORCH_CHECK_TYPE(false, "expected real values, got ", type);
  }
}

// Types without a kernel (uint16, float8, …) are read as double.
Tensor readable(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kHalf:
    case at::kBFloat16:
    case at::kChar:
    case at::kShort:
    case at::kInt:
    case at::kLong:
    case at::kByte:
    case at::kBool:
      return x;
    default:
      return x.to(at::kDouble);
  }
}

Matrix matrix_of(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t.scalar_type()), t.stride(0), t.stride(1)};
}

State state_of(const States& s, size_t i) {
  State state;
  state.sum = s.sum[i].data_ptr();
  state.ssq = s.ssq[i].data_ptr();
  state.count = s.count[i].data_ptr();
  state.finite = has(s.finite, i) ? s.finite[i].data_ptr<double>() : nullptr;
  state.sum_dtype = dtype_of(s.sum[i].scalar_type());
  state.ssq_dtype = dtype_of(s.ssq[i].scalar_type());
  state.count_dtype = dtype_of(s.count[i].scalar_type());
  return state;
}

// Set in forked children: the thread pool of their parent is gone there, and a
// parallel region would wait for it for ever.
std::atomic<bool> forked{false};

void parallel_for(int64_t n, const cpu::Body& body) {
  if (n <= 1 || forked.load(std::memory_order_relaxed)) {
    body(0, n);
  } else {
    at::parallel_for(0, n, 1, body);
  }
}

// The keys of a call for the kernels. Tensors that no strides can describe as [samples,
// features] are copied; outputs among them are copied back by write_back().
struct Keys {
  std::vector<Key> keys;
  std::vector<Tensor> alive;
  std::vector<std::pair<Tensor, Tensor>> copies;

  Keys(TensorList x, TensorList y, TensorList mask, const States& s) {
    keys.resize(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      Key& key = keys[i];
      const Tensor& value = x[i];
      const int64_t features = s.sum[i].numel();
      int64_t samples = 1;
      for (int64_t d = 0; d < value.dim() - s.sum[i].dim(); ++d) {
        samples *= value.size(d);
      }
      key.features = features;
      key.samples = samples;
      key.state = state_of(s, i);
      if (has(mask, i)) {
        const Tensor& m = mask[i];
        TORCH_CHECK_VALUE(m.scalar_type() == at::kBool && m.numel() == samples, "key ",
                          i, ": expected a bool mask with ", samples, " elements, got ",
                          m.scalar_type(), " ", m.sizes());
        key.mask = keep(m.contiguous()).data_ptr<bool>();
      }
      if (samples == 0 || features == 0) {
        key.samples = 0;
        continue;
      }
      key.x = matrix_of(keep(as_matrix(readable(value), samples, features)));
      if (has(y, i)) {
        const Tensor out = as_matrix(y[i], samples, features);
        const bool supported = out.scalar_type() == key_output_dtype(key, out);
        if (out.is_alias_of(y[i]) && supported) {
          key.y = matrix_of(keep(out));
        } else {
          const Tensor copy = at::empty(
              {samples, features}, out.options().dtype(key_output_dtype(key, out)));
          copies.emplace_back(y[i], copy);
          key.y = matrix_of(copy);
        }
      }
    }
  }

  void write_back() const {
    for (const auto& [y, copy] : copies) {
      y.copy_(copy.view(y.sizes()));
    }
  }

 private:
  // A value that had to be read as double is normalised as double.
  static at::ScalarType key_output_dtype(const Key& key, const Tensor& out) {
    const at::ScalarType type = out.scalar_type();
    const bool kernel = type == at::kFloat || type == at::kDouble ||
                        type == at::kHalf || type == at::kBFloat16;
    return kernel && key.x.dtype != Dtype::kFloat64 ? type : at::kDouble;
  }

  static Tensor as_matrix(const Tensor& t, int64_t samples, int64_t features) {
    return t.reshape({samples, features});
  }

  const Tensor& keep(Tensor t) {
    alive.push_back(std::move(t));
    return alive.back();
  }
};

void update_cpu(TensorList x, TensorList sum, TensorList ssq, TensorList count,
                TensorList finite, TensorList y, TensorList mask, double keep,
                double weight, double eps) {
  const States s{sum, ssq, count, finite};
  check_values(x, y, s);
  check_length(mask, x.size(), "mask", true);
  const Keys keys(x, y, mask, s);
  cpu::update(keys.keys, {keep, weight}, eps, parallel_for);
  keys.write_back();
}

void normalize_cpu(TensorList x, TensorList sum, TensorList ssq, TensorList count,
                   TensorList finite, TensorList y, double eps) {
  const States s{sum, ssq, count, finite};
  check_values(x, y, s);
  const Keys keys(x, y, {}, s);
  cpu::normalize(keys.keys, eps, parallel_for);
  keys.write_back();
}

void denormalize_cpu(TensorList y, TensorList sum, TensorList ssq, TensorList count,
                     TensorList finite, TensorList x, double eps) {
  const States s{sum, ssq, count, finite};
  for (size_t i = 0; i < y.size(); ++i) {
    TORCH_CHECK_TYPE(y[i].is_floating_point(), "key ", i,
                     ": expected floating-point values, got ", y[i].scalar_type());
  }
  check_values(y, x, s);
  const Keys keys(y, x, {}, s);
  cpu::denormalize(keys.keys, eps, parallel_for);
  keys.write_back();
}

void merge_cpu(TensorList sum, TensorList ssq, TensorList count, TensorList finite,
               TensorList other_sum, TensorList other_ssq, TensorList other_count,
               TensorList other_finite, double keep, double weight) {
  const States s{sum, ssq, count, finite};
  const States other{other_sum, other_ssq, other_count, other_finite};
  check_states(s);
  check_states(other);
  check_length(other_sum, sum.size(), "other_sum", false);
  for (size_t i = 0; i < sum.size(); ++i) {
    TORCH_CHECK_VALUE(sum[i].sizes() == other_sum[i].sizes(), "key ", i,
                      ": expected moments of shape ", sum[i].sizes(), ", got ",
                      other_sum[i].sizes());
  }
  for (size_t i = 0; i < sum.size(); ++i) {
    cpu::merge(state_of(s, i), state_of(other, i), sum[i].numel(), {keep, weight});
  }
}

// ----------------------------------------------------------------------- dispatch

const auto& update_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchrl_vecnorm::update", "")
                             .typed<decltype(vecnorm::update)>();
  return op;
}

const auto& normalize_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchrl_vecnorm::normalize", "")
                             .typed<decltype(vecnorm::normalize)>();
  return op;
}

const auto& denormalize_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchrl_vecnorm::denormalize", "")
                             .typed<decltype(vecnorm::denormalize)>();
  return op;
}

const auto& merge_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchrl_vecnorm::merge", "")
                             .typed<decltype(vecnorm::merge)>();
  return op;
}

// ----------------------------------------------------------------------- autograd

bool needs_grad(TensorList x) {
  if (at::GradMode::is_enabled()) {
    for (const Tensor& t : x) {
      if (t.requires_grad()) {
        return true;
      }
    }
  }
  return false;
}

// The scale of each key, shaped to broadcast over its values. Sizes may be symbolic
// here.
std::vector<Tensor> scales_of(const States& s, double eps) {
  std::vector<Tensor> scales;
  for (size_t i = 0; i < s.sum.size(); ++i) {
    const bool counted = !s.finite.empty() && s.finite[i].sym_numel() > 0;
    const Tensor n = counted ? s.finite[i].select(0, 0) : s.count[i].reshape({});
    const Tensor loc = s.sum[i] / n;
    const Tensor std = (s.ssq[i] / n - loc * loc).clamp_min(0).sqrt().clamp_min(eps);
    scales.push_back(at::where(n > 0, std, at::ones_like(std)));
  }
  return scales;
}

// An affine map whose coefficients are constants: the gradient of an output is divided
// by the scale (normalize) or multiplied by it (denormalize).
struct AffineGrad : public torch::autograd::Function<AffineGrad> {
  using Forward = std::function<std::vector<Tensor>()>;

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                TensorList x, TensorList y,
                                                const Forward& run, bool inverse) {
    const torch::autograd::variable_list outputs = y.vec();
    ctx->saved_data["scales"] = run();
    ctx->saved_data["inverse"] = inverse;
    ctx->saved_data["inputs"] = static_cast<int64_t>(x.size());
    ctx->mark_dirty(outputs);
    return outputs;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const std::vector<Tensor> scales = ctx->saved_data["scales"].toTensorVector();
    const bool inverse = ctx->saved_data["inverse"].toBool();
    torch::autograd::variable_list out;
    for (size_t i = 0; i < grads.size(); ++i) {
      Tensor grad = grads[i];
      if (grad.defined()) {
        const Tensor scale = scales[i].to(grad.scalar_type());
        grad = inverse ? grad * scale : grad / scale;
      }
      out.push_back(grad);
    }
    // Nothing flows into the outputs' old values, the function and the flag.
    out.resize(2 * grads.size() + 2);
    return out;
  }
};

void update_autograd(TensorList x, TensorList sum, TensorList ssq, TensorList count,
                     TensorList finite, TensorList y, TensorList mask, double keep,
                     double weight, double eps) {
  const auto run = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    update_op().call(x, sum, ssq, count, finite, y, mask, keep, weight, eps);
  };
  if (y.empty() || !needs_grad(x)) {
    return run();
  }
  AffineGrad::apply(
      x, y,
      [&] {
        run();
        return scales_of({sum, ssq, count, finite}, eps);
      },
      false);
}

void normalize_autograd(TensorList x, TensorList sum, TensorList ssq, TensorList count,
                        TensorList finite, TensorList y, double eps) {
  const auto run = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    normalize_op().call(x, sum, ssq, count, finite, y, eps);
  };
  if (!needs_grad(x)) {
    return run();
  }
  AffineGrad::apply(
      x, y,
      [&] {
        run();
        return scales_of({sum, ssq, count, finite}, eps);
      },
      false);
}

void denormalize_autograd(TensorList y, TensorList sum, TensorList ssq,
                          TensorList count, TensorList finite, TensorList x,
                          double eps) {
  const auto run = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    denormalize_op().call(y, sum, ssq, count, finite, x, eps);
  };
  if (!needs_grad(y)) {
    return run();
  }
  AffineGrad::apply(
      y, x,
      [&] {
        run();
        return scales_of({sum, ssq, count, finite}, eps);
      },
      true);
}

}  // namespace

void update(TensorList x, TensorList sum, TensorList ssq, TensorList count,
            TensorList finite, TensorList y, TensorList mask, double keep,
            double weight, double eps) {
  update_op().call(x, sum, ssq, count, finite, y, mask, keep, weight, eps);
}

void normalize(TensorList x, TensorList sum, TensorList ssq, TensorList count,
               TensorList finite, TensorList y, double eps) {
  normalize_op().call(x, sum, ssq, count, finite, y, eps);
}

void denormalize(TensorList y, TensorList sum, TensorList ssq, TensorList count,
                 TensorList finite, TensorList x, double eps) {
  denormalize_op().call(y, sum, ssq, count, finite, x, eps);
}

void merge(TensorList sum, TensorList ssq, TensorList count, TensorList finite,
           TensorList other_sum, TensorList other_ssq, TensorList other_count,
           TensorList other_finite, double keep, double weight) {
  merge_op().call(sum, ssq, count, finite, other_sum, other_ssq, other_count,
                  other_finite, keep, weight);
}

TORCH_LIBRARY(torchrl_vecnorm, m) {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  m.def(
      "update(Tensor[] x, Tensor(a!)[] sum, Tensor(b!)[] ssq, Tensor(c!)[] count, "
      "Tensor(d!)[] finite, Tensor(e!)[] y, Tensor[] mask, float keep, float weight, "
      "float eps) -> ()");
  m.def(
      "normalize(Tensor[] x, Tensor[] sum, Tensor[] ssq, Tensor[] count, "
      "Tensor[] finite, Tensor(a!)[] y, float eps) -> ()");
  m.def(
      "denormalize(Tensor[] y, Tensor[] sum, Tensor[] ssq, Tensor[] count, "
      "Tensor[] finite, Tensor(a!)[] x, float eps) -> ()");
  m.def(
      "merge(Tensor(a!)[] sum, Tensor(b!)[] ssq, Tensor(c!)[] count, "
      "Tensor(d!)[] finite, Tensor[] other_sum, Tensor[] other_ssq, "
      "Tensor[] other_count, Tensor[] other_finite, float keep, float weight) -> ()");
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, CPU, m) {
  m.impl("update", update_cpu);
  m.impl("normalize", normalize_cpu);
  m.impl("denormalize", denormalize_cpu);
  m.impl("merge", merge_cpu);
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, Autograd, m) {
  m.impl("update", update_autograd);
  m.impl("normalize", normalize_autograd);
  m.impl("denormalize", denormalize_autograd);
  m.impl("merge", torch::CppFunction::makeFallthrough());
}

}  // namespace vecnorm
