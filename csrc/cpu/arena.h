// Scratch memory of one thread.
#pragma once

#include "system_headers.h"
#include "vec.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

// Hands out arrays one after another, each on a cache line of its own. The kernels use no standard containers: their
// functions would be shared with the translation units for older processors (see DELTAMEM_ISA in core/delta_rule.h).
class Arena {
 public:
  ~Arena() { std::free(memory_); }
  // Makes room for `bytes` bytes; arrays taken before are no longer valid.
  void reset(size_t bytes) {
    if (size_ < bytes) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::aligned_alloc(kLine, bytes));
      size_ = bytes;
    }
    next_ = memory_;
  }
  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return p;
  }
  // The size of an array of `count` values, rounded up to whole cache lines.
  template <class T>
  static size_t bytes(size_t count) {
    return (count * sizeof(T) + kLine - 1) / kLine * kLine;
  }

 private:
  static constexpr size_t kLine = 64;
  char *memory_ = nullptr, *next_ = nullptr;
  size_t size_ = 0;
};

template <class T>
DELTAMEM_INLINE void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
