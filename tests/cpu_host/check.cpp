// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CPU kernels on a team of std::thread, for ThreadSanitizer, which knows nothing of
// OpenMP's barrier: against sums in long double, and the same to the bit for every
// number of threads. Prints what differs; exits with 1 then.
//
//   check [--no-barrier]
//
// without the barrier between phases: ThreadSanitizer has to see that.

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/cpu/choice.h"
#include "csrc/cpu/isa.h"
#include "tests/cases.h"
#include "tests/returns_cases.h"

using namespace vecnorm;
namespace kernels = vecnorm::cpu::baseline;

namespace {

int team_size = 1;
bool with_barrier = true;
int teams = 0;  // that the calls have asked for

// As csrc/torch/team.cpp has it.
void run_phases(const std::vector<cpu::Phase>& phases, int64_t) {
  ++teams;
  std::barrier<> barrier(team_size);
  std::vector<std::thread> team;
  for (int rank = 0; rank < team_size; ++rank) {
    team.emplace_back([&, rank] {
      for (const cpu::Phase& phase : phases) {
        if (with_barrier && &phase != &phases.front()) {
          barrier.arrive_and_wait();
        }
        phase.body(phase.parts * rank / team_size,
                   phase.parts * (rank + 1) / team_size);
      }
    });
  }
  for (std::thread& thread : team) {
    thread.join();
  }
}

// On a thread that has no workspace yet: it gets one of the size that it asks for.
template <typename Call>
void alone(Call call) {
  std::thread(call).join();
}

using Bytes = std::vector<std::vector<unsigned char>>;

// Two updates of the keys of one call, each normalised once more, and the inverse.
Bytes run(const std::vector<Case>& cases) {
  constexpr double keep = 0.9;
  const Rule rule = cases[0].rule();
  constexpr double kExact = 1e-5;  // 128 rows at a time are summed in float
  random_bits.seed(7);
  Bytes result;
  std::vector<Buffers> all;
  for (const Case& c : cases) {
    all.emplace_back(c);
    all.back().c.name += ", " + std::to_string(team_size) + " threads";
  }
  for (int call = 0; call < 2; ++call) {
    std::vector<Key> keys;
    for (Buffers& b : all) {
      b.fill();
      b.expect(keep);
      keys.push_back(b.key());
    }
    alone([&] { kernels::update(keys, {keep, 1}, rule, run_phases); });
    for (Buffers& b : all) {
      b.compare(kExact);
      for (const auto* leaf : {&b.sum, &b.ssq, &b.count, &b.nonfinite}) {
        result.push_back(leaf->bytes());
      }
      result.push_back(b.y.bytes());
      std::fill_n(b.y.data(), b.bytes(b.out_dtype()), 0);
    }
    alone([&] { kernels::normalize(keys, rule, run_phases); });
    for (Buffers& b : all) {
      b.compare(kExact);
    }
  }
  for (Buffers& b : all) {
    b.compare_back([&](const Key& k) {
      alone([&] { kernels::denormalize({k}, rule, run_phases); });
    });
  }
  return result;
}

std::vector<std::vector<Case>> calls() {
  std::vector<std::vector<Case>> all;
  const auto one = [&](Case c) { all.push_back({c}); };
  // Some too small for a team; rows taken as one, of one pack, of some, of many, cut.
  for (const auto& [n, f] : std::vector<std::pair<int64_t, int64_t>>{{1, 1},
                                                                     {5, 3},
                                                                     {33, 64},
                                                                     {40000, 1},
                                                                     {11003, 3},
                                                                     {2200, 15},
                                                                     {600, 70},
                                                                     {90, 400},
                                                                     {8, 5001}}) {
    one(make("shape", n, f));
  }
  for (Dtype d :
       {Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kInt8, Dtype::kInt16,
        Dtype::kInt32, Dtype::kInt64, Dtype::kUInt8, Dtype::kBool}) {
    one(make("dtype", 1500, 23, d));
    one(make("dtype", 40, 5, d));
  }
  Case c = make("padded", 4100, 8);
  c.pad = 3;
  one(c);
  c.offset = 1;
  one(c);
  c = make("strided features", 3700, 9);
  c.feature_stride = 2;
  one(c);
  c = make("masked", 700, 64);
  c.masked = true;
  one(c);
  c.masked_out = 1e8;
  one(c);
  c.masked_out = 0;
  c.spoiled = 0.05;
  c.counted = false;
  one(c);
  c = make("spoiled", 2200, 17);
  c.spoiled = 0.1;
  one(c);
  c.counted = false;
  c.float_state = true;
  one(c);
  c = make("far from zero", 2800, 12);
  c.loc = 1e4;
  c.scale = 1;
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
  for (int k = 0; k < 12; ++k) {
    many.push_back(make("one of many", 20 + 90 * k, 1 + k * 7 % 70,
                        k % 3 == 1 ? Dtype::kBFloat16 : Dtype::kFloat32));
    many.back().masked = k % 4 == 2;
  }
  many.push_back(make("no samples", 0, 3));
  all.push_back(many);
  return all;
}

// Many calls of one size, `alone` and `together` seconds each. The seconds they take,
// and how many go together.
struct Machine {
  cpu::Choice choice;

  std::pair<double, int> run(int calls, double alone, double together) {
    double seconds = 0;
    int teams = 0;
    for (int i = 0; i < calls; ++i) {
      if (choice.together()) {
        choice.went_together(together, 1000, 2);
        seconds += together;
        ++teams;
      } else {
        choice.went_alone(alone, 1000);
        seconds += alone;
      }
    }
    return {seconds, teams};
  }
};

void expect(bool holds, const char* what) {
  if (!holds) {
    std::printf("choice: %s\n", what);
    ++failures;
  }
}

void check_choice() {
  constexpr int n = 10000;
  Machine m;
  expect(m.run(n, 90e-6, 50e-6).second == n, "a quiet machine always goes together");
  const auto [busy, tries] = m.run(n, 200e-6, 10e-3);
  expect(busy < 1.25 * n * 200e-6, "a busy one takes little more than alone");
  expect(tries > 10, "and goes on trying");
  m.run(n, 90e-6, 50e-6);
  expect(m.run(n, 90e-6, 50e-6).second == n, "a quiet one again goes together again");
  Machine never;
  expect(never.run(n, 90e-6, 100e-6).first < 1.03 * n * 100e-6,
         "a team that is never quicker costs little");
}

}  // namespace

int main(int argc, char** argv) {
  with_barrier = argc < 2 || std::string(argv[1]) != "--no-barrier";
  check_choice();
  for (const auto& call : calls()) {
    team_size = 1;
    const Bytes expected = run(call);
    team_size = 7;
    if (run(call) != expected) {
      std::printf("%s: other bits on a team\n", call[0].name.c_str());
      ++failures;
    }
  }
  for (const ReturnsCase& of : returns_cases(/*small=*/false)) {
    check_returns(of,
                  [](const Returns& r, Discount by, Weights weights, const Rule& rule) {
                    kernels::scale_returns(r, by, weights, rule, run_phases);
                  });
  }
  std::printf("%d teams\n%d differences\n", teams, failures);
  return failures == 0 ? 0 : 1;
}
