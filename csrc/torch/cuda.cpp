// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CUDA registration of the operators, in plain C++: it needs no CUDA build of torch
// to compile and to load. merge() has no kernel here: it is a few additions of
// [features] tensors, and plain torch (CompositeExplicitAutograd) does them.

#include <ATen/DeviceAccelerator.h>
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/kernels.h"
#include "ops.h"
#include "tensors.h"

namespace vecnorm {
namespace {

void check_launch(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess,
              "torchrl_vecnorm: CUDA error: ", cudaGetErrorString(error));
}

void check_devices(TensorList x, const States& s, TensorList y, TensorList mask) {
  const at::Device device = x[0].device();
  for (TensorList list : {x, s.leaves, y, mask}) {
    for (const Tensor& t : list) {
      TORCH_CHECK_VALUE(t.device() == device || t.numel() == 0,
                        "expected all tensors on ", device, ", got one on ",
                        t.device());
    }
  }
}

cuda::Stream current_stream(const at::Device& device) {
  return static_cast<cuda::Stream>(
      at::accelerator::getCurrentStream(device.index()).native_handle());
}

bool is_capturing(cuda::Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

struct Buffers {
  Tensor partials;
  Tensor counters;

  Buffers() = default;
  Buffers(cuda::WorkspaceSize size, const at::Device& device)
      : partials(at::empty({static_cast<int64_t>(size.partials)},
                           at::TensorOptions(at::kDouble).device(device))),
        counters(at::zeros({static_cast<int64_t>(size.counters)},
                           at::TensorOptions(at::kInt).device(device))) {}

  bool holds(cuda::WorkspaceSize size) const {
    return partials.defined() &&
           partials.numel() >= static_cast<int64_t>(size.partials) &&
           counters.numel() >= static_cast<int64_t>(size.counters);
  }

  cuda::Workspace get() const {
    return {partials.data_ptr<double>(),
            reinterpret_cast<unsigned*>(counters.data_ptr<int>())};
  }
};

// A workspace belongs to a state, so that two streams never share its counters. Old
// ones are kept while the state lives: a captured graph may still write to them.
class Workspaces {
 public:
  Buffers find(const Tensor& state, cuda::WorkspaceSize size, cuda::Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Owner owner{state.storage().unsafeGetStorageImpl(), state.data_ptr()};
    const auto found = entries_.find(owner);
    if (found != entries_.end() && !found->second.owner.expired() &&
        found->second.buffers.back().holds(size)) {
      return found->second.buffers.back();
    }
    Buffers buffers(size, state.device());
    if (is_capturing(stream)) {
      // Zeroed by the graph, on each replay: nothing has run yet that would.
      return buffers;
    }
    if (found != entries_.end() && !found->second.owner.expired()) {
      found->second.buffers.push_back(buffers);
      return buffers;
    }
    forget_the_dead();
    entries_.erase(owner);
    entries_.emplace(owner, Entry{state.storage().getWeakStorageImpl(), {buffers}});
    return buffers;
  }

 private:
  // Several states may lie in one storage.
  using Owner = std::pair<c10::StorageImpl*, void*>;

  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> owner;
    std::vector<Buffers> buffers;
  };

  void forget_the_dead() {
    for (auto it = entries_.begin(); it != entries_.end();) {
      it = it->second.owner.expired() ? entries_.erase(it) : std::next(it);
    }
  }

  std::mutex mutex_;
  std::map<Owner, Entry> entries_;
};

Workspaces& workspaces() {
  // Never destroyed: at exit, CUDA is gone before static objects are.
  static auto* all = new Workspaces;
  return *all;
}

std::atomic<cuda::Path> wished_path = cuda::Path::kAuto;
std::atomic<cuda::Path> last_path = cuda::Path::kAuto;

void update_cuda(TensorList x, TensorList state, TensorList y, TensorList mask,
                 double keep, double weight, double eps) {
  const States s{state};
  check_update(x, y, mask, s, keep, weight, eps);
  if (x.empty()) {
    return;
  }
  check_devices(x, s, y, mask);
  const c10::DeviceGuard guard(x[0].device());
  const Keys keys(x, y, mask, s);
  const cuda::Stream stream = current_stream(x[0].device());
  cuda::Update update(keys.keys, {keep, weight}, eps, wished_path);
  const Buffers buffers = workspaces().find(s.count(0), update.workspace(), stream);
  check_launch(update.run(buffers.get(), stream));
  last_path = update.path();
  keys.write_back();
}

using Apply = cudaError_t (*)(const std::vector<Key>&, double, cuda::Stream);

void apply_cuda(TensorList x, const States& s, TensorList y, double eps, Apply apply) {
  if (x.empty()) {
    return;
  }
  check_devices(x, s, y, {});
  const c10::DeviceGuard guard(x[0].device());
  const Keys keys(x, y, {}, s);
  check_launch(apply(keys.keys, eps, current_stream(x[0].device())));
  keys.write_back();
}

void normalize_out_cuda(TensorList x, TensorList state, TensorList y, double eps) {
  check_output(x, y, {state}, eps);
  apply_cuda(x, {state}, y, eps, cuda::normalize);
}

std::vector<Tensor> normalize_cuda(TensorList x, TensorList state, double eps) {
  check_values(x, {}, {state}, eps);
  std::vector<Tensor> y = outputs_like(x);
  apply_cuda(x, {state}, y, eps, cuda::normalize);
  return y;
}

std::vector<Tensor> denormalize_cuda(TensorList y, TensorList state, double eps) {
  check_floating_point(y);
  check_values(y, {}, {state}, eps);
  std::vector<Tensor> x = outputs_like(y);
  apply_cuda(y, {state}, x, eps, cuda::denormalize);
  return x;
}

std::vector<Tensor> moments_cuda(TensorList x, int64_t feature_ndim, TensorList mask) {
  std::vector<Tensor> state = zero_states(x, feature_ndim);
  update_cuda(x, state, {}, mask, 1, 1, 1);
  return state;
}

constexpr std::pair<const char*, cuda::Path> kPaths[] = {
    {"auto", cuda::Path::kAuto},
    {"cluster", cuda::Path::kCluster},
    {"resident", cuda::Path::kResident},
    {"two_kernels", cuda::Path::kTwoKernels}};

}  // namespace

void set_cuda_path(const std::string& name) {
  for (const auto& [known, path] : kPaths) {
    if (name == known) {
      wished_path = path;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "expected auto, cluster, resident or two_kernels, got ",
                    name);
}

std::string last_cuda_path() {
  for (const auto& [name, path] : kPaths) {
    if (last_path == path) {
      return name;
    }
  }
  return "auto";
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, CUDA, m) {
  m.impl("update", update_cuda);
  m.impl("normalize", normalize_cuda);
  m.impl("normalize_out", normalize_out_cuda);
  m.impl("denormalize", denormalize_cuda);
  m.impl("moments", moments_cuda);
}

}  // namespace vecnorm
