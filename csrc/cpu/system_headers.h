// The system headers that the kernels use. Translation units for newer instruction sets include them before they enable
// the instruction set, because the linker may share the functions of these headers with code for older processors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
