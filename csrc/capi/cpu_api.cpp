// The C interface of the CPU kernels: structures of include/mpq.h become those of cpu/cpu.h.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "capi/place.h"
#include "cpu/cpu.h"
#include "format/ids.h"
#include "generated/layout.h"
#include "include/mpq_cpu.h"

namespace {

namespace cpu = mpq::cpu;

constexpr int64_t kMaxExtent = INT32_MAX;  // of N and K: no count below leaves 63 bits

int status_of(int error) {
  switch (error) {
    case cpu::kOk:
      return MPQ_OK;
    case cpu::kErrorIsa:
      return MPQ_ERROR_ISA;
    case cpu::kErrorShape:
      return MPQ_ERROR_SHAPE;
    case cpu::kErrorNull:
      return MPQ_ERROR_NULL;
    case cpu::kErrorDType:
      return MPQ_ERROR_DTYPE;
    case cpu::kErrorCover:
      return MPQ_ERROR_COVER;
    case cpu::kErrorWorkspace:
      return MPQ_ERROR_WORKSPACE;
    case cpu::kErrorId:
      return MPQ_ERROR_ID;
    default:
      return MPQ_ERROR_SEGMENT;
  }
}

bool is_dtype(int32_t dtype) { return dtype == MPQ_F32 || dtype == MPQ_F16 || dtype == MPQ_BF16; }

int64_t dtype_bytes(int32_t dtype) { return dtype == MPQ_F32 ? 4 : 2; }

// What mpq::cpu is given to run on, for so many multiplications.
cpu::Parallel threads_of(const mpq_cpu& how, int64_t work) {
  return work < cpu::kSerialWork ? cpu::Parallel{nullptr, nullptr} : cpu::Parallel{how.run, how.pool};
}

int check_how(const mpq_cpu* how) {
  if (!how) return MPQ_ERROR_NULL;
  if (!cpu::supported(static_cast<cpu::Isa>(how->isa))) return MPQ_ERROR_ISA;
  return how->activations == MPQ_ACTIVATIONS_EXACT || how->activations == MPQ_ACTIVATIONS_INT8 ? MPQ_OK
                                                                                               : MPQ_ERROR_UNSUPPORTED;
}

// A weight as cpu.h takes it. Its segments are checked by the kernels' own rules, in cpu/dispatch.cpp.
struct View {
  std::vector<cpu::Segment> segments;
  cpu::Weight weight{};

  // with_pointers: false where tensors may be null, because only sizes are asked for.
  int set(const mpq_weight& w, bool with_pointers) {
    if (!w.segments || (with_pointers && (!w.qweight || !w.scales))) return MPQ_ERROR_NULL;
    if (w.out_features < 1 || w.in_features < 1 || w.num_segments < 1) return MPQ_ERROR_SHAPE;
    if (w.out_features > kMaxExtent || w.in_features > kMaxExtent) return MPQ_ERROR_SIZE;
    if (!is_dtype(w.scale_dtype)) return MPQ_ERROR_DTYPE;
    segments.reserve(w.num_segments);
    // Sizes do not depend on addresses, but cpu/dispatch.cpp refuses null.
    constexpr uintptr_t kNotNull = 64;
    mpq_weight nowhere = w;
    nowhere.qweight = nowhere.scales = nowhere.zeros = reinterpret_cast<const void*>(kNotNull);
    mpq::Places at;
    for (int32_t i = 0; i < w.num_segments; ++i) {
      const mpq_segment& s = w.segments[i];
      if (!mpq::fits(s, w.out_features, w.in_features)) return MPQ_ERROR_SEGMENT;
      if (with_pointers && mpq::stores_zeros(s.zero) && !w.zeros) return MPQ_ERROR_NULL;
      segments.push_back(with_pointers ? place(w, s, at) : place(nowhere, s, at));
    }
    weight = {w.out_features, w.in_features, segments.data(), w.num_segments, static_cast<cpu::DType>(w.scale_dtype),
              w.perm};
    return with_pointers ? check_perm(w) : MPQ_OK;
  }

 private:
  static cpu::Segment place(const mpq_weight& w, const mpq_segment& s, mpq::Places& at) {
    const auto address = [](const void* base, int64_t bytes) {  // never read for a size, where `base` is no address
      return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(bytes));
    };
    cpu::Segment out{s.n0, s.n1, s.k0, s.k1, s.bits, s.group_size, s.zero, {}, nullptr, nullptr};
    const int64_t scale = dtype_bytes(w.scale_dtype), zero = mpq::zero_bytes(s.zero, scale);
    mpq::Places planes = at;
    for (int p = 0; p < mpq::kPlaneCount[s.bits]; ++p) {
      out.planes[p] = static_cast<const uint32_t*>(address(w.qweight, 4 * planes.words));
      planes.words += mpq::plane_words(s, p);
    }
    out.scales = address(w.scales, at.scales * scale);
    if (zero) out.zeros = address(w.zeros, at.zeros * zero);
    at.add(s);
    return out;
  }

