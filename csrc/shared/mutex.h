// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// A mutex that lives in memory which several processes map: POSIX process-shared, and
// robust where the platform has that (a lock whose owner died is given to the next).

#pragma once

#include <cstddef>

namespace vecnorm {
namespace shared {

// Bytes and alignment of the memory that a mutex needs.
size_t mutex_size();
size_t mutex_alignment();

// Makes a mutex in zeroed memory that nobody else uses yet.
void mutex_init(void* memory);

// Whether the memory holds a mutex made by mutex_init of this build's ABI.
bool is_mutex(const void* memory);

bool mutex_try_lock(void* memory);

// Waits for at most `seconds`; false when the time ran out.
bool mutex_lock(void* memory, double seconds);

void mutex_unlock(void* memory);

}  // namespace shared
}  // namespace vecnorm
