// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The operators: schemas, checks, autograd and the CPU registration.
//
// Every operator takes all keys of a call as lists. Key i has
//
//   x[i]       [*samples, *features]  values, any real dtype
//   y[i]       like x[i]              floating point; x's own dtype where x is
//   mask[i]    [*samples]             bool: which samples count. No elements: all
//
// and five entries in `state`, one after the other, float64 (float32 in the layout of
// torchrl's class, and on devices that have nothing better):
//
//   sum        [*features]            Σ x
//   ssq        [*features]            Σ x²
//   count      [1]                    number of samples
//   nonfinite  [2, *features]         samples whose value is missing; values left out
//   central    [*features]            the variance
//
// The last two have no elements where a state does without them. `y` and `mask` may be
// empty lists. `eps`, `eps_mode`, `clip` and `center` are the Rule of moments.h. What
// mutates takes its outputs and returns nothing: a mutating schema that returns a list
// of tensors cannot be compiled. What mutates nothing returns its results, so that
// graphs, their branches, and traces hold it as any other function.

#include "ops.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pthread.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "direct.h"
#include "gradients.h"
#include "team.h"
#include "tensors.h"

namespace vecnorm {
namespace {

// ---------------------------------------------------------------------------- CPU

// A large output is fresh from the system, page by page as it is written: huge pages
// take a fraction of the time.
void prefer_huge_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  if (t.device().is_cpu() && t.nbytes() >= 2 * page) {
    const auto address = reinterpret_cast<uintptr_t>(t.data_ptr());
    const uintptr_t begin = (address + page - 1) / page * page;
    const uintptr_t end = (address + t.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

void update_cpu(TensorList x, TensorList state, TensorList y, TensorList mask,
                double keep, double weight, double eps, int64_t eps_mode,
                std::optional<double> clip, bool center) {
  leave_the_pool_after_fork();
  const States s{state};
  const Rule rule = rule_of({eps, eps_mode, clip, center});
  check_update(x, y, mask, s, keep, weight);
  const Keys keys(x, y, mask, s);
  cpu::update(keys.keys, {keep, weight}, rule, run_phases);
  keys.write_back();
}

void normalize_out_cpu(TensorList x, TensorList state, TensorList y, double eps,
                       int64_t eps_mode, std::optional<double> clip, bool center) {
  leave_the_pool_after_fork();
  const States s{state};
  const Rule rule = rule_of({eps, eps_mode, clip, center});
  check_output(x, y, s);
  const Keys keys(x, y, {}, s);
  cpu::normalize(keys.keys, rule, run_phases);
  keys.write_back();
}

std::vector<Tensor> normalize_cpu(TensorList x, TensorList state, double eps,
                                  int64_t eps_mode, std::optional<double> clip,
                                  bool center) {
  leave_the_pool_after_fork();
  const States s{state};
  const Rule rule = rule_of({eps, eps_mode, clip, center});
  check_values(x, {}, s);
  std::vector<Tensor> y = outputs_like(x);
  const Keys keys(x, y, {}, s);
  cpu::normalize(keys.keys, rule, run_phases);
  keys.write_back();
  return y;
}

std::vector<Tensor> denormalize_cpu(TensorList y, TensorList state, double eps,
                                    int64_t eps_mode, std::optional<double> clip,
                                    bool center) {
  leave_the_pool_after_fork();
  const States s{state};
  check_floating_point(y);
  const Rule rule = rule_of({eps, eps_mode, clip, center});
  check_values(y, {}, s);
  std::vector<Tensor> x = outputs_like(y);
  const Keys keys(y, x, {}, s);
  cpu::denormalize(keys.keys, rule, run_phases);
  keys.write_back();
  return x;
}

std::vector<Tensor> moments_cpu(TensorList x, int64_t feature_ndim, TensorList mask) {
  std::vector<Tensor> state = zero_states(x, feature_ndim);
  update_cpu(x, state, {}, mask, 1, 1, 1, 0, {}, true);
  return state;
}

void merge_cpu(TensorList state, TensorList other, double keep, double weight) {
  const States s{state};
  const States o{other};
  check_merge(s, o, keep, weight);
  for (size_t i = 0; i < s.size(); ++i) {
    cpu::merge(state_of(s, i), state_of(o, i), s.sum(i).numel(), {keep, weight});
  }
}

// ----------------------------------------------------------------------- dispatch

template <typename Schema>
c10::TypedOperatorHandle<Schema> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

const auto& update_op() {
  static const auto op = find_op<decltype(update_cpu)>("torchrl_vecnorm::update");
  return op;
}

const auto& normalize_op() {
  static const auto op = find_op<decltype(normalize_cpu)>("torchrl_vecnorm::normalize");
  return op;
}

const auto& normalize_out_op() {
  static const auto op =
      find_op<decltype(normalize_out_cpu)>("torchrl_vecnorm::normalize_out");
  return op;
}

const auto& denormalize_op() {
  static const auto op =
      find_op<decltype(denormalize_cpu)>("torchrl_vecnorm::denormalize");
  return op;
}

const auto& moments_op() {
  static const auto op = find_op<decltype(moments_cpu)>("torchrl_vecnorm::moments");
  return op;
}

const auto& merge_op() {
  static const auto op = find_op<decltype(merge_cpu)>("torchrl_vecnorm::merge");
  return op;
}

// ----------------------------------------------------------------------- autograd

struct LocScale {
  Tensor loc;
  Tensor scale;
};

// Those of a key, shaped to broadcast over its values: statistic() of moments.h in
// plain torch, as sizes may be symbolic here.
LocScale loc_scale_of(const States& s, size_t i, const Rule& rule) {
  // mps has nothing better than float32.
  const at::ScalarType real = s.sum(i).is_mps() ? at::kFloat : at::kDouble;
  const bool keeps_var = s.central(i).sym_numel() > 0;
  const bool in_double =
      s.sum(i).scalar_type() == at::kDouble && s.ssq(i).scalar_type() == at::kDouble;
  const Rounding rounding = Rounding::of(in_double, keeps_var);
  Tensor n = s.count(i).reshape({-1}).select(0, 0).to(real);
  if (s.nonfinite(i).sym_numel() > 0) {
    // As Moments::used() has it.
    const Tensor used = n - s.nonfinite(i).select(0, 0).to(real);
    const Tensor slack = n * 1e-9;
    n = at::where(used < -slack, n, at::where(used <= slack, 0., used));
  }
  const Tensor loc = s.sum(i).to(real) / n;
  Tensor var = (s.ssq(i).to(real) / n - loc * loc).clamp_min(0);
  if (keeps_var) {
    const Tensor kept = s.central(i).to(real);
    const Tensor slack = (kept + var) * 1e-6 + loc * loc * rounding.var;
    var = at::where((kept - var).abs() <= slack, kept, var);
  }
  const Scaling& scaling = rule.scaling;
  const Tensor least = (loc.abs() * rounding.scale).clamp_min(scaling.least_std);
  const Tensor seen = n > 0;
  var = at::where(seen, var, at::ones_like(var));
  const Tensor root = (var.clamp_min(scaling.least_var) + scaling.add_var).sqrt();
  const Tensor scale =
      at::where(seen, at::maximum(root, least), root) + scaling.add_std;
  const Tensor zero = at::zeros_like(loc);
  return {scaling.centering > 0 ? at::where(seen, loc, zero) : zero, scale};
}

// What the gradients of some keys are made of.
struct Slopes {
  std::vector<Tensor> scales;
  std::vector<Tensor> within;  // where the clip has changed nothing; empty without one

  Slopes() = default;

  // `x` are what the keys' outputs are made from.
  Slopes(const States& s, const std::vector<size_t>& keys, const std::vector<Tensor>& x,
         const Rule& rule, bool inverse) {
    const bool clips = std::isfinite(rule.clip);
    for (size_t k = 0; k < keys.size(); ++k) {
      const auto [loc, scale] = loc_scale_of(s, keys[k], rule);
      scales.push_back(scale);
      if (clips) {
        const Tensor wide = x[k].to(scale.scalar_type());
        within.push_back((inverse ? wide : (wide - loc) / scale).abs() <= rule.clip);
      }
    }
  }
};

// An affine map whose coefficients are constants: the gradient of an output is divided
// by the scale (normalize) or multiplied by it (denormalize), and 0 where it is
// clipped.
struct AffineGrad : public torch::autograd::Function<AffineGrad> {
  using Variables = torch::autograd::variable_list;
  using Context = torch::autograd::AutogradContext;

  // `run` returns the outputs, which are `y` where there are any, and their slopes.
  using Run = std::function<std::pair<Variables, Slopes>()>;

  static Variables forward(Context* ctx, TensorList x, TensorList y, const Run& run,
                           bool inverse) {
    auto [outputs, slopes] = run();
    ctx->saved_data["scales"] = slopes.scales;
    ctx->saved_data["within"] = slopes.within;
    ctx->saved_data["inverse"] = inverse;
    ctx->saved_data["written"] = static_cast<int64_t>(y.size());
    if (!y.empty()) {
      ctx->mark_dirty(outputs);
    }
    return outputs;
  }

  static Variables backward(Context* ctx, Variables grads) {
    const std::vector<Tensor> scales = ctx->saved_data["scales"].toTensorVector();
    const std::vector<Tensor> within = ctx->saved_data["within"].toTensorVector();
    const bool inverse = ctx->saved_data["inverse"].toBool();
    Variables out;
    for (size_t i = 0; i < grads.size(); ++i) {
      Tensor grad = grads[i];
      if (grad.defined()) {
        const Tensor scale = scales[i].to(grad.scalar_type());
        grad = inverse ? grad * scale : grad / scale;
        if (!within.empty()) {
          grad = at::where(within[i], grad, at::zeros_like(grad));
        }
      }
      out.push_back(grad);
    }
    // Nothing flows into the outputs' old values, the function and the flag.
    out.resize(grads.size() + ctx->saved_data["written"].toInt() + 2);
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

// Runs an operator whose outputs are or become part of a graph.
template <typename Run>
void run_in_graph(TensorList x, TensorList y, const States& s, const Rule& rule,
                  const Run& run) {
  std::vector<size_t> keys;
  std::vector<Tensor> inputs;
  std::vector<Tensor> values;  // the inputs as they are before anything is written
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
      const bool is_lost = std::isfinite(rule.clip) && share_storage(x[i], y[i]);
      values.push_back(is_lost ? x[i].detach().clone() : x[i]);
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
          return std::pair(outputs, Slopes(s, keys, values, rule, /*inverse=*/false));
        },
        /*inverse=*/false);
  }
  for (const auto& [written, copy] : copies) {
    written.copy_(copy);
  }
}

bool needs_gradient(TensorList list) {
  return at::GradMode::is_enabled() &&
         std::any_of(list.begin(), list.end(),
                     [](const Tensor& t) { return t.requires_grad(); });
}

void check_no_tangents(TensorList x) {
  for (size_t i = 0; i < x.size(); ++i) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !x[i]._fw_grad(0).defined(), "key ", i,
        ": the operators have no forward-mode derivatives, torchrl_vecnorm.functional "
        "has them");
  }
}

// Runs an operator that writes to its outputs, and connects those whose inputs need
// gradients.
template <typename Run>
void with_gradients(TensorList x, TensorList y, const States& s, const RuleArgs& rule,
                    const Run& run) {
  check_no_tangents(x);
  if (needs_gradient(x) || needs_gradient(y)) {
    run_in_graph(x, y, s, rule_of(rule), run);
  } else {
    run();
  }
}

// The same for one that returns them.
template <typename Run>
std::vector<Tensor> returned_with_gradients(TensorList x, const States& s,
                                            const RuleArgs& rule, bool inverse,
                                            const Run& run) {
  check_no_tangents(x);
  const auto run_below = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return run();
  };
  if (!needs_gradient(x)) {
    return run_below();
  }
  std::vector<size_t> keys;
  std::vector<Tensor> inputs;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i].requires_grad()) {
      keys.push_back(i);
      inputs.push_back(x[i]);
    }
  }
  std::vector<Tensor> all;
  const std::vector<Tensor> connected = AffineGrad::apply(
      TensorList(inputs), TensorList(),
      [&] {
        all = run_below();
        std::vector<Tensor> outputs;
        for (size_t i : keys) {
          outputs.push_back(all[i]);
        }
        return std::pair(outputs, Slopes(s, keys, inputs, rule_of(rule), inverse));
      },
      inverse);
  for (size_t k = 0; k < keys.size(); ++k) {
    all[keys[k]] = connected[k];
  }
  return all;
}

