// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// What the kernels need of CUDA. The tests compile the kernels for the host with a
// header of their own in its place (VECNORM_CUDA_ON_HOST), so keep this small.

#pragma once

#ifdef VECNORM_CUDA_ON_HOST
#include VECNORM_CUDA_ON_HOST
#else

#include <cuda_runtime_api.h>

namespace vecnorm {
namespace cuda {

using Stream = cudaStream_t;

#ifdef __CUDACC__

template <typename Params>
cudaError_t launch(void (*kernel)(Params), int blocks, int threads, Stream stream,
                   const Params& params) {
  // clang-format off: in a header it does not know the launch syntax
  kernel<<<blocks, threads, 0, stream>>>(params);
  // clang-format on
  return cudaGetLastError();
}

// A 16-byte store that will not be read again soon: it should not push x out of the L2
// cache.
template <typename T>
__device__ __forceinline__ void store_streaming(T* to, const T& value) {
  static_assert(sizeof(T) == sizeof(int4), "16 bytes at once");
  __stcs(reinterpret_cast<int4*>(to), *reinterpret_cast<const int4*>(&value));
}

#endif  // __CUDACC__

}  // namespace cuda
}  // namespace vecnorm

#endif
