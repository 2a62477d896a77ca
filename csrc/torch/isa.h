// The instruction set that the CPU operators use.
#pragma once

#include "cpu/cpu.h"

namespace mpq {

// The best one, unless mpq::set_cpu_isa chose another.
cpu::Isa current_isa();

}  // namespace mpq
