// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Tensors as the kernels take them: the checks that all backends share, and the keys.

#pragma once

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "key.h"

namespace vecnorm {

using at::Tensor;
using at::TensorList;

// ------------------------------------------------------------------------- checks

// The state lists of a call, each with one entry a key.
struct States {
  TensorList sum;
  TensorList ssq;
  TensorList count;
  TensorList nonfinite;
};

inline bool has(TensorList list, size_t i) {
  return !list.empty() && list[i].numel() > 0;
}

inline void check_length(TensorList list, size_t n, const char* name, bool optional) {
  TORCH_CHECK_VALUE(list.size() == n || (optional && list.empty()), "expected ", n,
                    " tensors in ", name, ", one for each key, got ", list.size());
}

inline bool is_state_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat;
}

inline void check_state(const States& s, size_t i) {
  const Tensor& sum = s.sum[i];
  TORCH_CHECK_VALUE(s.ssq[i].sizes() == sum.sizes(), "key ", i,
                    ": expected ssq of shape ", sum.sizes(), " as sum, got ",
                    s.ssq[i].sizes());
  TORCH_CHECK_VALUE(s.count[i].numel() == 1, "key ", i,
                    ": expected count with one element, got shape ",
                    s.count[i].sizes());
  for (const Tensor* t : {&sum, &s.ssq[i], &s.count[i]}) {
    TORCH_CHECK_TYPE(is_state_dtype(t->scalar_type()), "key ", i,
                     ": expected a float64 or float32 state, got ", t->scalar_type());
    TORCH_CHECK_VALUE(t->is_contiguous(), "key ", i, ": expected a contiguous state");
  }
  if (has(s.nonfinite, i)) {
    const Tensor& nonfinite = s.nonfinite[i];
    // mps has no float64, and no kernel of ours that relies on it.
    const bool is_counter =
        nonfinite.scalar_type() == at::kDouble ||
        (nonfinite.is_mps() && nonfinite.scalar_type() == at::kFloat);
    TORCH_CHECK_TYPE(is_counter, "key ", i, ": expected nonfinite as float64, got ",
                     nonfinite.scalar_type());
    TORCH_CHECK_VALUE(nonfinite.dim() == sum.dim() + 1 && nonfinite.size(0) == 2 &&
                          nonfinite.sizes().slice(1) == sum.sizes() &&
                          nonfinite.is_contiguous(),
                      "key ", i, ": expected a contiguous nonfinite of shape [2, *",
                      sum.sizes(), "], got ", nonfinite.sizes());
  }
}

inline void check_states(const States& s) {
  const size_t n = s.sum.size();
  check_length(s.ssq, n, "ssq", false);
  check_length(s.count, n, "count", false);
  check_length(s.nonfinite, n, "nonfinite", true);
  for (size_t i = 0; i < n; ++i) {
    check_state(s, i);
  }
}

// A state that is updated for two keys at once would depend on which comes last.
inline void check_own_states(TensorList sum) {
  for (size_t i = 1; i < sum.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      TORCH_CHECK_VALUE(
          sum[i].numel() == 0 || sum[i].const_data_ptr() != sum[j].const_data_ptr(),
          "key ", i, ": expected a state of its own, got that of key ", j);
    }
  }
}

inline void check_merge(const States& s, const States& other) {
  check_states(s);
  check_states(other);
  check_own_states(s.sum);
  check_length(other.sum, s.sum.size(), "other_sum", false);
  for (size_t i = 0; i < s.sum.size(); ++i) {
    TORCH_CHECK_VALUE(s.sum[i].sizes() == other.sum[i].sizes(), "key ", i,
                      ": expected moments of shape ", s.sum[i].sizes(), ", got ",
                      other.sum[i].sizes());
  }
}

inline bool share_storage(const Tensor& a, const Tensor& b) {
  const auto storage = [](const Tensor& t) {
    return t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  };
  return storage(a) != nullptr && storage(a) == storage(b);
}

// Whether two tensors surely share elements; of interleaved views nobody can tell
// cheaply.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (!share_storage(a, b) || a.numel() == 0 || b.numel() == 0) {
    return false;
  }
  const at::MemOverlapStatus status = at::get_overlap_status(a, b);
  return status == at::MemOverlapStatus::Full ||
         status == at::MemOverlapStatus::Partial ||
         a.const_data_ptr() == b.const_data_ptr();
}

