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
#include "tensors.h"

namespace vecnorm {
namespace {

// ---------------------------------------------------------------------------- CPU

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
  check_floating_point(y);
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
