// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Statistics in shared memory (csrc/shared) among processes that are killed:
//
//   check crash [few]               killed at every crash point, and in the recovery
//   check identity                  a lock is held: copies, restarts; damaged files
//   check soak KILLS [--no-journal] killed at any time
//   check contend PROCESSES UPDATES
//   check threads
//   check cost
//
// The first two need -DVECNORM_CRASH_POINTS, `identity` also
// -DVECNORM_BOOT_ID='"boot_id"'; -DVECNORM_RECORD_LOCK takes the lock of systems
// without robust mutexes. An update adds known whole numbers to every word, so each
// word says how many updates there were, and all have to say the same. Files are made
// in the current directory. Exits with 1 where something is wrong, with 3 where it is
// that `soak` found statistics of half an update.

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "csrc/shared/control.h"
#include "csrc/shared/identity.h"
#include "csrc/shared/lock.h"

using vecnorm::shared::Control;
using vecnorm::shared::Entry;

namespace {

constexpr int kKeys = 3;
constexpr int kFeatures = 512;
constexpr int kWorkers = 4;
constexpr int kPoints = 12;       // of control.cpp, in an update
constexpr int kAttachPoint = 13;  // where the lock of a copy is made anew
constexpr int kPoint = 14;        // between the writes to the entries themselves
#ifdef VECNORM_ROBUST_MUTEX
constexpr int kOtherLockPoint = 0;
#else
constexpr int kOtherLockPoint = 2;  // where a lock tells that its owner has died
#endif
// From here on the update has happened: by commit(), and where the entries are.
constexpr int kCommitPoint = 6;
constexpr int kEndPoint = 12;
// Seconds that no wait should take: for others that work, and for nobody.
constexpr double kLong = 10;
constexpr double kShort = 0.2;
const char kNote[] = "note of 17 bytes.";

int failures = 0;

void fail(const std::string& what) {
  if (++failures < 20) {
    std::printf("%s\n", what.c_str());
  }
}

void require(bool good, const char* what) {
  if (!good) {
    std::perror(what);
    std::exit(2);
  }
}

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

// What the processes tell each other, apart from what is tested.
struct Notes {
  std::atomic<long> hits[kPoint + 1];  // deaths at each point
  std::atomic<long> commits;
  std::atomic<bool> held;
  std::atomic<bool> go_on;  // those that stay somewhere
  std::atomic<bool> attached;
  std::atomic<bool> stop;
  std::atomic<long> torn, timeouts, checked;
  struct Slot {
    std::atomic<long> finished;
    std::atomic<int> phase;  // 0, 1 with the lock, 2 in commit()
  } slots[kWorkers];
};

Notes* notes;

// Of this process: it dies after this many crash points, or stays there.
long points_left = -1;
bool stays = false;
bool in_place = false;  // how it updates

}  // namespace

extern "C" void vecnorm_crash_point(int point) {
  if (point == (in_place ? kEndPoint : kCommitPoint)) {
    ++notes->commits;
  }
  if (points_left < 0 || points_left-- > 0) {
    return;
  }
  ++notes->hits[point];
  if (stays) {
    notes->held = true;
    while (!notes->go_on) {
      usleep(100);
    }
    return;
  }
  raise(SIGKILL);
}

