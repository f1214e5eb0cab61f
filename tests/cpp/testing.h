// What the tests share: short ways to describe types and to make states and masks of them.
#pragma once

#include <boost/test/unit_test.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <ostream>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "storax/storax.h"

namespace storax {

// Boost.Test finds it by its name.
inline std::ostream& boost_test_print_type(std::ostream& out, Status status) {
  switch (status) {
    case Status::kOk:
      return out << "kOk";
    case Status::kNeverSet:
      return out << "kNeverSet";
    case Status::kTypeMismatch:
      return out << "kTypeMismatch";
    case Status::kWrongDevice:
      return out << "kWrongDevice";
    case Status::kPartialFirstSet:
      return out << "kPartialFirstSet";
    case Status::kNoSuchRow:
      return out << "kNoSuchRow";
    case Status::kChanged:
      return out << "kChanged";
    case Status::kLent:
      return out << "kLent";
    case Status::kLost:
      return out << "kLost";
    case Status::kOutOfMemory:
      return out << "kOutOfMemory";
    case Status::kDropped:
      return out << "kDropped";
  }
  return out << "no status: " << static_cast<int>(status);
}

namespace testing {

using Dims = std::vector<std::int64_t>;

inline Leaf f32(Dims dims) { return {"f32", 4, std::move(dims)}; }
inline Leaf i8(Dims dims) { return {"i8", 1, std::move(dims)}; }

inline TypeDesc describe(std::vector<Leaf> leaves, std::vector<BatchLevel> levels = {},
                         std::vector<MeshAxis> mesh = {}) {
  std::string text = leaves.size() == 1 ? "*" : "(";
  if (leaves.size() != 1) {
    for (std::size_t k = 0; k < leaves.size(); ++k) text += k == 0 ? "*" : ", *";
    text += ")";
  }
  const std::uint64_t structure = leaves.size();
  return {std::move(leaves), structure, std::move(text), std::move(levels), std::move(mesh)};
}

template <class... Args>
TypeId make_type(Args&&... args) {
  return intern_type(describe(std::forward<Args>(args)...));
}

inline std::size_t num_elements(const Leaf& leaf) {
  std::size_t count = 1;
  for (std::int64_t d : leaf.dims) count *= static_cast<std::size_t>(d);
  return count;
}

// The arrays of one state, as a program would hold them: each in memory of its own.
struct State {
  std::vector<std::vector<std::byte>> leaves;

  // Every byte is `fill`.
  explicit State(TypeId type, std::byte fill = std::byte{0}) {
    const Type& t = *find_type(type);
    for (std::size_t k = 0; k < t.num_leaves(); ++k) leaves.emplace_back(t.leaf_bytes(k), fill);
  }

  static State random(TypeId type, std::uint32_t seed) {
    State state(type);
    std::mt19937 bits(seed);
    for (auto& leaf : state.leaves) {
      for (std::byte& b : leaf) b = static_cast<std::byte>(bits() & 0xff);
    }
    return state;
  }

  std::vector<const std::byte*> in() const {
    std::vector<const std::byte*> pointers;
    for (const auto& leaf : leaves) pointers.push_back(leaf.data());
    return pointers;
  }
  std::vector<std::byte*> out() {
    std::vector<std::byte*> pointers;
    for (auto& leaf : leaves) pointers.push_back(leaf.data());
    return pointers;
  }

  bool operator==(const State&) const = default;
};

inline std::ostream& operator<<(std::ostream& out, const State& state) {
  for (const auto& leaf : state.leaves) {
    out << '[';
    for (std::size_t i = 0; i < leaf.size() && i < 64; ++i) out << ' ' << static_cast<int>(leaf[i]);
    out << (leaf.size() > 64 ? " ... ]" : " ]");
  }
  return out;
}

// A state of one leaf with these elements.
template <class T>
State state_of(TypeId type, std::vector<T> elements) {
  State state(type);
  BOOST_REQUIRE_EQUAL(state.leaves.at(0).size(), elements.size() * sizeof(T));
  if (!elements.empty()) {
    std::memcpy(state.leaves[0].data(), elements.data(), state.leaves[0].size());
  }
  return state;
}

// One bool per element of each leaf.
class Masks {
 public:
  explicit Masks(TypeId type, bool fill) {
    const Type& t = *find_type(type);
    for (std::size_t k = 0; k < t.num_leaves(); ++k) {
      sizes_.push_back(num_elements(t.desc().leaves[k]));
      masks_.push_back(sizes_[k] == 0 ? nullptr : std::make_unique<bool[]>(sizes_[k]));
      for (std::size_t i = 0; i < sizes_[k]; ++i) masks_[k][i] = fill;
      pointers_.push_back(masks_[k].get());
    }
  }
  // A mask for a single leaf.
  Masks(TypeId type, std::initializer_list<bool> elements) : Masks(type, false) {
    BOOST_REQUIRE_EQUAL(elements.size(), sizes_.at(0));
    std::size_t i = 0;
    for (bool on : elements) masks_[0][i++] = on;
  }

  bool* leaf(std::size_t k) const { return masks_[k].get(); }
  std::size_t size(std::size_t k) const { return sizes_[k]; }
  std::span<const bool* const> pointers() const { return pointers_; }

 private:
  std::vector<std::size_t> sizes_;
  std::vector<std::unique_ptr<bool[]>> masks_;
  std::vector<const bool*> pointers_;
};

inline Status set(const SlotRef& slot, TypeId type, const State& state, Device device = 0) {
  return slot->set(slot.id(), device, type, state.in());
}

inline Status set_masked(const SlotRef& slot, TypeId type, const Masks& masks, const State& state,
                         Device device = 0) {
  return slot->set_masked(slot.id(), device, type, masks.pointers(), state.in());
}

inline Status get(const SlotRef& slot, TypeId type, State* state, Device device = 0) {
  return slot->get(slot.id(), device, type, state->out());
}

// What the slot holds, which must be a state of that type.
inline State held(const SlotRef& slot, TypeId type, Device device = 0) {
  State state(type);
  BOOST_REQUIRE(get(slot, type, &state, device) == Status::kOk);
  return state;
}

// For each test: no failure is left over from another, and every slot and every byte is freed.
struct NothingLeaks {
  NothingLeaks() { failures::take(); }
  ~NothingLeaks() {
    failures::take();
    BOOST_TEST(usage().slots == 0);
    BOOST_TEST(usage().bytes == 0);
    BOOST_TEST(usage().programs == 0);
  }
};

}  // namespace testing
}  // namespace storax
