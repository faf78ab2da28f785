#include "team.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <thread>

namespace baton {
namespace {

// About 50 µs: longer than any operation's imbalance, shorter than what waking a thread saves.
constexpr int kSpins = 1000;
constexpr int kLoops = 4;  // counters of loops; see Member::next

void pin(const std::vector<int>& cpus, int index) {
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus[index % cpus.size()], &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a refusal costs speed only
}

// Returns when `word` is no longer `old`.
void wait_for_change(const std::atomic<uint32_t>& word, uint32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (word.load(std::memory_order_acquire) != old) return;
    _mm_pause();
  }
  word.wait(old, std::memory_order_acquire);
}

}  // namespace

struct Team::State {
  int size;
  std::vector<int> cpus;
  std::vector<std::thread> threads;
  const std::function<void(Member&)>* body = nullptr;
  bool stopping = false;

  alignas(64) std::atomic<uint32_t> round{0};    // grows with every run; starts the threads
  alignas(64) std::atomic<uint32_t> arrived{0};  // at the current barrier
  alignas(64) std::atomic<uint32_t> passed{0};   // barriers that all have reached
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  } loops[kLoops];

  void barrier() {
    const uint32_t before = passed.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size)) {
      arrived.store(0, std::memory_order_relaxed);
      passed.store(before + 1, std::memory_order_release);
      passed.notify_all();
    } else {
      wait_for_change(passed, before);
    }
  }

  void serve(Team& team, int index) {
    pin(cpus, index);
    for (uint32_t seen = 0;;) {
      wait_for_change(round, seen);
      seen += 1;
      if (stopping) return;
      Member member(team, index);
      (*body)(member);
      barrier();
    }
  }

  void start_round() {
    round.fetch_add(1, std::memory_order_release);
    round.notify_all();
  }
};

Team::Team(int size, const std::vector<int>& cpus) : state_(std::make_unique<State>()) {
  state_->size = size;
  state_->cpus = cpus;
  for (int index = 1; index < size; ++index) {
    state_->threads.emplace_back([this, index] { state_->serve(*this, index); });
  }
}

Team::~Team() {
  state_->stopping = true;
  state_->start_round();
  for (std::thread& thread : state_->threads) thread.join();
}

int Team::size() const { return state_->size; }

void Team::run(const std::function<void(Member&)>& body) {
  thread_local const State* pinned_by = nullptr;
  if (pinned_by != state_.get()) pin(state_->cpus, 0);
  pinned_by = state_.get();
  for (auto& loop : state_->loops) loop.next.store(0, std::memory_order_relaxed);
  state_->body = &body;
  Member member(*this, 0);
  if (state_->size == 1) return body(member);
  state_->start_round();
  body(member);
  state_->barrier();
}

int Member::size() const { return team_.state_->size; }

void Member::barrier() {
  if (size() == 1) return;
  const uint64_t before = __rdtsc();
  team_.state_->barrier();
  waited_ += __rdtsc() - before;
}

// Loop k counts on loops[k % 4]. While it runs, nobody is still in loop k - 1, whose counter is set
// back for loop k + 3; nobody can get there before this member has finished loop k.
int64_t Member::next(bool begin) {
  auto& loops = team_.state_->loops;
  if (begin) {
    loops_ += 1;
    if (index_ == 0) loops[(loops_ + kLoops - 1) % kLoops].next.store(0, std::memory_order_relaxed);
  }
  return loops[loops_ % kLoops].next.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace baton
