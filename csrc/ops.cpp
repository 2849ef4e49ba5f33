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
//   nonfinite[i]  [2, *features]         float64: values used; values left out. No
//                                     elements: the state keeps no such counter
//   y[i]       like x[i]              floating point; x's own dtype where x is
//   mask[i]    [samples]              bool: which samples count. No elements: all
//
// `nonfinite`, `y` and `mask` may be empty lists. Outputs are mutated and nothing is
// returned: a mutating schema that returns a list of tensors cannot be compiled.

#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pthread.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <functional>
#include <initializer_list>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"

namespace vecnorm {
namespace {

// ---------------------------------------------------------------------------- CPU

std::atomic<bool> forked{false};  // in forked children

// One team of threads for all phases, the one that at::parallel_for uses too: starting
// it anew for each phase would cost as much as a small update.
void run_phases(const std::vector<cpu::Phase>& phases) {
#ifdef _OPENMP
  int64_t parts = 1;
  for (const cpu::Phase& phase : phases) {
    parts = std::max(parts, phase.parts);
  }
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(static_cast<int>(std::min(threads, parts)))
  {
    const int64_t rank = omp_get_thread_num();
    const int64_t team = omp_get_num_threads();
    for (const cpu::Phase& phase : phases) {
      if (&phase != &phases.front()) {
#pragma omp barrier
      }
      phase.body(phase.parts * rank / team, phase.parts * (rank + 1) / team);
    }
  }
#else
  for (const cpu::Phase& phase : phases) {
    at::parallel_for(0, phase.parts, 1, phase.body);
  }
#endif
}

void update_cpu(TensorList x, TensorList sum, TensorList ssq, TensorList count,
                TensorList nonfinite, TensorList y, TensorList mask, double keep,
                double weight, double eps) {
  leave_the_pool_after_fork();
  const States s{sum, ssq, count, nonfinite};
  check_update(x, y, mask, s);
  const Keys keys(x, y, mask, s);
  cpu::update(keys.keys, {keep, weight}, eps, run_phases);
  keys.write_back();
}

void normalize_cpu(TensorList x, TensorList sum, TensorList ssq, TensorList count,
                   TensorList nonfinite, TensorList y, double eps) {
  leave_the_pool_after_fork();
  const States s{sum, ssq, count, nonfinite};
  check_values(x, y, s);
  const Keys keys(x, y, {}, s);
  cpu::normalize(keys.keys, eps, run_phases);
  keys.write_back();
}

void denormalize_cpu(TensorList y, TensorList sum, TensorList ssq, TensorList count,
                     TensorList nonfinite, TensorList x, double eps) {
  leave_the_pool_after_fork();
  const States s{sum, ssq, count, nonfinite};
  check_floating_point(y);
  check_values(y, x, s);
  const Keys keys(y, x, {}, s);
  cpu::denormalize(keys.keys, eps, run_phases);
  keys.write_back();
}

void merge_cpu(TensorList sum, TensorList ssq, TensorList count, TensorList nonfinite,
               TensorList other_sum, TensorList other_ssq, TensorList other_count,
               TensorList other_nonfinite, double keep, double weight) {
  const States s{sum, ssq, count, nonfinite};
  const States other{other_sum, other_ssq, other_count, other_nonfinite};
  check_merge(s, other);
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

// The scale of a key, shaped to broadcast over its values. Sizes may be symbolic here.
Tensor scale_of(const States& s, size_t i, double eps) {
  Tensor n = s.count[i].reshape({}).to(at::kDouble);
  if (!s.nonfinite.empty() && s.nonfinite[i].sym_numel() > 0) {
    // As Moments::used() has it.
    const Tensor used = n - s.nonfinite[i].select(0, 0);
    const Tensor rounding = n * 1e-9;
    n = at::where(used < -rounding, n, at::where(used <= rounding, 0., used));
  }
  const Tensor loc = s.sum[i].to(at::kDouble) / n;
  const Tensor var = s.ssq[i].to(at::kDouble) / n - loc * loc;
  const Tensor std = var.clamp_min(0).sqrt().clamp_min(eps);
  return at::where(n > 0, std, at::ones_like(std));
}

// An affine map whose coefficients are constants: the gradient of an output is divided
// by the scale (normalize) or multiplied by it (denormalize).
struct AffineGrad : public torch::autograd::Function<AffineGrad> {
  using Run = std::function<std::vector<Tensor>()>;

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                TensorList x, TensorList y,
                                                const Run& run, bool inverse) {
    const torch::autograd::variable_list outputs = y.vec();
    ctx->saved_data["scales"] = run();
    ctx->saved_data["inverse"] = inverse;
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

// What autograd would refuse about a write to an output, before anything is written.
void check_writable(const Tensor& y, size_t i) {
  TORCH_CHECK(!y.is_inference(), "key ", i,
              ": expected an output that can have a gradient, got an inference tensor");
  try {
    torch::autograd::check_inplace(y, true);
  } catch (c10::Error& error) {
    error.add_context(c10::str("key ", i, ": expected an output to write to"));
    throw;
  }
}

// Runs an operator below autograd. What a graph has saved must not be used by its
// backward pass once it was written to.
template <typename Call>
void run_below_autograd(std::initializer_list<TensorList> mutated, const Call& call) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    call();
  }
  for (TensorList list : mutated) {
    for (const Tensor& t : list) {
      if (!t.is_inference()) {
        t.unsafeGetTensorImpl()->bump_version();
      }
    }
  }
}

// Runs an operator whose outputs are or become part of a graph.
template <typename Run>
void run_in_graph(TensorList x, TensorList y, const States& s, double eps, bool inverse,
                  const Run& run) {
  std::vector<size_t> keys;
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
  std::vector<std::pair<Tensor, Tensor>> copies;
  for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
    if (!x[i].requires_grad() && !y[i].requires_grad()) {
      continue;
    }
    check_writable(y[i], i);
    Tensor output = y[i];
    if (output.is_view() || output.requires_grad()) {
      // It shares a graph with others: torch's own copy_ knows how that goes on.
      output = at::empty_like(y[i]);
      copies.emplace_back(y[i], output);
    }
    if (x[i].requires_grad()) {
      keys.push_back(i);
      inputs.push_back(x[i]);
      outputs.push_back(output);
    }
  }
  const auto run_and_copy = [&] {
    run();
    at::AutoDispatchBelowADInplaceOrView guard;
    for (const auto& [written, copy] : copies) {
      copy.copy_(written);
    }
  };
  if (keys.empty()) {
    run_and_copy();
  } else {
    AffineGrad::apply(
        TensorList(inputs), TensorList(outputs),
        [&] {
          run_and_copy();
          std::vector<Tensor> scales;
          for (size_t i : keys) {
            scales.push_back(scale_of(s, i, eps));
          }
          return scales;
        },
        inverse);
  }
  for (const auto& [written, copy] : copies) {
    written.copy_(copy);
  }
}

// Runs an operator, and connects the outputs whose inputs need gradients.
template <typename Run>
void with_gradients(TensorList x, TensorList y, const States& s, double eps,
                    bool inverse, const Run& run) {
  const auto needs_gradient = [](const Tensor& t) { return t.requires_grad(); };
  for (size_t i = 0; i < x.size(); ++i) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !x[i]._fw_grad(0).defined(), "key ", i,
        ": the operators have no forward-mode derivatives, torchrl_vecnorm.functional "
        "has them");
  }
  if (at::GradMode::is_enabled() && (std::any_of(x.begin(), x.end(), needs_gradient) ||
                                     std::any_of(y.begin(), y.end(), needs_gradient))) {
    run_in_graph(x, y, s, eps, inverse, run);
  } else {
    run();
  }
}

