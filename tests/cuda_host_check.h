// What the checks of the CUDA kernels share: arrays of random values, which end where their memory ends, and the
// comparison.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda/device.h"
#include "cuda/launchers.h"

using namespace deltamem;

void layer();  // the operations around the scan

inline std::mt19937 engine;
inline double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine); }

struct Array {
  DType dtype = DType::f32;
  size_t count = 0;
  std::unique_ptr<char[]> bytes;

  static size_t size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  Array() = default;
  Array(DType dtype, size_t count, double low = 0, double high = 0)
      : dtype(dtype), count(count), bytes(new char[count * size(dtype)]) {
    for (size_t i = 0; i < count; ++i) put(i, low == high ? NAN : uniform(low, high));
  }
  void put(size_t i, double x) {
    with_dtype(dtype, [&](auto tag) { convert_to(x, reinterpret_cast<decltype(tag)*>(bytes.get())[i]); });
  }
  double at(size_t i) const {
    double x = 0;
    with_dtype(dtype, [&](auto tag) { x = convert<double>(reinterpret_cast<decltype(tag)*>(bytes.get())[i]); });
    return x;
  }
  Operand operand(int64_t s0, int64_t s1, int64_t s2, int64_t s3) const {
    return {bytes.get(), dtype, {s0, s1, s2, s3}};
  }
};

inline bool failed = false;
inline void compare(const char* what, const Array& ours, const std::vector<double>& exact) {
  double distance = 0, scale = 0;
  for (size_t i = 0; i < ours.count; ++i) {
    distance += std::pow(ours.at(i) - exact[i], 2), scale += exact[i] * exact[i];
  }
  const double limit = Array::size(ours.dtype) == 2 ? 1e-2 : ours.dtype == DType::f64 ? 1e-13 : 2e-5;
  if (std::sqrt(distance) <= limit * std::sqrt(scale)) return;
  std::printf("  %s is wrong: %g of %g\n", what, std::sqrt(distance), std::sqrt(scale));
  failed = true;
}
