// Every path against the portable one, without Python: kernel by kernel through the table of paths, then whole
// encoders. For CPUs that are emulated; built and run by test_arm.py. Stops with a message at the first difference.
//
//   paths_check list                     the paths that this CPU can run
//   paths_check check PATH SEED          compares, and prints how much
//   paths_check multiply PATH LAYOUT N   N times one layer of 768 x 768, int8 or fp32, for instructions to be counted
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "linear.h"
#include "panels.h"
#include "pattern.h"
#include "random_model.h"
#include "scheduler.h"

using namespace pruneofa;

namespace {

int some_size(int most) {
  return std::min(most, one_of({1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 80, 129, 200}));
}

// Sums of int32, to the bit, also of the portable path against plain loops.
int check_sums(const Kernels& path) {
  for (int round = 0; round < 60; ++round) {
    const float sparsity = one_of({0, 3, 5, 9, 10}) / 10.0f;
    const Layer layer(some_size(129), some_size(200), sparsity, whole(0, Layer::kFills - 1), true);
    const int tokens = some_size(80), ends = whole(0, 2);
    std::vector<uint8_t> x(static_cast<std::size_t>(tokens) * layer.k);
    for (uint8_t& code : x) code = static_cast<uint8_t>(ends == 0 ? 255 : ends == 1 ? one_of({0, 255}) : whole(0, 255));
    std::vector<int32_t> wanted(static_cast<std::size_t>(tokens) * layer.n), sums(wanted.size());
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < layer.n; ++r) {
        double sum = 0;
        for (int c = 0; c < layer.k; ++c) sum += layer.weight[r * layer.k + c] * x[t * layer.k + c];
        wanted[static_cast<std::size_t>(t) * layer.n + r] = static_cast<int32_t>(sum);
      }
    }
    for (const Layout layout : kLayouts) {
      const Kernels kernels = choosing(path, layout);
      const Linear linear(layer.packed, kernels);
      linear.accumulate(x.data(), tokens, sums.data());
      expect(sums == wanted, path, "other sums;", linear.choice());
    }
  }
  return 60 * 4;
}

// What follows the sums: scales, bias, activation, addition to y, ranges, and rows of one thread only.
int check_outputs(const Kernels& path, const Kernels& portable, bool int8) {
  for (int round = 0; round < 60; ++round) {
    const Layer layer(some_size(129), some_size(200), one_of({0, 5, 9}) / 10.0f, Layer::kRandom, int8);
    const Linear wanted_linear(layer.packed, portable);
    const Kernels kernels = choosing(path, kLayouts[round % 4]);
    const Linear linear(layer.packed, kernels);
    const int panels = whole(1, 6), begin = layer.n > 16 ? whole(0, 1) * 16 : 0, end = layer.n;
    const std::size_t lanes = static_cast<std::size_t>(panels) * kLanes, tokens = lanes;
    std::vector<uint8_t> codes(tokens * layer.k);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(whole(0, 255));
    const Aligned<float> floats = filled<float>(lanes * layer.k, normal);
    const Aligned<float> scale = filled<float>(lanes, [] { return real(0.001f, 0.02f); });
    const Aligned<int32_t> zero = filled<int32_t>(lanes, [] { return whole(0, 255); });
    const Aligned<float> before = filled<float>(lanes * (end - begin), normal);
    Operands o;
    o.scale = scale.data(), o.zero = zero.data(), o.panels = panels;
    o.y_stride = static_cast<std::ptrdiff_t>(end - begin) * kLanes, o.first = begin;
    o.add = whole(0, 3) == 0;
    if (!o.add) o.activation = static_cast<Activation>(one_of({0, 1, 3, 4}));
    const Aligned<char> scratch(scratch_bytes(layer.k, static_cast<int>(tokens), 0));
    o.scratch = scratch.data();
    const auto run = [&](const Linear& one, Aligned<float>& y, Aligned<float>& ranges) {
      const Kernels& own = one.kernels();
      Aligned<char> x(panels * codes_bytes(layer.k, own.group_int8));
      rows_to_codes(codes.data(), tokens, layer.k, own.group_int8, own.code_offset, x.data());
      o.x = int8 ? static_cast<const void*>(x.data()) : floats.data();
      o.y = y.data(), o.ranges = o.add ? nullptr : ranges.data();
      one.run(o, begin, end);
    };
    Aligned<float> wanted = copy(before), y = copy(before), wanted_ranges(lanes * 2), ranges(lanes * 2);
    run(wanted_linear, wanted, wanted_ranges);
    run(linear, y, ranges);
    for (int p = 0; p < panels; ++p) {
      for (int i = 0; i < kLanes; ++i) {
        float low = 0, high = 0;
        for (int r = begin; r < end; ++r) {
          const std::size_t at = p * o.y_stride + (r - begin) * kLanes + i;
          double size = std::fabs(layer.bias[r]) + std::fabs(o.add ? before[at] : 0.0f);
          for (int c = 0; c < layer.k; ++c) {
            const double weight = std::fabs(layer.weight[static_cast<std::size_t>(r) * layer.k + c]);
            size += int8 ? weight * 510 * scale[p * kLanes + i] * layer.scale[r]
                         : weight * std::fabs(floats[(static_cast<std::size_t>(p) * layer.k + c) * kLanes + i]);
          }
          const bool close = std::fabs(y[at] - wanted[at]) <= 1e-6 * size + 1e-6;
          expect(close, path, "another output;", linear.choice());
          low = std::min(low, y[at]), high = std::max(high, y[at]);
        }
        const float* range = ranges.data() + p * 2 * kLanes + i;
        expect(o.add || (range[0] == low && range[kLanes] == high), path, "another range");
      }
    }
  }
  return 60;
}

