// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "kernels.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "launches.h"

namespace vecnorm {
namespace cuda {
namespace {

// The most that two kernels ever ask for, on every GPU from sm_75 on.
constexpr size_t kAccumulateBytes = 64 * 1024;

// What is known of each device: asked once.
class Known {
 public:
  cudaError_t find(int device, Limits* limits) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = limits_.find(device);
    if (found != limits_.end()) {
      *limits = found->second;
      return cudaSuccess;
    }
    const OutsideCapture outside;
    cudaError_t error = query(device, limits);
    if (error == cudaSuccess) {
      error = allow_fused(limits);
    }
    if (error == cudaSuccess) {
      error = allow_two_kernels(kAccumulateBytes);
    }
    if (error == cudaSuccess) {
      error = allow_returns();
    }
    if (error == cudaSuccess) {
      limits_.emplace(device, *limits);
    }
    return error;
  }

  // A launch was refused: other processes hold a part of the GPU.
  void take_away(int device, Path path) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (path == Path::kCluster) {
      for (int& clusters : limits_[device].clusters) {
        clusters = 0;
      }
    } else {
      limits_[device].cooperative = false;
    }
  }

 private:
  std::mutex mutex_;
  std::map<int, Limits> limits_;
};

Known& known() {
  static auto* all = new Known;
  return *all;
}

// Gathers keys with their plans into the arguments of a kernel.
class Arguments {
 public:
  Arguments(Weights weights, const Rule& rule, int threads) : threads_(threads) {
    p_.size = 0;
    p_.slots = 0;
    p_.weights = weights;
    p_.rule = rule;
  }

  // `inner`: what its blocks count through first.
  void add(const Key& key, const LanePlan& plan, int inner, Workspace* workspace) {
    DeviceKey& k = p_.keys[p_.size];
    k.key = key;
    k.plan = plan;
    k.by_inner = Divisor::of(inner);
    k.by_features = Divisor::of(plan.features);
    k.partials = nullptr;
    k.counters = nullptr;
    if (workspace != nullptr) {
      k.partials = workspace->partials;
      k.counters = workspace->counters;
      const WorkspaceSize size = size_of(plan);
      workspace->partials += size.partials;
      workspace->counters += size.counters;
    }
    p_.ends[p_.size] = blocks() + plan.blocks();
    p_.shared.fit(plan, threads_);
    ++p_.size;
  }

  bool full() const { return p_.size == kMaxKeys; }
  int blocks() const { return p_.size > 0 ? p_.ends[p_.size - 1] : 0; }

  // The arguments of a kernel whose threads keep so many vectors in shared memory each.
  const Params& get(int slots) {
    p_.slots = slots;
    p_.shared_bytes = static_cast<int>(p_.shared.bytes());
    return p_;
  }

  Launch shape(int vector_bytes) const {
    Launch shape;
    shape.blocks = blocks();
    shape.threads = threads_;
    shape.shared =
        p_.shared.bytes() + static_cast<size_t>(vector_bytes * p_.slots * threads_);
    return shape;
  }

  static WorkspaceSize size_of(const LanePlan& plan) {
    return {static_cast<size_t>(plan.blocks()) * static_cast<size_t>(plan.values()),
            static_cast<size_t>(plan.slabs) + 1};
  }

 private:
  int threads_;
  Params p_;
};

// The type of the kernel that a key goes to.
Dtype launch_type(const Key& key) {
  const Dtype type = kernel_type(key);
  return type == kNoVectors ? Dtype::kFloat32 : type;
}

// Keys with samples, those of one kernel together.
std::vector<Key> in_order(const std::vector<Key>& keys) {
  std::vector<Key> some;
  for (const Key& key : keys) {
    if (key.samples > 0) {
      some.push_back(key);
    }
  }
  std::stable_sort(some.begin(), some.end(), [](const Key& a, const Key& b) {
    return launch_type(a) < launch_type(b);
  });
  return some;
}

// How many of the keys in_order(), from the first on, share a launch.
int batch_size(const Key* keys, size_t size) {
  size_t n = 1;
  while (n < size && n < kMaxKeys && launch_type(keys[n]) == launch_type(keys[0])) {
    ++n;
  }
  return static_cast<int>(n);
}

using Launcher = cudaError_t (*)(Dtype, const Launch&, Stream, const Params&);

// A batch of keys; those whose outputs nobody wants are left out.
cudaError_t apply(Launcher launcher, const Key* keys, int size, const Limits& limits,
                  const Rule& rule, Stream stream) {
  Arguments arguments({1., 1.}, rule, kBlockThreads);
  for (int i = 0; i < size; ++i) {
    if (keys[i].y.data != nullptr) {
      const LanePlan plan = plan_maps(keys[i], limits);
      arguments.add(keys[i], plan, plan.slabs, nullptr);
    }
  }
  if (arguments.blocks() == 0) {
    return cudaSuccess;
  }
  const Params& p = arguments.get(0);
  Launch shape = arguments.shape(0);
  shape.shared = 3 * sizeof(double) * static_cast<size_t>(p.shared.features);
  return launcher(launch_type(keys[0]), shape, stream, p);
}

cudaError_t apply_all(Launcher launcher, const std::vector<Key>& all, const Rule& rule,
                      Stream stream) {
  Limits limits;
  if (const cudaError_t error = current_limits(&limits)) {
    return error;
  }
  const std::vector<Key> keys = in_order(all);
  for (size_t i = 0; i < keys.size();) {
    const int size = batch_size(&keys[i], keys.size() - i);
    if (const cudaError_t error =
            apply(launcher, &keys[i], size, limits, rule, stream)) {
      return error;
    }
    i += static_cast<size_t>(size);
  }
  return cudaSuccess;
}

}  // namespace

