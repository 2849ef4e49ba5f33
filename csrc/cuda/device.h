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

#include <utility>

#include "launch.h"
#include "plan.h"

namespace vecnorm {
namespace cuda {

// ---------------------------------------------------------------------------- host

using Stream = cudaStream_t;

inline cudaError_t current_device(int* device) { return cudaGetDevice(device); }

// A failed launch must not be reported again by the next call of anybody.
inline void forget_error() { cudaGetLastError(); }

// Loading kernels may allocate, which a stream that is being captured forbids unless it
// is told that this has nothing to do with it.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Whether a launch was refused because other processes hold a part of the GPU, or
// because it cannot be had there: nothing has run then. Other errors are of what ran
// before.
inline bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge ||
         error == cudaErrorLaunchOutOfResources ||
         error == cudaErrorInvalidClusterSize ||
         error == cudaErrorInvalidConfiguration || error == cudaErrorNotSupported;
}

inline cudaError_t query(int device, Limits* limits) {
  int shared = 0;
  int cooperative = 0;
  int clusters = 0;
  for (const auto& [attribute, value] :
       {std::pair(cudaDevAttrMultiProcessorCount, &limits->processors),
        std::pair(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared),
        std::pair(cudaDevAttrCooperativeLaunch, &cooperative),
        std::pair(cudaDevAttrClusterLaunch, &clusters)}) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device)) {
      return error;
    }
  }
  limits->shared = static_cast<size_t>(shared);
  limits->cooperative = cooperative != 0;
  for (int& of_a_size : limits->clusters) {
    of_a_size = clusters;
  }
  return cudaSuccess;
}

#ifdef __CUDACC__

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Launch& shape, Stream stream,
                   const Params& params) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Lets a kernel have more shared memory than the 48 KB that are there unasked.
template <typename Params>
cudaError_t allow_shared(void (*kernel)(Params), size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// Has a kernel loaded now, and not by its first launch: that may be captured.
template <typename Params>
cudaError_t load_now(void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

// How many such blocks run at once on one processor of the current GPU.
template <typename Params>
cudaError_t blocks_at_once(void (*kernel)(Params), int threads, size_t bytes,
                           int* blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, bytes);
}

// How many such clusters run at once on the current GPU: none where the kernel was
// compiled for one that knows no clusters, or where no part of the GPU is large enough.
template <typename Params>
cudaError_t clusters_at_once(void (*kernel)(Params), int size, int threads,
                             size_t bytes, int* clusters) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *clusters = 0;
  if (error != cudaSuccess || attributes.ptxVersion < 90) {
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(size);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  if (cudaOccupancyMaxActiveClusters(clusters, kernel, &config) != cudaSuccess) {
    forget_error();
    *clusters = 0;
  }
  return cudaSuccess;
}

// -------------------------------------------------------------------------- device

// The shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ int4 bytes[];
  return reinterpret_cast<char*>(bytes);
}

// A 16-byte store that will not be read again soon: it should not push x out of the L2
// cache.
template <typename T>
__device__ __forceinline__ void store_streaming(T* to, const T& value) {
  static_assert(sizeof(T) == sizeof(int4), "16 bytes at once");
  __stcs(reinterpret_cast<int4*>(to), *reinterpret_cast<const int4*>(&value));
}

// The same number, but the compiler does not know: what is computed from it is computed
// anew, and takes no register until then.
__device__ __forceinline__ int opaque(unsigned x) {
  asm volatile("" : "+r"(x));
  return static_cast<int>(x);
}

__device__ __forceinline__ double shuffle_xor(double value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Adds to a word that other blocks read. What the thread wrote before can be read by
// those who have seen the sum, and what they wrote before, by the thread.
__device__ __forceinline__ unsigned fetch_add(unsigned* to, unsigned value) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(to), "r"(value)
               : "memory");
  return before;
}

// The same for threads that have nothing to tell.
__device__ __forceinline__ unsigned fetch_add_relaxed(unsigned* to, unsigned value) {
  unsigned before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(to), "r"(value));
  return before;
}

// The same for one that does not care what the others wrote: it waits for no answer.
__device__ __forceinline__ void add_release(unsigned* to, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;"
               :
               : "l"(to), "r"(value)
               : "memory");
}

__device__ __forceinline__ unsigned load_relaxed(const unsigned* from) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(from)
               : "memory");
  return value;
}

// Called while waiting for another block.
__device__ __forceinline__ void pause() {}

// Clusters, from sm_90 on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;

// All threads of the cluster's blocks arrive, later they wait for each other. What a
// block wrote before a barrier of its own and this can be read after: one warp says so
// for all, a fence takes as long as the slowest store.
__device__ __forceinline__ void cluster_arrive() {
  if (threadIdx.x < kWarp) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
}
// The same for blocks that have written nothing others read.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What another block of the cluster has where this one has `mine`.
__device__ __forceinline__ double load_peer(const double* mine, int rank) {
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(mine));
  unsigned there;
  double value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];"
               : "=d"(value)
               : "r"(there)
               : "memory");
  return value;
}
#else
constexpr bool kHasClusters = false;
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_arrive_relaxed() {}
__device__ inline void cluster_wait() {}
__device__ inline double load_peer(const double* mine, int) { return *mine; }
#endif

#endif  // __CUDACC__

}  // namespace cuda
}  // namespace vecnorm

#endif
