// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The control block of statistics that several processes update: a lock and a journal,
// in memory that all of them map. No torch and no Python here.
//
// An update works on a private copy of the statistics. Then, with the lock held,
//
//   1. write     the new values of all entries go into the journal
//   2. commit    the journal's state becomes kCommitted: the update has happened
//   3. publish   the values are copied from the journal to the entries
//   4. clean     the state becomes kClean
//
// Whoever takes the lock next after its owner was killed finds kClean (the update never
// happened) or kCommitted (it publishes again, which does no harm). So an update of all
// keys happens whole or not at all, at whatever instruction a process dies. The lock
// (lock.h) is the next one's when its owner dies.
//
// Of many features the copies take longer than the update. It may work on the entries
// instead:
//
//   1. begin     what the entries have goes into the journal, whose state then becomes
//                kCommitted: who finds it so puts that back, and nothing has happened
//   2. the entries are updated where they are
//   3. end       the state becomes kReplaced: the update has happened
//
// The journal does not have what the entries have then, so that lost() knows nothing:
// for memory that is no file's.
//
// A file can be copied, or outlive the machine's uptime, while its lock is held. The
// block remembers where it lives (identity.h), and is given a new lock elsewhere.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vecnorm {
namespace shared {

enum class Taken;  // lock.h, which only control.cpp depends on

// A tensor of the statistics. `name` is the same in all processes.
struct Entry {
  std::string name;
  void* data;    // where this process has it mapped
  size_t bytes;  // a multiple of 4
};

class Control {
 public:
  // Bytes of a block with a journal for entries of these names and sizes; `note` is for
  // whoever attaches.
  static size_t size_for(const std::vector<Entry>& entries, const std::string& note);

  // Makes a block in zeroed memory that nobody else uses yet.
  static void init(void* memory, size_t bytes, const std::string& note);

  // Attaches to a block. `entries` are what this process knows of the statistics.
  // Throws std::runtime_error where the memory holds no block of this layout.
  Control(void* memory, size_t bytes, std::vector<Entry> entries);

  std::string note() const;

  // Takes the lock, waiting for at most `seconds`; false when the time ran out. What an
  // owner that died has left is put right first.
  bool lock(double seconds);
  bool try_lock();
  void unlock();

  // The process that holds the lock, or held it last; 0 before the first.
  int64_t owner() const;

  // Whether the journal is long enough for all entries.
  bool has_room() const;

  // Replaces the contents of all entries, with the lock held. All happen or none, if
  // the journal has room for them.
  void commit(const std::vector<const void*>& values);

  // With the lock held: opens all entries to an update where they are; false where
  // there is no journal for them. Until end() whoever takes the lock after this process
  // has died puts back what they had, as undo() does.
  bool begin();
  void end();
  void undo();

  // With the lock held: the name of an entry that has lost what was last committed to
  // it, as the end of a file does that was truncated and is mapped as long as before.
  // Empty if there is none. Other values, of a program that has no journal, are not a
  // loss.
  std::string lost() const;

 private:
  struct Header;
  bool taken(Taken how);
  void recover();
  void publish();
  void expect_finished() const;
  template <typename F>
  void write_journal(const F& value_of);
  template <typename F>
  void for_each_record(const F& f) const;

  Header* header_;
  std::vector<Entry> entries_;
  size_t needed_;                // bytes of the journal
  std::vector<uint64_t> names_;  // hashes, as in the journal
};

}  // namespace shared
}  // namespace vecnorm