Update::Update(const std::vector<Key>& keys, Weights weights, const Rule& rule,
               Path wish)
    : keys_(in_order(keys)), weights_(weights), rule_(rule) {
  error_ = current_device(&device_);
  if (error_ == cudaSuccess) {
    error_ = known().find(device_, &limits_);
  }
  for (size_t i = 0; i < keys_.size() && error_ == cudaSuccess;) {
    const int size = batch_size(&keys_[i], keys_.size() - i);
    batches_.push_back({&keys_[i], size, plan_update(&keys_[i], size, limits_, wish)});
    const WorkspaceSize more = workspace_of(batches_.back());
    workspace_.partials += more.partials;
    workspace_.counters += more.counters;
    i += static_cast<size_t>(size);
  }
}

WorkspaceSize Update::workspace_of(const Batch& batch) const {
  WorkspaceSize all;
  for (int i = 0; i < batch.size; ++i) {
    const WorkspaceSize size = Arguments::size_of(batch.plan.keys[i]);
    // A fused kernel that finds no room for itself gives way to the other path.
    const WorkspaceSize other =
        batch.plan.path == Path::kTwoKernels
            ? size
            : Arguments::size_of(plan_sums(batch.keys[i], limits_));
    all.partials += std::max(size.partials, other.partials);
    all.counters += std::max(size.counters, other.counters);
  }
  return all;
}

cudaError_t Update::run(Workspace workspace, Stream stream) {
  if (error_ != cudaSuccess) {
    return error_;
  }
  for (Batch& batch : batches_) {
    const Workspace start = workspace;
    cudaError_t error = run(batch, &workspace, stream);
    if (is_refusal(error) && batch.plan.path != Path::kTwoKernels) {
      // Nothing has run.
      forget_error();
      known().take_away(device_, batch.plan.path);
      batch.plan = plan_update(batch.keys, batch.size, limits_, Path::kTwoKernels);
      workspace = start;
      error = run(batch, &workspace, stream);
    }
    if (error != cudaSuccess) {
      return error;
    }
    const WorkspaceSize used = workspace_of(batch);
    workspace = {start.partials + used.partials, start.counters + used.counters};
  }
  return cudaSuccess;
}

cudaError_t Update::run(const Batch& batch, Workspace* workspace, Stream stream) const {
  const bool fused = batch.plan.path != Path::kTwoKernels;
  Arguments arguments(weights_, rule_, fused ? kFusedThreads : kBlockThreads);
  for (int i = 0; i < batch.size; ++i) {
    const LanePlan& plan = batch.plan.keys[i];
    arguments.add(batch.keys[i], plan, fused ? plan.chunks : plan.slabs, workspace);
  }
  const Params& p = arguments.get(batch.plan.slots);
  Launch shape = arguments.shape(batch.plan.vector_bytes);
  const Dtype type = launch_type(batch.keys[0]);
  if (fused) {
    shape.cluster = batch.plan.cluster;
    shape.cooperative = batch.plan.path == Path::kResident;
    return launch_fused(type, shape, stream, p);
  }
  if (const cudaError_t error = launch_accumulate(type, shape, stream, p)) {
    return error;
  }
  return apply(launch_normalize, batch.keys, batch.size, limits_, rule_, stream);
}

cudaError_t current_limits(Limits* limits) {
  int device = 0;
  const cudaError_t error = current_device(&device);
  return error != cudaSuccess ? error : known().find(device, limits);
}

cudaError_t normalize(const std::vector<Key>& keys, const Rule& rule, Stream stream) {
  return apply_all(launch_normalize, keys, rule, stream);
}

cudaError_t denormalize(const std::vector<Key>& keys, const Rule& rule, Stream stream) {
  return apply_all(launch_denormalize, keys, rule, stream);
}

}  // namespace cuda
}  // namespace vecnorm
