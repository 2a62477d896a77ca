// Runs the machine code of int8_amx.cpp on an x86-64 processor without AMX: each of its instructions is illegal there,
// and the handler of SIGILL carries it out on simulated tile registers, one set for each thread.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <ucontext.h>

#include <csignal>
#include <cstdint>
#include <cstring>

#include "simulated_tiles.h"

namespace mpq::cpu {
namespace {

thread_local SimulatedTiles trapped_tiles;

int64_t displacement(const uint8_t* at, int bytes) {
  if (bytes == 1) return static_cast<int8_t>(*at);
  int32_t value = 0;
  std::memcpy(&value, at, static_cast<size_t>(bytes));
  return value;
}

// An instruction with a three-byte VEX prefix, 128 bits wide, of the table 0F 38.
struct Trapped {
  int opcode, prefix;  // prefix: 0 none, 1 66, 2 F3, 3 F2
  bool registers;      // no memory operand
  int reg, rm, third;
  char* address;
  int64_t index;  // value of the index register: the stride of a tile
  int length;

  static bool read(const uint8_t* code, const greg_t* values, Trapped& out) {
    static constexpr int kNumbers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                         REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || code[2] & 0x84) return false;  // also W = 0, L = 0
    const int b = code[1] & 32 ? 0 : 8, x = code[1] & 64 ? 0 : 8;
    const int mod = code[4] >> 6, rm = code[4] & 7;
    out = {code[3], code[2] & 3, mod == 3, code[4] >> 3 & 7, rm, ~code[2] >> 3 & 7, nullptr, 0, 5};
    if (out.registers) return true;
    int base = rm;
    if (rm == 4) {
      const int sib = code[out.length++], index = (sib >> 3 & 7) + x;
      base = sib & 7;
      if (index != 4) out.index = values[kNumbers[index]] << (sib >> 6);
    }
    if (mod == 0 && base == 5) return false;  // an address without a base, or relative to the instruction
    const int bytes = mod == 0 ? 0 : mod == 1 ? 1 : 4;
    const int64_t offset = bytes ? displacement(code + out.length, bytes) : 0;
    out.length += bytes;
    out.address = reinterpret_cast<char*>(values[kNumbers[base + b]] + offset);
    return true;
  }

  bool carry_out(SimulatedTiles& tiles) const {
    if (opcode == 0x49 && prefix == 0 && registers) {
      tiles.release();
    } else if (opcode == 0x49 && prefix == 0) {
      TileConfig config;
      std::memcpy(&config, address + index, sizeof config);
      tiles.configure(config);
    } else if (opcode == 0x49 && prefix == 3 && registers) {
      tiles.zero(reg);
    } else if (opcode == 0x4b && prefix == 3 && rm == 4) {
      tiles.load(reg, address, index);
    } else if (opcode == 0x4b && prefix == 2 && rm == 4) {
      tiles.store(reg, address, index);
    } else if (opcode == 0x5e && prefix == 2 && registers) {
      tiles.dot_as<int8_t, uint8_t>(reg, rm, third);
    } else if (opcode == 0x5c && prefix == 2 && registers) {
      tiles.dot_bf16(reg, rm, third);
    } else {
      return false;
    }
    return true;
  }
};

void carry_out_trapped(int, siginfo_t*, void* context) {
  greg_t* values = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Trapped instruction;
  if (Trapped::read(reinterpret_cast<const uint8_t*>(values[REG_RIP]), values, instruction) &&
      instruction.carry_out(trapped_tiles)) {
    values[REG_RIP] += instruction.length;
  } else {
    std::signal(SIGILL, SIG_DFL);  // what is left is illegal indeed
  }
}

void trap_amx() {
  struct sigaction action{};
  action.sa_sigaction = carry_out_trapped;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
}  // namespace mpq::cpu
#endif