void update_autograd(TensorList x, TensorList state, TensorList y, TensorList mask,
                     double keep, double weight, double eps, int64_t eps_mode,
                     std::optional<double> clip, bool center) {
  refuse_recomputation();
  with_gradients(x, y, {state}, {eps, eps_mode, clip, center}, [&] {
    run_below_autograd({state, y}, [&] {
      update_op().call(x, state, y, mask, keep, weight, eps, eps_mode, clip, center);
    });
  });
}

void normalize_out_autograd(TensorList x, TensorList state, TensorList y, double eps,
                            int64_t eps_mode, std::optional<double> clip, bool center) {
  with_gradients(x, y, {state}, {eps, eps_mode, clip, center}, [&] {
    run_below_autograd({y}, [&] {
      normalize_out_op().call(x, state, y, eps, eps_mode, clip, center);
    });
  });
}

std::vector<Tensor> normalize_autograd(TensorList x, TensorList state, double eps,
                                       int64_t eps_mode, std::optional<double> clip,
                                       bool center) {
  return returned_with_gradients(x, {state}, {eps, eps_mode, clip, center}, false, [&] {
    return normalize_op().call(x, state, eps, eps_mode, clip, center);
  });
}

std::vector<Tensor> denormalize_autograd(TensorList y, TensorList state, double eps,
                                         int64_t eps_mode, std::optional<double> clip,
                                         bool center) {
  return returned_with_gradients(y, {state}, {eps, eps_mode, clip, center}, true, [&] {
    return denormalize_op().call(y, state, eps, eps_mode, clip, center);
  });
}