  static int check_perm(const mpq_weight& w) {
    uint32_t largest = 0;  // negative values are large ones
    for (int64_t k = 0; w.perm && k < w.in_features; ++k) {
      int32_t value;
      std::memcpy(&value, w.perm + k, sizeof value);
      largest = std::max(largest, static_cast<uint32_t>(value));
    }
    return largest < w.in_features ? MPQ_OK : MPQ_ERROR_PERM;
  }
};

// One of the two products of cpu.h.
struct Product {
  size_t (*workspace_bytes)(const cpu::LinearArgs& args);
  int (*run)(const cpu::LinearArgs& args, cpu::Isa isa, const cpu::Parallel& parallel);
};

constexpr Product kProducts[] = {{cpu::linear_workspace_bytes, cpu::linear},
                                 {cpu::linear_int8_workspace_bytes, cpu::linear_int8}};

const Product& product_of(const mpq_cpu& how) { return kProducts[how.activations]; }

// Everything but the weight. y has `columns` of them.
int check_activations(const mpq_linear_args& a, int64_t columns) {
  if (a.x_gate) return MPQ_ERROR_UNSUPPORTED;
  if (a.tokens < 0) return MPQ_ERROR_SHAPE;
  if (a.tokens > kMaxExtent) return MPQ_ERROR_SIZE;
  if (!is_dtype(a.x_dtype) || (a.bias && !is_dtype(a.bias_dtype))) return MPQ_ERROR_DTYPE;
  if (a.x_row_stride < 0 || (a.tokens > 1 && a.y_row_stride != columns)) return MPQ_ERROR_STRIDE;
  return MPQ_OK;
}

cpu::LinearArgs arguments(const mpq_linear_args& a, const cpu::Weight& weight) {
  return {a.x,    static_cast<cpu::DType>(a.x_dtype),    a.tokens, a.x_row_stride, weight,
          a.bias, static_cast<cpu::DType>(a.bias_dtype), a.y,      a.workspace,    a.workspace_bytes};
}

// The experts of a stacked weight, each a weight of its own over the same tensors.
struct Experts {
  std::vector<cpu::Weight> weights;

  // Moves the rows of the segments of `view`, which is held for as long as this.
  int set(View& view, int64_t count) {
    const int64_t rows = view.weight.N / count;
    int at = 0;
    for (int64_t e = 0; e < count; ++e) {
      const int first = at;
      for (; at < view.weight.num_segments && view.segments[at].n0 / rows == e; ++at) {
        cpu::Segment& s = view.segments[at];
        s.n0 -= e * rows;
        s.n1 -= e * rows;
        if (s.n1 > rows) return MPQ_ERROR_GROUPED;
      }
      cpu::Weight weight = view.weight;
      weight.N = rows;
      weight.segments = view.segments.data() + first;
      weight.num_segments = at - first;
      weights.push_back(weight);
    }
    return at == view.weight.num_segments ? MPQ_OK : MPQ_ERROR_COVER;
  }
};

int check_grouped(const mpq_grouped_args& g) {
  if (!g.offsets) return MPQ_ERROR_NULL;
  if (g.num_experts < 1 || g.linear.weight.out_features % g.num_experts) return MPQ_ERROR_GROUPED;
  if (g.offsets[0] != 0 || g.offsets[g.num_experts] != g.linear.tokens) return MPQ_ERROR_GROUPED;
  for (int32_t e = 0; e < g.num_experts; ++e) {
    if (g.offsets[e] > g.offsets[e + 1]) return MPQ_ERROR_GROUPED;
  }
  return check_activations(g.linear, g.linear.weight.out_features / g.num_experts);
}

// visit(arguments) for each expert that has tokens.
template <class Visit>
void for_each_expert(const mpq_grouped_args& g, const Experts& experts, const Visit& visit) {
  const mpq_linear_args& a = g.linear;
  for (int32_t e = 0; e < g.num_experts; ++e) {
    const int64_t first = g.offsets[e];
    cpu::LinearArgs args = arguments(a, experts.weights[e]);
    args.M = g.offsets[e + 1] - first;
    if (!args.M) continue;
    const int64_t rows = args.weight.N;
    if (a.x) args.x = static_cast<const char*>(a.x) + first * a.x_row_stride * dtype_bytes(a.x_dtype);
    if (a.y) args.y = static_cast<char*>(a.y) + first * rows * dtype_bytes(a.x_dtype);
    if (a.bias) args.bias = static_cast<const char*>(a.bias) + e * rows * dtype_bytes(a.bias_dtype);
    visit(args);
  }
}

