#include "fibres.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The linker's names for the ends of the section of static shared arrays.
extern "C" __attribute__((weak)) char __start_mmfast_shared[], __stop_mmfast_shared[];

namespace shim {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kGuard = 4096;  // behind the shared memory, must stay as it is
constexpr size_t kDefaultShared = 48 << 10, kMostShared = 227 << 10;
constexpr int kPoison = 0xff;  // NaN in every floating-point type

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

enum class State { ready, barrier, warp, done };

struct Fibre {
  char* stack = nullptr;
  jmp_buf at;
  bool started = false;
  State state = State::ready;
  Site site{};  // where it waits
  unsigned mask = 0;
  void* data = nullptr;
  int predicate = 0;
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Machine {
  std::vector<Fibre> fibres;  // of the largest block so far
  unsigned count = 0;         // threads of the block
  unsigned current = 0;
  jmp_buf scheduler;
  const std::function<void()>* thread = nullptr;
  std::string error;
  int vote = 0;
  std::vector<char> shared;
  char* shared_begin = nullptr;
  size_t shared_size = 0;
  std::map<const void*, size_t> allowed;
  uint64_t order = 2;
} machine;

void place(unsigned i) {
  machine.current = i;
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
}

void entry() {
  Fibre& self = machine.fibres[machine.current];
  try {
    (*machine.thread)();
    if (!self.copies.empty() || !self.groups.empty())
      fail("a thread ended before it waited for its cp_async");
  } catch (const std::exception& error) {
    if (machine.error.empty()) machine.error = error.what();
  }
  machine.fibres[machine.current].state = State::done;
  _longjmp(machine.scheduler, 1);
}

void resume(unsigned i) {
  place(i);
  Fibre& fibre = machine.fibres[i];
  if (_setjmp(machine.scheduler)) return;
  if (fibre.started) _longjmp(fibre.at, 1);
  fibre.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

// Back to the scheduler until the fibre is ready again.
void give_way() {
  if (!_setjmp(machine.fibres[machine.current].at)) _longjmp(machine.scheduler, 1);
  if (!machine.error.empty()) throw std::runtime_error("stopped");
}

std::string name_of(unsigned i) {
  return "thread " + std::to_string(i) + " of block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

std::vector<uint64_t> permutation(uint64_t n, std::mt19937_64& random) {
  std::vector<uint64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Nobody can go on: says who waits where.
std::string deadlock() {
  std::string message = "threads of a block wait for each other:";
  Site last{};
  for (unsigned i = 0; i < machine.count; ++i) {
    const Fibre& f = machine.fibres[i];
    if (f.state == State::done || f.site == last) continue;
    message += " " + name_of(i) + " at " + f.site.text() + ";";
    last = f.site;
  }
  return message;
}

void release_barrier() {
  unsigned waiting = 0, alive = 0;
  for (unsigned i = 0; i < machine.count; ++i) {
    waiting += machine.fibres[i].state == State::barrier;
    alive += machine.fibres[i].state != State::done;
  }
  if (!waiting || waiting != alive) return;
  const Fibre* first = nullptr;
  int any = 0;
  for (unsigned i = 0; i < machine.count; ++i) {
    Fibre& f = machine.fibres[i];
    if (f.state == State::done) continue;
    if (!first) first = &f;
    if (!(f.site == first->site)) {
      machine.error = "divergent barrier: " + name_of(i) + " waits at " + f.site.text() + ", another at " +
                      first->site.text();
    }
    any += f.predicate != 0;
    f.state = State::ready;
  }
  machine.vote = any + (int(alive) << 16);
}

void run_block(const std::vector<uint64_t>& order) {
  for (unsigned i = 0; i < machine.count; ++i) {
    Fibre& f = machine.fibres[i];
    f.started = false;
    f.state = State::ready;
    f.copies.clear();
    f.groups.clear();
  }
  if (!machine.shared.empty()) std::memset(machine.shared.data(), kPoison, machine.shared.size());
  if (__start_mmfast_shared)
    std::memset(__start_mmfast_shared, kPoison, __stop_mmfast_shared - __start_mmfast_shared);
  // One warp falls behind: it runs when no other can, so that what it reads too late is seen.
  const uint64_t late = machine.order > 1 ? machine.order % (machine.count / 32 + 1) : UINT64_MAX;
  for (;;) {
    bool moved = false, alive = false;
    for (int turn = 0; turn < 2 && !moved; ++turn) {
      for (const uint64_t i : order) {
        Fibre& f = machine.fibres[i];
        if ((i / 32 == late) != (turn == 1) || f.state != State::ready) continue;
        resume(unsigned(i));
        moved = true;
      }
    }
    for (unsigned i = 0; i < machine.count; ++i) alive |= machine.fibres[i].state != State::done;
    if (!alive) break;
    if (!machine.error.empty()) {  // the rest unwinds
      for (unsigned i = 0; i < machine.count; ++i) {
        Fibre& f = machine.fibres[i];
        if (f.state == State::done) continue;
        if (!f.started)
          f.state = State::done;
        else
          f.state = State::ready;
      }
      continue;
    }
    release_barrier();
    if (!moved) {
      bool ready = false;
      for (unsigned i = 0; i < machine.count; ++i) ready |= machine.fibres[i].state == State::ready;
      if (!ready) machine.error = deadlock();
    }
  }
  const char* guard = machine.shared_begin + machine.shared_size;
  if (machine.error.empty() && !std::all_of(guard, guard + kGuard, [](char c) { return c == char(kPoison); }))
    machine.error = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                    ") wrote behind its dynamic shared memory";
}

void finish(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.shared, copy.global, 16);
  else
    std::memset(copy.shared, 0, 16);
}

}  // namespace

std::string Site::text() const {
  const char* slash = std::strrchr(file, '/');
  return std::string(what) + " in " + (slash ? slash + 1 : file) + ":" + std::to_string(line);
}

void fail(const std::string& message) {
  throw std::runtime_error(name_of(machine.current) + ": " + message);
}

unsigned lane_number() {
  return machine.current % 32;
}

int barrier(Site site, int predicate, Vote vote) {
  Fibre& self = machine.fibres[machine.current];
  self.site = site;
  self.predicate = predicate;
  self.state = State::barrier;
  give_way();
  const int any = machine.vote & 0xffff, alive = machine.vote >> 16;
  return vote == Vote::any ? any > 0 : vote == Vote::all ? any == alive : any;
}

void meet(Site site, unsigned mask, void* mine, const std::function<void(void* const* lanes)>& together) {
  const unsigned me = machine.current, first = me / 32 * 32, lane = me % 32;
  check(mask >> lane & 1, site, "the mask does not name the lane itself");
  check(first + 32 <= machine.count || mask >> (machine.count - first) == 0, site,
        "the mask names lanes that the block does not have");
  Fibre& self = machine.fibres[me];
  self.site = site;
  self.mask = mask;
  self.data = mine ? mine : &self;
  void* lanes[32] = {};
  bool complete = true;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fibre& other = machine.fibres[first + i];
    lanes[i] = other.data;
    if (i == lane) continue;
    check(other.state != State::done, site, "a lane that the mask names has ended");
    if (other.state == State::warp)
      check(other.site == site && other.mask == mask, site,
            ("another lane of the mask waits elsewhere: " + other.site.text()).c_str());
    else
      complete = false;
  }
  if (!complete) {
    self.state = State::warp;
    give_way();
    return;
  }
  together(lanes);
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) machine.fibres[first + i].state = State::ready;
}

void copy_later(void* shared, const void* global, bool valid) {
  check_shared("cp_async_16", shared);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16)
    fail("cp_async_16: the source is no multiple of 16 bytes");
  std::memset(shared, kPoison, 16);
  machine.fibres[machine.current].copies.push_back({shared, global, valid});
}

