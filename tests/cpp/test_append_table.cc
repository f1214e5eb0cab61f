#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "allocations.h"
#include "storax/append_table.h"
#include "testing.h"

namespace storax::testing {
namespace {

BOOST_AUTO_TEST_SUITE(append_table)

BOOST_AUTO_TEST_CASE(an_empty_table_has_no_entries) {
  const AppendTable<int> table;
  BOOST_TEST(table.size() == 0u);
  for (const std::uint64_t index : {0u, 1u, 1024u, 0xffffffffu}) {
    BOOST_TEST(table.find(index) == nullptr);
  }
}

BOOST_AUTO_TEST_CASE(entries_are_found_by_the_index_append_returned) {
  AppendTable<int> table;
  constexpr int kEntries = 5000;  // several chunks
  for (int i = 0; i < kEntries; ++i) {
    BOOST_TEST(table.append([&](int& entry) { entry = 10 * i; }) == static_cast<std::uint32_t>(i));
    BOOST_TEST(table.find(static_cast<std::uint64_t>(i) + 1) == nullptr);
  }
  BOOST_TEST(table.size() == 5000u);
  for (int i = 0; i < kEntries; ++i) {
    BOOST_TEST(*table.find(static_cast<std::uint64_t>(i)) == 10 * i);
  }
  BOOST_TEST(table.find(std::uint64_t{1} << 32) == nullptr);  // not entry 0
  BOOST_TEST(table.find(~std::uint64_t{0}) == nullptr);
}

BOOST_AUTO_TEST_CASE(entries_never_move) {
  AppendTable<std::uint32_t> table;
  std::vector<std::uint32_t*> places;
  for (std::uint32_t i = 0; i < 5000; ++i) {
    table.append([&](std::uint32_t& entry) { entry = i; });
    places.push_back(table.find(i));
  }
  for (std::uint32_t i = 0; i < 5000; ++i) {
    BOOST_TEST(table.find(i) == places[i]);
    BOOST_TEST(*places[i] == i);
  }
}

BOOST_AUTO_TEST_CASE(an_entry_that_fails_to_start_is_not_published) {
  AppendTable<int> table;
  table.append([](int& entry) { entry = 1; });
  BOOST_CHECK_THROW(table.append([](int&) { throw std::runtime_error("no"); }), std::runtime_error);
  BOOST_TEST(table.size() == 1u);
  BOOST_TEST(table.find(1) == nullptr);
  BOOST_TEST(table.append([](int& entry) { entry = 2; }) == 1u);
  BOOST_TEST(*table.find(1) == 2);
}

BOOST_AUTO_TEST_CASE(a_table_without_memory_stays_as_it_was) {
  AppendTable<int> table;
  const auto append = [&] { return table.append([](int& entry) { entry = 5; }); };
  {
    const FailAllocation fail(0);
    BOOST_CHECK_THROW(append(), std::bad_alloc);
  }
  BOOST_TEST(table.size() == 0u);
  BOOST_TEST(append() == 0u);
  BOOST_TEST(*table.find(0) == 5);
}

BOOST_AUTO_TEST_CASE(a_table_can_be_full) {
  using Table = AppendTable<std::uint8_t>;
  constexpr std::uint32_t kCapacity = Table::kChunkSize * Table::kMaxChunks;
  Table table;
  for (std::uint32_t i = 0; i < kCapacity; ++i) {
    table.append([&](std::uint8_t& entry) { entry = static_cast<std::uint8_t>(i % 251); });
  }
  BOOST_CHECK_THROW(table.append([](std::uint8_t&) {}), std::bad_alloc);
  BOOST_TEST(table.size() == kCapacity);
  BOOST_TEST(*table.find(0) == 0);
  BOOST_TEST(*table.find(kCapacity - 1) == (kCapacity - 1) % 251);
  BOOST_TEST(table.find(kCapacity) == nullptr);
}

BOOST_AUTO_TEST_CASE(a_table_frees_its_entries) {
  const std::int64_t before = live_allocations();
  {
    AppendTable<std::shared_ptr<int>> table;
    for (int i = 0; i < 3000; ++i)
      table.append([&](auto& entry) { entry = std::make_shared<int>(i); });
    BOOST_TEST(**table.find(2999) == 2999);
  }
  BOOST_TEST(live_allocations() == before);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