// Sets up `view` and `experts`. Reads the offsets.
int set_grouped(const mpq_grouped_args& g, bool with_pointers, View& view, Experts& experts) {
  if (int status = check_grouped(g)) return status;
  if (int status = view.set(g.linear.weight, with_pointers)) return status;
  return experts.set(view, g.num_experts);
}

size_t grouped_workspace(const mpq_grouped_args& g, const mpq_cpu& how, const Experts& experts) {
  size_t most = 0;  // all experts use one workspace in turn
  for_each_expert(g, experts,
                  [&](const cpu::LinearArgs& args) { most = std::max(most, product_of(how).workspace_bytes(args)); });
  return most;
}

// Runs what may be short of memory: a table of segments is made in every call.
template <class Call>
int guarded(const Call& call) noexcept {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return MPQ_ERROR_MEMORY;
  }
}

}  // namespace

uint32_t mpq_cpu_version() { return MPQ_CPU_VERSION; }

const char* mpq_cpu_layout_id() { return mpq::kLayoutId; }

const char* mpq_cpu_isa_name(int32_t isa) {
  for (const cpu::Isa known : cpu::kIsas) {
    if (static_cast<int32_t>(known) == isa) return cpu::isa_name(known);
  }
  return nullptr;
}

int mpq_cpu_query(uint32_t version, const char* isa, mpq_cpu* how) {
  if (version != MPQ_CPU_VERSION) return MPQ_ERROR_VERSION;
  if (!how) return MPQ_ERROR_NULL;
  *how = {static_cast<int32_t>(cpu::best_isa()), MPQ_ACTIVATIONS_EXACT, nullptr, nullptr};
  if (!isa) return MPQ_OK;
  for (const cpu::Isa known : cpu::kIsas) {
    if (std::strcmp(isa, cpu::isa_name(known)) != 0) continue;
    how->isa = static_cast<int32_t>(known);
    return cpu::supported(known) ? MPQ_OK : MPQ_ERROR_ISA;
  }
  return MPQ_ERROR_ISA;
}

int mpq_cpu_weight_bytes(const mpq_weight* weight, mpq_weight_bytes* bytes) {
  if (!weight || !bytes) return MPQ_ERROR_NULL;
  return guarded([&] {
    View view;
    if (int status = view.set(*weight, false)) return status;
    if (int error = cpu::check_weight(view.weight)) return status_of(error);
    mpq::Places end;
    size_t zeros = 0;
    const int64_t scale = dtype_bytes(weight->scale_dtype);
    for (int32_t i = 0; i < weight->num_segments; ++i) {
      const mpq_segment& s = weight->segments[i];
      end.add(s);
      if (const int64_t zero = mpq::zero_bytes(s.zero, scale)) zeros = static_cast<size_t>(end.zeros * zero);
    }
    *bytes = {static_cast<size_t>(4 * end.words), static_cast<size_t>(scale * end.scales), zeros,
              static_cast<size_t>(4 * weight->in_features)};
    return static_cast<int>(MPQ_OK);
  });
}

int mpq_cpu_workspace_size(const mpq_linear_args* args, const mpq_cpu* how, size_t* bytes) {
  if (!args || !bytes) return MPQ_ERROR_NULL;
  if (int status = check_how(how)) return status;
  return guarded([&] {
    View view;
    if (int status = view.set(args->weight, false)) return status;
    if (int status = check_activations(*args, args->weight.out_features)) return status;
    *bytes = product_of(*how).workspace_bytes(arguments(*args, view.weight));
    return static_cast<int>(MPQ_OK);
  });
}

int mpq_cpu_linear(const mpq_linear_args* args, const mpq_cpu* how) {
  if (!args) return MPQ_ERROR_NULL;
  if (int status = check_how(how)) return status;
  return guarded([&] {
    View view;
    if (int status = view.set(args->weight, true)) return status;
    if (int status = check_activations(*args, args->weight.out_features)) return status;
    const int64_t work = args->tokens * view.weight.K * view.weight.N;
    return status_of(
        product_of(*how).run(arguments(*args, view.weight), static_cast<cpu::Isa>(how->isa), threads_of(*how, work)));
  });
}

int mpq_cpu_grouped_workspace_size(const mpq_grouped_args* args, const mpq_cpu* how, size_t* bytes) {
  if (!args || !bytes) return MPQ_ERROR_NULL;
  if (int status = check_how(how)) return status;
  return guarded([&] {
    View view;
    Experts experts;
    if (int status = set_grouped(*args, false, view, experts)) return status;
    *bytes = grouped_workspace(*args, *how, experts);
    return static_cast<int>(MPQ_OK);
  });
}

