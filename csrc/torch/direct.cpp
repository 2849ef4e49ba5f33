// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "direct.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <utility>

#include "../cpu/kernels.h"
#include "ops.h"
#include "team.h"

namespace vecnorm {
namespace {

// Whether the dispatcher would do nothing but call the kernel: no mode, no trace, no
// transform, no profiler.
bool nobody_listens() {
  return c10::impl::tls_local_dispatch_key_set().included_ ==
             c10::default_included_set &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

}  // namespace

std::optional<Direct> Direct::of(TensorList state) {
  const auto on_cpu = [](const Tensor& t) { return t.device().is_cpu(); };
  if (!std::all_of(state.begin(), state.end(), on_cpu)) {
    return std::nullopt;
  }
  return Direct(state);
}

Direct::Direct(TensorList state) : leaves_(state.begin(), state.end()) {
  const States s{leaves_};
  check_states(s);
  const Apart apart(s);
  for (size_t i = 0; i < s.size(); ++i) {
    states_.push_back(state_of(s, i));
  }
  for (const Tensor& t : leaves_) {
    if (has(t)) {
      spans_.emplace_back(t);
    }
  }
  std::sort(spans_.begin(), spans_.end());
}

bool Direct::in_place() const {
  for (size_t i = 0; i < states_.size(); ++i) {
    const State now = state_of({leaves_}, i);
    const State& then = states_[i];
    if (now.sum.data != then.sum.data || now.ssq.data != then.ssq.data ||
        now.count.data != then.count.data ||
        now.nonfinite.data != then.nonfinite.data ||
        now.central.data != then.central.data) {
      return false;
    }
  }
  return true;
}

bool Direct::lies_apart(const Tensor& x) const {
  const Span span(x);
  const auto after = std::lower_bound(spans_.begin(), spans_.end(), span);
  return (after == spans_.end() || span.end <= after->begin) &&
         (after == spans_.begin() || (after - 1)->end <= span.begin);
}

bool Direct::is_usual(const std::vector<Tensor>& x, double eps) const {
  if (!nobody_listens() || !in_place() || !(0 < eps) || !std::isfinite(eps)) {
    return false;
  }
  const States s{leaves_};
  for (size_t i = 0; i < x.size(); ++i) {
    const Tensor& t = x[i];
    const at::IntArrayRef features = s.sum(i).sizes();
    const int64_t leading = t.dim() - static_cast<int64_t>(features.size());
    if (!is_plain(t) || t.numel() == 0 || !has_kernel(t.scalar_type()) || leading < 0 ||
        t.sizes().slice(leading) != features ||
        (t.requires_grad() && at::GradMode::is_enabled())) {
      return false;
    }
  }
  return true;
}

bool Direct::keys_of(const std::vector<Tensor>& x, const std::vector<Tensor>& y,
                     std::vector<Key>* keys) const {
  keys->resize(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    Key& key = (*keys)[i];
    const Tensor& sum = leaves_[States::kLeaves * i];
    key.state = states_[i];
    key.features = sum.numel();
    key.samples = x[i].numel() / key.features;
    if (!as_matrix(x[i], sum.dim(), key.features, &key.x) ||
        !as_matrix(y[i], sum.dim(), key.features, &key.y)) {
      return false;
    }
  }
  return true;
}

std::optional<std::vector<Tensor>> Direct::update(const std::vector<Tensor>& x,
                                                  double keep, double eps) const {
  if (!is_usual(x, eps) || !(0 < keep && keep <= 1) ||
      torch::autograd::get_current_graph_task_id() != -1 ||
      !std::all_of(x.begin(), x.end(),
                   [&](const Tensor& t) { return lies_apart(t); })) {
    return std::nullopt;
  }
  leave_the_pool_after_fork();
  std::vector<Tensor> y = outputs_like(x);
  std::vector<Key> keys;
  if (!keys_of(x, y, &keys)) {
    return std::nullopt;
  }
  cpu::update(keys, {keep, 1}, eps, run_phases);
  // What a graph has saved must not be used by its backward pass any more.
  for (const Tensor& t : leaves_) {
    if (!t.is_inference()) {
      t.unsafeGetTensorImpl()->bump_version();
    }
  }
  return y;
}

std::optional<std::vector<Tensor>> Direct::normalize(const std::vector<Tensor>& x,
                                                     double eps) const {
  if (!is_usual(x, eps)) {
    return std::nullopt;
  }
  leave_the_pool_after_fork();
  std::vector<Tensor> y = outputs_like(x);
  std::vector<Key> keys;
  if (!keys_of(x, y, &keys)) {
    return std::nullopt;
  }
  cpu::normalize(keys, eps, run_phases);
  return y;
}

}  // namespace vecnorm
