// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "control.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "identity.h"
#include "lock.h"

// Tests kill the process at numbered points.
#ifdef VECNORM_CRASH_POINTS
extern "C" void vecnorm_crash_point(int point);
#define VECNORM_CRASH(point) vecnorm_crash_point(point)
#else
#define VECNORM_CRASH(point)
#endif

namespace vecnorm {
namespace shared {

// Changes with the layout below.
constexpr uint64_t kMagic = 0x76656e6f726d0003u;
constexpr uint64_t kByteOrder = 0x0102030405060708u;

enum State : uint64_t { kClean = 0, kCommitted = 1, kReplaced = 2 };

// What follows it in memory: the note, then the journal, a sequence of records.
struct Control::Header {
  uint64_t magic;
  uint64_t byte_order;
  uint64_t lock_kind;
  std::atomic<uint64_t> identity;
  uint64_t note_bytes;
  uint64_t journal_offset;
  uint64_t journal_bytes;
  std::atomic<uint64_t> used;  // bytes of the journal
  std::atomic<uint64_t> state;
  std::atomic<int64_t> owner;
  Lock lock;

  char* note() { return reinterpret_cast<char*>(this + 1); }
  char* journal() { return reinterpret_cast<char*>(this) + journal_offset; }
};

namespace {

// A record of the journal: this, then `bytes` of contents, rounded up to 8.
struct Record {
  uint64_t name;
  uint64_t bytes;
};

constexpr size_t up_to_8(size_t n) { return (n + 7) / 8 * 8; }

// Bytes of the journal that entries take.
size_t records_of(const std::vector<Entry>& entries) {
  size_t bytes = 0;
  for (const Entry& entry : entries) {
    bytes += sizeof(Record) + up_to_8(entry.bytes);
  }
  return bytes;
}

// Words one by one: others may look at the entries while they are written, and none of
// them should be seen in halves.
template <typename Word>
void copy_words(void* to, const void* from, size_t bytes) {
  auto* out = static_cast<Word*>(to);
  const auto* in = static_cast<const Word*>(from);
  const auto copy_word = [](Word* to, const Word* from) {
    __atomic_store_n(to, __atomic_load_n(from, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
  };
  const Word* const end = in + bytes / sizeof(Word);
  // A loop of single words takes twice the time.
  for (; end - in >= 4; in += 4, out += 4) {
    copy_word(out, in);
    copy_word(out + 1, in + 1);
    copy_word(out + 2, in + 2);
    copy_word(out + 3, in + 3);
  }
  for (; in != end; ++in, ++out) {
    copy_word(out, in);
  }
}

void copy(void* to, const void* from, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (at % 8 == 0 && bytes % 8 == 0) {
    copy_words<uint64_t>(to, from, bytes);
  } else {
    copy_words<uint32_t>(to, from, bytes);
  }
}

// Into memory that nobody reads meanwhile. What is there already, as counters that
// rarely change, is not written again.
void keep(char* to, const char* from, size_t bytes) {
  constexpr size_t kBlock = 4096;
  for (size_t at = 0; at < bytes; at += kBlock) {
    const size_t n = std::min(kBlock, bytes - at);
    if (std::memcmp(to + at, from + at, n) != 0) {
      std::memcpy(to + at, from + at, n);
    }
  }
}

// getpid() is a system call: twice what the mutex costs.
int64_t process() {
  static std::atomic<int64_t> pid{[] {
    pthread_atfork(nullptr, nullptr, [] { pid.store(getpid()); });
    return getpid();
  }()};
  return pid.load(std::memory_order_relaxed);
}

}  // namespace

size_t Control::size_for(const std::vector<Entry>& entries, const std::string& note) {
  return sizeof(Header) + up_to_8(note.size()) + records_of(entries);
}

void Control::init(void* memory, size_t bytes, const std::string& note) {
  auto* header = new (memory) Header;
  header->byte_order = kByteOrder;
  header->lock_kind = Lock::kind();
  header->note_bytes = note.size();
  header->journal_offset = sizeof(Header) + up_to_8(note.size());
  header->journal_bytes = bytes - header->journal_offset;
  header->used = 0;
  header->state = kClean;
  header->owner = 0;
  std::memcpy(header->note(), note.data(), note.size());
  header->lock.init();
  header->identity = identity_of(memory);
  header->magic = kMagic;
}

Control::Control(void* memory, size_t bytes, std::vector<Entry> entries)
    : header_(static_cast<Header*>(memory)),
      entries_(std::move(entries)),
      needed_(records_of(entries_)) {
  for (const Entry& entry : entries_) {
    names_.push_back(hash_of(entry.name));
  }
  const auto expect = [](bool good, const char* what) {
    if (!good) {
      throw std::runtime_error(what);
    }
  };
  expect(bytes >= sizeof(Header) && header_->magic == kMagic,
         "the tensor holds no lock of this version of torchrl_vecnorm; is it "
         "another file, or was it truncated?");
  expect(header_->byte_order == kByteOrder && header_->lock_kind == Lock::kind(),
         "the lock was made on another kind of machine, or by a build of "
         "torchrl_vecnorm with another kind of lock");
  expect(header_->journal_offset == sizeof(Header) + up_to_8(header_->note_bytes) &&
             header_->journal_offset <= bytes &&
             header_->journal_bytes <= bytes - header_->journal_offset &&
             header_->used.load() <= header_->journal_bytes,
         "the lock's memory is shorter than it was");
  const uint64_t identity = identity_of(memory);
  const auto is_elsewhere = [&] {
    const uint64_t was = header_->identity.load();
    return identity != 0 && was != 0 && identity != was;
  };
  if (is_elsewhere()) {
    // A copy, or the machine was started anew: nobody can hold the lock that is here.
    const FileLock one_at_a_time;
    if (is_elsewhere()) {
      header_->lock.init();
      VECNORM_CRASH(13);
      header_->identity.store(identity);
    }
  }
}

std::string Control::note() const { return {header_->note(), header_->note_bytes}; }

int64_t Control::owner() const {
  return header_->owner.load(std::memory_order_relaxed);
}

// True when the lock was taken. One whose owner died is made usable again after the
// recovery, or it would have to be taken for granted.
bool Control::taken(Taken how) {
  if (how == Taken::kNo) {
    return false;
  }
  VECNORM_CRASH(1);
  if (how == Taken::kFromDead) {
    recover();
    VECNORM_CRASH(2);
    header_->lock.recovered();
  }
  header_->owner.store(process(), std::memory_order_relaxed);
  if (header_->state.load(std::memory_order_acquire) == kCommitted) {
    recover();
  }
  return true;
}

bool Control::try_lock() {
  if (header_->magic != kMagic) {
    throw std::runtime_error("the lock of the shared statistics was overwritten");
  }
  return taken(header_->lock.try_lock());
}

bool Control::lock(double seconds) {
  return seconds > 0 ? taken(header_->lock.lock(seconds)) : try_lock();
}

void Control::unlock() {
  VECNORM_CRASH(3);
  header_->lock.unlock();
}

bool Control::has_room() const { return needed_ <= header_->journal_bytes; }

void Control::expect_finished() const {
  if (header_->state.load(std::memory_order_relaxed) == kCommitted) {
    throw std::runtime_error(
        "a process died in an update of statistics that are not known here: one that "
        "has all of them must finish it first");
  }
}

// After which the entries are what the journal has, or are made so by whoever takes the
// lock when this process has died. `value_of(i)` is what it is to have for entry i.
template <typename F>
void Control::write_journal(const F& value_of) {
  char* at = header_->journal();
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Record record{names_[i], entries_[i].bytes};
    std::memcpy(at, &record, sizeof(record));
    keep(at + sizeof(record), static_cast<const char*>(value_of(i)), record.bytes);
    at += sizeof(record) + up_to_8(record.bytes);
    VECNORM_CRASH(4);
  }
  header_->used.store(needed_, std::memory_order_relaxed);
  VECNORM_CRASH(5);
  header_->state.store(kCommitted, std::memory_order_release);
  // The entries are not written before.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  VECNORM_CRASH(6);
}

void Control::commit(const std::vector<const void*>& values) {
  if (entries_.empty()) {
    return;
  }
  expect_finished();
  if (!has_room()) {
    for (size_t i = 0; i < entries_.size(); ++i) {
      copy(entries_[i].data, values[i], entries_[i].bytes);
    }
    return;
  }
  write_journal([&](size_t i) { return values[i]; });
  publish();
}

bool Control::begin() {
  if (entries_.empty() || !has_room()) {
    return false;
  }
  expect_finished();
  write_journal([this](size_t i) { return entries_[i].data; });
  return true;
}

void Control::end() {
  std::atomic_signal_fence(std::memory_order_seq_cst);
  header_->state.store(kReplaced, std::memory_order_release);
  VECNORM_CRASH(12);
}

void Control::undo() { publish(); }

// Calls f(entry, contents) for the records of the journal. Entries that this process
// does not know are another's own.
template <typename F>
void Control::for_each_record(const F& f) const {
  const char* at = header_->journal();
  const char* const end = at + header_->used.load(std::memory_order_relaxed);
  while (at < end) {
    Record record;
    copy(&record, at, sizeof(record));
    at += sizeof(record);
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (names_[i] == record.name && entries_[i].bytes == record.bytes) {
        f(entries_[i], at);
      }
    }
    at += up_to_8(record.bytes);
  }
}

// Only by a process that knows all that the journal has, or a part would be lost:
// others, such as those that have nothing but the lock, leave it as it is.
void Control::recover() {
  VECNORM_CRASH(7);
  if (header_->state.load(std::memory_order_acquire) == kCommitted) {
    size_t known = 0;
    for_each_record([&](const Entry& entry, const char*) {
      known += sizeof(Record) + up_to_8(entry.bytes);
    });
    if (known == header_->used.load(std::memory_order_relaxed)) {
      publish();
    }
  }
}

std::string Control::lost() const {
  std::string name;
  if (header_->state.load(std::memory_order_relaxed) == kReplaced) {
    return name;
  }
  for_each_record([&](const Entry& entry, const char* committed) {
    bool differs = false;
    bool to_zero = true;
    for (size_t at = 0; at < entry.bytes; at += 4) {
      uint32_t now, then;
      copy(&now, static_cast<char*>(entry.data) + at, 4);
      copy(&then, committed + at, 4);
      if (now != then) {
        differs = true;
        // Torch, when it makes a file longer, writes a zero to its first byte.
        to_zero &= now == 0 || (at == 0 && now == (then & ~0xffu));
      }
    }
    if (differs && to_zero && name.empty()) {
      name = entry.name;
    }
  });
  return name;
}

void Control::publish() {
  for_each_record([](const Entry& entry, const char* committed) {
    VECNORM_CRASH(8);
    copy(entry.data, committed, entry.bytes);
    VECNORM_CRASH(9);
  });
  VECNORM_CRASH(10);
  header_->state.store(kClean, std::memory_order_release);
  VECNORM_CRASH(11);
}

}  // namespace shared
}  // namespace vecnorm
