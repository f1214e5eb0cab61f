// Copies between arrays whose axes stand in different order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace storax {

// The order in which to read an array, so as to write one whose axes stand in another order.
class Walk {
 public:
  // For writing a C-ordered array of shape `dims`, whose axis d is axis from[d] of the one that is
  // read. An empty `from` means that both have the same order; it is the only one that needs no
  // memory. Throws std::bad_alloc; the walk itself, which may leave things half done, cannot fail.
  Walk(std::span<const std::int64_t> dims, std::span<const int> from) : axes_(from.size()) {
    for (std::int64_t d : dims) count_ *= static_cast<std::size_t>(d);
    std::vector<std::size_t> written_as(from.size());
    for (std::size_t d = 0; d < from.size(); ++d) written_as[static_cast<std::size_t>(from[d])] = d;
    std::size_t stride = 1;
    for (std::size_t s = from.size(); s-- > 0;) {
      const auto size = static_cast<std::size_t>(dims[written_as[s]]);
      axes_[written_as[s]] = {size, stride, 0};
      stride *= size;
    }
  }

  bool keeps_order() const noexcept { return axes_.empty(); }

  // Calls visit(i, j) for each element i of the array that is written, in C order, where j is the
  // same element's index in the array that is read.
  template <class Visit>
  void for_each(Visit&& visit) {
    if (keeps_order()) {
      for (std::size_t i = 0; i < count_; ++i) visit(i, i);
      return;
    }
    std::size_t j = 0;
    for (std::size_t i = 0; i < count_; ++i) {
      visit(i, j);
      for (std::size_t d = axes_.size(); d-- > 0;) {
        Axis& axis = axes_[d];
        j += axis.stride;
        if (++axis.at < axis.size) break;
        j -= axis.stride * axis.at;
        axis.at = 0;
      }
    }
  }

 private:
  struct Axis {
    std::size_t size;
    std::size_t stride;  // in the array that is read
    std::size_t at;
  };

  std::size_t count_ = 1;
  std::vector<Axis> axes_;  // empty if both arrays have the same order
};

}  // namespace storax
