// A team of threads that all run the same function, and the loops and barriers inside of it.
//
//     Team::run(body):   thread 0 (the caller)  body(member 0) ─┬─ barrier ─┬─ ... ─┐
//                        thread 1               body(member 1) ─┘           └─ ... ─┴─ returns
//
// One forward pass is one `run`: threads are woken once, and meet at barriers between operations
// that cost less than a microsecond each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace baton {

class Team;

// One thread's view of a team, valid inside of `Team::run`.
class Member {
 public:
  Member(Team& team, int index) : team_(team), index_(index) {}

  int index() const { return index_; }
  int size() const;

  // Returns when every member has called it. What they wrote before is visible afterwards.
  void barrier();

  // Time stamp counts that this member has spent in `barrier`, the ends of loops included.
  uint64_t waited() const { return waited_; }

  // Calls `body(i)` once for every i in [0, count), each on whichever member is free, and returns
  // after a barrier. All members must call it with the same count.
  template <typename Body>
  void for_each(int64_t count, Body&& body) {
    for (int64_t i = next(true); i < count; i = next(false)) body(i);
    barrier();
  }

  // Like `for_each`, but calls `body(i, after)`, where `after` is the index that this member gets
  // next, or `count`: so that it can fetch ahead. It is taken early, and the ends are less even.
  template <typename Body>
  void for_each_ahead(int64_t count, Body&& body) {
    for (int64_t i = next(true); i < count;) {
      const int64_t after = std::min(count, next(false));
      body(i, after);
      i = after;
    }
    barrier();
  }

 private:
  int64_t next(bool begin);  // an index of the current loop that nobody else got

  Team& team_;
  int index_;
  uint32_t loops_ = 0;  // loops begun; the team's counters are used in turn
  uint64_t waited_ = 0;
};

// The threads live as long as the team. `run` is called by one thread at a time. Waiting threads
// spin for a few microseconds and then sleep in the kernel: an idle team takes no CPU.
class Team {
 public:
  // `cpus[i]` is where thread i is pinned; empty: nowhere. Thread 0 is the caller of `run`: each
  // thread that calls is pinned by its first `run`.
  Team(int size, const std::vector<int>& cpus);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const;
  void run(const std::function<void(Member&)>& body);

 private:
  friend class Member;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace baton
