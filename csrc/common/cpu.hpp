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

// n threads (the caller is one) that live as long as the call. Work items are handed out one by one, so a busy core
// holds nobody up; every item must write its own place, which makes the result independent of the number of threads.
// The first exception of an item is thrown again by run().
class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  void run(int64_t count, const std::function<void(int64_t)>& item);

 private:
  void drain();
  void work();
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int64_t)>* item_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  std::atomic<int64_t> round_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
};

}  // namespace infoclip