void update_autograd(TensorList x, TensorList sum, TensorList ssq, TensorList count,
                     TensorList nonfinite, TensorList y, TensorList mask, double keep,
                     double weight, double eps) {
  with_gradients(x, y, {sum, ssq, count, nonfinite}, eps, false, [&] {
    run_below_autograd({sum, ssq, count, nonfinite, y}, [&] {
      update_op().call(x, sum, ssq, count, nonfinite, y, mask, keep, weight, eps);
    });
  });
}

void normalize_autograd(TensorList x, TensorList sum, TensorList ssq, TensorList count,
                        TensorList nonfinite, TensorList y, double eps) {
  with_gradients(x, y, {sum, ssq, count, nonfinite}, eps, false, [&] {
    run_below_autograd(
        {y}, [&] { normalize_op().call(x, sum, ssq, count, nonfinite, y, eps); });
  });
}

void denormalize_autograd(TensorList y, TensorList sum, TensorList ssq,
                          TensorList count, TensorList nonfinite, TensorList x,
                          double eps) {
  with_gradients(y, x, {sum, ssq, count, nonfinite}, eps, true, [&] {
    run_below_autograd(
        {x}, [&] { denormalize_op().call(y, sum, ssq, count, nonfinite, x, eps); });
  });
}

void merge_autograd(TensorList sum, TensorList ssq, TensorList count,
                    TensorList nonfinite, TensorList other_sum, TensorList other_ssq,
                    TensorList other_count, TensorList other_nonfinite, double keep,
                    double weight) {
  run_below_autograd({sum, ssq, count, nonfinite}, [&] {
    merge_op().call(sum, ssq, count, nonfinite, other_sum, other_ssq, other_count,
                    other_nonfinite, keep, weight);
  });
}

}  // namespace

