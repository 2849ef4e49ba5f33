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
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/kernels.h"
#include "../cuda/returns.h"
#include "ops.h"
#include "returns.h"
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

// The guard has to reach the runtime that is linked into this extension.
void check_current(const at::Device& device) {
  int current = -1;
  check_launch(cuda::current_device(&current));
  TORCH_CHECK(current == device.index(),
              "torchrl_vecnorm: expected the current device to be ", device,
              ", got cuda:", current);
}

// Kernels count features in 32 bits.
void check_features(const Keys& keys) {
  for (size_t i = 0; i < keys.keys.size(); ++i) {
    TORCH_CHECK_VALUE(keys.keys[i].features <= 1 << 30, "x[", i, "]: expected at most ",
                      1 << 30, " features on CUDA, got ", keys.keys[i].features);
  }
}

cuda::Stream native(const c10::Stream& stream) {
  return static_cast<cuda::Stream>(stream.native_handle());
}

bool is_capturing(cuda::Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// The memory of a workspace: doubles, then counters, which are zero.
struct Buffers {
  Tensor memory;
  cuda::WorkspaceSize size;

  Buffers() = default;
  Buffers(cuda::WorkspaceSize wanted, const at::Device& device,
          const c10::Stream& stream)
      : memory(at::empty({static_cast<int64_t>(wanted.partials + wanted.counters)},
                         at::TensorOptions(at::kDouble).device(device))),
        size(wanted) {
    const cuda::Workspace w = get();
    check_launch(cudaMemsetAsync(w.counters, 0, size.counters * sizeof(unsigned),
                                 native(stream)));
  }

  bool holds(cuda::WorkspaceSize other) const {
    return size.partials >= other.partials && size.counters >= other.counters;
  }

  cuda::Workspace get() const {
    auto* const partials = memory.data_ptr<double>();
    return {partials, reinterpret_cast<unsigned*>(partials + size.partials)};
  }
};

size_t power_of_two_from(size_t n) {
  size_t p = 1;
  while (p < n) {
    p *= 2;
  }
  return p;
}

// A workspace belongs to a state, so that two streams never share its counters. Old
// ones are kept while the state lives: a captured graph may still write to them. They
// double, so that there are few.
//
// What a state's first call needs is not kept: where torch.compile warms its graphs up,
// that is memory of their pool, which nobody may keep, and the state is born anew in
// each run.
class Workspaces {
 public:
  Buffers find(const Tensor& state, cuda::WorkspaceSize size,
               const c10::Stream& stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Owner owner{state.storage().unsafeGetStorageImpl(), state.data_ptr()};
    const auto found = entries_.find(owner);
    Entry* const entry = found != entries_.end() && !found->second.owner.expired()
                             ? &found->second
                             : nullptr;
    if (entry != nullptr && !entry->buffers.empty() &&
        entry->buffers.back().holds(size)) {
      Buffers& last = entry->buffers.back();
      const bool is_new = entry->streams.count(stream.id()) == 0;
      if (is_new && !is_capturing(native(stream))) {
        last.memory.record_stream(stream);  // it may be freed while that one still runs
        entry->streams.insert(stream.id());
      }
      return last;
    }
    const bool captures = is_capturing(native(stream));
    if (captures || entry == nullptr) {
      if (!captures) {
        forget_the_dead();
        entries_.erase(owner);
        entries_.emplace(owner, Entry{state.storage().getWeakStorageImpl(), {}, {}});
      }
      // In a graph, it is zeroed on each replay.
      return Buffers(size, state.device(), stream);
    }
    size = {power_of_two_from(size.partials), power_of_two_from(size.counters)};
    entry->buffers.emplace_back(size, state.device(), stream);
    entry->streams = {stream.id()};
    return entry->buffers.back();
  }

 private:
  // Several states may lie in one storage.
  using Owner = std::pair<c10::StorageImpl*, void*>;

  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> owner;
    std::vector<Buffers> buffers;
    std::set<c10::StreamId> streams;  // that the last one is known to be used on
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

// `lives`: whether the state may see another call.
void update_states(TensorList x, TensorList state, TensorList y, TensorList mask,
                   double keep, double weight, const RuleArgs& args, bool lives) {
  const States s{state};
  const Rule rule = rule_of(args);
  check_update(x, y, mask, s, keep, weight);
  if (x.empty()) {
    return;
  }
  check_devices(x, s, y, mask);
  const at::Device device = x[0].device();
  const c10::DeviceGuard guard(device);
  check_current(device);
  const Keys keys(x, y, mask, s);
  check_features(keys);
  const c10::Stream stream = at::accelerator::getCurrentStream(device.index());
  cuda::Update update(keys.keys, {keep, weight}, rule, wished_path);
  const cuda::WorkspaceSize size = update.workspace();
  const Buffers buffers = lives ? workspaces().find(s.count(0), size, stream)
                                : Buffers(size, device, stream);
  check_launch(update.run(buffers.get(), native(stream)));
  last_path = update.path();
  keys.write_back();
}

void update_cuda(TensorList x, TensorList state, TensorList y, TensorList mask,
                 double keep, double weight, double eps, int64_t eps_mode,
                 std::optional<double> clip, bool center) {
  update_states(x, state, y, mask, keep, weight, {eps, eps_mode, clip, center}, true);
}

using Apply = cudaError_t (*)(const std::vector<Key>&, const Rule&, cuda::Stream);

void apply_cuda(TensorList x, const States& s, TensorList y, const Rule& rule,
                Apply apply) {
  if (x.empty()) {
    return;
  }
  check_devices(x, s, y, {});
  const at::Device device = x[0].device();
  const c10::DeviceGuard guard(device);
  check_current(device);
  const Keys keys(x, y, {}, s);
  check_features(keys);
  check_launch(apply(keys.keys, rule,
                     native(at::accelerator::getCurrentStream(device.index()))));
  keys.write_back();
}

void normalize_out_cuda(TensorList x, TensorList state, TensorList y, double eps,
                        int64_t eps_mode, std::optional<double> clip, bool center) {
  const Rule rule = rule_of({eps, eps_mode, clip, center});
  check_output(x, y, {state});
  apply_cuda(x, {state}, y, rule, cuda::normalize);
}

std::vector<Tensor> normalize_cuda(TensorList x, TensorList state, double eps,
                                   int64_t eps_mode, std::optional<double> clip,
                                   bool center) {
  const Rule rule = rule_of({eps, eps_mode, clip, center});
  check_values(x, {}, {state});
  std::vector<Tensor> y = outputs_like(x);
  apply_cuda(x, {state}, y, rule, cuda::normalize);
  return y;
}

std::vector<Tensor> denormalize_cuda(TensorList y, TensorList state, double eps,
                                     int64_t eps_mode, std::optional<double> clip,
                                     bool center) {
  check_floating_point(y);
  const Rule rule = rule_of({eps, eps_mode, clip, center});
  check_values(y, {}, {state});
  std::vector<Tensor> x = outputs_like(y);
  apply_cuda(y, {state}, x, rule, cuda::denormalize);
  return x;
}

std::vector<Tensor> moments_cuda(TensorList x, int64_t feature_ndim, TensorList mask) {
  std::vector<Tensor> state = zero_states(x, feature_ndim);
  update_states(x, state, {}, mask, 1, 1, {1}, false);
  return state;
}

void scale_returns_cuda(TensorList x, TensorList done, TensorList returns,
                        TensorList state, TensorList y, TensorList mask, double gamma,
                        bool clears_before, double keep, double eps, int64_t eps_mode,
                        std::optional<double> clip) {
  const Rule rule = rule_of({eps, eps_mode, clip, /*center=*/false});
  const ReturnsArgs args{x, done, returns, {state}, y, mask};
  check_returns(args, gamma, keep);
  if (x.empty()) {
    return;
  }
  check_devices(x, args.state, y, mask);
  check_devices(x, {}, done, returns);
  const at::Device device = x[0].device();
  const c10::DeviceGuard guard(device);
  check_current(device);
  const ReturnsKeys keys(args);
  check_features(keys.values);
  const c10::Stream stream = at::accelerator::getCurrentStream(device.index());
  for (size_t i = 0; i < keys.keys.size(); ++i) {
    const Returns& key = keys.keys[i];
    const cuda::WorkspaceSize size = cuda::returns_workspace(key);
    const Buffers buffers = size.counters > 0
                                ? workspaces().find(args.state.count(i), size, stream)
                                : Buffers();
    check_launch(cuda::scale_returns(
        key, {gamma, clears_before}, {keep, 1}, rule,
        size.counters > 0 ? buffers.get() : cuda::Workspace{}, native(stream)));
  }
  keys.values.write_back();
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

std::string cuda_limits() {
  cuda::Limits limits;
  check_launch(cuda::current_limits(&limits));
  std::string text = std::to_string(limits.processors) + " processors, " +
                     std::to_string(limits.shared) +
                     " bytes of shared memory a block, ";
  int size = 1;
  for (int clusters : limits.clusters) {
    size *= 2;
    text += std::to_string(clusters) + " clusters of " + std::to_string(size) + ", ";
  }
  return text +
         (limits.cooperative ? "cooperative launches" : "no cooperative launches");
}

TORCH_LIBRARY_IMPL(torchrl_vecnorm, CUDA, m) {
  m.impl("update", update_cuda);
  m.impl("normalize", normalize_cuda);
  m.impl("normalize_out", normalize_out_cuda);
  m.impl("denormalize", denormalize_cuda);
  m.impl("moments", moments_cuda);
  m.impl("scale_returns", scale_returns_cuda);
}

}  // namespace vecnorm