// Statistics are constants.
std::vector<Tensor> moments_autograd(TensorList x, int64_t feature_ndim,
                                     TensorList mask) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return moments_op().call(x, feature_ndim, mask);
}

void merge_autograd(TensorList state, TensorList other, double keep, double weight) {
  refuse_recomputation();
  run_below_autograd({state}, [&] { merge_op().call(state, other, keep, weight); });
}

// ------------------------------------------------------------------------- traces

[[noreturn]] void refuse_trace(const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "torchrl_vecnorm::", name,
      ": torch.jit.trace cannot record what changes its arguments, as an update of the "
      "statistics does; trace normalize(), without out, or a transform that is frozen");
}

void update_trace(TensorList, TensorList, TensorList, TensorList, double, double,
                  double, int64_t, std::optional<double>, bool) {
  refuse_trace("update");
}

void normalize_out_trace(TensorList, TensorList, TensorList, double, int64_t,
                         std::optional<double>, bool) {
  refuse_trace("normalize_out");
}

void merge_trace(TensorList, TensorList, double, double) { refuse_trace("merge"); }

}  // namespace

void run_with_gradients(TensorList x, TensorList y, TensorList state,
                        const RuleArgs& rule, const std::function<void()>& run) {
  with_gradients(x, y, {state}, rule, run);
}