bool near(const float* a, const float* b, std::size_t count, float relative) {
  for (std::size_t i = 0; i < count; ++i) {
    if (!(std::fabs(a[i] - b[i]) <= relative * (1 + std::fabs(b[i])))) return false;
  }
  return true;
}

// Ranges, quantization and LayerNorm of a panel.
int check_panels(const Kernels& path, const Kernels& portable) {
  const auto check = [&](bool holds, const char* what) { expect(holds, path, "another", what); };
  for (int round = 0; round < 60; ++round) {
    const int count = some_size(200), blocks = (count + kNormBlock - 1) / kNormBlock;
    const float constant = static_cast<float>(one_of({0, 0, 300})), size = std::pow(10.0f, real(-3, 3));
    const Aligned<float> x = filled<float>(count * kLanes, [&] { return size * (normal() + constant); });
    const Aligned<float> gamma = filled<float>(count, normal), beta = filled<float>(count, normal);
    struct Found {
      Aligned<float> range{2 * kLanes}, scale{kLanes}, moments, normal;
      Aligned<int32_t> zero{kLanes};
      Aligned<char> codes;
    };
    const auto run = [&](const Kernels& kernels) {
      Found found;
      kernels.range(x.data(), count, found.range.data());
      kernels.scales(found.range.data(), 1, 0, found.scale.data(), found.zero.data());
      found.codes = Aligned<char>(codes_bytes(count, kernels.group_int8));
      const int middle = count / 16 * 8 / 16 * 16;  // two threads
      for (const auto& [begin, end] : {std::pair(0, middle), std::pair(middle, count)}) {
        kernels.encode(x.data() + begin * kLanes, begin, end, count, found.scale.data(), found.zero.data(),
                       found.codes.data());
      }
      found.moments = Aligned<float>(static_cast<std::size_t>(blocks) * 2 * kLanes);
      kernels.moments(x.data(), count, found.moments.data());
      found.normal = copy(x);
      Aligned<float> range(2 * kLanes);
      kernels.normalize(found.normal.data(), count, count, found.moments.data(), gamma.data(), beta.data(), 1e-12f,
                        range.data());
      Aligned<float> wanted(2 * kLanes);
      kernels.range(found.normal.data(), count, wanted.data());
      check(same_bits(range.data(), wanted.data(), 2 * kLanes * sizeof(float)), "range of LayerNorm");
      return found;
    };
    const Found wanted = run(portable), found = run(path);
    for (int i = 0; i < kLanes; ++i) {
      float low = 0, high = 0;
      for (int f = 0; f < count; ++f) low = std::min(low, x[f * kLanes + i]), high = std::max(high, x[f * kLanes + i]);
      check(found.range[i] == low && found.range[kLanes + i] == high, "range");
    }
    check(near(found.scale.data(), wanted.scale.data(), kLanes, 1e-6f), "scale");
    check(same_bits(found.zero.data(), wanted.zero.data(), kLanes * sizeof(int32_t)), "zero point");
    int off = 0;
    for (std::size_t i = 0; i < found.codes.size(); ++i) {
      const int code = static_cast<uint8_t>(found.codes[i] + path.code_offset);
      const int difference = code - static_cast<uint8_t>(wanted.codes[i] + portable.code_offset);
      check(std::abs(difference) <= 1, "code");
      off += difference != 0;
    }
    check(off * 100 <= static_cast<int>(found.codes.size()), "code in more than one of a hundred places");
    const float rounding = 2e-6f * size * (1 + constant);
    check(near(found.moments.data(), wanted.moments.data(), found.moments.size(), rounding), "moment");
    // A constant that all have in common costs as many digits as it has.
    check(near(found.normal.data(), wanted.normal.data(), x.size(), 1e-5f * (1 + constant)), "LayerNorm");
  }
  return 60;
}

