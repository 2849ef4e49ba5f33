// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Where kernels find what a check has in its own memory: there, on the host; on a GPU,
// in allocations that are as large to the byte, so that compute-sanitizer sees what
// goes beyond.

#pragma once

#include <cstdint>
#include <cstdio>
#include <map>

#include "csrc/cuda/device.h"
#include "csrc/returns.h"

namespace vecnorm {

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

#ifdef VECNORM_CUDA_ON_HOST
  template <typename T>
  T* there(T* data, size_t) {
    return data;
  }
  template <typename T>
  T* blank(T* data, size_t) {
    return data;
  }
  bool bring_back() { return true; }
#else
  ~Memory() {
    for (const auto& [host, block] : blocks_) {
      cudaFree(block.base);
    }
  }

  // A copy of n values, at the same distance from a multiple of 16 bytes.
  template <typename T>
  T* there(T* data, size_t n) {
    return static_cast<T*>(find(data, n * sizeof(T), true));
  }

  // The same for values that nobody has written, nor reads after.
  template <typename T>
  T* blank(T* data, size_t n) {
    return static_cast<T*>(find(data, n * sizeof(T), false));
  }

  // Waits for the kernels, and copies everything back.
  bool bring_back() {
    is_good_ = good(cudaDeviceSynchronize()) && is_good_;
    for (const auto& [host, block] : blocks_) {
      if (block.is_copy && is_good_) {
        is_good_ = good(cudaMemcpy(const_cast<void*>(host), block.data, block.bytes,
                                   cudaMemcpyDeviceToHost));
      }
    }
    return is_good_;
  }
#endif

  Key there(Key key) {
    key.x.data = there(key.x, key);
    key.y.data = there(key.y, key);
    key.mask = there(key.mask, static_cast<size_t>(key.samples));
    const auto n = static_cast<size_t>(key.features);
    key.state.sum = there(key.state.sum, n);
    key.state.ssq = there(key.state.ssq, n);
    key.state.count = there(key.state.count, key.state.count.has_seen ? 2 : 1);
    key.state.nonfinite = there(key.state.nonfinite, 2 * n);
    key.state.central = there(key.state.central, n);
    return key;
  }

  Returns there(Returns of) {
    const Key& key = of.key;
    of.done = there(of.done, static_cast<size_t>(key.samples));
    of.returns = there(of.returns, static_cast<size_t>(key.samples * key.features));
    of.key = there(key);
    return of;
  }

 private:
  Leaf there(Leaf leaf, size_t n) {
    leaf.data = bytes_there(leaf.data, n * static_cast<size_t>(value_size(leaf.dtype)));
    return leaf;
  }

  // From the first value to the last.
  void* there(const Matrix& m, const Key& key) {
    const int64_t last =
        (key.samples - 1) * m.row_stride + (key.features - 1) * m.feature_stride;
    const int64_t values = key.samples > 0 && key.features > 0 ? last + 1 : 0;
    return bytes_there(m.data, static_cast<size_t>(values * value_size(m.dtype)));
  }

  void* bytes_there(void* data, size_t n) {
    return there(static_cast<unsigned char*>(data), n);
  }

#ifndef VECNORM_CUDA_ON_HOST
  struct Block {
    void* base;
    void* data;
    size_t bytes;
    bool is_copy;
  };

  void* find(const void* host, size_t bytes, bool is_copy) {
    if (host == nullptr || bytes == 0) {
      return const_cast<void*>(host);
    }
    const auto found = blocks_.find(host);
    if (found != blocks_.end()) {
      return found->second.data;
    }
    const size_t skew = reinterpret_cast<uintptr_t>(host) % 16;
    Block block{nullptr, nullptr, bytes, is_copy};
    is_good_ = good(cudaMalloc(&block.base, skew + bytes)) && is_good_;
    block.data = static_cast<char*>(block.base) + skew;
    if (is_copy && is_good_) {
      is_good_ = good(cudaMemcpy(block.data, host, bytes, cudaMemcpyHostToDevice));
    }
    blocks_.emplace(host, block);
    return block.data;
  }

  static bool good(cudaError_t error) {
    if (error != cudaSuccess) {
      std::printf("CUDA error: %s\n", cudaGetErrorString(error));
    }
    return error == cudaSuccess;
  }

  std::map<const void*, Block> blocks_;
  bool is_good_ = true;
#endif
};

}  // namespace vecnorm