Tensor output_like(const Tensor& x) {
  const at::ScalarType dtype = output_dtype(x);
  // Without the dispatcher, in a third of the time.
  const bool is_simple =
      is_plain(x) && x.is_contiguous() && !c10::impl::dispatch_mode_enabled();
  Tensor y = is_simple ? Tensor(at::detail::empty_cpu(x.sizes(), dtype))
                       : at::empty_like(x, x.options().dtype(dtype));
  prefer_huge_pages(y);
  return y;
}

std::vector<Tensor> outputs_like(TensorList x) {
  std::vector<Tensor> y;
  y.reserve(x.size());
  for (const Tensor& t : x) {
    y.push_back(output_like(t));
  }
  return y;
}

void update(TensorList x, TensorList state, TensorList y, TensorList mask, double keep,
            double weight, const RuleArgs& rule) {
  const auto& [eps, eps_mode, clip, center] = rule;
  if (is_usual({x, y}, {state, mask})) {
    refuse_recomputation();
    run_below_autograd({state, y}, [&] {
      update_cpu(x, state, y, mask, keep, weight, eps, eps_mode, clip, center);
    });
    return;
  }
  update_op().call(x, state, y, mask, keep, weight, eps, eps_mode, clip, center);
}

std::vector<Tensor> normalize(TensorList x, TensorList state, const RuleArgs& rule) {
  const auto& [eps, eps_mode, clip, center] = rule;
  if (is_usual({x}, {state})) {
    return normalize_cpu(x, state, eps, eps_mode, clip, center);
  }
  return normalize_op().call(x, state, eps, eps_mode, clip, center);
}

