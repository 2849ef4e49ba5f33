// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "totals.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cmath>

#include "../moments.h"
#include "tensors.h"

namespace vecnorm {
namespace {

// As in totals.py.
constexpr int64_t kHeader = 6;
constexpr double kLimit = 1 << 20;

double* data_of(const Tensor& t, int64_t least) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == at::kDouble &&
                        t.is_contiguous() && t.numel() >= least,
                    "expected ", least, " contiguous float64 elements on the CPU, got ",
                    t.numel(), " of ", t.scalar_type(), " on ", t.device());
  return t.mutable_data_ptr<double>();
}

// The parts of the tensor that is reduced.
struct Parts {
  double* header;
  double* counts;
  double* missing;
  double* d1;
  double* d2;

  Parts(const Tensor& buffer, int64_t keys, int64_t features)
      : header(data_of(buffer, kHeader + keys + 3 * features)),
        counts(header + kHeader),
        missing(counts + keys),
        d1(missing + features),
        d2(d1 + features) {}
};

// A leaf of a batch: who gives one may have made it in any way.
Tensor dense(const Tensor& t, int64_t least) {
  TORCH_CHECK_VALUE(t.numel() >= least, "expected a batch with ", least,
                    " elements in each leaf, got one of shape ", t.sizes());
  return t.to(at::kDouble).contiguous();
}

}  // namespace

void write_totals(const Tensor& buffer, const Tensor& expected, const Tensor& shift,
                  TensorList batches, bool asks, bool refused) {
  const States s{batches};
  const int64_t features = shift.numel();
  const double* at = data_of(shift, features);
  const Parts to(buffer, static_cast<int64_t>(s.size()), features);
  double* header = data_of(expected, kHeader);
  int64_t begin = 0;
  for (size_t k = 0; k < s.size(); ++k) {
    const int64_t size = s.sum(k).numel();
    TORCH_CHECK_VALUE(begin + size <= features, "expected batches of ", features,
                      " features, got more of them");
    const Tensor leaves[] = {dense(s.count(k), 1), dense(s.sum(k), size),
                             dense(s.central(k), size), dense(s.nonfinite(k), size)};
    const double count = *leaves[0].const_data_ptr<double>();
    const auto* sum = leaves[1].const_data_ptr<double>();
    const auto* var = leaves[2].const_data_ptr<double>();
    const auto* missing = leaves[3].const_data_ptr<double>();
    to.counts[k] = count;
    for (int64_t f = 0; f < size; ++f) {
      const double n = count - missing[f];
      const Partial p = shifted(n, sum[f], var[f], at[begin + f]);
      to.missing[begin + f] = missing[f];
      to.d1[begin + f] = p.d1;
      to.d2[begin + f] = p.d2;
    }
    begin += size;
  }
  TORCH_CHECK_VALUE(begin == features, "expected batches of ", features,
                    " features, got ", begin);
  header[0] = std::fmod(header[0] + 1, kLimit);
  header[1] = header[0] * header[0];
  std::copy_n(header, kHeader, to.header);
  to.header[4] += asks ? 1 : 0;
  to.header[5] += refused ? 1 : 0;
}

std::vector<Tensor> read_totals(const Tensor& buffer, const Tensor& shift,
                                TensorList like) {
  const int64_t features = shift.numel();
  double* at = data_of(shift, features);
  const Parts from(buffer, static_cast<int64_t>(like.size()), features);
  std::vector<Tensor> leaves;
  leaves.reserve(States::kLeaves * like.size());
  int64_t begin = 0;
  for (size_t k = 0; k < like.size(); ++k) {
    const at::IntArrayRef shape = like[k].sizes();
    const int64_t size = like[k].numel();
    TORCH_CHECK_VALUE(begin + size <= features, "expected keys of ", features,
                      " features, got more of them");
    c10::SmallVector<int64_t, 6> both{2};
    both.append(shape.begin(), shape.end());
    const int64_t one = 1;
    double* to[States::kLeaves];
    for (size_t l = 0; l < States::kLeaves; ++l) {
      const at::IntArrayRef sizes =
          l == 2 ? at::IntArrayRef(one) : (l == 3 ? at::IntArrayRef(both) : shape);
      leaves.emplace_back(at::detail::empty_cpu(sizes, at::kDouble));
      to[l] = leaves.back().mutable_data_ptr<double>();
    }
    auto [sum, ssq, count, missing, var] = to;
    *count = from.counts[k];
    for (int64_t f = 0; f < size; ++f) {
      const int64_t i = begin + f;
      const Partial p{*count - from.missing[i], from.d1[i], from.d2[i]};
      const double per_value = inverse(p.n);
      const Moments m = unshift(p, per_value, at[i], *count);
      sum[f] = m.sum;
      ssq[f] = m.ssq;
      missing[f] = missing[size + f] = from.missing[i];
      var[f] = m.var;
      at[i] += p.d1 * per_value;
    }
    begin += size;
  }
  return leaves;
}

}  // namespace vecnorm
