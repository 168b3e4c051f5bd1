// Runs the blocks of a grid one after the other, each thread of a block as a fibre. A fibre gives way where
// threads synchronise, and only there. The order of blocks and threads differs from launch to launch, so that
// what depends on it changes its results. What a GPU would leave undefined raises, where it can be told.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace shim {

// Where a thread stands in the source.
struct Site {
  const char* what;
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return what == other.what && line == other.line && file == other.file;
  }
  std::string text() const;
};

[[noreturn]] void fail(const std::string& message);

inline void check(bool holds, const Site& site, const char* message) {
  if (!holds) fail(site.text() + ": " + message);
}

enum class Vote { none, any, all, count };

// The barrier of a block; what the predicates of all its threads give.
int barrier(Site site, int predicate, Vote vote);

// The lanes that `mask` names meet; the last to arrive runs `together` over their data, null for absent
// lanes.
void meet(Site site, unsigned mask, void* mine, const std::function<void(void* const* lanes)>& together);

unsigned lane_number();

// Copies in the background: they happen at the wait, and until then the destination holds NaN.
void copy_later(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int groups);

char* shared_memory();
// Raises unless 16 bytes from p on, a multiple of 16, lie in the block's shared memory.
void check_shared(const char* what, const void* p);

struct Shape {
  unsigned grid[3], block[3];
  size_t shared;
};
bool allow_shared(const void* kernel, int bytes);
bool can_launch(const void* kernel, const Shape& shape);
void run(const Shape& shape, const std::function<void()>& thread);

// The order of what follows: 0 ascending, 1 descending, else shuffled by the number, which counts up by
// itself.
void set_order(uint64_t order);

}  // namespace shim