// An output that is another key's too, or its values, would depend on the order in
// which keys are written.
inline void check_apart(TensorList x, TensorList y) {
  for (size_t i = 0; i < y.size(); ++i) {
    for (size_t j = 0; j < y.size(); ++j) {
      TORCH_CHECK_VALUE(j == i || !overlap(y[i], x[j]), "key ", i,
                        ": expected an output apart from the values of key ", j,
                        ", got one that shares memory with them");
      TORCH_CHECK_VALUE(j >= i || !overlap(y[i], y[j]), "key ", i,
                        ": expected an output apart from that of key ", j,
                        ", got one that shares memory with it");
    }
  }
}

inline void check_values(TensorList x, TensorList y, const States& s) {
  check_states(s);
  check_length(x, s.sum.size(), "x", false);
  check_length(y, s.sum.size(), "y", true);
  for (size_t i = 0; i < x.size(); ++i) {
    const Tensor& value = x[i];
    const at::IntArrayRef features = s.sum[i].sizes();
    TORCH_CHECK_TYPE(!value.is_complex() && value.layout() == at::kStrided, "key ", i,
                     ": expected dense real values, got ", value.scalar_type(), " ",
                     value.layout());
    const int64_t leading = value.dim() - static_cast<int64_t>(features.size());
    TORCH_CHECK_VALUE(leading >= 0 && value.sizes().slice(leading) == features, "key ",
                      i, ": expected features of shape ", features,
                      ", got values of shape ", value.sizes());
    if (!y.empty()) {
      at::assert_no_internal_overlap(y[i]);
      if (share_storage(y[i], value)) {
        at::assert_no_partial_overlap(y[i], value);
      }
      TORCH_CHECK_VALUE(y[i].sizes() == value.sizes(), "key ", i,
                        ": expected an output of shape ", value.sizes(), ", got ",
                        y[i].sizes());
      TORCH_CHECK_TYPE(
          y[i].is_floating_point() &&
              (!value.is_floating_point() || value.scalar_type() == y[i].scalar_type()),
          "key ", i, ": ", value.scalar_type(), " values cannot be written to a ",
          y[i].scalar_type(), " output");
    }
  }
  check_apart(x, y);
}

// The number of samples in values that check_values() has passed.
inline int64_t samples_of(const Tensor& x, const Tensor& sum) {
  int64_t samples = 1;
  for (int64_t d = 0; d < x.dim() - sum.dim(); ++d) {
    samples *= x.size(d);
  }
  return samples;
}

inline void check_masks(TensorList mask, TensorList x, const States& s) {
  check_length(mask, x.size(), "mask", true);
  for (size_t i = 0; i < mask.size(); ++i) {
    const int64_t samples = samples_of(x[i], s.sum[i]);
    TORCH_CHECK_VALUE(!has(mask, i) || (mask[i].scalar_type() == at::kBool &&
                                        mask[i].numel() == samples),
                      "key ", i, ": expected a bool mask with ", samples,
                      " elements, got ", mask[i].scalar_type(), " ", mask[i].sizes());
  }
}

inline void check_update(TensorList x, TensorList y, TensorList mask, const States& s) {
  check_values(x, y, s);
  check_masks(mask, x, s);
  check_own_states(s.sum);
}

inline void check_floating_point(TensorList list) {
  for (size_t i = 0; i < list.size(); ++i) {
    TORCH_CHECK_TYPE(list[i].is_floating_point(), "key ", i,
                     ": expected floating-point values, got ", list[i].scalar_type());
  }
}

// --------------------------------------------------------------------------- keys

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kChar:
      return Dtype::kInt8;
    case at::kShort:
      return Dtype::kInt16;
    case at::kInt:
      return Dtype::kInt32;
    case at::kLong:
      return Dtype::kInt64;
    case at::kByte:
      return Dtype::kUInt8;
    case at::kBool:
      return Dtype::kBool;
    default:
      TORCH_CHECK_TYPE(false, "expected real values, got ", type);
  }
}