void leave_the_pool_after_fork() {
  if (forked.exchange(false)) {
    at::set_num_threads(1);
  }
}

void update(TensorList x, TensorList sum, TensorList ssq, TensorList count,
            TensorList nonfinite, TensorList y, TensorList mask, double keep,
            double weight, double eps) {
  update_op().call(x, sum, ssq, count, nonfinite, y, mask, keep, weight, eps);
}

void normalize(TensorList x, TensorList sum, TensorList ssq, TensorList count,
               TensorList nonfinite, TensorList y, double eps) {
  normalize_op().call(x, sum, ssq, count, nonfinite, y, eps);
}

void denormalize(TensorList y, TensorList sum, TensorList ssq, TensorList count,
                 TensorList nonfinite, TensorList x, double eps) {
  denormalize_op().call(y, sum, ssq, count, nonfinite, x, eps);
}

void merge(TensorList sum, TensorList ssq, TensorList count, TensorList nonfinite,
           TensorList other_sum, TensorList other_ssq, TensorList other_count,
           TensorList other_nonfinite, double keep, double weight) {
  merge_op().call(sum, ssq, count, nonfinite, other_sum, other_ssq, other_count,
                  other_nonfinite, keep, weight);
}

TORCH_LIBRARY(torchrl_vecnorm, m) {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  m.def(
      "update(Tensor[] x, Tensor(a!)[] sum, Tensor(b!)[] ssq, Tensor(c!)[] count, "
      "Tensor(d!)[] nonfinite, Tensor(e!)[] y, Tensor[] mask, float keep, float "
      "weight, "
      "float eps) -> ()");
  m.def(
      "normalize(Tensor[] x, Tensor[] sum, Tensor[] ssq, Tensor[] count, "
      "Tensor[] nonfinite, Tensor(a!)[] y, float eps) -> ()");
  m.def(
      "denormalize(Tensor[] y, Tensor[] sum, Tensor[] ssq, Tensor[] count, "
      "Tensor[] nonfinite, Tensor(a!)[] x, float eps) -> ()");
  m.def(
      "merge(Tensor(a!)[] sum, Tensor(b!)[] ssq, Tensor(c!)[] count, "
      "Tensor(d!)[] nonfinite, Tensor[] other_sum, Tensor[] other_ssq, "
      "Tensor[] other_count, Tensor[] other_nonfinite, float keep, float weight) -> "
      "()");
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
  m.impl("merge", merge_autograd);
}

// What is left of it in inference mode, for tensors from outside.
TORCH_LIBRARY_IMPL(torchrl_vecnorm, ADInplaceOrView, m) {
  m.impl("update", update_autograd);
  m.impl("normalize", normalize_autograd);
  m.impl("denormalize", denormalize_autograd);
  m.impl("merge", merge_autograd);
}

}  // namespace vecnorm
