// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// scale_returns, the operator that divides rewards by the deviation of discounted
// returns. Its lists, states and rule are those of ops.cpp; beside them key i has
//
//   done[i]     [*samples]             bool: whose episode ends with this reward
//   returns[i]  like x[i]              float64 or float32, contiguous: the discounted
//                                      returns so far, which go on by one step
//
// `clears_before`: whether an end clears a return before its reward is added, or after
// the statistics have seen it. The gradient of y is that of normalize().

#include "returns.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>

#include "../cpu/kernels.h"
#include "direct.h"
#include "gradients.h"
#include "ops.h"
#include "team.h"

namespace vecnorm {
namespace {

void scale_returns_cpu(TensorList x, TensorList done, TensorList returns,
                       TensorList state, TensorList y, TensorList mask, double gamma,
                       bool clears_before, double keep, double eps, int64_t eps_mode,
                       std::optional<double> clip) {
  leave_the_pool_after_fork();
  const Rule rule = rule_of({eps, eps_mode, clip, /*center=*/false});
  const ReturnsArgs args{x, done, returns, {state}, y, mask};
  check_returns(args, gamma, keep);
  const ReturnsKeys keys(args);
  for (const Returns& key : keys.keys) {
    cpu::scale_returns(key, {gamma, clears_before}, {keep, 1}, rule, run_phases);
  }
  keys.values.write_back();
}

const auto& scale_returns_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchrl_vecnorm::scale_returns", "")
                             .typed<decltype(scale_returns_cpu)>();
  return op;
}

void scale_returns_autograd(TensorList x, TensorList done, TensorList returns,
                            TensorList state, TensorList y, TensorList mask,
                            double gamma, bool clears_before, double keep, double eps,
                            int64_t eps_mode, std::optional<double> clip) {
  refuse_recomputation();
  run_with_gradients(x, y, state, {eps, eps_mode, clip, /*center=*/false}, [&] {
    run_below_autograd({returns, state, y}, [&] {
      scale_returns_op().call(x, done, returns, state, y, mask, gamma, clears_before,
                              keep, eps, eps_mode, clip);
    });
  });
}

void scale_returns_trace(TensorList, TensorList, TensorList, TensorList, TensorList,
                         TensorList, double, bool, double, double, int64_t,
                         std::optional<double>) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false,
      "torchrl_vecnorm::scale_returns: torch.jit.trace cannot record what changes its "
      "arguments; trace normalize(), with center=False");
}

}  // namespace

void scale_returns(TensorList x, TensorList done, TensorList returns, TensorList state,
                   TensorList y, TensorList mask, double gamma, bool clears_before,
                   double keep, const RuleArgs& rule) {
  if (is_usual({x, y}, {done, returns, state, mask})) {
    refuse_recomputation();
    run_below_autograd({returns, state}, [&] {
      scale_returns_cpu(x, done, returns, state, y, mask, gamma, clears_before, keep,
                        rule.eps, rule.eps_mode, rule.clip);
    });
    return;
  }
  scale_returns_op().call(x, done, returns, state, y, mask, gamma, clears_before, keep,
                          rule.eps, rule.eps_mode, rule.clip);
}

TORCH_LIBRARY_FRAGMENT(torchrl_vecnorm, m) {
  m.def(
      "scale_returns(Tensor[] x, Tensor[] done, Tensor(a!)[] returns, "
      "Tensor(b!)[] state, Tensor(c!)[] y, Tensor[] mask, float gamma, "
      "bool clears_before, float keep, float eps, int eps_mode=0, float? clip=None) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, CPU, m) {
  m.impl("scale_returns", scale_returns_cpu);
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, Autograd, m) {
  m.impl("scale_returns", scale_returns_autograd);
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, ADInplaceOrView, m) {
  m.impl("scale_returns", scale_returns_autograd);
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, Tracer, m) {
  m.impl("scale_returns", scale_returns_trace);
}

}  // namespace vecnorm
