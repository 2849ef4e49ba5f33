// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Tensors as the kernels take them: the checks that all backends share, and the keys.

#pragma once

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "../key.h"
#include "../moments.h"
#include "ops.h"

namespace vecnorm {

using at::Tensor;
using at::TensorList;

// A CPU tensor that no subclass and no transform looks into.
inline bool is_plain(const Tensor& t) {
  constexpr c10::DispatchKeySet everywhere =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView |
      c10::autocast_dispatch_keyset;
  return t.key_set() - everywhere == c10::DispatchKeySet(c10::DispatchKey::CPU);
}

// ------------------------------------------------------------------------- checks

// Whether a tensor of an optional list, or an optional leaf, is there.
inline bool has(const Tensor& t) { return t.numel() > 0; }

inline bool has(TensorList list, size_t i) { return !list.empty() && has(list[i]); }

// The states of a call: of each key `kLeaves` tensors, in the order of State. Those
// that a state does without have no elements.
struct States {
  static constexpr size_t kLeaves = 5;
  TensorList leaves;

  size_t size() const { return leaves.size() / kLeaves; }
  const Tensor& sum(size_t i) const { return leaves[kLeaves * i]; }
  const Tensor& ssq(size_t i) const { return leaves[kLeaves * i + 1]; }
  const Tensor& count(size_t i) const { return leaves[kLeaves * i + 2]; }
  const Tensor& nonfinite(size_t i) const { return leaves[kLeaves * i + 3]; }
  const Tensor& central(size_t i) const { return leaves[kLeaves * i + 4]; }
};

inline void check_length(TensorList list, size_t n, const char* name, bool optional) {
  TORCH_CHECK_VALUE(list.size() == n || (optional && list.empty()), "expected ", n,
                    " tensors in ", name, ", one for each key, got ", list.size());
}

// NaN is no number that can be expected.
inline void check_weights(double keep, double weight) {
  TORCH_CHECK_VALUE(0 < keep && keep <= 1, "expected decay in (0, 1], got ", keep);
  TORCH_CHECK_VALUE(0 < weight && std::isfinite(weight),
                    "expected weight positive and finite, got ", weight);
}

// The rule of a call, which is the same for all its keys.
inline Rule rule_of(const RuleArgs& args) {
  TORCH_CHECK_VALUE(0 < args.eps && std::isfinite(args.eps),
                    "expected eps positive and finite, got ", args.eps);
  TORCH_CHECK_VALUE(0 <= args.eps_mode && args.eps_mode <= 3,
                    "expected eps_mode in 0 … 3, got ", args.eps_mode);
  const double none = std::numeric_limits<double>::infinity();
  TORCH_CHECK_VALUE(!args.clip.has_value() || (0 < *args.clip && *args.clip < none),
                    "expected clip positive and finite, or none, got ", *args.clip);
  return Rule::of(args.eps, static_cast<EpsMode>(args.eps_mode),
                  args.clip.value_or(none), args.center);
}

inline void check_leaf(const Tensor& t, size_t i, const char* name) {
  const bool is_real = t.scalar_type() == at::kDouble || t.scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(is_real && t.layout() == at::kStrided, "key ", i, ": expected ",
                   name, " as dense float64 or float32, got ", t.scalar_type(), " ",
                   t.layout());
  TORCH_CHECK_VALUE(t.is_contiguous(), "key ", i, ": expected a contiguous ", name,
                    ", got strides ", t.strides());
}

inline void check_state(const States& s, size_t i) {
  const Tensor& sum = s.sum(i);
  check_leaf(sum, i, "sum");
  check_leaf(s.ssq(i), i, "ssq");
  check_leaf(s.count(i), i, "count");
  TORCH_CHECK_VALUE(s.ssq(i).sizes() == sum.sizes(), "key ", i,
                    ": expected ssq of shape ", sum.sizes(), " as sum, got ",
                    s.ssq(i).sizes());
  TORCH_CHECK_VALUE(s.count(i).numel() == 1 || s.count(i).numel() == 2, "key ", i,
                    ": expected count with one element or two, got shape ",
                    s.count(i).sizes());
  if (has(s.nonfinite(i))) {
    const Tensor& nonfinite = s.nonfinite(i);
    check_leaf(nonfinite, i, "nonfinite");
    TORCH_CHECK_VALUE(nonfinite.dim() == sum.dim() + 1 && nonfinite.size(0) == 2 &&
                          nonfinite.sizes().slice(1) == sum.sizes(),
                      "key ", i, ": expected nonfinite of shape [2, *", sum.sizes(),
                      "], got ", nonfinite.sizes());
  }
  if (has(s.central(i))) {
    check_leaf(s.central(i), i, "central");
    TORCH_CHECK_VALUE(s.central(i).sizes() == sum.sizes(), "key ", i,
                      ": expected central of shape ", sum.sizes(), " as sum, got ",
                      s.central(i).sizes());
  }
}

inline void check_states(const States& s) {
  TORCH_CHECK_VALUE(s.leaves.size() % States::kLeaves == 0, "expected ",
                    States::kLeaves, " tensors of each state, got ", s.leaves.size(),
                    " in all");
  for (size_t i = 0; i < s.size(); ++i) {
    check_state(s, i);
  }
}

// The memory from a tensor's first element to its last.
struct Span {
  uintptr_t begin = 0;
  uintptr_t end = 0;

