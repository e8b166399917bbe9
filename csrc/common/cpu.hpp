// Which instruction sets this CPU has, and a call-scoped team of threads.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace infoclip {

// In order: each has what the ones before it have.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };
constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16};

// The best set of instructions that both this build and this CPU (and its operating system) have.
Isa best_isa();
bool has_isa(Isa isa);
const char* isa_name(Isa isa);
// "auto" or a name; throws where the CPU lacks it.
Isa parse_isa(const std::string& name);

// What `name` is in the best namespace of an instruction set that has a copy of its own, of those up to AVX-512: the sets
// above it differ in the bfloat16 product alone (common/tiles.hpp).
#ifdef INFOCLIP_X86
#define INFOCLIP_BY_ISA(isa, name) \
  ((isa) >= Isa::avx512 ? avx512::name : (isa) == Isa::avx2 ? avx2::name : baseline::name)
#else
#define INFOCLIP_BY_ISA(isa, name) ((void)(isa), baseline::name)
#endif

// Up to `useful` threads (the caller is one) for the length of a call. Work items are handed out one by one, so a busy
// core holds nobody up; every item must write its own place, which makes the result independent of the number of threads.
// The first exception of an item is thrown again by run().
//
// They are those of the OpenMP runtime that torch has loaded: its threads go on turning for a while after torch's own work,
// and others beside them would have to share their cores. Where there is none, and in a forked process, whose copy of such
// a pool has lost its threads, the team makes threads of its own. `threads` is how many torch works with: the pool is
// entered as a whole, as libgomp takes a pool of another size down and puts it up again.
class Team {
 public:
  Team(int threads, int64_t useful);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  void run(int64_t count, const std::function<void(int64_t)>& item);

 private:
  static void enter(void* team);
  void drain();
  void work();
  const int wanted_;  // threads beside the caller that are to work
  const bool pool_;   // they are the OpenMP runtime's
  int others_ = 0;    // those that do
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int64_t)>* item_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  std::atomic<int64_t> round_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

}  // namespace infoclip
