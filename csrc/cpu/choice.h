// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Whether the calls of one kind and size go together, on a team of threads, or alone.

#pragma once

#include <algorithm>
#include <cstdint>

namespace vecnorm {
namespace cpu {

// A team ends with its last thread. Where other processes use the cores that is one
// that has to wait for a core, for milliseconds, and whoever goes alone has long since
// finished.
//
// What going together has cost more than going alone would have is a debt, and while
// there is one calls go alone and pay it off. So the time that is lost to attempts
// stays a fraction of all time, and a team that pays again is found out about soon. On
// a quiet machine there is never a debt.
class Choice {
 public:
  bool together() const { return debt_ <= 0; }

  void went_together(double seconds, int64_t values, int64_t threads) {
    const double each = seconds / values;
    // Never tried alone: no quicker than a share of what all threads take at best.
    best_ = best_ > 0 ? std::min(best_, each) : each;
    const double alone = alone_ > 0 ? alone_ : best_ * threads;
    debt_ = std::max(debt_ + seconds - alone * values, -kCredit);
  }

  void went_alone(double seconds, int64_t values) {
    const double each = seconds / values;
    alone_ = alone_ > 0 ? alone_ + (each - alone_) / 8 : each;
    debt_ -= seconds * kShare;
  }

 private:
  static constexpr double kShare = 0.2;    // of the time alone, lost to attempts
  static constexpr double kCredit = 2e-4;  // seconds: of what went well, remembered

  double debt_ = 0;
  double best_ = 0;   // seconds for a value, together
  double alone_ = 0;  // and alone
};

}  // namespace cpu
}  // namespace vecnorm
