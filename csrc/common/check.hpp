// Errors inside the native code are C++ exceptions; pybind11 turns them into Python's at the one boundary.
#pragma once
#include <cstdint>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>

#define INFOCLIP_CHECK(condition, message)                                                    \
  do {                                                                                        \
    if (!(condition)) throw std::invalid_argument(std::string("infoclip._C: ") + (message)); \
  } while (0)

namespace infoclip {

// A buffer that there is no room for. It tells the size, as a bare std::bad_alloc cannot.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(int64_t n, size_t size) {
    std::snprintf(text_, sizeof text_, "infoclip._C: out of memory for a buffer of %lld entries of %d bytes",
                  static_cast<long long>(n), static_cast<int>(size));
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[112];
};

}  // namespace infoclip