void commit_copies() {
  Fibre& self = machine.fibres[machine.current];
  self.groups.push_back(std::move(self.copies));
  self.copies.clear();
}

void wait_for_copies(int groups) {
  auto& pending = machine.fibres[machine.current].groups;
  while (int(pending.size()) > groups) {
    for (const Copy& copy : pending.front()) finish(copy);
    pending.erase(pending.begin());
  }
}

char* shared_memory() {
  return machine.shared_begin;
}

void check_shared(const char* what, const void* p) {
  const char* c = static_cast<const char*>(p);
  const bool is_dynamic = c >= machine.shared_begin && c + 16 <= machine.shared_begin + machine.shared_size;
  const bool is_static =
      __start_mmfast_shared && c >= __start_mmfast_shared && c + 16 <= __stop_mmfast_shared;
  if (!is_dynamic && !is_static)
    fail(std::string(what) + ": the address is not in the block's shared memory");
  if (reinterpret_cast<uintptr_t>(p) % 16)
    fail(std::string(what) + ": the address is no multiple of 16 bytes");
}

bool allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return false;
  machine.allowed[kernel] = size_t(bytes);
  return true;
}

bool can_launch(const void* kernel, const Shape& s) {
  const auto found = machine.allowed.find(kernel);
  const size_t limit =
      found == machine.allowed.end() ? kDefaultShared : std::max(kDefaultShared, found->second);
  const uint64_t threads = uint64_t(s.block[0]) * s.block[1] * s.block[2];
  return threads >= 1 && threads <= 1024 && s.block[2] <= 64 && s.grid[0] >= 1 && s.grid[1] >= 1 &&
         s.grid[2] >= 1 && s.grid[0] <= INT32_MAX && s.grid[1] <= 65535 && s.grid[2] <= 65535 &&
         s.shared <= limit;
}

void run(const Shape& shape, const std::function<void()>& thread) {
  gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
  blockDim = {shape.block[0], shape.block[1], shape.block[2]};
  machine.count = blockDim.x * blockDim.y * blockDim.z;
  machine.thread = &thread;
  machine.error.clear();
  machine.shared.resize(shape.shared + kGuard + 128);
  machine.shared_begin = machine.shared.data() + (-reinterpret_cast<uintptr_t>(machine.shared.data()) & 127);
  machine.shared_size = shape.shared;
  while (machine.fibres.size() < machine.count) {
    void* stack =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stack of a fibre");
    machine.fibres.emplace_back().stack = static_cast<char*>(stack);
  }
  std::mt19937_64 random(machine.order);
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  const auto threads = permutation(machine.count, random);
  for (const uint64_t b : permutation(blocks, random)) {
    blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y),
                unsigned(b / gridDim.x / gridDim.y)};
    run_block(threads);
    if (!machine.error.empty()) throw std::runtime_error(machine.error);
  }
  if (machine.order > 1) ++machine.order;
}

void set_order(uint64_t order) {
  machine.order = order;
}

}  // namespace shim