// All sequences of a batch and all heads, also against plain loops in double precision.
int check_attention(const Kernels& path, const Kernels& portable) {
  for (int round = 0; round < 40; ++round) {
    const int size = one_of({1, 3, 5, 8, 12, 20, 31, 32, 33, 64, 80}), heads = whole(1, 2), features = heads * size;
    std::vector<int> offsets{0};
    for (int s = whole(1, 4); s > 0; --s) offsets.push_back(offsets.back() + one_of({1, 2, 15, 16, 17, 33, 50, 70}));
    const int tokens = offsets.back(), panels = round_up(tokens, kLanes) / kLanes;
    const std::ptrdiff_t stride = std::ptrdiff_t{3} * features * kLanes;
    const float large = whole(0, 4) == 0 ? 30.0f : 1.0f;
    // Queries, keys, values; a kernel may read 16 features past the last head.
    const Aligned<float> all = filled<float>(panels * stride + kLanes * kLanes, [&] { return large * normal(); });
    const Aligned<float> distances = filled<float>(heads * (2 * 70 - 1), normal);
    const RelativeBias bias = whole(0, 1) ? RelativeBias(distances.data(), heads, 70) : RelativeBias();
    const auto run = [&](const Kernels& kernels) {
      Aligned<float> x = copy(all);
      const Aligned<char> scratch(scratch_bytes(64, panels * kLanes, size));
      for (int h = 0; h < heads; ++h) {
        for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
          Attention a;
          a.query = x.data() + static_cast<std::ptrdiff_t>(h) * size * kLanes;
          a.key = a.query + features * kLanes, a.value = a.key + features * kLanes;
          a.stride = stride, a.size = size, a.scale = 1 / std::sqrt(static_cast<float>(size));
          a.begin = offsets[s], a.end = offsets[s + 1];
          a.bias = bias.of_head(h);
          a.scratch = scratch.data();
          kernels.attention(a);
        }
      }
      return x;
    };
    const Aligned<float> wanted = run(portable), found = run(path);
    const auto at = [&](int token, int feature) { return token / kLanes * stride + feature * kLanes + token % kLanes; };
    for (int h = 0; h < heads; ++h) {
      const float* own = bias.of_head(h);
      for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
        for (int t = offsets[s]; t < offsets[s + 1]; ++t) {
          std::vector<double> score, sum(size);
          for (int key = offsets[s]; key < offsets[s + 1]; ++key) {
            double dot = 0;
            for (int d = h * size; d < (h + 1) * size; ++d) dot += double{all[at(t, d)]} * all[at(key, features + d)];
            score.push_back(dot / std::sqrt(static_cast<double>(size)) + (own ? own[t - key] : 0.0f));
          }
          const double top = *std::max_element(score.begin(), score.end());
          double total = 0;
          for (std::size_t key = 0; key < score.size(); ++key) {
            const double weight = std::exp(score[key] - top);
            total += weight;
            const int token = offsets[s] + static_cast<int>(key);
            for (int d = 0; d < size; ++d) sum[d] += weight * all[at(token, 2 * features + h * size + d)];
          }
          for (int d = 0; d < size; ++d) {
            const double exact = sum[d] / total, tolerance = 1e-5 * large * large * large;
            expect(std::fabs(found[at(t, h * size + d)] - exact) <= tolerance, path, "another attention");
            expect(std::fabs(wanted[at(t, h * size + d)] - exact) <= tolerance, portable, "another attention");
          }
        }
      }
    }
    for (int token = 0; token < panels * kLanes; ++token) {  // keys, values and lanes without a token
      for (int f = token < tokens ? features : 0; f < 3 * features; ++f) {
        expect(found[at(token, f)] == all[at(token, f)], path, "attention wrote what is not its own");
      }
    }
  }
  return 40;
}

