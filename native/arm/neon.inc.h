// What the paths for ARM share: vectors of 16 bytes, their products and gathered words. Included as lanes.inc.h is, by
// a file that defines
//
//   PRUNEOFA_DOT(sum, codes, words)             the path's product: four of codes (uint8x16_t) and weights (int8x16_t)
//   PRUNEOFA_DOT_LANE(sum, codes, words, lane)  are added to each int32; in the second form, with one word of the four
//   PRUNEOFA_CODE_OFFSET 128                    if it multiplies int8 by int8
#define PRUNEOFA_REGISTER 16
// The number where one of the two is NaN.
#define PRUNEOFA_MIN(a, b) vminnmq_f32((float32x4_t)(a), (float32x4_t)(b))
#define PRUNEOFA_MAX(a, b) vmaxnmq_f32((float32x4_t)(a), (float32x4_t)(b))
#include "portable/lanes.inc.h"
#include "portable/math.inc.h"
#include "portable/layers.inc.h"
#include "portable/linear.inc.h"
#include "portable/ceilings.inc.h"
#include "portable/training.inc.h"

// For training, see there.
struct Neon {
  static constexpr int kTile = 4;

  static void transpose(const float* from, std::ptrdiff_t from_stride, float* to, std::ptrdiff_t to_stride) {
    const float32x4x2_t a = vtrnq_f32(vld1q_f32(from), vld1q_f32(from + from_stride));
    const float32x4x2_t b = vtrnq_f32(vld1q_f32(from + 2 * from_stride), vld1q_f32(from + 3 * from_stride));
    PRUNEOFA_UNROLL
    for (int i = 0; i < 2; ++i) {
      vst1q_f32(to + i * to_stride, vcombine_f32(vget_low_f32(a.val[i]), vget_low_f32(b.val[i])));
      vst1q_f32(to + (i + 2) * to_stride, vcombine_f32(vget_high_f32(a.val[i]), vget_high_f32(b.val[i])));
    }
  }

  static void add_lanes(const Vector (&sum)[4], float* out) {
    const float32x4_t a = vpaddq_f32((float32x4_t)sum[0], (float32x4_t)sum[1]);
    const float32x4_t b = vpaddq_f32((float32x4_t)sum[2], (float32x4_t)sum[3]);
    vst1q_f32(out, vaddq_f32(vld1q_f32(out), vpaddq_f32(a, b)));
  }
};

struct Int8 {
  struct Sum {
    int32x4_t quarter[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
  };
  using Vector = uint8x16_t;
  using Word = int8x16_t;
  using Number = int32_t;
  static constexpr int kGroup = 4, kGroupBytes = 64;
  static constexpr bool kPadded = true;
  static Vector load(const char* x) { return vld1q_u8(reinterpret_cast<const uint8_t*>(x)); }
  static Word word(uint32_t w) { return vreinterpretq_s8_u32(vdupq_n_u32(w)); }
  static Word words(const uint32_t* w) { return vreinterpretq_s8_u32(vld1q_u32(w)); }
  static void add(Sum& sum, const char* x, Word word) {
    const uint8x16x4_t codes = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(x));
    PRUNEOFA_UNROLL
    for (int q = 0; q < 4; ++q) sum.quarter[q] = PRUNEOFA_DOT(sum.quarter[q], codes.val[q], word);
  }
  template <int Lane>
  static void add(int32x4_t& sum, Vector codes, Word words) {
    sum = PRUNEOFA_DOT_LANE(sum, codes, words, Lane);
  }
  static lanes::Ints value(const Sum& sum) {
    lanes::Ints v;
    memcpy(&v, &sum, sizeof v);
    return v;
  }
};

struct Float {
  struct Sum {
    float32x4_t quarter[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
  };
  using Vector = float32x4_t;
  using Word = float32x4_t;
  using Number = float;
  static constexpr int kGroup = 1, kGroupBytes = 64;
  static constexpr bool kPadded = false;
  static Vector load(const char* x) { return vld1q_f32(reinterpret_cast<const float*>(x)); }
  static Word word(uint32_t w) { return vreinterpretq_f32_u32(vdupq_n_u32(w)); }
  static Word words(const uint32_t* w) { return vreinterpretq_f32_u32(vld1q_u32(w)); }
  static void add(Sum& sum, const char* x, Word word) {
    const float32x4x4_t floats = vld1q_f32_x4(reinterpret_cast<const float*>(x));
    PRUNEOFA_UNROLL
    for (int q = 0; q < 4; ++q) sum.quarter[q] = vfmaq_f32(sum.quarter[q], floats.val[q], word);
  }
  template <int Lane>
  static void add(float32x4_t& sum, Vector x, Word words) {
    sum = vfmaq_laneq_f32(sum, x, words, Lane);
  }
  static lanes::Floats value(const Sum& sum) {
    lanes::Floats v;
    memcpy(&v, &sum, sizeof v);
    return v;
  }
};

// Dense blocks of four outputs, whose words of one group are one register: a product takes one of them, and nothing is
// broadcast.
template <class Path>
inline void dense_by_lane(const Weights& w, const Operands& o, int begin, int end) {
  const int groups = (Path::kPadded ? round_up(w.inputs, 64) : w.inputs) / Path::kGroup;
  const std::ptrdiff_t panel_bytes = static_cast<std::ptrdiff_t>(groups) * Path::kGroupBytes;
  for (int n = begin; n < end; n += 4) {
    const uint32_t* const block = w.words + static_cast<std::ptrdiff_t>(n) * groups;
    for (int p = 0; p < o.panels; ++p) {
      typename Path::Sum sum[4][1] = {};
      const char* x = static_cast<const char*>(o.x) + p * panel_bytes;
      for (int g = 0; g < groups; ++g, x += Path::kGroupBytes) {
        const typename Path::Word words = Path::words(block + g * 4);
        PRUNEOFA_UNROLL
        for (int q = 0; q < 4; ++q) {
          const typename Path::Vector v = Path::load(x + 16 * q);
          Path::template add<0>(sum[0][0].quarter[q], v, words);
          Path::template add<1>(sum[1][0].quarter[q], v, words);
          Path::template add<2>(sum[2][0].quarter[q], v, words);
          Path::template add<3>(sum[3][0].quarter[q], v, words);
        }
      }
      StoredSums<Path, 4, 1> stored;
      store_sums(stored, sum);
      epilogue(w, o, n, p, stored);
    }
  }
}

inline void linear_float(const Weights& w, const Operands& o, int begin, int end) {
  w.sparse ? sparse_linear<Float>(w, o, begin, end) : dense_by_lane<Float>(w, o, begin, end);
}

// Gathered words from rows of 32 bytes per input, 16 tokens of each of two panels. Eight shuffles interleave the rows
// of four inputs to the codes of a panel.
struct Gather {
  static constexpr int kGroup = 4, kGroupBytes = 64, kPanels = 2;