// Types without a kernel (uint16, float8, …) are read as double.
inline Tensor readable(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kHalf:
    case at::kBFloat16:
    case at::kChar:
    case at::kShort:
    case at::kInt:
    case at::kLong:
    case at::kByte:
    case at::kBool:
      return x;
    default:
      return x.to(at::kDouble);
  }
}

// One stride for the dimensions [begin, end) of a tensor, if one describes them.
inline bool collapse(const Tensor& t, int64_t begin, int64_t end, int64_t* stride) {
  int64_t extent = 0;
  for (int64_t d = end - 1; d >= begin; --d) {
    if (t.size(d) == 1) {
      continue;
    }
    if (extent == 0) {
      *stride = t.stride(d);
      extent = 1;
    } else if (t.stride(d) != *stride * extent) {
      return false;
    }
    extent *= t.size(d);
  }
  return true;
}

// A tensor as [samples, features], its last `feature_dims` dimensions being features;
// false where no two strides describe it.
inline bool as_matrix(const Tensor& t, int64_t feature_dims, int64_t features,
                      Matrix* m) {
  const int64_t rows = t.dim() - feature_dims;
  m->dtype = dtype_of(t.scalar_type());
  m->feature_stride = 1;
  m->row_stride = features;  // of a single row, whatever
  m->data = t.data_ptr();
  return collapse(t, rows, t.dim(), &m->feature_stride) &&
         collapse(t, 0, rows, &m->row_stride);
}

inline State state_of(const States& s, size_t i) {
  State state;
  state.sum = s.sum[i].data_ptr();
  state.ssq = s.ssq[i].data_ptr();
  state.count = s.count[i].data_ptr();
  state.nonfinite = has(s.nonfinite, i) ? s.nonfinite[i].data_ptr<double>() : nullptr;
  state.sum_dtype = dtype_of(s.sum[i].scalar_type());
  state.ssq_dtype = dtype_of(s.ssq[i].scalar_type());
  state.count_dtype = dtype_of(s.count[i].scalar_type());
  return state;
}

// The keys of a call for the kernels. Tensors that no strides can describe as [samples,
// features] are copied; outputs among them are copied back by write_back().
struct Keys {
  std::vector<Key> keys;
  std::vector<Tensor> alive;
  std::vector<std::pair<Tensor, Tensor>> copies;

  Keys(TensorList x, TensorList y, TensorList mask, const States& s) {
    keys.resize(x.size());
    alive.reserve(3 * x.size());  // references to it stay good
    for (size_t i = 0; i < x.size(); ++i) {
      Key& key = keys[i];
      const Tensor& value = x[i];
      const int64_t features = s.sum[i].numel();
      const int64_t samples = samples_of(value, s.sum[i]);
      key.features = features;
      key.samples = samples;
      key.state = state_of(s, i);
      if (has(mask, i)) {
        key.mask = keep(mask[i].contiguous()).data_ptr<bool>();
      }
      if (samples == 0 || features == 0) {
        key.samples = 0;
        continue;
      }
      const int64_t feature_dims = s.sum[i].dim();
      const Tensor& in = keep(readable(value));
      if (!as_matrix(in, feature_dims, features, &key.x)) {
        as_matrix(keep(in.contiguous()), feature_dims, features, &key.x);
      }
      if (has(y, i)) {
        const at::ScalarType dtype = output_dtype(key, y[i]);
        if (y[i].scalar_type() != dtype ||
            !as_matrix(y[i], feature_dims, features, &key.y)) {
          const Tensor copy = at::empty(
              y[i].sizes(),
              y[i].options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
          as_matrix(copy, feature_dims, features, &key.y);
          copies.emplace_back(y[i], copy);
        }
      }
    }
  }

  void write_back() const {
    for (const auto& [y, copy] : copies) {
      y.copy_(copy);
    }
  }

 private:
  // A value that is read as double is written as double.
  static at::ScalarType output_dtype(const Key& key, const Tensor& out) {
    const at::ScalarType type = out.scalar_type();
    const bool kernel = type == at::kFloat || type == at::kDouble ||
                        type == at::kHalf || type == at::kBFloat16;
    return kernel && key.x.dtype != Dtype::kFloat64 ? type : at::kDouble;
  }

  const Tensor& keep(Tensor t) {
    alive.push_back(std::move(t));
    return alive.back();
  }
};

}  // namespace vecnorm
