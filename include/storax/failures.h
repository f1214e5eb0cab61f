// Operations that failed while a program ran. XLA reports an asynchronous failure only to whoever
// blocks on the program's outputs, which may be nobody; this record makes sure that it is raised.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace storax::failures {

// Remembers one failure on one device. Any thread; never throws. Past some hundred unraised
// failures only their number is kept.
void record(int device, std::string_view message) noexcept;

// Forgets the failure that an exception carrying `message` has just told the user about: the oldest
// on each device whose message `message` contains.
void acknowledge(std::string_view message) noexcept;

// How many failures nobody has been told about. Cheap: one atomic load.
std::size_t pending() noexcept;

// Returns those failures' messages, oldest first, and forgets them.
std::vector<std::string> take();

}  // namespace storax::failures
