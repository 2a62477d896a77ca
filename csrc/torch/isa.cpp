// Torch operators that name and choose the instruction set of the CPU kernels.
#include "torch/isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

namespace mpq {
namespace {

// Chosen once, at the first call or by mpq::set_cpu_isa; -1 until then.
std::atomic<int> g_isa{-1};

}  // namespace

cpu::Isa current_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(cpu::best_isa());
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<cpu::Isa>(isa);
}

namespace {

// Instruction sets that work on this processor, best first, comma-separated.
std::string cpu_isas() {
  std::string names;
  for (cpu::Isa isa : cpu::kIsas) {
    if (!cpu::supported(isa)) continue;
    if (!names.empty()) names += ",";
    names += cpu::isa_name(isa);
  }
  return names;
}

std::string cpu_isa() { return cpu::isa_name(current_isa()); }

// Which kernels serve how many tokens with the instruction set in use: lines of "x, tokens from, kernel".
std::string cpu_paths() {
  struct Kind {
    const char* x;
    cpu::DType dtype;
    bool int8;
  };
  constexpr Kind kKinds[] = {{"bf16", cpu::DType::kBF16, false},
                             {"fp16 or fp32", cpu::DType::kF32, false},
                             {"rounded to int8", cpu::DType::kF32, true}};
  std::string lines;
  for (const Kind& kind : kKinds) {
    cpu::Path found[cpu::kMostPaths];
    const int count = cpu::paths(current_isa(), kind.dtype, kind.int8, found);
    for (int i = 0; i < count; ++i) {
      lines += std::string(kind.x) + "," + std::to_string(found[i].tokens) + "," + found[i].kernel + "\n";
    }
  }
  return lines;
}

cpu::Isa isa_of(const std::string& name) {
  for (cpu::Isa isa : cpu::kIsas) {
    if (name == cpu::isa_name(isa)) return isa;
  }
  STD_TORCH_CHECK(false, "unknown instruction set ", name, "; this processor has ", cpu_isas());
}

// Why an instruction set cannot be chosen here; empty where it can.
std::string cpu_isa_refusal(std::string name) {
  const char* reason = cpu::isa_refusal(isa_of(name));
  return reason ? reason : "";
}

void set_cpu_isa(std::string name) {
  const cpu::Isa isa = isa_of(name);
  const char* reason = cpu::isa_refusal(isa);
  STD_TORCH_CHECK(!reason, name, " cannot be used here: ", reason, "; choose one of ", cpu_isas());
  g_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace
}  // namespace mpq

STABLE_TORCH_LIBRARY_FRAGMENT(mpq, m) {
  m.def("cpu_isas() -> str");
  m.def("cpu_isa() -> str");
  m.def("cpu_paths() -> str");
  m.def("cpu_isa_refusal(str name) -> str");
  m.def("set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mpq, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&mpq::cpu_isas));
  m.impl("cpu_isa", TORCH_BOX(&mpq::cpu_isa));
  m.impl("cpu_paths", TORCH_BOX(&mpq::cpu_paths));
  m.impl("cpu_isa_refusal", TORCH_BOX(&mpq::cpu_isa_refusal));
  m.impl("set_cpu_isa", TORCH_BOX(&mpq::set_cpu_isa));
}
