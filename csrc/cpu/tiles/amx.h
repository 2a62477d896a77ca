// AMX, the tile registers of x86-64: whether they may be used here, and the form of their configuration.
//
// A processor can list AMX and still fault, and Linux gives a process the registers only when it asks for them. So one
// product of each kind is tried in a child process first, and nothing of this happens where the processor lists no AMX.
#pragma once

#include <cstdint>

namespace mpq::cpu {

// What ldtilecfg reads, palette 1: the shapes of tile registers 0..7, the other entries zero.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// nullptr where products on the tile registers work in this process, else why not. Asked once; the answer is kept.
const char* amx_refusal();

enum class Trial { kRight, kWrong, kFaulted, kNoChild };

// Runs `right` in a child process, where a fault ends only the child. It must do nothing but compute.
Trial try_in_child(bool (*right)());

// Products of bytes and of bf16 on the tile registers, compared with plain C++. They fault where there are none.
bool amx_multiplies_bytes();
bool amx_multiplies_pairs();

}  // namespace mpq::cpu