void normalize_out(TensorList x, TensorList state, TensorList y, const RuleArgs& rule) {
  const auto& [eps, eps_mode, clip, center] = rule;
  if (is_usual({x, y}, {state})) {
    run_below_autograd(
        {y}, [&] { normalize_out_cpu(x, state, y, eps, eps_mode, clip, center); });
    return;
  }
  normalize_out_op().call(x, state, y, eps, eps_mode, clip, center);
}

std::vector<Tensor> moments(TensorList x, int64_t feature_ndim, TensorList mask) {
  return moments_op().call(x, feature_ndim, mask);
}

void merge(TensorList state, TensorList other, double keep, double weight) {
  merge_op().call(state, other, keep, weight);
}

TORCH_LIBRARY(torchrl_vecnorm, m) {
  m.def(
      "update(Tensor[] x, Tensor(a!)[] state, Tensor(b!)[] y, Tensor[] mask, "
      "float keep, float weight, float eps, int eps_mode=0, float? clip=None, "
      "bool center=True) -> ()");
  m.def(
      "normalize(Tensor[] x, Tensor[] state, float eps, int eps_mode=0, "
      "float? clip=None, bool center=True) -> Tensor[]");
  m.def(
      "normalize_out(Tensor[] x, Tensor[] state, Tensor(a!)[] y, float eps, "
      "int eps_mode=0, float? clip=None, bool center=True) -> ()");
  m.def(
      "denormalize(Tensor[] y, Tensor[] state, float eps, int eps_mode=0, "
      "float? clip=None, bool center=True) -> Tensor[]");
  m.def("moments(Tensor[] x, int feature_ndim, Tensor[] mask) -> Tensor[]");
  m.def("merge(Tensor(a!)[] state, Tensor[] other, float keep, float weight) -> ()");
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, CPU, m) {
  m.impl("update", update_cpu);
  m.impl("normalize", normalize_cpu);
  m.impl("normalize_out", normalize_out_cpu);
  m.impl("denormalize", denormalize_cpu);
  m.impl("moments", moments_cpu);
  m.impl("merge", merge_cpu);
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, Autograd, m) {
  m.impl("update", update_autograd);
  m.impl("normalize", normalize_autograd);
  m.impl("normalize_out", normalize_out_autograd);
  m.impl("denormalize", denormalize_autograd);
  m.impl("moments", moments_autograd);
  m.impl("merge", merge_autograd);
}

// What is left of it in inference mode, for tensors from outside.
TORCH_LIBRARY_IMPL(torchrl_vecnorm, ADInplaceOrView, m) {
  m.impl("update", update_autograd);
  m.impl("normalize_out", normalize_out_autograd);
  m.impl("merge", merge_autograd);
}

// The others are recorded as any operator is.
TORCH_LIBRARY_IMPL(torchrl_vecnorm, Tracer, m) {
  m.impl("update", update_trace);
  m.impl("normalize_out", normalize_out_trace);
  m.impl("merge", merge_trace);
}

}  // namespace vecnorm
