// What an operation on a slot can report. The core never prints, never aborts and, in the
// operations themselves, never throws.
#pragma once

namespace storax {

enum class Status {
  kOk,               // done
  kNeverSet,         // get: nothing was ever set, or nothing on this device
  kTypeMismatch,     // the slot holds a state of another type; nothing was read or written
  kWrongDevice,      // the slot lives on another device; nothing was read or written
  kPartialFirstSet,  // first set, under a mask that does not cover every lane; nothing was written
  kNoSuchRow,        // a row outside of the stacked state; nothing was read or written
  kLent,             // the state is lent out; nothing was read or written
  kChanged,          // the state is no longer the one to be lent out; nothing was done
  kLost,             // the state was lent out and never came back; nothing was read
  kOutOfMemory,      // no memory for the state; nothing was written
  kDropped,          // the index, and every program that named it, is gone
};

}  // namespace storax