  static void transpose_codes(const char* x, std::ptrdiff_t panel_bytes, int groups, int count, char* rows) {
    for (int i = 0; i < count; ++i) {
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(x + i * panel_bytes);
      uint8_t* row = reinterpret_cast<uint8_t*>(rows) + i * 16;
      for (int g = 0; g < groups; ++g, codes += 64, row += 4 * 32) {
        const uint8x16x4_t by_input = vld4q_u8(codes);
        PRUNEOFA_UNROLL
        for (int k = 0; k < 4; ++k) vst1q_u8(row + k * 32, by_input.val[k]);
      }
    }
  }

  static void interleave(const char* const (&row)[4], Int8::Vector (&codes)[4]) {
    const uint8x16_t a = Int8::load(row[0]), b = Int8::load(row[1]), c = Int8::load(row[2]), d = Int8::load(row[3]);
    const uint16x8_t low_ab = vreinterpretq_u16_u8(vzip1q_u8(a, b)), low_cd = vreinterpretq_u16_u8(vzip1q_u8(c, d));
    const uint16x8_t high_ab = vreinterpretq_u16_u8(vzip2q_u8(a, b)), high_cd = vreinterpretq_u16_u8(vzip2q_u8(c, d));
    codes[0] = vreinterpretq_u8_u16(vzip1q_u16(low_ab, low_cd));
    codes[1] = vreinterpretq_u8_u16(vzip2q_u16(low_ab, low_cd));
    codes[2] = vreinterpretq_u8_u16(vzip1q_u16(high_ab, high_cd));
    codes[3] = vreinterpretq_u8_u16(vzip2q_u16(high_ab, high_cd));
  }

  // One output, or four that share their inputs and whose words are a register.
  template <int Shared, int Panels>
  static void block(const Weights& w, const Operands& o, int n, int p, const char* rows) {
    Int8::Sum sum[Shared][Panels] = {};
    const uint32_t end = w.row_start[n / Shared + 1];
    for (uint32_t e = w.row_start[n / Shared]; e < end; ++e) {
      const uint16_t* index = w.index + std::size_t{e} * 4;
      const uint32_t* words = w.words + std::size_t{e} * Shared;
      const Int8::Word word = Shared == 1 ? Int8::word(*words) : Int8::words(words);
      const char* row[4];
      PRUNEOFA_UNROLL
      for (int k = 0; k < 4; ++k) {
        row[k] = rows + std::size_t{index[k]} * 32;
        // Hides where it comes from: the compiler would compute the address of each load, instead of loading pairs.
        if (Panels > 1) __asm__("" : "+r"(row[k]));
      }
      PRUNEOFA_UNROLL
      for (int i = 0; i < Panels; ++i) {
        Int8::Vector codes[4];
        interleave({row[0] + i * 16, row[1] + i * 16, row[2] + i * 16, row[3] + i * 16}, codes);
        PRUNEOFA_UNROLL
        for (int q = 0; q < 4; ++q) {
          Int8::add<0>(sum[0][i].quarter[q], codes[q], word);
          if constexpr (Shared == 4) {
            Int8::add<1>(sum[1][i].quarter[q], codes[q], word);
            Int8::add<2>(sum[2][i].quarter[q], codes[q], word);
            Int8::add<3>(sum[3][i].quarter[q], codes[q], word);
          }
        }
      }
    }
    StoredSums<Int8, Shared, Panels> stored;
    store_sums(stored, sum);
    epilogue(w, o, n, p, stored);
  }

  static void multiply(const Weights& w, const Operands& o, int n, int p, int count, const char* rows) {
    if (w.shared == 1) return count == 2 ? block<1, 2>(w, o, n, p, rows) : block<1, 1>(w, o, n, p, rows);
    // The sums of two panels would not fit the registers.
    for (int i = 0; i < count; ++i) block<4, 1>(w, o, n, p + i, rows + i * 16);
  }
};
