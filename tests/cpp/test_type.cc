#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "layouts.h"
#include "testing.h"

namespace storax::testing {
namespace {

BOOST_AUTO_TEST_SUITE(type)

TypeDesc rich() {
  return describe({f32({3, 4}), i8({5, 3})}, {{{0, kNotBatched}, false}, {{1, 0}, false}},
                  {{"x", 2}, {"y", 3}});
}

BOOST_AUTO_TEST_CASE(equal_descriptions_have_equal_ids) {
  const TypeId id = intern_type(rich());
  BOOST_TEST(id != kNoType);
  BOOST_TEST(intern_type(rich()) == id);
  BOOST_TEST(find_type(id)->id() == id);
  BOOST_TEST((find_type(id)->desc() == rich()));
}

BOOST_AUTO_TEST_CASE(every_field_matters) {
  using Change = std::function<void(TypeDesc&)>;
  const std::vector<Change> changes = {
      [](TypeDesc&) {},
      [](TypeDesc& d) { d.leaves[0].dtype = "i32"; },
      [](TypeDesc& d) { d.leaves[0].item_bytes = 8; },
      [](TypeDesc& d) { d.leaves[0].dims = {4, 3}; },
      [](TypeDesc& d) { d.leaves[0].dims = {34}; },
      [](TypeDesc& d) { d.leaves[0].dims = {3, 4, 1}; },
      [](TypeDesc& d) { d.leaves[0].dims = {}; },
      [](TypeDesc& d) { d.leaves[1].dims = {5, 4}; },
      [](TypeDesc& d) { std::swap(d.leaves[0], d.leaves[1]); },
      [](TypeDesc& d) { d.leaves.push_back(f32({})); },
      [](TypeDesc& d) { d.structure = 7; },
      [](TypeDesc& d) { d.levels[0].axes = {1, kNotBatched}; },
      [](TypeDesc& d) { d.levels[0].axes = {0, 0}; },
      [](TypeDesc& d) { d.levels[0].axes = {kNotBatched, 0}; },
      [](TypeDesc& d) { d.levels[0].moved = true; },
      [](TypeDesc& d) { d.levels[1].moved = true; },
      [](TypeDesc& d) { std::swap(d.levels[0], d.levels[1]); },
      [](TypeDesc& d) { d.levels.pop_back(); },
      [](TypeDesc& d) { d.levels.clear(); },
      [](TypeDesc& d) { d.levels.push_back({{0, 0}, false}); },
      [](TypeDesc& d) { d.mesh[0].name += 'z'; },
      [](TypeDesc& d) { d.mesh[0].size = 3; },
      [](TypeDesc& d) { std::swap(d.mesh[0], d.mesh[1]); },
      [](TypeDesc& d) { d.mesh.pop_back(); },
      [](TypeDesc& d) { d.mesh.clear(); },
  };
  std::set<TypeId> ids;
  for (const Change& change : changes) {
    TypeDesc desc = rich();
    change(desc);
    ids.insert(intern_type(desc));
  }
  BOOST_TEST(ids.size() == changes.size());
}

// The printed structure is for messages: equal structures may print an address, say, differently.
BOOST_AUTO_TEST_CASE(the_structures_text_does_not_matter) {
  TypeDesc other = rich();
  other.structure_text = "{'a': *, 'b': *}";
  BOOST_TEST(intern_type(other) == intern_type(rich()));
}

BOOST_AUTO_TEST_CASE(names_cannot_pose_as_other_fields) {
  const auto mesh = [](std::vector<MeshAxis> axes) {
    return make_type(std::vector{f32({})}, std::vector<BatchLevel>{}, std::move(axes));
  };
  BOOST_TEST(mesh({{"a", 12}}) != mesh({{"a1", 2}}));
  BOOST_TEST(mesh({{"a", 1}, {"b", 2}}) != mesh({{"a1#1:b", 2}}));
  BOOST_TEST(mesh({{"", 11}}) != mesh({{"1", 1}}));
  BOOST_TEST(mesh({{std::string("a\0b", 3), 1}}) != mesh({{std::string("a\0c", 3), 1}}));
  TypeDesc two = describe({f32({1}), f32({2})}), one = describe({{"f32[1]4|f32", 4, {2}}});
  one.structure = two.structure;
  BOOST_TEST(intern_type(two) != intern_type(one));

  // All sorts of lists of names from the characters a careless key would be made of.
  constexpr std::string_view kAlphabet = "a1#:|@~,[]";
  std::mt19937 bits(1);
  const auto name = [&] {
    std::string text;
    for (auto n = bits() % 4; n > 0; --n) text += kAlphabet[bits() % kAlphabet.size()];
    return text;
  };
  std::map<std::vector<std::pair<std::string, std::int64_t>>, TypeId> known;
  std::set<TypeId> ids;
  for (int i = 0; i < 5000; ++i) {
    TypeDesc desc = describe({f32({1})});
    std::vector<std::pair<std::string, std::int64_t>> key;
    for (auto n = bits() % 3; n > 0; --n) {
      desc.mesh.push_back({name(), 1 + static_cast<int>(bits() % 12)});
    }
    desc.leaves[0].dtype = name();
    for (const MeshAxis& axis : desc.mesh) key.emplace_back(axis.name, axis.size);
    key.emplace_back(desc.leaves[0].dtype, -1);
    const TypeId id = intern_type(desc);
    const auto [at, is_new] = known.emplace(key, id);
    if (at->second != id || is_new != ids.insert(id).second) {
      BOOST_FAIL("distinct descriptions share an id, or equal ones do not: " << at->second << ' '
                                                                             << id);
    }
  }
  BOOST_TEST(ids.size() > 1000u);
}

BOOST_AUTO_TEST_CASE(ids_that_name_nothing) {
  BOOST_TEST(find_type(kNoType) == nullptr);
  BOOST_TEST(find_type(0xffffffff) == nullptr);
}

BOOST_AUTO_TEST_CASE(one_devices_part_of_a_mapped_type) {
  const TypeId mapped = intern_type(rich());
  TypeDesc one = rich();
  one.mesh.clear();
  BOOST_TEST(find_type(mapped)->is_mapped());
  BOOST_TEST(find_type(mapped)->base() == intern_type(one));
  BOOST_TEST(find_type(mapped)->num_devices() == 6u);
  const TypeId base = find_type(mapped)->base();
  BOOST_TEST(!find_type(base)->is_mapped());
  BOOST_TEST(find_type(base)->base() == base);
  BOOST_TEST(find_type(base)->num_devices() == 1u);
}

BOOST_AUTO_TEST_CASE(leaves_lie_on_cache_lines_and_do_not_overlap) {
  const Type type(describe({f32({3, 4}), i8({}), i8({0, 7}), i8({64}), i8({65}), f32({})}), 1);
  const std::vector<std::size_t> bytes = {48, 1, 0, 64, 65, 4};
  std::size_t end = 0;
  for (std::size_t k = 0; k < bytes.size(); ++k) {
    BOOST_TEST(type.leaf_bytes(k) == bytes[k]);
    BOOST_TEST(type.leaf_offset(k) % 64 == 0u);
    BOOST_TEST(type.leaf_offset(k) >= end);
    end = type.leaf_offset(k) + bytes[k];
  }
  BOOST_TEST(type.total_bytes() >= end);
  BOOST_TEST(type.total_bytes() <= 64u * 6);
}

std::string text_of(TypeDesc desc, const std::string& structure_text = "") {
  if (!structure_text.empty()) desc.structure_text = structure_text;
  return Type(std::move(desc), 1).str();
}

BOOST_AUTO_TEST_CASE(text_is_in_jaxs_notation) {
  BOOST_TEST(text_of(describe({f32({3, 4})})) == "f32[3,4]");
  BOOST_TEST(text_of(describe({{"i32", 4, {}}})) == "i32[]");
  BOOST_TEST(text_of(describe({{"key<fry>", 8, {2}}})) == "key<fry>[2]");
  BOOST_TEST(text_of(describe({f32({3}), {"i32", 4, {}}})) == "(f32[3], i32[])");
  BOOST_TEST(text_of(describe({})) == "()");
}

BOOST_AUTO_TEST_CASE(text_shows_the_structure) {
  BOOST_TEST(text_of(describe({f32({0}), i8({1})}), "{'a': *, 'b': (None, [*])}") ==
             "{'a': f32[0], 'b': (None, [i8[1]])}");
  // A star in a key, or in a dtype, is no leaf.
  BOOST_TEST(text_of(describe({f32({}), i8({})}), "{'a*': *, \"it's *\": *}") ==
             "{'a*': f32[], \"it's *\": i8[]}");
  BOOST_TEST(text_of(describe({f32({}), i8({})}), "{'\\'*': *, '\\\\': *}") ==
             "{'\\'*': f32[], '\\\\': i8[]}");
  BOOST_TEST(text_of(describe({{"*", 4, {}}, i8({})})) == "(*[], i8[])");
}

BOOST_AUTO_TEST_CASE(text_shows_batch_axes) {
  BOOST_TEST(text_of(describe({f32({5, 3})}, {{{0}, false}})) == "f32[5,3] with batch axes 0");
  BOOST_TEST(text_of(describe({f32({5, 2, 3})}, {{{0}, false}, {{1}, true}})) ==
             "f32[5,2,3] with batch axes 0, then 1");
  BOOST_TEST(text_of(describe({f32({5}), i8({})}, {{{0, kNotBatched}, false}})) ==
             "(f32[5], i8[]) with batch axes (0, None)");
  BOOST_TEST(text_of(describe({f32({5, 2}), i8({2})},
                              {{{0, kNotBatched}, false}, {{1, 0}, false}, {{0, 0}, false}})) ==
             "(f32[5,2], i8[2]) with batch axes (0, None), then (1, 0), then 0");
  BOOST_TEST(text_of(describe({}, {{{}, false}})) == "() with batch axes ()");
}

BOOST_AUTO_TEST_CASE(text_shows_mesh_axes) {
  BOOST_TEST(text_of(describe({f32({3})}, {}, {{"x", 2}})) ==
             "f32[3] mapped over mesh axes 'x' of size 2");
  BOOST_TEST(text_of(describe({f32({3})}, {{{0}, false}}, {{"x", 2}, {"y", 4}})) ==
             "f32[3] with batch axes 0 mapped over mesh axes 'x' of size 2, 'y' of size 4");
}

BOOST_AUTO_TEST_CASE(outer_levels_move_inner_axes) {
  const auto final_of = [](std::vector<int> axes) {
    TypeDesc desc = describe({f32(Dims(axes.size(), 2))});
    for (int axis : axes) desc.levels.push_back({{axis}, false});
    return final_axes(desc, 0);
  };
  using Axes = std::vector<int>;
  BOOST_TEST(final_of({}) == Axes(), boost::test_tools::per_element());
  BOOST_TEST(final_of({0, 0}) == (Axes{1, 0}), boost::test_tools::per_element());
  BOOST_TEST(final_of({0, 1}) == (Axes{0, 1}), boost::test_tools::per_element());
  BOOST_TEST(final_of({1, 0, 0}) == (Axes{3, 1, 0}), boost::test_tools::per_element());
  BOOST_TEST(final_of({0, kNotBatched, 0}) == (Axes{1, kNotBatched, 0}),
             boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(final_axes_are_where_vmap_puts_the_lanes) {
  std::mt19937 bits(2);
  for (int i = 0; i < 500; ++i) {
    const TwoLayouts two = random_layouts(&bits);
    const TypeDesc desc = describe_layouts({two.a, two.b}, false);
    for (std::size_t leaf = 0; leaf < 2; ++leaf) {
      const Layout& layout = leaf == 0 ? two.a : two.b;
      std::vector<int> expected;
      for (std::size_t l = 0; l < desc.levels.size(); ++l) {
        expected.push_back(layout.axis(static_cast<int>(l)));
      }
      BOOST_TEST(final_axes(desc, leaf) == expected, boost::test_tools::per_element());
    }
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
