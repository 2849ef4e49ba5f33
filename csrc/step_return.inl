// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// A step of a discounted return. To be included in a namespace: CPU kernels have one
// for each instruction set, which compiles it for registers of its own.

// What the statistics are shown (not usable where they are to leave it out), and what
// is left for the next step.
template <typename T>
struct ReturnStep {
  T seen;
  T left;
};

// T is double, or a register of them, and the flags are bool, or a register that fits;
// `round` is to what returns are kept in.
//
// A reward that is not finite counts as 0 in what is left, or it would stay there for
// ever, and so does one that makes a return too large to be squared. A row that does
// not count stays as it is.
template <typename T, typename Flag, typename Round>
VECNORM_HD ReturnStep<T> step_return(T old, T reward, Flag done, Flag counts,
                                     Discount by, Round round) {
  const T zero{};
  const T none = zero + kNone;
  const T discounted = by.gamma * old;
  const T past = by.clears_before ? (done ? zero : discounted) : discounted;
  const T carried = past * past <= 1e290 ? past : zero;  // usable(past)
  const T value = round(carried + reward);
  const T kept = value * value <= 1e290 ? value : round(carried);
  const T left = by.clears_before ? kept : (done ? zero : kept);
  return {counts ? value : none, counts ? left : old};
}