namespace {

// How an update is written: by commit(), to the entries themselves between begin() and
// end(), or to them and nothing else.
enum class How { kCommit, kInPlace, kBare };

struct Statistics {
  struct Key {
    double sum[kFeatures];
    double ssq[kFeatures];
    double count;
  } keys[kKeys];
  uint32_t steps[3];  // no multiple of 8 bytes
};

// What `n` updates make of zeros.
Statistics after(long n) {
  Statistics s;
  for (int k = 0; k < kKeys; ++k) {
    for (int f = 0; f < kFeatures; ++f) {
      s.keys[k].sum[f] = static_cast<double>(n * (k + 1) * (f + 1));
      s.keys[k].ssq[f] = static_cast<double>(n * (k + 2) * (f + 3) * (f + 3));
    }
    s.keys[k].count = static_cast<double>(n * (k + 1));
  }
  for (uint32_t i = 0; i < 3; ++i) {
    s.steps[i] = static_cast<uint32_t>(n) * (i + 1);
  }
  return s;
}

void add_one(Statistics& s) {
  for (int k = 0; k < kKeys; ++k) {
    for (int f = 0; f < kFeatures; ++f) {
      s.keys[k].sum[f] += (k + 1) * (f + 1);
      s.keys[k].ssq[f] += (k + 2) * (f + 3) * (f + 3);
    }
    s.keys[k].count += k + 1;
  }
  for (uint32_t i = 0; i < 3; ++i) {
    s.steps[i] += i + 1;
  }
}

// The number of updates, or -1 where the words do not agree about it.
long updates_in(const Statistics& s) {
  const auto n = static_cast<long>(s.keys[0].count);
  const Statistics whole = after(n);
  bool same = true;
  for (int k = 0; k < kKeys; ++k) {
    same = same && s.keys[k].count == whole.keys[k].count;
    for (int f = 0; f < kFeatures; ++f) {
      same = same && s.keys[k].sum[f] == whole.keys[k].sum[f] &&
             s.keys[k].ssq[f] == whole.keys[k].ssq[f];
    }
  }
  for (int i = 0; i < 3; ++i) {
    same = same && s.steps[i] == whole.steps[i];
  }
  return same ? n : -1;
}

std::vector<Entry> entries_of(Statistics* s) {
  std::vector<Entry> entries;
  for (int k = 0; k < kKeys; ++k) {
    Statistics::Key& key = s->keys[k];
    const std::string name = "key " + std::to_string(k);
    entries.push_back({name + " sum", key.sum, sizeof(key.sum)});
    entries.push_back({name + " ssq", key.ssq, sizeof(key.ssq)});
    entries.push_back({name + " count", &key.count, sizeof(key.count)});
  }
  entries.push_back({"steps", s->steps, sizeof(s->steps)});
  return entries;
}

size_t block_bytes() {
  static Statistics any;
  return Control::size_for(entries_of(&any), kNote);
}

size_t offset_of_statistics() { return (block_bytes() + 63) / 64 * 64; }
size_t memory_bytes() { return offset_of_statistics() + sizeof(Statistics); }

Statistics* statistics_at(void* memory) {
  return reinterpret_cast<Statistics*>(static_cast<char*>(memory) +
                                       offset_of_statistics());
}

void init(void* memory) {
  Control::init(memory, block_bytes(), kNote);
  *statistics_at(memory) = after(0);
}

// A named file, or without a name memory of the kernel.
class Memory {
 public:
  explicit Memory(const std::string& file, bool fresh = true) : file_(file) {
    fd_ = file.empty() ? memfd_create("statistics", 0)
                       : open(file.c_str(), O_RDWR | (fresh ? O_CREAT | O_TRUNC : 0),
                              S_IRUSR | S_IWUSR);
    require(fd_ >= 0, "open");
    if (fresh) {
      require(ftruncate(fd_, static_cast<off_t>(memory_bytes())) == 0, "ftruncate");
      void* memory = map();
      init(memory);
      munmap(memory, memory_bytes());
    }
  }
  ~Memory() {
    close(fd_);
    if (!file_.empty()) {
      unlink(file_.c_str());
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Somewhere else each time.
  void* map() const {
    void* memory =
        mmap(nullptr, memory_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    require(memory != MAP_FAILED, "mmap");
    return memory;
  }
  const std::string& file() const { return file_; }

 private:
  std::string file_;
  int fd_;
};

// Who shares the statistics: a process, or a thread.
class Member {
 public:
  explicit Member(void* memory)
      : shared_(statistics_at(memory)),
        control_(memory, block_bytes(), entries_of(shared_)) {
    for (const Entry& entry : entries_of(&mine_)) {
      values_.push_back(entry.data);
    }
  }
  explicit Member(const Memory& memory) : Member(memory.map()) { mapped_ = true; }
  ~Member() {
    if (mapped_) {
      munmap(reinterpret_cast<char*>(shared_) - offset_of_statistics(), memory_bytes());
    }
  }
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  Control& control() { return control_; }
  Statistics* shared() { return shared_; }

  // With the lock held.
  long look() {
    mine_ = *shared_;
    return updates_in(mine_);
  }
  void write(How how = How::kCommit) {
    in_place = how == How::kInPlace;
    mine_ = *shared_;
    add_one(mine_);
    if (how == How::kCommit) {
      control_.commit(values_);
      return;
    }
    if (how == How::kInPlace && !control_.begin()) {
      fail("no room in the journal");
    }
    const std::vector<Entry> entries = entries_of(shared_);
    for (size_t i = 0; i < entries.size(); ++i) {
      std::memcpy(entries[i].data, values_[i], entries[i].bytes);
      vecnorm_crash_point(kPoint);
    }
    if (how == How::kInPlace) {
      control_.end();
    }
  }

  bool update(How how = How::kCommit) {
    if (!control_.lock(kLong)) {
      return false;
    }
    write(how);
    control_.unlock();
    return true;
  }
  // The number of updates; -1 torn, -2 no lock.
  long count() {
    if (!control_.lock(kLong)) {
      return -2;
    }
    const long n = look();
    control_.unlock();
    return n;
  }

 private:
  Statistics* shared_;
  Control control_;
  Statistics mine_;
  std::vector<const void*> values_;
  bool mapped_ = false;
};

// `body` in a process of its own, which ends with this one.
template <typename Body>
pid_t start(Body body) {
  std::fflush(stdout);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  require(pid >= 0, "fork");
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int status = 2;
    if (getppid() == parent) {
      try {
        status = body();
      } catch (const std::exception& error) {
        std::printf("in a child: %s\n", error.what());
        std::fflush(stdout);
      }
    }
    _exit(status);
  }
  return pid;
}

int wait_for(pid_t pid) {
  int status = 0;
  require(waitpid(pid, &status, 0) == pid, "waitpid");
  return status;
}

// A process that updates, and dies after `points` crash points; false if it did not get
// that far.
bool dies(const Memory& memory, long points, How how) {
  const int status = wait_for(start([&] {
    Member member(memory);
    points_left = points;
    return member.update(how) ? 0 : 4;
  }));
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
    return true;
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    fail("a child ended with status " + std::to_string(status));
  }
  return false;
}

// What the next finds when a process has died at a point, and perhaps another one in
// the recovery from that or in the update after it: what was committed, and nothing
// else.
void crash(const std::string& file, How how, How others) {
  const Memory memory(file);
  Member next(memory);
  long deaths = 0;
  double longest = 0;
  for (long first = 0;; ++first) {
    bool first_died = true;
    bool second_died = true;
    for (long second = -1; first_died && second_died; ++second) {
      const long before = next.count();
      notes->commits = 0;
      first_died = dies(memory, first, how);
      if (first_died && second >= 0) {
        second_died = dies(memory, second, others);
      }
      deaths += first_died + (second >= 0 && first_died && second_died);
      const std::string where =
          "point " + std::to_string(first) + ", then " + std::to_string(second) + ": ";
      const double begin = now();
      if (!next.control().lock(kLong)) {
        fail(where + "the lock is lost");
        return;
      }
      longest = std::max(longest, now() - begin);
      const long expected = before + notes->commits;
      long found = next.look();
      if (found != expected) {
        fail(where + std::to_string(found) + " updates, not " +
             std::to_string(expected));
        *next.shared() = after(expected);
      }
      next.write(others);
      next.control().unlock();
      found = next.count();
      if (found != expected + 1) {
        fail(where + "then " + std::to_string(found) + " updates, not " +
             std::to_string(expected + 1));
        return;
      }
    }
    if (!first_died) {
      break;
    }
  }
  std::printf("%s: %ld deaths, the lock came within %.2f ms\n",
              file.empty() ? "memory" : "file", deaths, 1e3 * longest);
}

int crash_all(bool few) {
  crash("", How::kCommit, How::kInPlace);
  crash("", How::kInPlace, How::kCommit);
  if (!few) {
    crash("", How::kInPlace, How::kInPlace);
    crash("statistics", How::kCommit, How::kCommit);
  }
  std::printf("deaths at points 1 to %d:", kPoints);
  for (int point = 1; point <= kPoints; ++point) {
    std::printf(" %ld", notes->hits[point].load());
    if (notes->hits[point] == 0 && point != kOtherLockPoint) {
      fail("\npoint " + std::to_string(point) + " was never reached");
    }
  }
  std::printf("\n");
  // The same without a journal leaves half an update behind: this would be seen.
  const Memory memory("");
  Member next(memory);
  long torn = 0;
  long deaths = 0;
  while (dies(memory, deaths, How::kBare)) {
    ++deaths;
    torn += next.count() == -1;
    *next.shared() = after(0);
  }
  std::printf("without a journal: %ld of %ld deaths leave half an update\n", torn,
              deaths);
  if (torn == 0) {
    fail("half an update was not seen");
  }
  return failures == 0 ? 0 : 1;
}

int work(const Memory& memory, int index, bool journal) {
  Notes::Slot& slot = notes->slots[index];
  Member member(memory);
  while (!notes->stop) {
    if (!member.control().lock(kLong)) {
      ++notes->timeouts;
      return 4;
    }
    slot.phase = 1;
    if (member.look() < 0) {
      ++notes->torn;
    }
    slot.phase = 2;
    // By turns, so that each finds what the other has left.
    const auto one = slot.finished % 2 == 0 ? How::kCommit : How::kInPlace;
    member.write(journal ? one : How::kBare);
    slot.phase = 0;
    member.control().unlock();
    ++slot.finished;
  }
  return 0;
}

int read(const Memory& memory) {
  Member member(memory);
  while (!notes->stop) {
    const long n = member.count();
    notes->torn += n == -1;
    notes->timeouts += n == -2;
    ++notes->checked;
  }
  return 0;
}

int soak(long wanted, bool journal) {
  const Memory memory("");
  Member next(memory);
  pid_t workers[kWorkers];
  const auto start_worker = [&](int i) {
    workers[i] = start([&] { return work(memory, i, journal); });
  };
  for (int i = 0; i < kWorkers; ++i) {
    start_worker(i);
  }
  const pid_t reader = start([&] { return read(memory); });
  std::mt19937 random_bits(7);
  long kills = 0;
  long inside[3] = {0, 0, 0};
  std::vector<double> waits;
  while (kills < wanted && notes->torn == 0 && notes->timeouts == 0) {
    usleep(random_bits() % 4000);
    const int victim = static_cast<int>(random_bits() % kWorkers);
    // Most moments are outside of the lock: every other kill is aimed inside of it.
    const std::atomic<int>& phase = notes->slots[victim].phase;
    const int aim = 1 + static_cast<int>(random_bits() % 2);
    const double give_up = now() + 2e-3;
    while (kills % 2 == 1 && phase != aim && now() < give_up) {
    }
    const double begin = now();
    kill(workers[victim], SIGKILL);
    const int status = wait_for(workers[victim]);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
      fail("a worker ended with status " + std::to_string(status));
    }
    ++kills;
    ++inside[notes->slots[victim].phase.exchange(0)];
    const long found = next.count();
    waits.push_back(now() - begin);
    notes->torn += found == -1;
    notes->timeouts += found == -2;
    start_worker(victim);
  }
  notes->stop = true;
  for (pid_t pid : workers) {
    wait_for(pid);
  }
  if (wait_for(reader) != 0) {
    fail("the reader failed");
  }
  long finished = 0;
  for (const Notes::Slot& slot : notes->slots) {
    finished += slot.finished;
  }
  const long found = next.count();
  std::printf("%ld kills, of them %ld with the lock and %ld more in a commit\n", kills,
              inside[1], inside[2]);
  std::sort(waits.begin(), waits.end());
  const auto milliseconds = [&](double share) {
    return waits.empty() ? 0.
                         : 1e3 * waits[static_cast<size_t>(
                                     share * static_cast<double>(waits.size() - 1))];
  };
  std::printf(
      "ms from a kill to the next with the lock: %.3f median, %.3f of 99 %%, "
      "%.3f at most\n",
      milliseconds(0.5), milliseconds(0.99), milliseconds(1));
  std::printf("%ld updates, %ld of them finished; %ld reads\n", found, finished,
              notes->checked.load());
  if (notes->timeouts > 0) {
    fail("the lock is lost");
    return 1;
  }
  if (notes->torn > 0 || found < 0) {
    std::printf("half an update was seen\n");
    return 3;
  }
  if (found < finished || found > finished + kills) {
    fail("updates were lost, or done twice");
  }
  if (finished == 0 || notes->checked == 0) {
    fail("nothing was done");
  }
  return failures == 0 ? 0 : 1;
}

int contend(int processes, long updates) {
  const Memory memory("");
  const double begin = now();
  std::vector<pid_t> pids;
  for (int i = 0; i < processes; ++i) {
    pids.push_back(start([&] {
      Member member(memory);
      for (long n = 0; n < updates; ++n) {
        if (!member.update()) {
          return 4;
        }
      }
      return 0;
    }));
  }
  for (pid_t pid : pids) {
    if (wait_for(pid) != 0) {
      fail("a child failed");
    }
  }
  const long found = Member(memory).count();
  std::printf("%ld updates of %d processes, %.0f ns each\n", found, processes,
              1e9 * (now() - begin) / static_cast<double>(processes * updates));
  if (found != processes * updates) {
    fail("updates were lost");
  }
  return failures == 0 ? 0 : 1;
}

// Each with a Control of its own, for ThreadSanitizer.
int threads() {
  constexpr int kThreads = 4;
  constexpr long kUpdates = 2000;
  const Memory memory("");
  void* mapped = memory.map();
  std::atomic<int> writing(kThreads);
  std::atomic<int> bad(0);
  std::vector<std::thread> all;
  for (int i = 0; i < kThreads; ++i) {
    all.emplace_back([&] {
      Member member(mapped);
      for (long n = 0; n < kUpdates; ++n) {
        bad += !member.update();
      }
      --writing;
    });
  }
  all.emplace_back([&] {
    Member member(mapped);
    while (writing > 0) {
      bad += member.count() < 0;
    }
  });
  // Without the lock: whole words, and none goes back.
  all.emplace_back([&] {
    Statistics* shared = statistics_at(mapped);
    double last[kKeys][kFeatures] = {};
    while (writing > 0) {
      for (int k = 0; k < kKeys; ++k) {
        for (int f = 0; f < kFeatures; ++f) {
          double value;
          __atomic_load(&shared->keys[k].sum[f], &value, __ATOMIC_RELAXED);
          const double n = value / ((k + 1) * (f + 1));
          bad += value < last[k][f] || n != static_cast<double>(static_cast<long>(n));
          last[k][f] = value;
        }
      }
    }
  });
  for (std::thread& thread : all) {
    thread.join();
  }
  const long found = Member(mapped).count();
  std::printf("%ld updates of %d threads\n", found, kThreads);
  if (found != kThreads * kUpdates || bad != 0) {
    fail("updates were lost, or words were seen in halves");
  }
  munmap(mapped, memory_bytes());
  return failures == 0 ? 0 : 1;
}

void copy_file(const std::string& from, const std::string& to) {
  std::vector<char> bytes(memory_bytes());
  const int in = open(from.c_str(), O_RDONLY);
  const int out = open(to.c_str(), O_WRONLY | O_CREAT | O_EXCL, S_IRUSR | S_IWUSR);
  const auto size = static_cast<ssize_t>(bytes.size());
  require(in >= 0 && out >= 0, "open");
  require(pread(in, bytes.data(), bytes.size(), 0) == size, "read");
  require(pwrite(out, bytes.data(), bytes.size(), 0) == size, "write");
  close(in);
  close(out);
}

// Another process finds the lock taken, also by another name of the file.
void expect_locked(const Memory& memory, const char* link, const std::string& where) {
  for (const std::string& name : {memory.file(), std::string(link)}) {
    const int status = wait_for(start([&] {
      const int fd = open(name.c_str(), O_RDWR);
      Member member(
          mmap(nullptr, memory_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
      return member.control().try_lock() || member.control().lock(0.003);
    }));
    if (status != 0) {
      fail(where + "a lock was broken that is held");
    }
  }
}

// Until it is so, or a child has ended without.
template <typename Condition>
void await(pid_t child, const Condition& is_so) {
  siginfo_t ended;
  ended.si_pid = 0;
  while (!is_so() && ended.si_pid == 0) {
    require(waitid(P_PID, static_cast<id_t>(child), &ended,
                   WEXITED | WNOHANG | WNOWAIT) == 0,
            "waitid");
    usleep(100);
  }
}

// Until a child waits for something, or has ended.
void await_sleep(pid_t child) {
  const std::string file = "/proc/" + std::to_string(child) + "/stat";
  for (char state = 'R'; state != 'S' && state != 'Z'; usleep(100)) {
    std::FILE* stat = std::fopen(file.c_str(), "r");
    require(stat != nullptr && std::fscanf(stat, "%*d (%*[^)]) %c", &state) == 1,
            "/proc");
    std::fclose(stat);
  }
}

// The lock of a file is held, at each crash point of an update.
void copies() {
  const Memory memory("statistics");
  require(symlink("statistics", "link") == 0, "symlink");
  Member next(memory);
  double longest = 0;
  long count = 0;
  for (;; ++count) {
    const std::string where = "point " + std::to_string(count) + ": ";
    const long before = next.count();
    notes->commits = 0;
    notes->held = false;
    const pid_t holder = start([&] {
      Member member(memory);
      points_left = count;
      stays = true;
      return member.update() ? 0 : 4;
    });
    await(holder, [] { return notes->held.load(); });
    if (!notes->held) {  // past the last point
      require(wait_for(holder) == 0, "the holder failed");
      break;
    }
    const long expected = before + notes->commits;
    expect_locked(memory, "link", where);
    copy_file("statistics", "copy");
    {
      const Memory copy("copy", false);
      Member member(copy);
      const double begin = now();
      if (!member.control().lock(kShort)) {
        fail(where + "a copy cannot be locked");
        kill(holder, SIGKILL);
        break;
      }
      longest = std::max(longest, now() - begin);
      expect_locked(copy, "copy", where);
      if (member.look() != expected) {
        fail(where + "a copy has other statistics");
      }
      member.write();
      member.control().unlock();
      if (Member(copy).count() != expected + 1) {
        fail(where + "a copy has other statistics after an update");
      }
    }
    expect_locked(memory, "link", where);
    kill(holder, SIGKILL);
    wait_for(holder);
    if (next.count() != expected) {
      fail(where + "the original has changed");
    }
  }
  unlink("link");
  std::printf("%ld copies, their locks came within %.2f ms\n", count, 1e3 * longest);
  if (count == 0) {
    fail("no lock was held");
  }
}

// What the kernel is asked for in this build.
void start_machine_anew() {
  static int times = 0;
  const std::string id = "boot " + std::to_string(++times);
  const int file = open("boot_id", O_WRONLY | O_CREAT | O_TRUNC, S_IRUSR | S_IWUSR);
  const auto size = static_cast<ssize_t>(id.size());
  require(file >= 0 && write(file, id.data(), id.size()) == size, "boot_id");
  close(file);
}

// A file outlives the machine's start; its lock, held at some crash points, does not.
void started_anew() {
  const Memory memory("statistics");
  long count = 0;
  for (;; count += 6) {
    const std::string where = "started anew, point " + std::to_string(count) + ": ";
    const long before = Member(memory).count();
    notes->commits = 0;
    notes->held = false;
    const pid_t holder = start([&] {
      Member member(memory);
      points_left = count;
      stays = true;
      return member.update() ? 0 : 4;
    });
    await(holder, [] { return notes->held.load(); });
    if (!notes->held) {  // past the last point
      require(wait_for(holder) == 0, "the holder failed");
      break;
    }
    expect_locked(memory, "statistics", where);
    start_machine_anew();
    const long expected = before + notes->commits;
    Member member(memory);
    const bool free = member.control().try_lock();
    if (!free) {
      fail(where + "the lock is still held");
    } else {
      expect_locked(memory, "statistics", where);
      if (member.look() != expected) {
        fail(where + "the statistics are others");
      }
      member.control().unlock();
    }
    kill(holder, SIGKILL);
    wait_for(holder);
    if (!free) {
      return;
    }
  }
  if (count == 0) {
    fail("no lock was held");
  }
}

// Who makes the lock of a copy anew dies, or another one comes meanwhile.
void attaching() {
  const Memory memory("statistics");
  notes->held = false;
  const pid_t holder = start([&] {
    Member member(memory);
    points_left = 0;
    stays = true;
    return member.update() ? 0 : 4;
  });
  await(holder, [] { return notes->held.load(); });
  const auto attach = [](const Memory& copy, bool stay) {
    return start([&copy, stay] {
      points_left = 0;
      stays = stay;
      Member member(copy);
      const bool taken = member.control().try_lock();
      for (notes->held = true; taken;) {
        pause();
      }
      return 4;
    });
  };

  for (const char* name : {"first", "second"}) {
    copy_file("statistics", name);
  }
  {
    const Memory copy("first", false);
    const int status = wait_for(attach(copy, false));
    if (!WIFSIGNALED(status) || notes->hits[kAttachPoint] == 0) {
      fail("nobody died when the lock of a copy was made anew");
    }
    Member next(copy);
    if (!next.control().try_lock()) {
      fail("a copy cannot be locked: who made its lock anew has died");
    } else {
      next.control().unlock();
    }
  }

  kill(holder, SIGKILL);
  wait_for(holder);
  {
    const Memory copy("second", false);
    notes->held = false;
    notes->attached = false;
    const pid_t first = attach(copy, true);
    await(first, [] { return notes->held.load(); });
    const pid_t second = start([&] {
      Member member(copy);
      notes->attached = true;
      return member.control().try_lock() ? 4 : 0;
    });
    // It waits, or it has made the lock anew too. Let it do nothing more for now.
    await_sleep(second);
    if (notes->attached) {
      fail("two make the lock of a copy anew at once");
    }
    kill(second, SIGSTOP);
    notes->held = false;
    notes->go_on = true;
    await(first, [] { return notes->held.load(); });
    kill(second, SIGCONT);
    if (wait_for(second) != 0) {
      fail("the lock of a copy was made anew when somebody had it");
    }
    kill(first, SIGKILL);
    wait_for(first);
  }
  notes->go_on = false;
}

// A fork copies private memory.
void private_memory() {
  void* memory = mmap(nullptr, memory_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require(memory != MAP_FAILED, "mmap");
  init(memory);
  Member member(memory);
  if (!member.control().lock(kLong)) {
    fail("private memory cannot be locked");
  }
  if (Member(memory).control().try_lock()) {
    fail("a lock of private memory was broken");
  }
  const int status = wait_for(start([&] {
    Member copy(memory);
    if (!copy.control().lock(kShort)) {
      return 4;
    }
    copy.write();
    return 0;
  }));
  if (status != 0) {
    fail("a fork's copy cannot be locked");
  }
  if (member.look() != 0) {
    fail("a fork's copy is not its own");
  }
  member.control().unlock();
  munmap(memory, memory_bytes());
}

// `bytes` of a block, the word at `changed` another one.
bool attaches(const std::vector<char>& block, size_t bytes, int changed = -1) {
  // Of just this size, for AddressSanitizer.
  const std::unique_ptr<char[]> memory(new char[bytes]);
  std::memcpy(memory.get(), block.data(), bytes);
  if (changed >= 0) {
    memory[static_cast<size_t>(changed) * 8] ^= 1;
  }
  Statistics statistics = after(0);
  try {
    Control control(memory.get(), bytes, entries_of(&statistics));
    return control.note() == kNote;
  } catch (const std::runtime_error&) {
    return false;
  }
}

void damaged() {
  std::vector<char> block(block_bytes());
  Control::init(block.data(), block.size(), kNote);
  if (!attaches(block, block.size())) {
    fail("a whole block is not accepted");
  }
  for (size_t bytes = 0; bytes < block.size(); ++bytes) {
    if (attaches(block, bytes)) {
      fail("a block cut to " + std::to_string(bytes) + " bytes is accepted");
    }
  }
  for (int word : {0, 1, 2}) {  // magic, byte order, kind of lock
    if (attaches(block, block.size(), word)) {
      fail("a block with another word " + std::to_string(word) + " is accepted");
    }
  }
  std::fill(block.begin(), block.end(), 0);
  if (attaches(block, block.size())) {
    fail("zeros are accepted");
  }
}

// A child is somebody else, also when it is forked with the lock held.
void forked() {
  const Memory memory("");
  Member member(memory);
  if (!member.control().lock(kLong)) {
    fail("a lock cannot be taken");
  }
  notes->held = false;
  const pid_t child = start([&] {
    if (member.control().try_lock()) {
      return 4;
    }
    notes->held = true;
    return member.count() == 0 ? 0 : 5;
  });
  await(child, [] { return notes->held.load(); });
  member.control().unlock();
  if (wait_for(child) != 0) {
    fail("a child that was forked with the lock held cannot wait for it");
  }
}

// Of a program that is started afresh: takes the lock and keeps it.
int hold() {
  const Memory memory("statistics", false);
  Member member(memory);
  if (!member.control().lock(kShort)) {
    return 4;
  }
  close(open("held", O_WRONLY | O_CREAT, S_IRUSR));
  for (;;) {
    pause();
  }
}

// The file of record locks is removed, by whoever tidies up /tmp, while members have it
// open: all have to meet again in a new one.
void removed_file() {
  const Memory memory("statistics");
  Member member(memory);
  if (member.count() != 0) {
    fail("a lock cannot be taken");
  }
  unlink(vecnorm::shared::lock_file(".locks").c_str());
  const pid_t holder = start([] {
    execl("/proc/self/exe", "check", "hold", nullptr);
    return 5;
  });
  await(holder, [] { return access("held", F_OK) == 0; });
  if (unlink("held") != 0 || member.control().try_lock()) {
    fail("two have the lock after its file was removed");
  }
  kill(holder, SIGKILL);
  wait_for(holder);
  if (member.count() != 0) {
    fail("the lock is lost with its file");
  }
}

int identity() {
#ifndef VECNORM_BOOT_ID
  fail("compile it with -DVECNORM_BOOT_ID");
#endif
  copies();
  started_anew();
  attaching();
  forked();
  removed_file();
  private_memory();
  damaged();
  return failures == 0 ? 0 : 1;
}

template <typename Body>
void time_of(const char* what, Body body) {
  constexpr int kTimes = 200000;
  double best = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const double begin = now();
    for (int i = 0; i < kTimes; ++i) {
      body();
    }
    best = std::min(best, (now() - begin) / kTimes);
  }
  std::printf("%-24s %6.0f ns\n", what, 1e9 * best);
}

// One key of 64 features, and nobody else.
int cost() {
  constexpr size_t kF = 64;
  std::vector<double> sum(kF), ssq(kF), count(1), nonfinite(2 * kF);
  std::vector<Entry> entries;
  std::vector<const void*> values;
  std::vector<std::vector<double>> changed;
  for (auto* leaf : {&sum, &ssq, &count, &nonfinite}) {
    changed.emplace_back(leaf->size(), 1);
    entries.push_back({"leaf " + std::to_string(entries.size()), leaf->data(),
                       leaf->size() * sizeof(double)});
  }
  for (const auto& leaf : changed) {
    values.push_back(leaf.data());
  }
  const size_t bytes = Control::size_for(entries, kNote);
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  require(memory != MAP_FAILED, "mmap");
  Control::init(memory, bytes, kNote);
  Control control(memory, bytes, entries);
  time_of("lock, unlock", [&] {
    control.lock(kLong);
    control.unlock();
  });
  time_of("try_lock, unlock", [&] {
    control.try_lock();
    control.unlock();
  });
  time_of("lock, commit, unlock", [&] {
    control.lock(kLong);
    control.commit(values);
    control.unlock();
  });
  munmap(memory, bytes);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  void* memory = mmap(nullptr, sizeof(Notes), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  require(memory != MAP_FAILED, "mmap");
  notes = new (memory) Notes();
  const std::string what = args.empty() ? "" : args[0];
#ifdef VECNORM_BOOT_ID
  if (what != "hold") {
    start_machine_anew();
  }
#endif
  if (what == "crash") {
    return crash_all(args.back() == "few");
  }
  if (what == "identity") {
    return identity();
  }
  if (what == "hold") {
    return hold();
  }
  if (what == "soak" && args.size() >= 2) {
    return soak(std::stol(args[1]), args.back() != "--no-journal");
  }
  if (what == "contend" && args.size() == 3) {
    return contend(std::stoi(args[1]), std::stol(args[2]));
  }
  if (what == "threads") {
    return threads();
  }
  if (what == "cost") {
    return cost();
  }
  std::printf("see the top of check.cpp\n");
  return 2;
}
