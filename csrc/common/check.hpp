// Errors inside the native code are C++ exceptions; pybind11 turns them into Python's at the one boundary.
#pragma once
#include <stdexcept>
#include <string>

#define INFOCLIP_CHECK(condition, message)                                                    \
  do {                                                                                        \
    if (!(condition)) throw std::invalid_argument(std::string("infoclip._C: ") + (message)); \
  } while (0)
