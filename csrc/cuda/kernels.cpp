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

// The most that accumulate() ever asks for, on every GPU from sm_75 on.
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
      error = allow_accumulate(kAccumulateBytes);
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
      limits_[device].clusters = 0;
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
  Arguments(Weights weights, double eps, int threads) : threads_(threads) {
    p_.size = 0;
    p_.slots = 0;
    p_.weights = weights;
    p_.eps = eps;
  }

  void add(const Key& key, const LanePlan& plan, Workspace* workspace) {
    DeviceKey& k = p_.keys[p_.size];
    k.key = key;
    k.plan = plan;
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

  // The arguments of a kernel whose threads keep `slots` vectors each.
  const Params& get(int slots) {
    p_.slots = slots;
    p_.shared_bytes = static_cast<int>(p_.shared.bytes());
    return p_;
  }

  Launch shape() const {
    Launch shape;
    shape.blocks = blocks();
    shape.threads = threads_;
    shape.shared = p_.shared.bytes() + static_cast<size_t>(16 * p_.slots * threads_);
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

bool is_integer(const Key& key) {
  const Dtype d = key.x.dtype;
  return d != Dtype::kFloat32 && d != Dtype::kFloat64 && d != Dtype::kFloat16 &&
         d != Dtype::kBFloat16;
}

// Integers last: they go with any other kind.
int kind_of(const Key& key) {
  return is_integer(key) ? 99 : static_cast<int>(key.x.dtype);
}

using Launcher = cudaError_t (*)(const Launch&, Stream, const Params&);

cudaError_t apply(Launcher launcher, const Key* keys, size_t size, double eps,
                  Stream stream) {
  for (size_t i = 0; i < size;) {
    Arguments arguments({1., 1.}, eps, kBlockThreads);
    for (; i < size && !arguments.full(); ++i) {
      if (keys[i].samples > 0 && keys[i].y.data != nullptr) {
        arguments.add(keys[i], plan_maps(keys[i]), nullptr);
      }
    }
    if (arguments.blocks() > 0) {
      const Params& p = arguments.get(0);
      Launch shape = arguments.shape();
      shape.shared = 3 * sizeof(double) * static_cast<size_t>(p.shared.features);
      if (const cudaError_t error = launcher(shape, stream, p)) {
        return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace

Update::Update(const std::vector<Key>& keys, Weights weights, double eps, Path wish)
    : weights_(weights), eps_(eps) {
  for (const Key& key : keys) {
    if (key.samples > 0) {
      keys_.push_back(key);
    }
  }
  // A fused kernel knows one floating-point type, and takes integers along.
  std::stable_sort(keys_.begin(), keys_.end(),
                   [](const Key& a, const Key& b) { return kind_of(a) < kind_of(b); });
  error_ = current_device(&device_);
  if (error_ == cudaSuccess) {
    error_ = known().find(device_, &limits_);
  }
  for (size_t i = 0; i < keys_.size() && error_ == cudaSuccess;) {
    size_t end = i + 1;
    while (end < keys_.size() && end - i < kMaxKeys &&
           (is_integer(keys_[end]) || keys_[end].x.dtype == keys_[i].x.dtype)) {
      ++end;
    }
    const int size = static_cast<int>(end - i);
    batches_.push_back({&keys_[i], size, plan_update(&keys_[i], size, limits_, wish)});
    const WorkspaceSize more = workspace_of(batches_.back());
    workspace_.partials += more.partials;
    workspace_.counters += more.counters;
    i = end;
  }
}

WorkspaceSize Update::workspace_of(const Batch& batch) const {
  WorkspaceSize all;
  for (int i = 0; i < batch.size; ++i) {
    const WorkspaceSize size = Arguments::size_of(batch.plan.keys[i]);
    // A fused kernel that finds no room for itself gives way to the other path.
    const WorkspaceSize other = batch.plan.path == Path::kTwoKernels
                                    ? size
                                    : Arguments::size_of(plan_sums(batch.keys[i]));
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
    if (error != cudaSuccess && batch.plan.path != Path::kTwoKernels) {
      // The launch was refused, nothing has run.
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
  Arguments arguments(weights_, eps_, fused ? kFusedThreads : kBlockThreads);
  for (int i = 0; i < batch.size; ++i) {
    arguments.add(batch.keys[i], batch.plan.keys[i], workspace);
  }
  const Params& p = arguments.get(batch.plan.slots);
  Launch shape = arguments.shape();
  if (fused) {
    shape.cluster = batch.plan.cluster;
    shape.cooperative = batch.plan.path == Path::kResident;
    return launch_fused(batch.keys[0].x.dtype, shape, stream, p);
  }
  if (const cudaError_t error = launch_accumulate(shape, stream, p)) {
    return error;
  }
  return apply(launch_normalize, batch.keys, static_cast<size_t>(batch.size), eps_,
               stream);
}

cudaError_t normalize(const std::vector<Key>& keys, double eps, Stream stream) {
  return apply(launch_normalize, keys.data(), keys.size(), eps, stream);
}

cudaError_t denormalize(const std::vector<Key>& keys, double eps, Stream stream) {
  return apply(launch_denormalize, keys.data(), keys.size(), eps, stream);
}

}  // namespace cuda
}  // namespace vecnorm
