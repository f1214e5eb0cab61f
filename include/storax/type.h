// The type of a state: its leaves' dtypes and shapes, its PyTree structure, its batch axes and the
// mesh axes it is mapped over. Types are interned, so that two states have the same type exactly
// when their type ids are equal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace storax {

using TypeId = std::uint32_t;
inline constexpr TypeId kNoType = 0;
inline constexpr int kNotBatched = -1;

struct Leaf {
  std::string dtype;       // JAX's short name: "f32", "bf16", "key<fry>"
  std::size_t item_bytes;  // bytes per element in the store
  std::vector<std::int64_t> dims;

  bool operator==(const Leaf&) const = default;
};

// One level of vmap, innermost first: for each leaf the physical axis it is batched along, in the
// array as that level saw it, or kNotBatched.
struct BatchLevel {
  std::vector<int> axes;
  // Recorded inside control flow that JAX itself batched, where JAX moves batch axes to the front:
  // the positions say nothing about the user's `in_axes`.
  bool moved = false;

  bool operator==(const BatchLevel&) const = default;
};

struct MeshAxis {
  std::string name;
  std::int64_t size;

  bool operator==(const MeshAxis&) const = default;
};

struct TypeDesc {
  std::vector<Leaf> leaves;
  std::uint64_t structure = 0;  // equal exactly when the PyTree structures are
  std::string structure_text;   // for messages: "(*, {'a': *})"
  std::vector<BatchLevel> levels;
  std::vector<MeshAxis> mesh;  // mesh axes that this state has one copy along

  bool operator==(const TypeDesc&) const = default;
};

// How one type's arrays are laid out relative to another's: for each leaf the axis of the source
// that each axis of the destination is read from. An empty permutation is the identity.
using Permutations = std::vector<std::vector<int>>;

class Type {
 public:
  Type() = default;
  Type(TypeDesc desc, TypeId id, TypeId base = kNoType);

  TypeId id() const noexcept { return id_; }
  const TypeDesc& desc() const noexcept { return desc_; }
  std::size_t num_leaves() const noexcept { return desc_.leaves.size(); }
  std::size_t leaf_bytes(std::size_t k) const noexcept { return sizes_[k]; }
  // Where leaf k starts in a state's storage. Leaves start on cache lines.
  std::size_t leaf_offset(std::size_t k) const noexcept { return offsets_[k]; }
  std::size_t total_bytes() const noexcept { return total_bytes_; }
  bool is_mapped() const noexcept { return !desc_.mesh.empty(); }
  // The type of one device's state: this one without its mesh axes.
  TypeId base() const noexcept { return base_ == kNoType ? id_ : base_; }
  // On how many devices a mapped state lives.
  std::size_t num_devices() const noexcept;

  // In JAX's notation: "f32[3,4]", "(f32[3], i32[])", with batch and mesh axes if it has any.
  std::string str() const;

  // Whether this type and `other` differ at most in where batch axes stand, at levels that JAX may
  // have moved. If so, and `out` is given, fills in how to read `other`'s storage as this type.
  bool agrees_up_to_moves(const Type& other, Permutations* out) const;

 private:
  TypeDesc desc_;
  TypeId id_ = kNoType;
  TypeId base_ = kNoType;
  std::vector<std::size_t> sizes_;
  std::vector<std::size_t> offsets_;
  std::size_t total_bytes_ = 0;
};

// Returns the id of `desc`, the same for equal descriptions. Any thread. Throws std::bad_alloc.
TypeId intern_type(TypeDesc desc);

// The type with that id; nullptr if there is none. Any thread, without a lock.
const Type* find_type(TypeId id) noexcept;

// The position of each level's axis in the final array of leaf k, or kNotBatched: an axis recorded
// at an inner level moves when an outer level puts its own in front of it.
std::vector<int> final_axes(const TypeDesc& desc, std::size_t leaf);

}  // namespace storax
