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

// two_kernels.cu
cudaError_t allow_accumulate(size_t bytes);
cudaError_t launch_accumulate(const Launch& shape, Stream stream, const Params& p);
cudaError_t launch_normalize(const Launch& shape, Stream stream, const Params& p);
cudaError_t launch_denormalize(const Launch& shape, Stream stream, const Params& p);

// fused.cu: kernels for one floating-point type each, and for keys without vectors.
// allow_fused() lets them have all shared memory of the current GPU, and takes from the
// limits what they cannot do there.
cudaError_t allow_fused(Limits* limits);
cudaError_t launch_fused(Dtype dtype, const Launch& shape, Stream stream,
                         const Params& p);

}  // namespace cuda
}  // namespace vecnorm
