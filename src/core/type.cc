#include "storax/type.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "storax/append_table.h"

namespace storax {
namespace {

constexpr std::size_t kLeafAlignment = 64;

std::size_t round_up(std::size_t n) {
  return (n + kLeafAlignment - 1) / kLeafAlignment * kLeafAlignment;
}

std::string leaf_text(const Leaf& leaf) {
  std::string text = leaf.dtype + "[";
  for (std::size_t i = 0; i < leaf.dims.size(); ++i) {
    if (i > 0) text += ',';
    text += std::to_string(leaf.dims[i]);
  }
  return text + "]";
}

std::string axis_text(int axis) { return axis == kNotBatched ? "None" : std::to_string(axis); }

std::string levels_text(const std::vector<BatchLevel>& levels) {
  std::string text;
  for (const BatchLevel& level : levels) {
    if (!text.empty()) text += ", then ";
    const bool one =
        !level.axes.empty() && std::all_of(level.axes.begin(), level.axes.end(),
                                           [&](int a) { return a == level.axes.front(); });
    if (one) {
      text += axis_text(level.axes.front());
    } else {
      text += '(';
      for (std::size_t k = 0; k < level.axes.size(); ++k) {
        if (k > 0) text += ", ";
        text += axis_text(level.axes[k]);
      }
      text += ')';
    }
  }
  return text;
}

// Where the next leaf's '*' stands in a structure's text, at `at` or later; npos if there is none.
// A '*' between quotes is part of a key.
std::size_t find_leaf(const std::string& text, std::size_t at) {
  char quote = 0;
  for (; at < text.size(); ++at) {
    const char c = text[at];
    if (quote != 0) {
      if (c == '\\') ++at;
      if (c == quote) quote = 0;
    } else if (c == '\'' || c == '"') {
      quote = c;
    } else if (c == '*') {
      return at;
    }
  }
  return std::string::npos;
}

// Separators that cannot occur in what they separate, and lengths before names, which may hold any
// character, keep the key injective.
std::string key_of(const TypeDesc& desc) {
  std::string key = std::to_string(desc.structure);
  for (const Leaf& leaf : desc.leaves) {
    key += '|' + std::to_string(leaf.dtype.size()) + ':' + leaf_text(leaf) +
           std::to_string(leaf.item_bytes);
  }
  for (const BatchLevel& level : desc.levels) {
    key += level.moved ? '~' : '@';
    for (int axis : level.axes) key += std::to_string(axis) + ',';
  }
  for (const MeshAxis& axis : desc.mesh) {
    key += '#' + std::to_string(axis.name.size()) + ':' + axis.name + std::to_string(axis.size);
  }
  return key;
}

struct Registry {
  std::mutex mutex;
  std::unordered_map<std::string, TypeId> ids;
  AppendTable<Type> types;
};

Registry& registry() {
  // Leaked on purpose: handlers may still run while static destructors do.
  static Registry* const instance = [] {
    auto* made = new Registry;
    made->types.append([](Type&) {});  // id 0 is kNoType
    return made;
  }();
  return *instance;
}

// Every level's lane axis first, in level order, then the leaf's own axes.
std::vector<int> lanes_first(const TypeDesc& desc, std::size_t leaf) {
  std::vector<int> order;
  std::vector<bool> is_lane(desc.leaves[leaf].dims.size(), false);
  for (int axis : final_axes(desc, leaf)) {
    if (axis == kNotBatched) continue;
    order.push_back(axis);
    is_lane[static_cast<std::size_t>(axis)] = true;
  }
  for (std::size_t d = 0; d < is_lane.size(); ++d) {
    if (!is_lane[d]) order.push_back(static_cast<int>(d));
  }
  return order;
}

}  // namespace

std::vector<int> final_axes(const TypeDesc& desc, std::size_t leaf) {
  std::vector<int> positions;
  for (const BatchLevel& level : desc.levels) {
    const int axis = level.axes[leaf];
    if (axis != kNotBatched) {
      for (int& p : positions) {
        if (p != kNotBatched && p >= axis) ++p;
      }
    }
    positions.push_back(axis);
  }
  return positions;
}

Type::Type(TypeDesc desc, TypeId id, TypeId base) : desc_(std::move(desc)), id_(id), base_(base) {
  for (const Leaf& leaf : desc_.leaves) {
    std::size_t bytes = leaf.item_bytes;
    for (std::int64_t d : leaf.dims) bytes *= static_cast<std::size_t>(d);
    sizes_.push_back(bytes);
    offsets_.push_back(total_bytes_);
    total_bytes_ += round_up(bytes);
  }
}

std::size_t Type::num_devices() const noexcept {
  std::size_t count = 1;
  for (const MeshAxis& axis : desc_.mesh) count *= static_cast<std::size_t>(axis.size);
  return count;
}

std::string Type::str() const {
  std::string text = desc_.structure_text;
  // Leaves stand in the structure's text as '*', in order.
  std::size_t at = 0;
  for (const Leaf& leaf : desc_.leaves) {
    at = find_leaf(text, at);
    if (at == std::string::npos) break;
    const std::string shown = leaf_text(leaf);
    text.replace(at, 1, shown);
    at += shown.size();
  }
  if (!desc_.levels.empty()) text += " with batch axes " + levels_text(desc_.levels);
  for (std::size_t i = 0; i < desc_.mesh.size(); ++i) {
    text += i == 0 ? " mapped over mesh axes " : ", ";
    text += "'" + desc_.mesh[i].name + "' of size " + std::to_string(desc_.mesh[i].size);
  }
  return text;
}

bool Type::agrees_up_to_moves(const Type& other, Permutations* out) const {
  const TypeDesc &a = desc_, &b = other.desc_;
  if (a.structure != b.structure || a.mesh != b.mesh || a.levels.size() != b.levels.size() ||
      a.leaves.size() != b.leaves.size()) {
    return false;
  }
  for (std::size_t l = 0; l < a.levels.size(); ++l) {
    const bool may_move = a.levels[l].moved || b.levels[l].moved;
    for (std::size_t k = 0; k < a.leaves.size(); ++k) {
      const int x = a.levels[l].axes[k], y = b.levels[l].axes[k];
      if ((x == kNotBatched) != (y == kNotBatched)) return false;
      if (x != y && !may_move) return false;
    }
  }
  for (std::size_t k = 0; k < a.leaves.size(); ++k) {
    const Leaf &x = a.leaves[k], &y = b.leaves[k];
    if (x.dtype != y.dtype || x.item_bytes != y.item_bytes || x.dims.size() != y.dims.size()) {
      return false;
    }
    const std::vector<int> ours = lanes_first(a, k), theirs = lanes_first(b, k);
    std::vector<int> from(ours.size());
    for (std::size_t i = 0; i < ours.size(); ++i) {
      const auto o = static_cast<std::size_t>(ours[i]), t = static_cast<std::size_t>(theirs[i]);
      if (x.dims[o] != y.dims[t]) return false;
      from[o] = theirs[i];
    }
    if (out != nullptr) {
      if (std::is_sorted(from.begin(), from.end())) from.clear();
      out->push_back(std::move(from));
    }
  }
  return true;
}

TypeId intern_type(TypeDesc desc) {
  TypeId base = kNoType;
  if (!desc.mesh.empty()) {
    TypeDesc one = desc;
    one.mesh.clear();
    base = intern_type(std::move(one));
  }
  Registry& reg = registry();
  std::string key = key_of(desc);
  const std::lock_guard lock(reg.mutex);
  if (const auto it = reg.ids.find(key); it != reg.ids.end()) return it->second;
  const TypeId id = reg.types.size();
  reg.types.append([&](Type& slot) { slot = Type(std::move(desc), id, base); });
  reg.ids.emplace(std::move(key), id);
  return id;
}

const Type* find_type(TypeId id) noexcept {
  return id == kNoType ? nullptr : registry().types.find(id);
}

}  // namespace storax
