// Vectors of sixteen floats or int32, one per token.
//
// PRUNEOFA_REGISTER is the size in bytes of the vector registers of the path; sixteen lanes are one register of 64
// bytes, a pair of 32, or a pair of pairs of 16.
// Included once per path, inside its namespace and its target attribute, so that no function of one path can be linked
// into another.
#include "kernels.h"

namespace lanes {

template <class Half>
struct Pair {
  Half low, high;
};

typedef float FloatRegister __attribute__((vector_size(PRUNEOFA_REGISTER)));
typedef int32_t IntRegister __attribute__((vector_size(PRUNEOFA_REGISTER)));
static inline FloatRegister to_floats(IntRegister v) { return __builtin_convertvector(v, FloatRegister); }
static inline IntRegister truncate(FloatRegister v) { return __builtin_convertvector(v, IntRegister); }
static inline IntRegister as_ints(FloatRegister v) { return reinterpret_cast<IntRegister>(v); }
static inline FloatRegister as_floats(IntRegister v) { return reinterpret_cast<FloatRegister>(v); }
static inline FloatRegister select(IntRegister mask, FloatRegister a, FloatRegister b) { return mask ? a : b; }
// b where a is NaN.
#if defined(PRUNEOFA_MIN)  // the path's instruction; compilers make two of the general form, to be exact about NaN
static inline FloatRegister minimum(FloatRegister a, FloatRegister b) { return (FloatRegister)PRUNEOFA_MIN(a, b); }
static inline FloatRegister maximum(FloatRegister a, FloatRegister b) { return (FloatRegister)PRUNEOFA_MAX(a, b); }
#else
static inline FloatRegister minimum(FloatRegister a, FloatRegister b) { return a < b ? a : b; }
static inline FloatRegister maximum(FloatRegister a, FloatRegister b) { return a > b ? a : b; }
#endif
static inline IntRegister minimum(IntRegister a, IntRegister b) { return a < b ? a : b; }
static inline IntRegister maximum(IntRegister a, IntRegister b) { return a < b ? b : a; }

template <class V, int Bytes>
struct Sixteen {
  typedef typename Sixteen<Pair<V>, Bytes * 2>::Type Type;
};
template <class V>
struct Sixteen<V, 64> {
  typedef V Type;
};
typedef Sixteen<FloatRegister, sizeof(FloatRegister)>::Type Floats;
typedef Sixteen<IntRegister, sizeof(IntRegister)>::Type Ints;

// Operators and functions of pairs are those of their halves.
#define PRUNEOFA_OPERATOR(op)                                                        \
  template <class H>                                                                 \
  static inline Pair<H> operator op(const Pair<H>& a, const Pair<H>& b) {            \
    return {a.low op b.low, a.high op b.high};                                       \
  }                                                                                  \
  template <class H>                                                                 \
  static inline Pair<H> operator op(const Pair<H>& a, float b) {                     \
    return {a.low op b, a.high op b};                                                \
  }                                                                                  \
  template <class H>                                                                 \
  static inline Pair<H> operator op(float a, const Pair<H>& b) {                     \
    return {a op b.low, a op b.high};                                                \
  }
PRUNEOFA_OPERATOR(+)
PRUNEOFA_OPERATOR(-)
PRUNEOFA_OPERATOR(*)
PRUNEOFA_OPERATOR(/)
#undef PRUNEOFA_OPERATOR
template <class H>
static inline Pair<H> operator|(const Pair<H>& a, const Pair<H>& b) {
  return {a.low | b.low, a.high | b.high};
}
template <class H>
static inline Pair<H> operator^(const Pair<H>& a, int32_t b) {
  return {a.low ^ b, a.high ^ b};
}
template <class H>
static inline Pair<H> operator<<(const Pair<H>& a, int count) {
  return {a.low << count, a.high << count};
}
template <class H>
static inline auto operator<(const Pair<H>& a, const Pair<H>& b) -> Pair<decltype(truncate(a.low))> {
  return {a.low < b.low, a.high < b.high};
}
template <class H>
static inline auto to_floats(const Pair<H>& v) -> Pair<decltype(to_floats(v.low))> {
  return {to_floats(v.low), to_floats(v.high)};
}
template <class H>
static inline auto truncate(const Pair<H>& v) -> Pair<decltype(truncate(v.low))> {
  return {truncate(v.low), truncate(v.high)};
}
template <class H>
static inline auto as_ints(const Pair<H>& v) -> Pair<decltype(as_ints(v.low))> {
  return {as_ints(v.low), as_ints(v.high)};
}
template <class H>
static inline auto as_floats(const Pair<H>& v) -> Pair<decltype(as_floats(v.low))> {
  return {as_floats(v.low), as_floats(v.high)};
}
template <class M, class H>
static inline Pair<H> select(const Pair<M>& mask, const Pair<H>& a, const Pair<H>& b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}
template <class H>
static inline Pair<H> minimum(const Pair<H>& a, const Pair<H>& b) {
  return {minimum(a.low, b.low), minimum(a.high, b.high)};
}
template <class H>
static inline Pair<H> maximum(const Pair<H>& a, const Pair<H>& b) {
  return {maximum(a.low, b.low), maximum(a.high, b.high)};
}

// Register by register: compilers copy structs in smaller pieces, and reading those back as a register stalls.
template <class V>
struct Memory {
  static inline V load(const void* p) { return *static_cast<const V*>(p); }
  static inline V load_unaligned(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void store(void* p, const V& v) { *static_cast<V*>(p) = v; }
};
template <class Half>
struct Memory<Pair<Half>> {
  static inline Pair<Half> load(const void* p) {
    return {Memory<Half>::load(p), Memory<Half>::load(static_cast<const char*>(p) + sizeof(Half))};
  }
  static inline Pair<Half> load_unaligned(const void* p) {
    return {Memory<Half>::load_unaligned(p), Memory<Half>::load_unaligned(static_cast<const char*>(p) + sizeof(Half))};
  }
  static inline void store(void* p, const Pair<Half>& v) {
    Memory<Half>::store(p, v.low);
    Memory<Half>::store(static_cast<char*>(p) + sizeof(Half), v.high);
  }
};
static inline Floats load(const float* p) { return Memory<Floats>::load(p); }
static inline Floats load_unaligned(const float* p) { return Memory<Floats>::load_unaligned(p); }
static inline Ints load(const int32_t* p) { return Memory<Ints>::load(p); }
static inline void store(float* p, const Floats& v) { Memory<Floats>::store(p, v); }
static inline void store(int32_t* p, const Ints& v) { Memory<Ints>::store(p, v); }
template <class V>
struct Fill {
  template <class T>
  static inline V with(T value) {
    return V{} + value;
  }
};
template <class Half>
struct Fill<Pair<Half>> {
  template <class T>
  static inline Pair<Half> with(T value) {
    return {Fill<Half>::with(value), Fill<Half>::with(value)};
  }
};
static inline Floats broadcast(float value) { return Fill<Floats>::with(value); }
static inline Ints broadcast(int32_t value) { return Fill<Ints>::with(value); }

}  // namespace lanes
