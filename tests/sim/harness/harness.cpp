#include "harness.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "numbers.h"
#include "simulator.h"

namespace harness {
namespace {

uint64_t state = 1;

uint64_t next() {  // splitmix64
  uint64_t x = state += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

}  // namespace

void launched(int status) {
  if (status == 0) return;
  std::fprintf(stderr, "launcher returned %d: %s\n", status, pikv_sim_last_error());
  std::exit(kFailed);
}

void equal(const char* what, const void* got, const void* expected, size_t bytes) {
  if (bytes == 0 || std::memcmp(got, expected, bytes) == 0) return;
  std::fprintf(stderr, "%s: wrong result\n", what);
  std::exit(kDifferent);
}

void near(const char* what, const std::vector<float>& got, const std::vector<float>& expected, float tolerance) {
  float largest = 0.0f;
  for (const float x : expected)
    if (std::isfinite(x)) largest = std::fmax(largest, std::fabs(x));
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == expected[i] || std::fabs(got[i] - expected[i]) <= tolerance * largest) continue;
    std::fprintf(stderr, "%s: wrong result, element %zu is %.9g, not %.9g\n", what, i, got[i], expected[i]);
    std::exit(kDifferent);
  }
}

std::vector<float> numbers(int64_t count, float low, float high) {
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24f;
  return x;
}

std::vector<uint8_t> bytes(int64_t count) {
  std::vector<uint8_t> x(static_cast<size_t>(count));
  for (uint8_t& v : x) v = static_cast<uint8_t>(next() >> 32);
  return x;
}

std::vector<int64_t> indices(int64_t count, int64_t limit) {
  std::vector<int64_t> x(static_cast<size_t>(count));
  for (int64_t& v : x) v = static_cast<int64_t>(next() >> 33) % limit;
  return x;
}

std::vector<uint16_t> halves(const std::vector<float>& x) {
  std::vector<uint16_t> y;
  for (const float v : x) y.push_back(pikv::float_to_half(v, pikv::Rounding::kNearest));
  return y;
}

std::vector<float> unwritten(int64_t count) {
  return std::vector<float>(static_cast<size_t>(count), std::numeric_limits<float>::quiet_NaN());
}

StoredKeys::StoredKeys(int64_t groups, int64_t block_size, int64_t dim, int hi_bits, int lo_bits) : keys{} {
  const int64_t rows = kBlocks * groups * block_size;
  if (hi_bits == 0) raw = numbers(rows * dim);
  keys = {.raw = raw.data(),
          .dtype = pikv::Dtype::kFloat32,
          .hi_bits = hi_bits ? hi_bits : 2,
          .lo_bits = lo_bits,
          .groups = groups,
          .block_size = block_size,
          .dim = dim};
  if (hi_bits) keys.raw = nullptr;
  high = bytes(rows * dim * keys.hi_bits / 8);
  low = bytes(rows * dim * lo_bits / 8);
  scale = halves(numbers(kBlocks * groups * dim, 0.01f, 0.2f));
  zero = halves(numbers(kBlocks * groups * dim));
  keys.high = high.data(), keys.low = lo_bits ? low.data() : nullptr, keys.scale = scale.data(),
  keys.zero = zero.data();
}

std::vector<float> StoredKeys::decoded(int64_t matrix) const {
  const int64_t size = keys.block_size * keys.dim;
  if (keys.raw) return {raw.begin() + matrix * size, raw.begin() + (matrix + 1) * size};
  std::vector<float> k(static_cast<size_t>(size));
  pikv::scalar_kernels()->dequantize(keys.high + matrix * size * keys.hi_bits / 8,
                                     keys.low ? keys.low + matrix * size * keys.lo_bits / 8 : nullptr,
                                     keys.scale + matrix * keys.dim, keys.zero + matrix * keys.dim, keys.block_size,
                                     keys.dim, keys.hi_bits, keys.lo_bits, true, false, k.data());
  return k;
}

StoredValues::StoredValues(int64_t groups, int64_t block_size, int64_t dim, int bits) : values{} {
  const int64_t rows = kBlocks * groups * block_size;
  values = {.dtype = pikv::Dtype::kFloat32, .bits = bits, .groups = groups, .block_size = block_size, .dim = dim};
  if (bits == 0) {
    raw = numbers(rows * dim);
    values.raw = raw.data();
    return;
  }
  codes = bytes(rows * dim * bits / 8);
  scale = halves(numbers(rows, 0.01f, 0.2f));
  zero = halves(numbers(rows));
  values.codes = codes.data(), values.scale = scale.data(), values.zero = zero.data();
}

