#include "control.h"

#include "state.h"

namespace sim = mpq::sim;

void mpq_sim_reset(void) {
  sim::simulation = sim::Simulation{};
  sim::forget_ranges();
}

void mpq_sim_allow(const void* address, size_t bytes, uint32_t flags, const char* name) {
  sim::add_range(address, bytes, flags, name);
}

void mpq_sim_order(int kind, uint32_t seed) {
  sim::simulation.order = static_cast<sim::Order>(kind);
  sim::simulation.random = seed * 2654435761u | 1;  // not 0
}

void mpq_sim_arrives_late(void* to, const void* from, size_t bytes) { sim::simulation.late = {to, from, bytes}; }

void mpq_sim_interleave(int on) { sim::simulation.interleave = on != 0; }

const char* mpq_sim_error(void) { return sim::simulation.error; }

uint64_t mpq_sim_count(int which) { return which >= 0 && which < sim::kCounters ? sim::simulation.counters[which] : 0; }
