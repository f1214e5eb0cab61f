// What a failed operation tells the user.
#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "storax/store.h"

namespace storax {
namespace {

bool is_batched(const Type& type) {
  const auto& levels = type.desc().levels;
  return std::any_of(levels.begin(), levels.end(), [](const BatchLevel& level) {
    return std::any_of(level.axes.begin(), level.axes.end(),
                       [](int a) { return a != kNotBatched; });
  });
}

// Whether the types would agree if every batch axis could stand anywhere.
bool differ_only_in_position(const Type& a, const Type& b) {
  TypeDesc moved = a.desc();
  for (BatchLevel& level : moved.levels) level.moved = true;
  return !a.desc().levels.empty() && Type(moved, kNoType).agrees_up_to_moves(b, nullptr);
}

std::string hint(const Type& held, const Type& asked, bool is_get) {
  const std::string what = is_get ? "`like`" : "the new state";
  if (differ_only_in_position(asked, held)) {
    return " Only the positions of the batch axes differ: use the same `in_axes`, best 0, in every "
           "`vmap` that gets or sets this state.";
  }
  if (is_batched(held) && !is_batched(asked)) {
    return " The state is batched and " + what +
           " is not: under `vmap`, `jnp.zeros_like(x)` of a batched `x` is not batched; write `0 * "
           "x` instead, or get it under the `vmap` it was set under.";
  }
  if (!is_batched(held) && is_batched(asked)) {
    return " The state is not batched and " + what + " is: set it under the same `vmap`, or make " +
           what +
           " independent of the batch. Layers made under a `vmap`, as an ensemble is, have a state "
           "each if `storax.stack` makes them.";
  }
  if (held.desc().mesh != asked.desc().mesh) {
    return " A state set under `shard_map` or `pmap` is one per device. Use it under the same "
           "mesh; outside of that and of `jit`, get it with the mesh axes in front, or as one if "
           "it "
           "is the same everywhere.";
  }
  return " Get and set must agree in dtype, shape, PyTree structure and batch axes. Make " + what +
         " match, or use a new StateIndex.";
}

// Leaves of two long texts what is around their difference.
void shorten(std::string& a, std::string& b) {
  constexpr std::size_t kLong = 400, kAround = 80;
  if (std::max(a.size(), b.size()) <= kLong) return;
  const std::size_t shorter = std::min(a.size(), b.size());
  std::size_t same = 0, same_at_end = 0;
  while (same < shorter && a[same] == b[same]) ++same;
  while (same_at_end < shorter - same && a.rbegin()[same_at_end] == b.rbegin()[same_at_end]) {
    ++same_at_end;
  }
  for (std::string* text : {&a, &b}) {
    const std::size_t begin = same - std::min(same, kAround);
    const std::size_t end = text->size() - (same_at_end - std::min(same_at_end, kAround));
    const std::size_t length = std::min(end - begin, kLong);
    const bool is_cut = begin + length < text->size();
    *text = (begin > 0 ? "..." : "") + text->substr(begin, length) + (is_cut ? "..." : "");
  }
}

}  // namespace

std::string Slot::explain(SlotId id, Status status, std::string_view op, Device device,
                          TypeId asked_id) {
  const bool is_get = op == "get_state";
  std::string name, held_text = "nothing";
  const Type* held = nullptr;
  Device home = kNoDevice;
  {
    const SpinGuard guard(lock_);
    if (!is_live(id)) status = Status::kDropped;
    name = name_;
    held = type_;
    home = home_.data == nullptr ? loan_device_ : Device{home_.device};
  }
  const Type* asked = find_type(asked_id);
  if (held != nullptr) held_text = held->str();
  std::string asked_text = asked != nullptr ? asked->str() : "an unknown type";
  if (status == Status::kTypeMismatch) shorten(held_text, asked_text);
  std::string text = "storax." + std::string(op) + " of ";
  text += status == Status::kDropped ? "a StateIndex that no longer exists" : name;
  text += ": ";
  switch (status) {
    case Status::kOk:
      return text + "done.";
    case Status::kNeverSet:
      text += "nothing has been set";
      if (held != nullptr) text += " on device " + std::to_string(device);
      return text + ", so there is no " + asked_text +
             " to get. Call `storax.set_state` first; it may stand earlier in the same program.";
    case Status::kTypeMismatch:
      text += "it holds " + held_text + ", but " + (is_get ? "`like` is " : "the new state is ") +
              asked_text + ".";
      return held != nullptr && asked != nullptr ? text + hint(*held, *asked, is_get) : text;
    case Status::kWrongDevice:
      return text + "it holds " + held_text + " on device " + std::to_string(home) +
             ", and this program runs on device " + std::to_string(device) +
             ". A state lives where it was first set: run the program there, or use one StateIndex "
             "per device.";
    case Status::kPartialFirstSet:
      return text + "this is the first set, and it covers only some lanes or rows of " +
             asked_text +
             ": the others would stay unset. Set it once as a whole, before the `vmap`, the "
             "branch " +
             "or the loop.";
    case Status::kNoSuchRow:
      return text + "it holds " + held_text + ", which has no such row. Use the layers as " +
             "`storax.stack` made them, one slice at a time.";
    case Status::kChanged:
      return text + "it has changed.";
    case Status::kLent:
      return text + "a program of `storax.jit` is working on its state in place just now.";
    case Status::kLost:
      return text +
             "its state is lost: a program of `storax.jit` that failed was working on it in "
             "place. Set it again. With `storax.jit(..., donate=False)` a program works on "
             "a copy, and the state outlives its failure.";
    case Status::kOutOfMemory:
      return text + "no memory for " + asked_text + ".";
    case Status::kDropped:
      return text + "its last StateIndex and every program that uses it are gone.";
  }
  return text;
}

}  // namespace storax
