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

bool nobody_listens() {
  return c10::impl::tls_local_dispatch_key_set().included_ ==
             c10::default_included_set &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

bool is_usual(std::initializer_list<TensorList> in_graphs,
              std::initializer_list<TensorList> others) {
  if (!nobody_listens()) {
    return false;
  }
  const bool records = at::GradMode::is_enabled();
  for (TensorList list : in_graphs) {
    for (const Tensor& t : list) {
      if (!is_plain(t) || (records && t.requires_grad())) {
        return false;
      }
    }
  }
  for (TensorList list : others) {
    if (!std::all_of(list.begin(), list.end(), is_plain)) {
      return false;
    }
  }
  return true;
}

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
  spans_ = apart.spans().vec();
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

bool Direct::is_usual(const Tensor& x, size_t i) const {
  const at::IntArrayRef features = leaves_[States::kLeaves * i].sizes();
  const int64_t leading = x.dim() - static_cast<int64_t>(features.size());
  return is_plain(x) && x.numel() > 0 && has_kernel(x.scalar_type()) && leading >= 0 &&
         x.sizes().slice(leading) == features &&
         !(x.requires_grad() && at::GradMode::is_enabled());
}

std::optional<Direct::Call> Direct::prepare(const std::vector<Tensor>& x,
                                            const std::vector<Tensor>& mask,
                                            double eps) const {
  if (!nobody_listens() || !in_place() || !(0 < eps) || !std::isfinite(eps)) {
    return std::nullopt;
  }
  Call call;
  call.keys.reserve(x.size());
  call.y.resize(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    if (!x[i].defined()) {
      continue;
    }
    if (!is_usual(x[i], i)) {
      return std::nullopt;
    }
    const Tensor& sum = leaves_[States::kLeaves * i];
    Key& key = call.keys.emplace_back();
    key.state = states_[i];
    key.features = sum.numel();
    key.samples = x[i].numel() / key.features;
    if (i < mask.size() && mask[i].defined()) {
      const at::IntArrayRef samples = x[i].sizes().slice(0, x[i].dim() - sum.dim());
      if (!is_plain(mask[i]) || mask[i].scalar_type() != at::kBool ||
          !is_mask_of(mask[i], samples)) {
        return std::nullopt;
      }
      call.masks.push_back(mask[i].contiguous());
      key.mask = call.masks.back().const_data_ptr<bool>();
    }
    call.y[i] = output_like(x[i]);
    if (!as_matrix(x[i], sum.dim(), key.features, &key.x) ||
        !as_matrix(call.y[i], sum.dim(), key.features, &key.y)) {
      return std::nullopt;
    }
  }
  return call;
}

std::optional<Direct::Call> Direct::prepare_update(const std::vector<Tensor>& x,
                                                   const std::vector<Tensor>& mask,
                                                   double keep, double weight,
                                                   double eps) const {
  if (!(0 < keep && keep <= 1) || !(0 < weight) || !std::isfinite(weight) ||
      torch::autograd::get_current_graph_task_id() != -1) {
    return std::nullopt;
  }
  std::optional<Call> call = prepare(x, mask, eps);
  const auto is_left_out_or_apart = [&](const Tensor& t) {
    return !t.defined() || lies_apart(t);
  };
  if (!call.has_value() || !std::all_of(x.begin(), x.end(), is_left_out_or_apart)) {
    return std::nullopt;
  }
  return call;
}

void Direct::run_update(const Call& call, const std::vector<Tensor>& x, double keep,
                        double weight, double eps) const {
  leave_the_pool_after_fork();
  cpu::update(call.keys, {keep, weight}, Rule::of(eps), run_phases);
  // What a graph has saved must not be used by its backward pass any more.
  for (size_t l = 0; l < leaves_.size(); ++l) {
    if (x[l / States::kLeaves].defined() && !leaves_[l].is_inference()) {
      leaves_[l].unsafeGetTensorImpl()->bump_version();
    }
  }
}

std::optional<std::vector<Tensor>> Direct::normalize(const std::vector<Tensor>& x,
                                                     double eps) const {
  std::optional<Call> call = prepare(x, {}, eps);
  if (!call.has_value()) {
    return std::nullopt;
  }
  leave_the_pool_after_fork();
  cpu::normalize(call->keys, Rule::of(eps), run_phases);
  return std::move(call->y);
}

}  // namespace vecnorm
