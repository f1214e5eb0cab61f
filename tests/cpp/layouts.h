// An independent model of where vmap puts lanes, for brute-force checks: it keeps a list of axis
// names and inserts one per level, as `vmap` itself does.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "testing.h"

namespace storax::testing {

// A leaf seen through `vmap`s. Axis names: 0, 1, ... are the levels' lanes, innermost first;
// kOwn + d is the leaf's own axis d.
struct Layout {
  static constexpr int kOwn = 100;

  std::vector<int> names;    // of the final array's axes
  std::vector<int> in_axes;  // of each level
  Dims dims;

  // Every level batches the leaf unless its entry in `in_axes` is kNotBatched.
  Layout(const Dims& own, const Dims& lanes, std::vector<int> axes) : in_axes(std::move(axes)) {
    for (std::size_t d = 0; d < own.size(); ++d) {
      names.push_back(kOwn + static_cast<int>(d));
      dims.push_back(own[d]);
    }
    for (std::size_t l = 0; l < lanes.size(); ++l) {
      if (in_axes[l] == kNotBatched) continue;
      names.insert(names.begin() + in_axes[l], static_cast<int>(l));
      dims.insert(dims.begin() + in_axes[l], lanes[l]);
    }
  }

  // The axis of that name, or kNotBatched.
  int axis(int name) const {
    const auto it = std::find(names.begin(), names.end(), name);
    return it == names.end() ? kNotBatched : static_cast<int>(it - names.begin());
  }

  // For each element in C order, a number that depends on its place along every named axis, and on
  // nothing else: equal numbers in two layouts are the same element.
  std::vector<std::uint64_t> elements() const {
    std::size_t count = 1;
    for (std::int64_t d : dims) count *= static_cast<std::size_t>(d);
    std::vector<std::uint64_t> numbers;
    for (std::size_t i = 0; i < count; ++i) {
      std::uint64_t number = 0, rest = i;
      for (std::size_t d = dims.size(); d-- > 0;) {
        const auto at = rest % static_cast<std::uint64_t>(dims[d]);
        rest /= static_cast<std::uint64_t>(dims[d]);
        const int name = names[d];
        const int digit = name >= kOwn ? name - kOwn : 8 + name;  // at most 8 own axes, 8 levels
        number += at << (4 * digit);                              // of at most 16 elements
      }
      numbers.push_back(number);
    }
    return numbers;
  }
};

// Two layouts of one leaf, which is batched at the same levels in both.
struct TwoLayouts {
  Layout a, b;
};

inline TwoLayouts random_layouts(std::mt19937* bits) {
  const auto below = [&](std::size_t n) { return static_cast<int>((*bits)() % n); };
  Dims own, lanes;
  for (int n = below(4); n > 0; --n) own.push_back(1 + below(3));
  for (int n = 1 + below(3); n > 0; --n) lanes.push_back(1 + below(3));
  std::vector<int> a, b;
  int rank = static_cast<int>(own.size());
  for (std::size_t l = 0; l < lanes.size(); ++l) {
    const bool batched = below(4) > 0;
    const auto places = static_cast<std::size_t>(rank + 1);
    a.push_back(batched ? below(places) : kNotBatched);
    b.push_back(batched ? below(places) : kNotBatched);
    rank += batched ? 1 : 0;
  }
  return {Layout(own, lanes, std::move(a)), Layout(own, lanes, std::move(b))};
}

// The type of a state whose leaves have these layouts, `moved` or not at every level.
inline TypeDesc describe_layouts(const std::vector<Layout>& layouts, bool moved,
                                 std::vector<MeshAxis> mesh = {}, const std::string& dtype = "u64",
                                 std::size_t item_bytes = 8) {
  std::vector<Leaf> leaves;
  std::vector<BatchLevel> levels(layouts.at(0).in_axes.size());
  for (const Layout& layout : layouts) {
    leaves.push_back({dtype, item_bytes, layout.dims});
    for (std::size_t l = 0; l < levels.size(); ++l) levels[l].axes.push_back(layout.in_axes.at(l));
  }
  for (BatchLevel& level : levels) level.moved = moved;
  return describe(std::move(leaves), std::move(levels), std::move(mesh));
}

}  // namespace storax::testing
