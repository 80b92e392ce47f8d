// Sixteen floats or int32, one per token, and the functions that the layers between the linear ones need.
//
// GCC and Clang compile these vectors to whatever the including file may use (one 512-bit register, two of 256 bits,
// four of 128). Elsewhere a plain array with loops does the same. Included once per path, inside its namespace and
// after its target pragma, so that no function of one path can be linked into another.
#include "kernels.h"

namespace lanes {

#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(64), aligned(64)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(64)));
static inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
static inline Ints truncate(Floats v) { return __builtin_convertvector(v, Ints); }
static inline Floats as_floats(Ints v) { return reinterpret_cast<Floats>(v); }
static inline Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }
#else
template <class T>
struct Vector {
  T v[kLanes];
  T& operator[](int i) { return v[i]; }
  T operator[](int i) const { return v[i]; }
};
using Floats = Vector<float>;
using Ints = Vector<int32_t>;
#define PRUNEOFA_OPERATOR(op)                                                                  \
  template <class T>                                                                           \
  static inline Vector<T> operator op(Vector<T> a, const Vector<T>& b) {                       \
    for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] op b.v[i];                                \
    return a;                                                                                  \
  }                                                                                            \
  template <class T, class S>                                                                  \
  static inline Vector<T> operator op(Vector<T> a, S b) {                                      \
    for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] op static_cast<T>(b);                     \
    return a;                                                                                  \
  }
PRUNEOFA_OPERATOR(+)
PRUNEOFA_OPERATOR(-)
PRUNEOFA_OPERATOR(*)
PRUNEOFA_OPERATOR(/)
#undef PRUNEOFA_OPERATOR
template <class T, class S>
static inline Vector<T>& operator+=(Vector<T>& a, const S& b) {
  return a = a + b;
}
static inline Vector<float> operator/(float a, const Vector<float>& b) {
  Vector<float> r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = a / b.v[i];
  return r;
}
static inline Vector<float> operator*(float a, const Vector<float>& b) { return b * a; }
static inline Vector<float> operator-(float a, const Vector<float>& b) {
  Vector<float> r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = a - b.v[i];
  return r;
}
static inline Ints operator<(const Floats& a, const Floats& b) {
  Ints r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = a.v[i] < b.v[i] ? -1 : 0;
  return r;
}
static inline Ints operator<<(Ints a, int bits) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << bits);
  return a;
}
static inline Floats to_floats(const Ints& v) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<float>(v.v[i]);
  return r;
}
static inline Ints truncate(const Floats& v) {
  Ints r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<int32_t>(v.v[i]);
  return r;
}
static inline Floats as_floats(const Ints& v) {
  Floats r;
  memcpy(&r, &v, sizeof r);
  return r;
}
static inline Floats select(const Ints& mask, const Floats& a, const Floats& b) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = mask.v[i] ? a.v[i] : b.v[i];
  return r;
}
#endif

static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static inline Ints load(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }
static inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
static inline void store(int32_t* p, Ints v) { *reinterpret_cast<Ints*>(p) = v; }
static inline Floats all(float value) {
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = value;
  return v;
}
static inline Floats smaller(Floats a, Floats b) { return select(a < b, a, b); }
static inline Floats larger(Floats a, Floats b) { return select(a < b, b, a); }

// Round half to even for |x| < 2^22: the sum has no room for fraction bits.
static inline Floats round(Floats x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (x + magic) - magic;
}

// e^x to 2e-7 relative. Below -87 it is the smallest normal float instead of a denormal or 0.
static inline Floats exponential(Floats x) {
  x = larger(smaller(x, all(88.0f)), all(-87.0f));
  const Floats n = round(x * 1.44269504f);
  // ln 2 in two parts: n * 0.693359375 is exact.
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Cephes expf, degree 5 on |r| <= ln(2) / 2.
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * as_floats((truncate(n) + 127) << 23);
}

// x * Phi(x), Phi by erf: Abramowitz and Stegun 7.1.26, |error of erf| <= 1.5e-7.
static inline Floats gelu(Floats x) {
  const Floats z = x * 0.70710678f;
  const Floats a = larger(z, 0.0f - z);
  const Floats t = 1.0f / (a * 0.3275911f + 1.0f);
  Floats p = t * 1.061405429f + -1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t + -0.284496736f;
  p = p * t + 0.254829592f;
  const Floats tail = p * t * exponential(0.0f - a * a);  // 1 - erf(a)
  const Floats half = tail * 0.5f;
  return x * select(z < all(0.0f), half, 1.0f - half);
}

// The tanh approximation of GELU, as in GPT-2: x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3)).
static inline Floats gelu_tanh(Floats x) {
  const Floats u = x * (x * x * 0.044715f + 1.0f) * -1.59576912f;
  return x / (exponential(u) + 1.0f);
}

static inline Floats activate(Floats x, Activation kind) {
  if (kind == Activation::kGelu) return gelu(x);
  if (kind == Activation::kGeluTanh) return gelu_tanh(x);
  if (kind == Activation::kRelu) return larger(x, all(0.0f));
  return x;
}

