// Rounding, exponential and activation functions of sixteen floats. Included after lanes.inc.h.

namespace lanes {

// For |x| < 2^22: x + kRound has no fraction bits, so its lowest bits are x rounded half to even.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

static inline Floats round(const Floats& x) { return (x + kRound) - kRound; }

// e^x to 2e-7 relative near 0 and to 2e-6 at -87, for x <= 0; below that it is the smallest normal float instead of a
// denormal or 0. Where the path multiplies and adds in one rounding, the fraction r loses nothing of x.
static inline Floats exponential_below(const Floats& x) {
  constexpr float kLog2E = 1.44269504f;
  const Floats y = maximum(x, broadcast(-87.3365f));
  const Floats shifted = y * kLog2E + kRound;
  const Floats r = y * kLog2E - (shifted - kRound);
  // 2^r, minimax on |r| <= 1/2.
  Floats p = r * 1.3264726899082373e-3f + 9.671512660591575e-3f;
  p = p * r + 5.550733744244122e-2f;
  p = p * r + 2.4022242084918582e-1f;
  p = p * r + 6.93146977598471e-1f;
  p = p * r + 1.0f;
  return as_floats(as_ints(p) + (as_ints(shifted) << 23));
}

// e^x with the same error, for |x| <= 87.
static inline Floats exponential(Floats x) {
  x = maximum(minimum(x, broadcast(87.0f)), broadcast(-87.0f));
  const Floats small = exponential_below(minimum(x, 0.0f - x));
  return select(x < broadcast(0.0f), small, 1.0f / small);
}

#if defined(PRUNEOFA_LOOKUP)  // the path's instruction: 16 of 32 floats by the lowest 5 bits of an index
// |x| * (Phi(|x|) - 1/2) by quartics around 0, 1/6, ... 31/6, fitted to Chebyshev points: coefficients of r^0 .. r^4
// with |x| = (n + r) / 6. The last is |x| / 2.
alignas(64) constexpr float kGelu[5][32] = {
    {0.00000000e+00f, 1.10306386e-02f, 4.35195528e-02f, 9.57312286e-02f, 1.65004969e-01f, 2.48059675e-01f,
     3.41344744e-01f, 4.41382080e-01f, 5.45051694e-01f, 6.49789214e-01f, 7.53682733e-01f, 8.55476379e-01f,
     9.54499722e-01f, 1.05055141e+00f, 1.14376426e+00f, 1.23447585e+00f, 1.32311904e+00f, 1.41014075e+00f,
     1.49595034e+00f, 1.58089185e+00f, 1.66523647e+00f, 1.74918580e+00f, 1.83288288e+00f, 1.91642439e+00f,
     1.99987328e+00f, 2.08326888e+00f, 2.16663480e+00f, 2.24998474e+00f, 2.33332610e+00f, 2.41666341e+00f,
     2.49999857e+00f, 2.58333325e+00f},
    {0.00000000e+00f, 2.19594948e-02f, 4.27254662e-02f, 6.12491295e-02f, 7.67454058e-02f, 8.87663141e-02f,
     9.72192064e-02f, 1.02332078e-01f, 1.04578137e-01f, 1.04578204e-01f, 1.03000827e-01f, 1.00476794e-01f,
     9.75386575e-02f, 9.45890024e-02f, 9.18948650e-02f, 8.96018595e-02f, 8.77598226e-02f, 8.63523409e-02f,
     8.53242725e-02f, 8.46039578e-02f, 8.41186419e-02f, 8.38036239e-02f, 8.36063549e-02f, 8.34870338e-02f,
     8.34172741e-02f, 8.33778158e-02f, 8.33562091e-02f, 8.33447576e-02f, 8.33388716e-02f, 8.33359361e-02f,
     8.33345279e-02f, 8.33333358e-02f},
    {1.10817226e-02f, 1.07770842e-02f, 9.90048051e-03f, 8.55714083e-03f, 6.90165488e-03f, 5.11183077e-03f,
     3.36070894e-03f, 1.79243169e-03f, 5.06208686e-04f, -4.49710205e-04f, -1.07459642e-03f, -1.40480127e-03f,
     -1.49974937e-03f, -1.42778060e-03f, -1.25444366e-03f, -1.03465805e-03f, -8.08975543e-04f, -6.03289343e-04f,
     -4.30874730e-04f, -2.95575941e-04f, -1.95165019e-04f, -1.24236045e-04f, -7.63392163e-05f, -4.53243993e-05f,
     -2.60224315e-05f, -1.44570640e-05f, -7.77616788e-06f, -4.05138826e-06f, -2.04533444e-06f, -1.00090449e-06f,
     -4.74913548e-07f, 0.00000000e+00f},
    {0.00000000e+00f, -2.00593073e-04f, -3.76762939e-04f, -5.08452009e-04f, -5.83318761e-04f, -5.98347280e-04f,
     -5.59469510e-04f, -4.79471404e-04f, -3.74848081e-04f, -2.62442452e-04f, -1.56625174e-04f, -6.75105330e-05f,
     -3.61302938e-07f, 4.39734395e-05f, 6.79416044e-05f, 7.59061295e-05f, 7.28526356e-05f, 6.34137323e-05f,
     5.12944353e-05f, 3.90676578e-05f, 2.82411802e-05f, 1.94774966e-05f, 1.28630054e-05f, 8.15556450e-06f,
     4.97424980e-06f, 2.92299706e-06f, 1.65684980e-06f, 9.06812204e-07f, 4.79601397e-07f, 2.45280631e-07f,
     1.21369936e-07f, 0.00000000e+00f},
    {-5.12242186e-05f, -4.80740491e-05f, -3.91921058e-05f, -2.61506320e-05f, -1.11635391e-05f, 3.40225392e-06f,
     1.55102534e-05f, 2.38128196e-05f, 2.78113403e-05f, 2.78076441e-05f, 2.46929994e-05f, 1.96553101e-05f,
     1.38901587e-05f, 8.38135111e-06f, 3.78321602e-06f, 4.03095243e-07f, -1.74169156e-06f, -2.82838710e-06f,
     -3.12842963e-06f, -2.92546861e-06f, -2.46236368e-06f, -1.91706408e-06f, -1.40068516e-06f, -9.68819791e-07f,
     -6.37986602e-07f, -4.01567235e-07f, -2.42285296e-07f, -1.40428412e-07f, -7.83192391e-08f, -4.20867181e-08f,
     -2.18148273e-08f, 0.00000000e+00f},
};

// x * Phi(x) to 2e-7 up to x = 1 and to a few 1e-8 of x beyond: as exact as float's own rounding, because a code that
// differs by one makes int8 differ from what training simulated. Fewer instructions than the polynomial
// below, and many of these are shuffles, which have a port of their own: tile instructions leave only one for
// multiplications.
static inline Floats gelu(const Floats& x) {
  const Floats a = as_floats(as_ints(x) & 0x7fffffff);
  const Floats shifted = minimum(a * 6.0f + kRound, broadcast(kRound + 31.0f));
  const Floats r = a * 6.0f - (shifted - kRound);
  const auto coefficient = [&](int i) { return PRUNEOFA_LOOKUP(kGelu[i], as_ints(shifted)); };
  Floats p = coefficient(4) * r + coefficient(3);
  p = ((p * r + coefficient(2)) * r + coefficient(1)) * r + coefficient(0);
  return x * 0.5f + p;
}
#else
// x * Phi(x) to 2e-7 up to x = 1 and to a few 1e-7 of x beyond. Phi - 1/2 is x times a polynomial in
// t = 2 x^2 / 25 - 1, fitted to minimise the largest error of the product (docs/kernels.md); beyond |x| = 5 Phi is
// taken from there.
static inline Floats gelu(const Floats& x) {
  const Floats c = maximum(minimum(x, broadcast(5.0f)), broadcast(-5.0f));
  const Floats t = c * c * 0.08f - 1.0f;
  Floats p = t * 8.233354310505092e-05f - 0.00027902069268748164f;
  p = p * t + 0.00043229450238868594f;
  p = p * t - 0.0007611344335600734f;
  p = p * t + 0.0018105822382494807f;
  p = p * t - 0.0036818194203078747f;
  p = p * t + 0.006457002833485603f;
  p = p * t - 0.010608281008899212f;
  p = p * t + 0.01634841039776802f;
  p = p * t - 0.023418579250574112f;
  p = p * t + 0.03145742416381836f;
  p = p * t - 0.040425412356853485f;
  p = p * t + 0.05151917412877083f;
  p = p * t - 0.07029683887958527f;
  p = p * t + 0.14136379957199097f;
  return x * (c * p + 0.5f);
}
#endif
// The tanh approximation of GELU, as in GPT-2: x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3)).
static inline Floats gelu_tanh(const Floats& x) {
  const Floats u = x * (x * x * 0.044715f + 1.0f) * -1.59576912f;
  return x / (exponential(u) + 1.0f);
}

static inline Floats activate(const Floats& x, Activation kind) {
  if (kind == Activation::kNone) return x;
  if (kind == Activation::kGelu) return gelu(x);
  if (kind == Activation::kGeluTanh) return gelu_tanh(x);
  return select(x < broadcast(0.0f), broadcast(0.0f), x);  // keeps NaN, which `maximum` may not
}

}  // namespace lanes
