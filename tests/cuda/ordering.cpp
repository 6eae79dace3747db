// Steps of every kind on grids of blocks that run at the same time, for ThreadSanitizer. Prints a
// line for each: what kind, how many blocks, and a hash of all that the steps left behind.
#include "emulator.cpp"

namespace {

// Layer (-1: excluded) and elements: layers of several groups of tiles, which any number of
// blocks share, and tensors with buckets of every length. Warps of one block and of three claim
// some of the tiles; those of five have no more than two each.
constexpr int32_t kLayer[] = {0, 0, 1, 1, -1};
constexpr int64_t kNumel[] = {48 * 4096 + 5, 700, 3000, 8192, 600};
constexpr int kTensors = 5, kLayers = 2;

struct Steps {
  const char* name;
  double exact, match_norm, max_norm;
  int driver;  // 12000: tables hold three tensors, so that a step takes several launches
};
constexpr Steps kSteps[] = {
    {"lagged", 0, 0, 0, 13000},         {"exact", 1, 0, 0, 13000},
    {"match_norm", 0, 1, 0, 13000},     {"max_norm", 0, 0, 0.5, 13000},
    {"lagged, launches", 0, 0, 0, 12000}, {"exact, launches", 1, 0, 0, 12000},
};

uint64_t hash(uint64_t h, const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i)
    h = (h ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3;
  return h;
}

template <class T>
uint64_t hash(uint64_t h, const std::vector<T>& values) {
  return hash(h, values.data(), values.size() * sizeof(T));
}

uint64_t run(const Steps& kind, int blocks, uint32_t seed) {
  runtime_answer("driver", kind.driver);
  int32_t log2[kTensors];
  int64_t first_bucket[kTensors], buckets = 0;
  const uint32_t first_word[kTensors] = {};
  for (int t = 0; t < kTensors; ++t) {
    log2[t] = bucket_log2(kNumel[t]);
    first_bucket[t] = buckets;
    buckets += (kNumel[t] >> log2[t]) + 16;
  }
  // In the order that emulated_new() reads: decisions in each step, by the mean fluctuation.
  const double options[] = {0, 0, 0, 0, kind.exact, kind.match_norm, kind.max_norm, 0.9, 1, 1, 0, 0, 0};
  std::vector<double> values(kGlobalFields + kLayers * kLayerFields);
  reinterpret_cast<GlobalState*>(values.data())->factor = 2.0;
  std::vector<float> sketch(2 * buckets);
  std::vector<int32_t> parity(kTensors - 1);
  void* const engine = emulated_new(kLayer, kNumel, log2, first_bucket, first_word, kTensors,
                                    kLayers, options, nullptr, values.data(), sketch.data(),
                                    buckets, parity.data());
  const int32_t dtypes[kTensors] = {};  // fp32
  uint8_t written[kTensors];
  uint64_t h = 0xcbf29ce484222325;
  for (int step = 0; step < 3; ++step) {
    std::mt19937 random(step);
    std::vector<std::vector<float>> gradients;
    void* addresses[kTensors];
    for (int t = 0; t < kTensors; ++t) {
      gradients.emplace_back(kNumel[t]);
      for (float& x : gradients[t]) x = static_cast<float>(random()) * 0x1p-32f - 0.4f;
      addresses[t] = gradients[t].data();
    }
    if (!emulated_step(engine, addresses, dtypes, nullptr, nullptr, 1, 1, 1, nullptr, nullptr,
                       nullptr, 0, written, blocks, 1, seed + step)) {
      std::printf("%s: %s\n", kind.name, emulated_problem());
      std::exit(1);
    }
    for (const std::vector<float>& gradient : gradients) h = hash(h, gradient);
  }
  emulated_delete(engine);
  return hash(hash(hash(h, values), sketch), parity);
}

}  // namespace

int main() {
  for (const Steps& kind : kSteps)
    for (int blocks : {1, 3, 5})
      std::printf("%s|%d|%016llx\n", kind.name, blocks,
                  static_cast<unsigned long long>(run(kind, blocks, 10 * blocks)));
}
