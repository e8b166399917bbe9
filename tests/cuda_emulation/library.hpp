// What every CUDA source has as a host library that ctypes calls: <op>.cpp includes this and its csrc/<op>/cuda.cu.
#pragma once
#define INFOCLIP_WITH_CUDA 1
#include <cuda_runtime.h>

#include <exception>
#include <string>

template <class F>
const char* guarded(F&& f) {  // what went wrong, or null
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

extern "C" size_t emulated_launches() { return emulation::launches; }
