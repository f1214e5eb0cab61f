// Copies between arrays whose axes stand in different order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace storax {

// Calls visit(i, j) for each element i of a C-ordered array of shape `dims`, where j is the same
// element's index in an array whose axis from[d] is this one's axis d. An empty `from` means that
// both have the same order.
template <class Visit>
void for_each_element(std::span<const std::int64_t> dims, std::span<const int> from, Visit&& visit) {
  std::size_t count = 1;
  for (std::int64_t d : dims) count *= static_cast<std::size_t>(d);
  if (from.empty()) {
    for (std::size_t i = 0; i < count; ++i) visit(i, i);
    return;
  }
  const std::size_t rank = dims.size();
  std::vector<std::size_t> source_dims(rank), source_strides(rank), stride(rank), at(rank, 0);
  for (std::size_t d = 0; d < rank; ++d) {
    source_dims[static_cast<std::size_t>(from[d])] = static_cast<std::size_t>(dims[d]);
  }
  std::size_t running = 1;
  for (std::size_t d = rank; d-- > 0;) {
    source_strides[d] = running;
    running *= source_dims[d];
  }
  for (std::size_t d = 0; d < rank; ++d) {
    stride[d] = source_strides[static_cast<std::size_t>(from[d])];
  }
  std::size_t j = 0;
  for (std::size_t i = 0; i < count; ++i) {
    visit(i, j);
    for (std::size_t d = rank; d-- > 0;) {
      j += stride[d];
      if (++at[d] < static_cast<std::size_t>(dims[d])) break;
      j -= stride[d] * at[d];
      at[d] = 0;
    }
  }
}

}  // namespace storax