int mpq_cpu_grouped_linear(const mpq_grouped_args* args, const mpq_cpu* how) {
  if (!args) return MPQ_ERROR_NULL;
  if (int status = check_how(how)) return status;
  return guarded([&] {
    View view;
    Experts experts;
    if (int status = set_grouped(*args, true, view, experts)) return status;
    const mpq_linear_args& a = args->linear;
    if (a.tokens > 0 && (!a.x || !a.y || !a.workspace)) return static_cast<int>(MPQ_ERROR_NULL);
    if (a.workspace_bytes < grouped_workspace(*args, *how, experts)) return static_cast<int>(MPQ_ERROR_WORKSPACE);
    for (const cpu::Weight& weight : experts.weights) {  // all of them, before anything is written
      if (int error = cpu::check_weight(weight)) return status_of(error);
    }
    int status = MPQ_OK;
    for_each_expert(*args, experts, [&](const cpu::LinearArgs& one) {
      const int64_t work = one.M * one.weight.K * one.weight.N;
      const int error = product_of(*how).run(one, static_cast<cpu::Isa>(how->isa), threads_of(*how, work));
      if (error) status = status_of(error);
    });
    return status;
  });
}

int mpq_cpu_dequantize(const mpq_dequantize_args* args, const mpq_cpu* how) {
  if (!args) return MPQ_ERROR_NULL;
  if (int status = check_how(how)) return status;
  return guarded([&] {
    View view;
    if (int status = view.set(args->weight, true)) return status;
    return status_of(cpu::dequantize(view.weight, args->out, static_cast<cpu::DType>(args->out_dtype),
                                     static_cast<cpu::Isa>(how->isa), threads_of(*how, view.weight.N * view.weight.K)));
  });
}

int mpq_cpu_embedding(const mpq_embedding_args* args, const mpq_cpu* how) {
  if (!args) return MPQ_ERROR_NULL;
  if (int status = check_how(how)) return status;
  return guarded([&] {
    View view;
    if (int status = view.set(args->weight, true)) return status;
    return status_of(cpu::embedding(view.weight, args->ids, args->count, args->out,
                                    static_cast<cpu::DType>(args->out_dtype),
                                    threads_of(*how, args->count * view.weight.K)));
  });
}

const char* mpq_cpu_error_text(int status) {
  switch (status) {
    case MPQ_OK:
      return "ok";
    case MPQ_ERROR_NULL:
      return "a required pointer is null";
    case MPQ_ERROR_SHAPE:
      return "tokens, out_features, in_features, segments or threads are too few";
    case MPQ_ERROR_DTYPE:
      return "unknown dtype";
    case MPQ_ERROR_SEGMENT:
      return "a segment has a bad range, width, group_size or kind of zeros";
    case MPQ_ERROR_COVER:
      return "the segments do not cover the weight exactly once in order of n0, then k0";
    case MPQ_ERROR_ALIGNMENT:
      return "a pointer is not aligned as the device asks";
    case MPQ_ERROR_STRIDE:
      return "x_row_stride is negative, or y is not contiguous";
    case MPQ_ERROR_WORKSPACE:
      return "the workspace is smaller than the workspace size";
    case MPQ_ERROR_DEVICE:
      return "the device cannot run the kernels";
    case MPQ_ERROR_SIZE:
      return "the weight or the number of tokens is too large";
    case MPQ_ERROR_GROUPED:
      return "the experts do not share out the rows, a row band lies in two of them, or the offsets are not those of "
             "the tokens";
    case MPQ_ERROR_VERSION:
      return "the program was compiled for another version of the interface than the library has";
    case MPQ_ERROR_ISA:
      return "this machine or this build does not have the instruction set";
    case MPQ_ERROR_ID:
      return "an id is outside of the rows of the weight";
    case MPQ_ERROR_PERM:
      return "perm has a value that is no column";
    case MPQ_ERROR_UNSUPPORTED:
      return "x_gate is not null, or activations are of an unknown kind";
    case MPQ_ERROR_MEMORY:
      return "no memory, or no thread, is to be had";
    case MPQ_ERROR_FILE:
      return "a file cannot be read or mapped";
    case MPQ_ERROR_FORMAT:
      return "the directory is not a packed model that this library reads";
    case MPQ_ERROR_NAME:
      return "the model has nothing of this name";
    default:
      return status >= MPQ_ERROR_CUDA ? "an error of the CUDA runtime" : "unknown status";
  }
}