  explicit Span(const Tensor& t) {
    if (t.numel() > 0 && t.has_storage()) {
      int64_t last = 0;
      for (int64_t d = 0; d < t.dim(); ++d) {
        last += (t.size(d) - 1) * t.stride(d);
      }
      begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
      end = begin + static_cast<size_t>(last + 1) * t.element_size();
    }
  }
  bool operator<(const Span& other) const { return begin < other.begin; }
  // Whether a tensor with this span shares elements with one that is dense. Strided
  // values may have others' memory between them.
  bool meets(const Span& dense, const Tensor& t) const {
    const bool inside = dense.begin <= begin && end <= dense.end;
    return begin < dense.end && dense.begin < end &&
           (inside || t.is_non_overlapping_and_dense());
  }
};

// Leaves that are written have to lie apart from each other, or an update of one would
// be an update of another; and from whatever else is read or written meanwhile.
class Apart {
 public:
  explicit Apart(const States& s) : states_(s) {
    spans_.reserve(s.leaves.size());
    for (const Tensor& t : s.leaves) {
      if (has(t)) {
        spans_.emplace_back(t);
      }
    }
    std::sort(spans_.begin(), spans_.end());
    for (size_t i = 1; i < spans_.size(); ++i) {
      if (spans_[i].begin < spans_[i - 1].end) {
        refuse();
      }
    }
  }

  void check(const Tensor& t, size_t i, const char* what) const {
    const Span span(t);
    const auto after = std::lower_bound(spans_.begin(), spans_.end(), span);
    const bool meets = (after != spans_.end() && span.meets(*after, t)) ||
                       (after != spans_.begin() && span.meets(*(after - 1), t));
    TORCH_CHECK_VALUE(!meets, "key ", i, ": expected ", what,
                      " apart from all states, got memory of one of them");
  }

  // Of the leaves, in their order in memory.
  c10::ArrayRef<Span> spans() const { return spans_; }

 private:
  [[noreturn]] void refuse() const {
    static constexpr const char* kNames[] = {"sum", "ssq", "count", "nonfinite",
                                             "central"};
    const auto name = [](size_t l) {
      return c10::str(kNames[l % States::kLeaves], " of key ", l / States::kLeaves);
    };
    for (size_t l = 0; l < states_.leaves.size(); ++l) {
      for (size_t k = 0; k < l; ++k) {
        const Span a(states_.leaves[k]);
        const Span b(states_.leaves[l]);
        TORCH_CHECK_VALUE(a.end <= b.begin || b.end <= a.begin, "key ",
                          l / States::kLeaves,
                          ": expected a state of its own, got one piece of memory for ",
                          name(k), " and ", name(l));
      }
    }
    TORCH_INTERNAL_ASSERT(false, "states that overlap");
  }

