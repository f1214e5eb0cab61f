// Boost.Test's own code, compiled once: it takes longer than all the tests together.
#define BOOST_TEST_MODULE storax_core
#include <boost/test/included/unit_test.hpp>
