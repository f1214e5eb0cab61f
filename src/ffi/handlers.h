// XLA FFI handlers for programs on one platform. This layer decodes XLA's call frames and knows the
// core; it does not know Python.
//
// A call's attribute `state` is an array of three i64: slot id; type id, and above its 32 bits the
// number of a mesh's order that a set is to note; and process_nonce().
// Operands and results start with a token, which orders the calls of a program:
//   get:         (token)                 -> (token, leaf...)
//   set:         (token, leaf...)        -> (token)
//   set_masked:  (token, mask..., leaf...) -> (token)   one mask per leaf, of the leaf's shape
//   get_row:     (token, row)            -> (token, leaf...)    `row` is an s32 scalar
//   set_row:     (token, row, leaf...)   -> (token)
//   set_row_masked: (token, row, mask..., leaf...) -> (token)
#pragma once

#include <cstdint>

#include "xla/ffi/api/c_api.h"

namespace storax::ffi {

// A number no other process has. Programs carry it, so that one which was compiled elsewhere, and
// names the slots of another process, is never mistaken for one of ours.
std::int64_t process_nonce() noexcept;

struct CpuHandlers {
  XLA_FFI_Handler* instantiate;  // gives the compiled program its share in the slot's life
  XLA_FFI_Handler* get;
  XLA_FFI_Handler* set;
  XLA_FFI_Handler* set_masked;
  XLA_FFI_Handler* get_row;
  XLA_FFI_Handler* set_row;
  XLA_FFI_Handler* set_row_masked;
  XLA_FFI_Handler* fence;    // counts itself; no attributes, operands or results
  XLA_FFI_Handler* copy;     // (x) -> (x), of a dtype of whole bytes; no attributes
  XLA_FFI_Handler* nothing;  // does nothing: what an ordered call costs at least
  XLA_FFI_TypeId* share_type_id;
  XLA_FFI_TypeInfo* share_type_info;
};
const CpuHandlers& cpu_handlers() noexcept;

// How many fences have run on this thread.
std::uint64_t fences_on_this_thread() noexcept;

// Hoisted programs load the states of many slots by one call, and store them by another. The
// attribute `states` is an array of i64: process_nonce(), then slot id and type id of each.
//   load:  () -> (s32, leaf...)       leaves in the order of the slots
//   store: (any..., [pred] leaf...) -> ()    nothing is stored unless all can be
// In store a type id is negative where a pred, before the leaves, says whether the slot was set.
// The s32 is 0: as an operand of store, which does not look at it, it orders that after the load.
// So do further operands for what else has to be over before.
struct PackedHandlers {
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* load;
  XLA_FFI_Handler* store;
  XLA_FFI_TypeId* shares_type_id;
  XLA_FFI_TypeInfo* shares_type_info;
};
const PackedHandlers& cpu_packed_handlers() noexcept;

}  // namespace storax::ffi