static inline void normalize(float* x, const float* y, int features, const float* gamma, const float* beta,
                             float epsilon) {
  Floats sum = all(0.0f);
  for (int f = 0; f < features; ++f) {
    Floats v = load(x + f * kLanes);
    if (y != nullptr) store(x + f * kLanes, v = v + load(y + f * kLanes));
    sum += v;
  }
  const Floats mean = sum / static_cast<float>(features);
  Floats squares = all(0.0f);
  for (int f = 0; f < features; ++f) {
    const Floats d = load(x + f * kLanes) - mean;
    squares += d * d;
  }
  Floats inverse = squares / static_cast<float>(features) + epsilon;
  for (int i = 0; i < kLanes; ++i) inverse[i] = 1.0f / sqrtf(inverse[i]);
  for (int f = 0; f < features; ++f) {
    store(x + f * kLanes, (load(x + f * kLanes) - mean) * inverse * gamma[f] + beta[f]);
  }
}

// Scale and zero point of a panel, per token: the range includes 0 (design.md, "int8").
static inline void range(const float* x, int features, float* scale, int32_t* zero) {
  Floats low = all(0.0f), high = all(0.0f);
  for (int f = 0; f < features; ++f) {
    const Floats v = load(x + f * kLanes);
    low = smaller(low, v);
    high = larger(high, v);
  }
  Floats s = (high - low) / 255.0f;
  s = select(all(0.0f) < s, s, all(1.0f));
  store(scale, s);
  store(zero, truncate(round((0.0f - low) / s)));
}

// Codes of 16 tokens. A product instead of the quotient x / scale: a division costs more than all the rest here, and
// only where x / scale is half an integer to within rounding does the code come out one off.
static inline Ints encode(Floats x, Floats inverse_scale, Floats zero) {
  const Floats q = round(x * inverse_scale) + zero;
  return truncate(larger(smaller(q, all(255.0f)), all(0.0f)));
}

// softmax(scale * q k^T) v for one panel of queries against the keys begin..end, online over panels of keys would
// save memory; two passes over the scores of 16 queries are faster, and they fit the second-level cache.
static inline void attention(const Attention& a) {
  float* scores = static_cast<float*>(a.scratch);  // [keys][16]
  const int first = a.begin / kLanes, last = (a.end - 1) / kLanes;
  const float* q = a.query + a.panel * a.stride;
  Floats top = all(-3.0e38f);
  for (int p = first; p <= last; ++p) {
    const float* k = a.key + p * a.stride;
    Floats sum[kLanes];
    for (int s = 0; s < kLanes; ++s) sum[s] = all(0.0f);
    for (int d = 0; d < a.size; ++d) {
      const Floats v = load(q + d * kLanes);
      PRUNEOFA_UNROLL
      for (int s = 0; s < kLanes; ++s) sum[s] += v * k[d * kLanes + s];
    }
    for (int s = 0; s < kLanes; ++s) {
      const int token = p * kLanes + s;
      const Floats score = sum[s] * a.scale;
      store(scores + ((p - first) * kLanes + s) * kLanes, score);
      if (token >= a.begin && token < a.end) top = larger(top, score);
    }
  }
  Floats total = all(0.0f);
  for (int token = first * kLanes; token < (last + 1) * kLanes; ++token) {
    float* score = scores + (token - first * kLanes) * kLanes;
    const bool inside = token >= a.begin && token < a.end;
    const Floats weight = inside ? exponential(load(score) - top) : all(0.0f);
    store(score, weight);
    total += weight;
  }
  const Floats inverse = 1.0f / total;
  // Lanes of the panel that belong to other sequences keep what those sequences wrote.
  float* out = a.out + a.panel * a.out_stride;
  Ints mine;
  for (int i = 0; i < kLanes; ++i) mine[i] = a.panel * kLanes + i >= a.begin && a.panel * kLanes + i < a.end ? -1 : 0;
  constexpr int kBlock = 16;
  for (int d0 = 0; d0 < a.size; d0 += kBlock) {
    const int rows = a.size - d0 < kBlock ? a.size - d0 : kBlock;
    Floats sum[kBlock];
    for (int d = 0; d < kBlock; ++d) sum[d] = all(0.0f);
    for (int p = first; p <= last; ++p) {
      const float* v = a.value + p * a.stride + d0 * kLanes;
      const float* weights = scores + (p - first) * kLanes * kLanes;
      for (int s = 0; s < kLanes; ++s) {
        const Floats w = load(weights + s * kLanes);
        if (rows == kBlock) {
          PRUNEOFA_UNROLL
          for (int d = 0; d < kBlock; ++d) sum[d] += w * v[d * kLanes + s];
        } else {
          for (int d = 0; d < rows; ++d) sum[d] += w * v[d * kLanes + s];
        }
      }
    }
    for (int d = 0; d < rows; ++d) {
      float* place = out + (d0 + d) * kLanes;
      store(place, select(mine, sum[d] * inverse, load(place)));
    }
  }
}

}  // namespace lanes