  const States& states_;
  c10::SmallVector<Span, 16> spans_;
};

inline void check_merge(const States& s, const States& other, double keep,
                        double weight) {
  check_weights(keep, weight);
  check_states(s);
  check_states(other);
  TORCH_CHECK_VALUE(other.size() == s.size(), "expected moments of ", s.size(),
                    " keys to merge, got ", other.size());
  const Apart apart(s);
  for (size_t i = 0; i < s.size(); ++i) {
    TORCH_CHECK_VALUE(s.sum(i).sizes() == other.sum(i).sizes(), "key ", i,
                      ": expected moments of shape ", s.sum(i).sizes(), ", got ",
                      other.sum(i).sizes());
    for (size_t l = 0; l < States::kLeaves; ++l) {
      if (const Tensor& leaf = other.leaves[States::kLeaves * i + l]; has(leaf)) {
        apart.check(leaf, i, "moments to merge");
      }
    }
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
  check_length(x, s.size(), "x", false);
  check_length(y, s.size(), "y", true);
  for (size_t i = 0; i < x.size(); ++i) {
    const Tensor& value = x[i];
    const at::IntArrayRef features = s.sum(i).sizes();
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

// One element a sample: in the shape of the samples, but for dimensions of size 1, or
// one after the other.
inline bool is_mask_of(const Tensor& mask, at::IntArrayRef samples) {
  if (mask.dim() == 1) {
    return mask.numel() == c10::multiply_integers(samples);
  }
  const auto next = [](at::IntArrayRef sizes, size_t d) {
    while (d < sizes.size() && sizes[d] == 1) {
      ++d;
    }
    return d;
  };
  const at::IntArrayRef sizes = mask.sizes();
  size_t d = next(sizes, 0);
  size_t e = next(samples, 0);
  while (d < sizes.size() && e < samples.size() && sizes[d] == samples[e]) {
    d = next(sizes, d + 1);
    e = next(samples, e + 1);
  }
  return d == sizes.size() && e == samples.size();
}

inline void check_mask(const Tensor& mask, const Tensor& x, int64_t feature_dims,
                       size_t i) {
  const at::IntArrayRef samples = x.sizes().slice(0, x.dim() - feature_dims);
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool && is_mask_of(mask, samples),
                    "key ", i, ": expected a bool mask of shape ", samples,
                    ", one element a sample, got ", mask.scalar_type(), " ",
                    mask.sizes());
}

inline void check_masks(TensorList mask, TensorList x, const States& s) {
  check_length(mask, x.size(), "mask", true);
  for (size_t i = 0; i < mask.size(); ++i) {
    if (has(mask, i)) {
      check_mask(mask[i], x[i], s.sum(i).dim(), i);
    }
  }
}

// Returns what else has to lie apart from the states.
inline Apart check_update(TensorList x, TensorList y, TensorList mask, const States& s,
                          double keep, double weight) {
  check_weights(keep, weight);
  check_values(x, y, s);
  check_masks(mask, x, s);
  Apart apart(s);
  for (size_t i = 0; i < x.size(); ++i) {
    apart.check(x[i], i, "values");
    if (!y.empty()) {
      apart.check(y[i], i, "an output");
    }
  }
  return apart;
}

inline void check_output(TensorList x, TensorList y, const States& s) {
  check_values(x, y, s);
  for (size_t i = 0; i < y.size(); ++i) {
    const Span span(y[i]);
    for (const Tensor& leaf : s.leaves) {
      TORCH_CHECK_VALUE(!has(leaf) || !span.meets(Span(leaf), y[i]), "key ", i,
                        ": expected an output apart from all states, got memory of one "
                        "of them");
    }
  }
}

inline void check_floating_point(TensorList list) {
  for (size_t i = 0; i < list.size(); ++i) {
    TORCH_CHECK_TYPE(list[i].is_floating_point(), "key ", i,
                     ": expected floating-point values, got ", list[i].scalar_type());
  }
}

// ------------------------------------------------------------------------- outputs

// Integers and bools come out in the default dtype, as everywhere in torch.
inline at::ScalarType output_dtype(const Tensor& x) {
  return x.is_floating_point() ? x.scalar_type()
                               : c10::get_default_dtype_as_scalartype();
}

// The moments of nothing for each key, in our own layout.
inline std::vector<Tensor> zero_states(TensorList x, int64_t feature_ndim) {
  std::vector<Tensor> leaves;
  leaves.reserve(x.size() * States::kLeaves);
  for (size_t i = 0; i < x.size(); ++i) {
    TORCH_CHECK_VALUE(0 <= feature_ndim && feature_ndim <= x[i].dim(), "key ", i,
                      ": expected feature_ndim from 0 to ", x[i].dim(),
                      " for values of shape ", x[i].sizes(), ", got ", feature_ndim);
    const at::IntArrayRef features = x[i].sizes().slice(x[i].dim() - feature_ndim);
    c10::SmallVector<int64_t, 6> both{2};
    both.append(features.begin(), features.end());
    const int64_t one = 1;
    const auto options = at::TensorOptions(at::kDouble).device(x[i].device());
    for (const at::IntArrayRef shape :
         {features, features, at::IntArrayRef(one), at::IntArrayRef(both), features}) {
      leaves.push_back(at::zeros(shape, options));
    }
  }
  return leaves;
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

// Whether kernels read values of this type; others (uint16, float8, …) are read as
// double.
inline bool has_kernel(at::ScalarType type) {
  switch (type) {
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
      return true;
    default:
      return false;
  }
}

inline Tensor readable(const Tensor& x) {
  return has_kernel(x.scalar_type()) ? x : x.to(at::kDouble);
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

inline Leaf leaf_of(const Tensor& t) {
  return {has(t) ? t.data_ptr() : nullptr, dtype_of(t.scalar_type())};
}

inline State state_of(const States& s, size_t i) {
  Leaf count = leaf_of(s.count(i));
  count.has_seen = s.count(i).numel() == 2;
  return {leaf_of(s.sum(i)), leaf_of(s.ssq(i)), count, leaf_of(s.nonfinite(i)),
          leaf_of(s.central(i))};
}

// The keys of a call for the kernels. Tensors that no strides can describe as [samples,
// features] are copied; outputs among them are copied back by write_back().
struct Keys {
  std::vector<Key> keys;
  std::vector<Tensor> alive;
  std::vector<std::pair<Tensor, Tensor>> copies;

  Keys(TensorList x, TensorList y, TensorList mask, const States& s) {
    keys.resize(x.size());
    alive.reserve(4 * x.size());  // references to it stay good
    for (size_t i = 0; i < x.size(); ++i) {
      Key& key = keys[i];
      const Tensor& value = x[i];
      const int64_t features = s.sum(i).numel();
      const int64_t samples = samples_of(value, s.sum(i));
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
      const int64_t feature_dims = s.sum(i).dim();
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
