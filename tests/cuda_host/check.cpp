// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CUDA kernels against sums in long double: all dtypes, strides, masks, tails,
// several keys, values that are not finite, with and without the counter of them, each
// kind of kernel, both orders of blocks and threads. Run on the host (emulation.h), or
// compiled by nvcc for a GPU, where compute-sanitizer looks at them. Prints what
// differs; exits with 1 then.

#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cuda/kernels.h"
#include "csrc/cuda/returns.h"
#include "tests/cases.h"
#include "tests/cuda_host/memory.h"
#include "tests/returns_cases.h"

using namespace vecnorm;

namespace {

// How often each path was taken.
int taken[4];

// The keys of one call; two updates, then the pieces.
void run(const std::vector<Case>& cases, cuda::Path wish) {
  constexpr double keep = 0.9;
  const Rule rule = cases[0].rule();
  std::vector<Buffers> all;
  for (const Case& c : cases) {
    all.emplace_back(c);
    all.back().c.name += " path " + std::to_string(static_cast<int>(wish));
  }
  for (int call = 0; call < 2; ++call) {
    Memory memory;
    std::vector<Key> keys;
    for (Buffers& b : all) {
      b.fill();
      b.expect(keep);
      keys.push_back(memory.there(b.key()));
    }
    cuda::Update update(keys, {keep, 1}, rule, wish);
    const cuda::WorkspaceSize size = update.workspace();
    Guarded<double> partials(size.partials);
    Guarded<unsigned> counters(size.counters);
    for (size_t i = 0; i < size.partials; ++i) {
      partials[i] = std::numeric_limits<double>::quiet_NaN();  // poisoned
    }
    for (size_t i = 0; i < size.counters; ++i) {
      counters[i] = i % 2 == 0 ? 0 : 0x80000000u;  // as barriers may leave them
    }
    const cuda::Workspace workspace{memory.blank(partials.data(), size.partials),
                                    memory.there(counters.data(), size.counters)};
    if (update.run(workspace, nullptr) != cudaSuccess || !memory.bring_back()) {
      std::printf("%s: the launch failed\n", all[0].c.name.c_str());
      ++failures;
    }
    ++taken[static_cast<int>(update.path())];
    for (Buffers& b : all) {
      b.compare();
    }
    for (size_t i = 0; i < size.counters; ++i) {
      if ((counters[i] & 0x7fffffffu) != 0) {
        std::printf("a counter was left at %u\n", counters[i]);
        ++failures;
      }
    }
    if (!partials.intact() || !counters.intact()) {
      std::printf("a write outside of the workspace\n");
      ++failures;
    }
    if (cuda::normalize(keys, rule, nullptr) != cudaSuccess || !memory.bring_back()) {
      std::printf("%s: a launch of normalize failed\n", all[0].c.name.c_str());
      ++failures;
    }
    for (Buffers& b : all) {
      b.compare();
    }
  }
  // The inverse gives back what was normalised.
  for (Buffers& b : all) {
    b.compare_back([&](const Key& k) {
      Memory memory;
      cuda::denormalize({memory.there(k)}, rule, nullptr);
      memory.bring_back();
    });
  }
}

std::vector<std::vector<Case>> calls(const std::string& extent) {
  const bool small = !extent.empty();
  std::vector<std::vector<Case>> all;
  const auto one = [&](Case c) { all.push_back({c}); };
  if (extent == "few") {  // threads are slow: one of each kind
    one(make("shape", 70, 3));
    one(make("shape", 700, 16));
    one(make("dtype", 70, 72, Dtype::kBFloat16));
    Case c = make("masked", 70, 3);
    c.masked = true;
    c.counted = false;
    one(c);
    c.masked_out = 1e8;
    one(c);
    c = make("spoiled", 130, 8);
    c.spoiled = 0.1;
    one(c);
    return all;
  }
  std::vector<std::pair<int64_t, int64_t>> shapes = {
      {1, 1}, {5, 3}, {33, 64}, {70, 129}, {600, 1}};
  if (!small) {
    shapes.insert(shapes.end(), {{2, 300},
                                 {129, 3},
                                 {1134, 17},
                                 {300, 68},
                                 {4097, 8},
                                 {3, 1},
                                 {20000, 1},
                                 {9000, 16},
                                 {700, 235},
                                 {40, 1000}});
  }
  for (const auto& [n, f] : shapes) {
    one(make("shape", n, f));
  }
  for (Dtype d :
       {Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kInt8, Dtype::kInt16,
        Dtype::kInt32, Dtype::kInt64, Dtype::kUInt8, Dtype::kBool}) {
    one(make("dtype", 130, 24, d));
    if (!small) {
      one(make("dtype", 131, 5, d));
    }
  }
  // Images: vectors of bytes, with rows that are grouped, padded, too short for them.
  one(make("image", 1400, 12, Dtype::kUInt8));
  one(make("image", 3, 6000, Dtype::kUInt8));
  Case c = make("padded image", 170, 100, Dtype::kUInt8);
  c.pad = 4;
  one(c);
  c.name = "misaligned image";
  c.pad = 3;
  one(c);
  c.name = "masked image";
  c.pad = 0;
  c.masked = true;
  one(c);
  // Few rows of many features: a block has its features alone.
  one(make("wide", 1, 3000));
  one(make("wide", 9, 1500, Dtype::kFloat64));
  c = make("padded", 70, 8);
  c.pad = 4;
  one(c);
  c.name = "misaligned rows";
  c.pad = 3;
  one(c);
  c = make("misaligned start", 70, 8);
  c.offset = 1;
  one(c);
  c = make("strided features", 70, 9);
  c.feature_stride = 2;
  one(c);
  for (int64_t f : small ? std::vector<int64_t>{3} : std::vector<int64_t>{1, 3, 64}) {
    c = make("masked", 700, f);
    c.masked = true;
    one(c);
    c.masked_out = 1e8;
    one(c);
    c.masked_out = 0;
    c.spoiled = 0.05;
    c.counted = false;
    c.name += " spoiled, no counter";
    one(c);
  }
  for (int64_t f :
       small ? std::vector<int64_t>{3, 100} : std::vector<int64_t>{1, 3, 64, 100}) {
    c = make("spoiled", 300, f);
    c.spoiled = 0.1;
    one(c);
  }
  c = make("float state", 300, 12);
  c.float_state = true;
  c.counted = false;
  one(c);
  c = make("far from zero", 500, 12);
  c.loc = 1e4;
  c.scale = 1;
  one(c);
  c = make("end of the range", 130, 24);  // x - loc overflows, and some values do
  c.loc = -1.5e38;
  c.scale = 7e37;
  c.spoiled = 0.01;
  one(c);
  c = make("too far for sums", 400, 12, Dtype::kFloat64);
  c.loc = 3e6;
  c.scale = 1;
  one(c);
  c = make("float state, counted", 300, 12);
  c.float_state = true;
  c.spoiled = 0.05;
  one(c);
  for (const Case& rule : rules()) {
    one(rule);
  }
  std::vector<Case> many;
  for (int k = 0; k < (small ? 5 : 33); ++k) {
    many.push_back(make("one of many", 20 + 13 * k, 1 + k * 7 % 70,
                        k % 3 == 1 ? Dtype::kBFloat16 : Dtype::kFloat32));
    many.back().masked = k % 4 == 2;
  }
  many.push_back(make("no samples", 0, 3));
  all.push_back(many);
  return all;
}

// Divisors give what a division does, also where a rounding would show first.
void check_divisors() {
  for (int divisor : {1, 2, 3, 5, 7, 64, 441, 46341, 65537, 1 << 30, 2147483647}) {
    const auto by = cuda::Divisor::of(divisor);
    for (int64_t near :
         {int64_t{0}, int64_t{divisor}, int64_t{2147483647} / divisor * divisor,
          int64_t{2147483647}, int64_t{1} << 30}) {
      for (int64_t n = near - 2; n <= near + 2; ++n) {
        if (n >= 0 && n <= 2147483647 &&
            by.divide(static_cast<int>(n)) != n / divisor) {
          std::printf("%ld / %d is wrong\n", static_cast<long>(n), divisor);
          ++failures;
        }
      }
    }
  }
}

// Rewards, in one block and in more.
void check_all_returns(const std::string& extent) {
  for (const ReturnsCase& of : returns_cases(!extent.empty())) {
    if (extent == "few" && of.clears_before) {
      continue;  // the order of it is arithmetic alone
    }
    check_returns(
        of, [](const Returns& r, Discount by, Weights weights, const Rule& rule) {
          const cuda::WorkspaceSize size = cuda::returns_workspace(r);
          Guarded<double> partials(size.partials);
          Guarded<unsigned> counters(size.counters);
          for (size_t i = 0; i < size.partials; ++i) {
            partials[i] = std::numeric_limits<double>::quiet_NaN();  // poisoned
          }
          for (size_t i = 0; i < size.counters; ++i) {
            counters[i] = 0x80000000u;  // as a barrier may leave it
          }
          Memory memory;
          const cuda::Workspace workspace{memory.blank(partials.data(), size.partials),
                                          memory.there(counters.data(), size.counters)};
          if (cuda::scale_returns(memory.there(r), by, weights, rule, workspace,
                                  nullptr) != cudaSuccess ||
              !memory.bring_back() || !partials.intact() || !counters.intact() ||
              (size.counters > 0 && (counters[0] & 0x7fffffffu) != 0)) {
            std::printf("returns: a launch failed, or its workspace is spoiled\n");
            ++failures;
          }
        });
  }
}

#ifdef VECNORM_CUDA_ON_HOST

// GPUs with little memory, with and without what fused kernels need.
void check_all(const std::string& extent) {
  using cuda::Path;
  const bool quick = extent == "few";
  emulation::uneven = quick;
#ifdef VECNORM_HOST_THREADS
  const std::vector<bool> orders = {false};  // threads have none
#else
  const std::vector<bool> orders = {false, true};
#endif
  for (bool descending : orders) {
    if (descending && extent == "small") {
      break;  // for sanitizers, which are slow
    }
    emulation::descending = descending;
    emulation::device = 0;
    check_all_returns(extent);
    for (const auto& call : calls(extent)) {
      if (descending && call[0].samples * call[0].features > 10000) {
        continue;  // once is slow enough
      }
      for (Path wish : {Path::kTwoKernels, Path::kCluster, Path::kResident}) {
        emulation::device = 0;
        run(call, wish);
        if (quick && failures > 0) {
          return;
        }
        // More memory changes what happens to what does not fit into less.
        if (!quick && (call[0].features > 64 || call[0].samples > 500)) {
          emulation::device = 1;
          run(call, wish);
        }
      }
      if (extent.empty() && !descending) {
        run(call, Path::kAuto);
        emulation::device = 3;
        emulation::busy = true;
        run(call, Path::kResident);
        run(call, Path::kCluster);
        emulation::busy = false;
        emulation::device = 2;
        run(call, Path::kAuto);
      }
    }
  }
}

#else

// The GPU that is there.
void check_all(const std::string& extent) {
  using cuda::Path;
  check_all_returns(extent);
  for (const auto& call : calls(extent)) {
    for (Path wish : {Path::kTwoKernels, Path::kCluster, Path::kResident}) {
      run(call, wish);
    }
  }
  if (extent.empty()) {
    // In shared memory as well, and more than that.
    run({make("kept", 60000, 64)}, Path::kResident);
    run({make("more than fits", 150000, 64)}, Path::kResident);
    run({make("long", 60000, 20, Dtype::kBFloat16)}, Path::kAuto);
    run({make("no vectors", 30000, 257)}, Path::kAuto);
  }
}

#endif

}  // namespace

int main(int argc, char** argv) {
  int device = 0;
  if (const cudaError_t error = cuda::current_device(&device)) {
    std::printf("CUDA error %d: there is no GPU\n", static_cast<int>(error));
    return 2;
  }
  check_divisors();
  check_all(argc > 1 ? argv[1] : "");  // "small", "few" or all
  std::printf("paths taken: %d clusters, %d resident, %d two kernels\n", taken[1],
              taken[2], taken[3]);
  std::printf("%d differences\n", failures);
  return failures == 0 ? 0 : 1;
}
