#include <string>
#include <vector>

#include "storax/failures.h"
#include "testing.h"

namespace storax::testing {
namespace {

using Messages = std::vector<std::string>;

BOOST_FIXTURE_TEST_SUITE(failure_record, NothingLeaks)

BOOST_AUTO_TEST_CASE(nothing_is_pending_at_first) {
  BOOST_TEST(failures::pending() == 0u);
  BOOST_TEST(failures::take().empty());
  failures::acknowledge("anything");
  BOOST_TEST(failures::pending() == 0u);
}

BOOST_AUTO_TEST_CASE(each_failure_is_taken_once_oldest_first) {
  failures::record(0, "one");
  failures::record(1, "two");
  failures::record(0, "one");
  BOOST_TEST(failures::pending() == 3u);
  BOOST_TEST(failures::take() == (Messages{"one", "two", "one"}), boost::test_tools::per_element());
  BOOST_TEST(failures::pending() == 0u);
  BOOST_TEST(failures::take().empty());
}

BOOST_AUTO_TEST_CASE(an_exception_acknowledges_what_it_says) {
  failures::record(0, "no state in a");
  failures::record(0, "no state in b");
  failures::acknowledge("INVALID_ARGUMENT: no state in a [while running replica 0]");
  BOOST_TEST(failures::pending() == 1u);
  failures::acknowledge("INVALID_ARGUMENT: no state");
  failures::acknowledge("");
  BOOST_TEST(failures::pending() == 1u);
  BOOST_TEST(failures::take() == (Messages{"no state in b"}), boost::test_tools::per_element());
}

// The same program may fail many times; each exception speaks of one of them.
BOOST_AUTO_TEST_CASE(one_failure_is_acknowledged_at_a_time) {
  for (int i = 0; i < 3; ++i) failures::record(0, "same");
  for (std::size_t left = 3; left-- > 0;) {
    failures::acknowledge("same");
    BOOST_TEST(failures::pending() == left);
  }
}

// But one exception speaks for the program's failures on all its devices.
BOOST_AUTO_TEST_CASE(the_oldest_on_each_device_is_acknowledged) {
  for (const char* message : {"first run", "first run, later"}) {
    for (int device = 0; device < 3; ++device) failures::record(device, message);
  }
  failures::record(7, "something else");
  failures::acknowledge("INTERNAL: first run, later");
  BOOST_TEST(failures::take() == (Messages{"first run, later", "first run, later",
                                           "first run, later", "something else"}),
             boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(an_overflow_keeps_the_number) {
  constexpr std::size_t kRecorded = 1000;
  for (std::size_t i = 0; i < kRecorded; ++i) failures::record(0, "failure " + std::to_string(i));
  BOOST_TEST(failures::pending() == kRecorded);
  const Messages taken = failures::take();
  const std::size_t kept = taken.size() - 1;
  BOOST_TEST(kept >= 100u);
  BOOST_TEST(kept < kRecorded);
  for (std::size_t i = 0; i < kept; ++i) BOOST_TEST(taken[i] == "failure " + std::to_string(i));
  BOOST_TEST(taken.back() == "and " + std::to_string(kRecorded - kept) + " failures more");
  BOOST_TEST(failures::pending() == 0u);

  failures::record(0, "afterwards");
  BOOST_TEST(failures::take() == (Messages{"afterwards"}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(acknowledging_after_an_overflow) {
  for (int i = 0; i < 1000; ++i) failures::record(0, i == 5 ? "five" : "other");
  failures::acknowledge("five");
  BOOST_TEST(failures::pending() == 999u);
  failures::record(0, "newest");
  BOOST_TEST(failures::pending() == 1000u);
  std::size_t told = 0;
  for (const std::string& message : failures::take()) {
    BOOST_TEST(message != "five");
    told += message.starts_with("and ") ? std::stoul(message.substr(4)) : 1;
  }
  BOOST_TEST(told == 1000u);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