// Products of training against plain loops.
int check_patterns(const Kernels& path) {
  for (int round = 0; round < 40; ++round) {
    const int n = some_size(129), k = some_size(200), tokens = some_size(200), threads = whole(1, 3);
    const int kept_of_ten = one_of({0, 1, 3, 10});
    const Aligned<bool> kept = filled<bool>(n * k, [&] { return whole(0, 9) < kept_of_ten; });
    const Aligned<float> x = filled<float>(tokens * k, normal), dy = filled<float>(tokens * n, normal);
    const Aligned<float> weight = filled<float>(n * k, normal), bias = filled<float>(n, normal);
    const Aligned<float> y(tokens * n), dx(tokens * k), dw(n * k);
    const Pattern pattern(kept.data(), n, k, path);
    pattern.multiply(x.data(), tokens, weight.data(), bias.data(), y.data(), threads);
    pattern.multiply_transposed(dy.data(), tokens, weight.data(), dx.data(), threads);
    pattern.weight_gradient(x.data(), dy.data(), tokens, dw.data(), threads);
    std::vector<double> wanted_y(tokens * n), wanted_dx(tokens * k), wanted_dw(n * k);
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < n; ++r) wanted_y[t * n + r] = bias[r];
      for (int at = 0; at < n * k; ++at) {
        const int r = at / k, c = at % k;
        if (!kept[at]) continue;
        wanted_y[t * n + r] += double{weight[at]} * x[t * k + c];
        wanted_dx[t * k + c] += double{weight[at]} * dy[t * n + r];
        wanted_dw[at] += double{dy[t * n + r]} * x[t * k + c];
      }
    }
    for (const auto& [found, wanted] : {std::pair{&y, &wanted_y}, {&dx, &wanted_dx}, {&dw, &wanted_dw}}) {
      for (std::size_t i = 0; i < wanted->size(); ++i) {
        expect(std::fabs((*found)[i] - (*wanted)[i]) <= 2e-4, path, "another product with a pattern");
      }
    }
  }
  return 40;
}

std::vector<float> forward(Scheduler& scheduler, const Batch& batch, int teams, int width) {
  std::vector<float> out(batch.ids.size() * scheduler.encoder().options().hidden);
  scheduler.forward(batch, teams, width, out.data());
  return out;
}

// Whether the threads of a team meet as often as the encoder says.
bool meets_as_told(const Encoder& encoder) {
  const std::vector<int32_t> ids(20, 1), offsets{0, 20};
  Sequences sequences;
  sequences.ids = sequences.positions = sequences.types = ids.data();
  sequences.offsets = offsets.data(), sequences.tokens = 20, sequences.count = 1;
  Team team;
  encoder.reserve(team, 2, 20);
  team.panels = 2;
  std::vector<float> out(20 * static_cast<std::size_t>(encoder.options().hidden));
  std::thread other([&] { encoder.pass(team, 1, sequences, out.data()); });
  encoder.pass(team, 0, sequences, out.data());
  other.join();
  return team.barrier.passed() == static_cast<uint32_t>(encoder.barriers());
}

