#include "common/cpu.hpp"

#include <algorithm>

#include "common/check.hpp"
#if defined(INFOCLIP_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#define INFOCLIP_POSIX 1
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace infoclip {

#ifdef INFOCLIP_X86
namespace {

// Linux saves the tiles of a process only once it has asked for that; the answer holds for all its threads.
bool may_use_tiles() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace
#endif

bool has_isa(Isa isa) {
#ifdef INFOCLIP_X86
  // libgcc's test also asks the operating system (XGETBV) whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512_bf16) return bf16;
  if (isa == Isa::amx_bf16)
    return bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
#endif
  return isa == Isa::baseline;
}

Isa best_isa() {
  Isa best = Isa::baseline;
  for (Isa isa : kIsas)
    if (has_isa(isa)) best = isa;
  return best;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx_bf16: return "amx_bf16";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

Isa parse_isa(const std::string& name) {
  if (name == "auto") return best_isa();
  for (Isa isa : kIsas)
    if (name == isa_name(isa)) {
      INFOCLIP_CHECK(has_isa(isa), "this CPU or build has no " + name);
      return isa;
    }
  throw std::invalid_argument("infoclip._C: unknown instruction set '" + name + "'");
}

namespace {

// What a compiler calls for `#pragma omp parallel`, of the runtime that is there already: GNU's own or LLVM's, which has
// the same entries. Linking one would bring a second pool into the process.
struct OpenMp {
  void (*start)(void (*)(void*), void*, unsigned) = nullptr;
  void (*end)() = nullptr;
  int (*size)() = nullptr;
  int (*index)() = nullptr;
};

#ifdef INFOCLIP_POSIX
std::atomic<bool> forked{false};

template <class F>
void look_up(F*& f, const char* name) {
  f = reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
}

const OpenMp* openmp() {
  static const OpenMp found = [] {
    OpenMp o;
    look_up(o.start, "GOMP_parallel_start");
    look_up(o.end, "GOMP_parallel_end");
    look_up(o.size, "omp_get_num_threads");
    look_up(o.index, "omp_get_thread_num");
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return o;
  }();
  return found.start && found.end && found.size && found.index && !forked ? &found : nullptr;
}
#else
const OpenMp* openmp() { return nullptr; }
#endif

}  // namespace

Team::Team(int threads, int64_t useful)
    : wanted_(static_cast<int>(std::max<int64_t>(std::min<int64_t>(threads, useful), 1) - 1)),
      pool_(wanted_ > 0 && openmp() != nullptr) {
  if (wanted_ == 0) return;
  if (pool_) {
    openmp()->start(&Team::enter, this, static_cast<unsigned>(threads));
    others_ = std::min(wanted_, openmp()->size() - 1);  // the runtime may give fewer than were asked for
    return;
  }
  threads_.reserve(wanted_);
  try {
    for (; others_ < wanted_; ++others_) threads_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {
    // Fewer threads than asked for: slower, the same bits.
  }
}

void Team::enter(void* team) {
  Team* t = static_cast<Team*>(team);
  const int index = openmp()->index();
  if (index > 0 && index <= t->wanted_) t->work();
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (auto& thread : threads_) thread.join();
  if (pool_) openmp()->end();
}

void Team::drain() {
  try {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*item_)(i);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    next_.store(count_, std::memory_order_relaxed);
  }
}

namespace {

inline void pause() {
#ifdef INFOCLIP_X86
  __builtin_ia32_pause();
#endif
}

// Rounds follow each other within microseconds: to look for a while is much cheaper than to sleep and be woken. The
// while is short, so that a core that is wanted elsewhere is soon free.
template <class Condition>
void look_for(const Condition& there) {
  for (int i = 0; i < 4000 && !there(); ++i) pause();
}

}  // namespace

void Team::work() {
  int64_t seen = 0;
  for (;;) {
    look_for([&] { return round_.load(std::memory_order_acquire) != seen || stop_.load(std::memory_order_relaxed); });
    {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
    }
    drain();
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      std::lock_guard<std::mutex> lock(mutex_);  // nobody is between its look and its sleep
      done_.notify_one();
    }
  }
}

void Team::run(int64_t count, const std::function<void(int64_t)>& item) {
  if (count <= 0) return;
  if (others_ == 0 || count == 1) {
    for (int64_t i = 0; i < count; ++i) item(i);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    item_ = &item;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_ = others_;
    ++round_;
  }
  start_.notify_all();
  drain();
  look_for([&] { return busy_.load(std::memory_order_acquire) == 0; });
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return busy_ == 0; });
  if (error_) {
    const std::exception_ptr error = error_;
    error_ = nullptr;
    std::rethrow_exception(error);
  }
}

}  // namespace infoclip
