// Runs launchers on shapes of their own under the simulator and compares them with the CPU kernels: what the sanitizers
// watch and what mutants must not survive. Buffers are as large as needed and no larger, so that ASan sees one step too
// far.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pikv/cuda.h"
#include "pikv/kernels.h"

namespace harness {

// An op's shapes, run once per seed; each op's file defines it.
void cases();

enum Exit { kEqual = 0, kDifferent = 3, kFailed = 4 };

// Ends the program with kFailed and the simulator's message unless status is 0.
void launched(int status);
// End the program with kDifferent where results are not equal, or further apart than `tolerance` times the largest
// expected.
void equal(const char* what, const void* got, const void* expected, size_t bytes);
void near(const char* what, const std::vector<float>& got, const std::vector<float>& expected, float tolerance);

template <class T>
void equal(const char* what, const std::vector<T>& got, const std::vector<T>& expected) {
  equal(what, got.data(), expected.data(), got.size() * sizeof(T));
}

// The same numbers in every run.
std::vector<float> numbers(int64_t count, float low = -2.0f, float high = 2.0f);
std::vector<uint8_t> bytes(int64_t count);
std::vector<int64_t> indices(int64_t count, int64_t limit);
std::vector<uint16_t> halves(const std::vector<float>& x);

// What no kernel writes: NaN.
std::vector<float> unwritten(int64_t count);

// A packed list of requests with so many entries each.
struct List {
  explicit List(const std::vector<int64_t>& lengths) {
    for (const int64_t length : lengths) first.push_back(first.back() + length);
    runs = {first.data(), requests(), count()};
  }
  List(const List&) = delete;
  int64_t requests() const { return static_cast<int64_t>(first.size()) - 1; }
  int64_t count() const { return first.back(); }
  int64_t begin(int64_t request) const { return first[static_cast<size_t>(request)]; }
  int64_t length(int64_t request) const { return begin(request + 1) - begin(request); }
  std::vector<int64_t> first{0};
  pikv::cuda::Runs runs{};
};

constexpr int64_t kBlocks = 6;  // of a pool

// A pool of keys, filled; bits 0: raw float32 and a 2-bit index plane.
struct StoredKeys {
  StoredKeys(int64_t groups, int64_t block_size, int64_t dim, int hi_bits, int lo_bits);
  std::vector<float> raw;
  std::vector<uint8_t> high, low;
  std::vector<uint16_t> scale, zero;
  pikv::Keys keys;

  // One KV head of a block, which are matrix block * groups + head: [block_size, dim].
  std::vector<float> decoded(int64_t matrix) const;
};

// A pool of values, filled; bits 0: raw float32.
struct StoredValues {
  StoredValues(int64_t groups, int64_t block_size, int64_t dim, int bits);
  std::vector<float> raw;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scale, zero;
  pikv::Values values;

  // As StoredKeys::decoded.
  std::vector<float> decoded(int64_t matrix) const;
};

// A low-rank part of a pool's rows, filled.
struct StoredPart {
  StoredPart(int64_t groups, int64_t block_size, int64_t channels, int64_t rank, int64_t bases);
  StoredKeys factors;
  std::vector<float> basis;
  std::vector<int64_t> basis_of;
  pikv::LowRank part;

  // What it adds to one KV head of a block: [block_size, channels].
  std::vector<float> decoded(int64_t id, int64_t head) const;
  // What `projected` is on CUDA for q [requests, G, rows, channels].
  std::vector<float> projected(const std::vector<float>& q, int64_t requests, int64_t rows, float scale) const;
};

// q [rows, dim] times scale, rows padded as the CPU kernels want them.
std::vector<float> padded_queries(const std::vector<float>& q, int64_t rows, int64_t dim, float scale);
std::vector<float> padded_queries(const float* q, int64_t rows, int64_t dim, float scale);

// Logits q [rows, dim] . k [tokens, dim] * scale, summed in double: [rows, tokens].
std::vector<double> products(const float* q, int64_t rows, const std::vector<float>& k, int64_t dim, float scale);

// Partials of the CPU kernels: begun, and divided at the end.
struct Softmax {
  Softmax(int64_t rows, int64_t dim);
  pikv::Partial from(int64_t row);
  void finish();
  int64_t rows, dim;
  std::vector<float> out, high, total, lse;
};

}  // namespace harness
