// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The launchers of the kernels, one for each.

#pragma once

#include "device.h"
#include "params.h"

namespace vecnorm {
namespace cuda {

// Calls f(Type<T>{}) for the T of the kernel that kernel_type() names.
template <typename F>
cudaError_t dispatch_kernel(Dtype type, F f) {
  switch (type) {
    case Dtype::kFloat64:
      return f(Type<double>{});
    case Dtype::kFloat16:
      return f(Type<Float16>{});
    case Dtype::kBFloat16:
      return f(Type<BFloat16>{});
    case Dtype::kUInt8:
      return f(Type<uint8_t>{});
    default:
      return f(Type<float>{});
  }
}

// Kernels are for one type of vectors each, that of float for keys without as well.
// two_kernels.cu
cudaError_t allow_two_kernels(size_t bytes);
cudaError_t launch_accumulate(Dtype dtype, const Launch& shape, Stream stream,
                              const Params& p);
cudaError_t launch_normalize(Dtype dtype, const Launch& shape, Stream stream,
                             const Params& p);
cudaError_t launch_denormalize(Dtype dtype, const Launch& shape, Stream stream,
                               const Params& p);

// fused.cu
// allow_fused() lets them have all shared memory of the current GPU, and takes from the
// limits what they cannot do there.
cudaError_t allow_fused(Limits* limits);
cudaError_t launch_fused(Dtype dtype, const Launch& shape, Stream stream,
                         const Params& p);

// returns.cu
cudaError_t allow_returns();

}  // namespace cuda
}  // namespace vecnorm