std::vector<float> StoredValues::decoded(int64_t matrix) const {
  const int64_t size = values.block_size * values.dim, first = matrix * values.block_size;
  if (values.raw) return {raw.begin() + matrix * size, raw.begin() + (matrix + 1) * size};
  std::vector<float> v(static_cast<size_t>(size));
  pikv::scalar_kernels()->dequantize(values.codes + matrix * size * values.bits / 8, nullptr, values.scale + first,
                                     values.zero + first, values.block_size, values.dim, values.bits, 0, false, false,
                                     v.data());
  return v;
}

StoredPart::StoredPart(int64_t groups, int64_t block_size, int64_t channels, int64_t rank, int64_t bases)
    : factors(groups, block_size, rank, 8, 0),  // a scale and a zero per column and block, as keys have them
      basis(numbers(bases * groups * rank * channels, -0.3f, 0.3f)),
      basis_of(indices(kBlocks, bases)),
      part{.codes = factors.keys.high,
           .scale = factors.keys.scale,
           .zero = factors.keys.zero,
           .basis = basis.data(),
           .basis_of = basis_of.data(),
           .rank = rank,
           .bases = bases} {}

std::vector<float> StoredPart::decoded(int64_t id, int64_t head) const {
  const int64_t groups = factors.keys.groups, rank = part.rank;
  const int64_t channels = static_cast<int64_t>(basis.size()) / (part.bases * groups * rank);
  const float* rows = basis.data() + (basis_of[static_cast<size_t>(id)] * groups + head) * rank * channels;
  const std::vector<float> a = factors.decoded(id * groups + head);
  std::vector<float> added;
  for (int64_t token = 0; token < factors.keys.block_size; ++token)
    for (int64_t channel = 0; channel < channels; ++channel) {
      double sum = 0;
      for (int64_t j = 0; j < rank; ++j)
        sum += static_cast<double>(a[static_cast<size_t>(token * rank + j)]) * rows[j * channels + channel];
      added.push_back(static_cast<float>(sum));
    }
  return added;
}

std::vector<float> StoredPart::projected(const std::vector<float>& q, int64_t requests, int64_t rows,
                                         float scale) const {
  const int64_t groups = factors.keys.groups, channels = static_cast<int64_t>(q.size()) / (requests * groups * rows);
  std::vector<float> all;
  for (int64_t matrix = 0; matrix < part.bases * groups; ++matrix)
    for (int64_t request = 0; request < requests; ++request) {
      const float* its = basis.data() + matrix * part.rank * channels;
      const std::vector<double> sums =
          products(q.data() + (request * groups + matrix % groups) * rows * channels, rows,
                   {its, its + part.rank * channels}, channels, scale);
      all.insert(all.end(), sums.begin(), sums.end());
    }
  return all;
}

std::vector<float> padded_queries(const std::vector<float>& q, int64_t rows, int64_t dim, float scale) {
  return padded_queries(q.data(), rows, dim, scale);
}
std::vector<float> padded_queries(const float* q, int64_t rows, int64_t dim, float scale) {
  const int64_t width = pikv::padded(dim);
  std::vector<float> to(static_cast<size_t>(rows * width));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < dim; ++i)
      to[static_cast<size_t>(row * width + i)] = q[row * dim + i] * scale;
  return to;
}

std::vector<double> products(const float* q, int64_t rows, const std::vector<float>& k, int64_t dim, float scale) {
  std::vector<double> logits;
  for (int64_t row = 0; row < rows; ++row)
    for (size_t token = 0; token < k.size() / static_cast<size_t>(dim); ++token) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d)
        sum += static_cast<double>(q[row * dim + d]) * k[token * static_cast<size_t>(dim) + static_cast<size_t>(d)];
      logits.push_back(sum * scale);
    }
  return logits;
}

Softmax::Softmax(int64_t rows, int64_t dim)
    : rows(rows),
      dim(dim),
      out(static_cast<size_t>(rows * dim)),
      high(static_cast<size_t>(rows), -INFINITY),
      total(static_cast<size_t>(rows)),
      lse(static_cast<size_t>(rows)) {}

pikv::Partial Softmax::from(int64_t row) { return {out.data() + row * dim, high.data() + row, total.data() + row}; }

void Softmax::finish() {
  for (int64_t row = 0; row < rows; ++row) {
    const size_t r = static_cast<size_t>(row);
    for (int64_t i = 0; i < dim; ++i) out[static_cast<size_t>(row * dim + i)] /= total[r] > 0 ? total[r] : 1;
    lse[r] = total[r] > 0 ? high[r] + std::log(total[r]) : -INFINITY;
  }
}

}  // namespace harness

// Arguments: seeds of the simulator.
int main(int count, char** seeds) {
  for (int i = 1; i < count; ++i) {
    harness::state = 1;
    pikv_sim_set_seed(std::strtoull(seeds[i], nullptr, 10));
    harness::cases();
  }
  return harness::kEqual;
}