// Whole encoders within the tolerances of test_encoder.py; a sequence alone, on one thread, has the same bits.
int check_encoders(const Kernels& path, const Kernels& portable) {
  const int sizes[][3] = {{64, 4, 100}, {36, 3, 50}, {20, 5, 33}, {96, 1, 130}};
  int done = 0;
  for (const auto& [hidden, heads, inner] : sizes) {
    for (int precision = 0; precision < 3; ++precision) {
      const Model model(hidden, heads, inner, one_of({0, 4, 9}) / 10.0f, precision > 0, precision == 2);
      const Encoder encoder = model.build(path);
      expect(meets_as_told(encoder) && encoder.barriers() == 1 + 2 * (precision == 1 ? 10 : 6), path,
             "threads wait for each other more or less often than told");
      Scheduler wanted(model.build(portable), 1), one(model.build(path), 1), three(model.build(path), 3);
      Batch batch;
      batch.offsets = {0};
      for (const int length : {5, 16, 1, 33, 17}) {
        for (int t = 0; t < length; ++t) batch.ids.push_back(whole(0, 59)), batch.positions.push_back(t);
        batch.offsets.push_back(batch.offsets.back() + length);
      }
      batch.types.assign(batch.ids.size(), 0);
      batch.parts = {0, 5};
      const std::vector<float> exact = forward(wanted, batch, 1, 1), found = forward(three, batch, 1, 3);
      double squares = 0, largest = 0;
      for (std::size_t i = 0; i < found.size(); ++i) {
        const double error = std::fabs(found[i] - exact[i]);
        expect(std::isfinite(found[i]), path, "an encoder's output is not finite");
        squares += error * error, largest = std::max(largest, error);
      }
      const double rms = std::sqrt(squares / static_cast<double>(found.size()));
      expect(precision == 0 ? largest <= 5e-5 : rms <= 0.02 && largest <= 0.2,
             path, "another encoder;", std::to_string(largest));
      for (int s = 0; s < 5; ++s) {
        const int begin = batch.offsets[s], end = batch.offsets[s + 1];
        Batch alone;
        alone.ids.assign(batch.ids.begin() + begin, batch.ids.begin() + end);
        alone.positions.assign(batch.positions.begin() + begin, batch.positions.begin() + end);
        alone.types.assign(alone.ids.size(), 0);
        alone.offsets = {0, end - begin}, alone.parts = {0, 1};
        const std::vector<float> bits = forward(one, alone, 1, 1);
        const bool same = same_bits(bits.data(), found.data() + begin * hidden, bits.size() * sizeof(float));
        expect(same, path, "other bits in a batch and on three threads");
      }
      ++done;
    }
  }
  return done;
}

// 128 tokens. Instructions of the product alone are the difference of two runs.
void multiply(const Kernels& path, const std::string& layout, int repeats) {
  const bool int8 = layout.substr(0, 4) != "fp32";
  const std::string name = int8 ? layout : layout.substr(5);
  const auto found = std::find(std::begin(kLayoutNames), std::end(kLayoutNames), name) - std::begin(kLayoutNames);
  const Layer layer(768, 768, found == 0 ? 0.0f : 0.9f, found == 3 ? Layer::kFour : Layer::kRandom, int8);
  const Kernels kernels = choosing(path, kLayouts[found]);
  const Linear linear(layer.packed, kernels);
  const Aligned<char> x(8 * 768 * kLanes * sizeof(float)), scratch(scratch_bytes(768, 128, 0));
  const Aligned<float> scale(128);
  const Aligned<int32_t> zero(128), sums(128 * 768);
  Operands o;
  o.x = x.data(), o.scale = scale.data(), o.zero = zero.data(), o.panels = 8, o.scratch = scratch.data();
  o.sums = int8 ? sums.data() : nullptr;
  o.y = reinterpret_cast<float*>(sums.data()), o.y_stride = 768 * kLanes;
  for (int i = 0; i < repeats; ++i) linear.run(o, 0, 768);
  std::printf("%zu\n", layer.values.size() * 128);
}

}  // namespace

int main(int, char** arguments) {
  const std::string verb = arguments[1];
  if (verb == "list") {
    for (const Kernels* kernels : available_kernels()) std::printf("%s\n", kernels->isa);
    return 0;
  }
  const Kernels& path = kernels_for(arguments[2]);
  const Kernels& portable = *built_kernels().front();
  if (verb == "multiply") {
    multiply(path, arguments[3], std::atoi(arguments[4]));
    return 0;
  }
  random_bits.seed(static_cast<unsigned>(std::atoi(arguments[3])));
  std::printf("sums %d\n", check_sums(path));
  std::printf("int8 outputs %d\n", check_outputs(path, portable, true));
  std::printf("fp32 outputs %d\n", check_outputs(path, portable, false));
  std::printf("panels %d\n", check_panels(path, portable));
  std::printf("attention %d\n", check_attention(path, portable));
  std::printf("patterns %d\n", check_patterns(path));
  std::printf("encoders %d\n", check_encoders(path, portable));
}
