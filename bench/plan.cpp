// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Says how CUDA kernels would run keys, for model.py. Each line of the input is a GPU
// and one key: processors, bytes of shared memory, clusters of 2, 4 and 8 at once,
// cooperative (0 or 1), a path (0: any), samples, features, dtype (as in dtypes.h),
// lanes of padding. Each line of the output is the plan, as `name=value`.

#include "../csrc/cuda/plan.h"

#include <cstdio>

using namespace vecnorm;

namespace {

void print(const char* what, const cuda::LanePlan& k) {
  std::printf(
      "%s_vector=%d %s_slabs=%d %s_chunks=%d %s_columns=%d %s_features=%d "
      "%s_rows=%ld ",
      what, k.vector, what, k.slabs, what, k.chunks, what, k.columns(), what,
      k.features, what, static_cast<long>(k.rows_per_chunk));
}

}  // namespace

int main() {
  cuda::Limits limits = {};
  int cooperative = 0;
  int path = 0;
  long samples = 0;
  long features = 0;
  int dtype = 0;
  int pad = 0;
  while (std::scanf("%d %zu %d %d %d %d %d %ld %ld %d %d", &limits.processors,
                    &limits.shared, &limits.clusters[0], &limits.clusters[1],
                    &limits.clusters[2], &cooperative, &path, &samples, &features,
                    &dtype, &pad) == 11) {
    limits.cooperative = cooperative != 0;
    Key key;
    key.samples = samples;
    key.features = features;
    key.x.dtype = static_cast<Dtype>(dtype);
    key.x.row_stride = features + pad;
    key.y = key.x;
    if (key.x.dtype == Dtype::kUInt8) {
      key.y.dtype = Dtype::kFloat32;
    }
    // Addresses stand for their alignment alone.
    key.x.data = key.y.data = reinterpret_cast<void*>(4096);
    const cuda::Plan plan =
        cuda::plan_update(&key, 1, limits, static_cast<cuda::Path>(path));
    const Dtype type = cuda::kernel_type(key);
    std::printf("path=%d cluster=%d slots=%d vector_bytes=%d held=%d threads=%d ",
                static_cast<int>(plan.path), plan.cluster, plan.slots,
                plan.vector_bytes, cuda::held_of(type),
                plan.path == cuda::Path::kTwoKernels ? cuda::kBlockThreads
                                                     : cuda::kFusedThreads);
    print("sums", plan.keys[0]);
    print("maps", cuda::plan_maps(key, limits));
    std::printf("\n");
  }
  return 0;
}
