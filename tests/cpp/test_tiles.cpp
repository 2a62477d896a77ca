// Standalone test of the kernels on tile registers, on any machine. Those of int8 x (cpu/int8/tile_registers.inl), over
// simulated registers, must give the bits of the kernels without any. So must the machine code of int8_amx.cpp: on the
// processor where it has AMX, and where it has AVX-512 VNNI alone, with every instruction of AMX trapped and simulated.
// The machine code of pairs_amx.cpp, likewise with AVX512_BF16, must give W times x, and W for a one-hot x. Returns 1
// on failure.
#include <csignal>

#include "cpu/tiles/amx.h"
#include "cpu_calls.h"
#include "simulated_tiles.h"
#include "trapped_amx.h"

#if defined(__linux__)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace mpq::cpu {

TileCounts tile_counts;

LinearInt8 simulated_int8();
bool simulated_multiplies();
bool signed_multiplies();

}  // namespace mpq::cpu

namespace {

// Kernels on simulated tile registers, and what they must agree with. All sets that have fused multiply-adds give the
// same bits; portable C++ rounds twice and has its own.
struct Alike {
  Isa isa;
  std::vector<Isa> others;
  LinearInt8 simulated;
};

std::vector<Alike> alike() {
  std::vector<Alike> out = {{Isa::portable, {}, simulated_int8()}};
#if defined(__x86_64__) && defined(__linux__)
  if (supported(Isa::avx512vnni)) {
    out.push_back({Isa::avx512vnni, {Isa::avx2, Isa::avx512, Isa::avxvnni, Isa::amx}, nullptr});
    if (!supported(Isa::amx)) {
      trap_amx();
      out.back().simulated = int8_amx();
    }
  }
#endif
  return out;
}

void check_model(const std::vector<BandSpec>& bands, int64_t tokens, int seed, const std::string& label) {
  const bool odd = seed & 1, permuted = seed & 2, bias = seed & 4;
  Model model = make_model(bands, kDTypes[seed % 3], permuted, odd);
  static const std::vector<Alike> kAlike = alike();
  for (const Alike& family : kAlike) {
    Call call(model, family.isa, kDTypes[seed / 3 % 3], tokens, bias, odd, label + " tiles");
    call.int8 = true;
    for (int64_t i = 0; i < tokens * model.K; ++i) {
      encode(uniform(-1, 1), call.dtype, call.x_at(i / model.K, i % model.K));
    }
    if (seed & 8) encode(NAN, call.dtype, call.x_at(tokens - 1, model.K - 1));
    const std::vector<unsigned char> want = call.run(kSerial);
    for (const Isa isa : family.others) {
      call.isa = isa;
      if (supported(isa)) check(call.run(kThreads) == want, call.name, isa_name(isa));
    }
    if (!family.simulated) continue;
    call.kernel = family.simulated;
    const long before = tile_counts.dots;
    check(call.run(kSerial) == want, call.name, "other bits than without tile registers");
    check(call.run(kThreads) == want, call.name, "other bits on three threads");
    check((tile_counts.dots > before) == (tokens >= 16), call.name, "tile registers used for the wrong tokens");
  }
}

// bf16 x on tile registers: the bits of W for a one-hot x, else the sum within the bound; the same on three threads.
void check_pairs(const std::vector<BandSpec>& bands, int64_t tokens, int seed, const std::string& label) {
#if defined(__x86_64__) && defined(__linux__)
  if (!supported(Isa::avx512bf16)) return;
  const bool odd = seed & 1, permuted = seed & 2, bias = seed & 4;
  Model model = make_model(bands, kDTypes[seed % 3], permuted, odd);
  bool whole_chunks = false;
  for (const BandSpec& band : bands) {
    for (const auto& s : band.segments) whole_chunks |= s.group_size % 16 == 0 || s.group_size == s.cols;
  }
  for (const bool one_hot : {true, false}) {
    Call call(model, Isa::amx, DType::kBF16, tokens, bias && !one_hot, odd, label + " pairs");
    if (!supported(Isa::amx)) call.pairs = pairs_amx();
    std::vector<int64_t> columns;
    for (int64_t m = 0; m < tokens; ++m) columns.push_back(m ? below(static_cast<int>(model.K)) : model.K - 1);
    for (int64_t i = 0; i < tokens * model.K; ++i) {
      const int64_t m = i / model.K, k = i % model.K;
      encode(one_hot ? columns[m] == k : uniform(-1, 1), call.dtype, call.x_at(m, k));
    }
    const long before = tile_counts.dots;
    const std::vector<unsigned char> first = call.run(kSerial);
    if (!supported(Isa::amx)) {
      check((tile_counts.dots > before) == (tokens >= 16 && whole_chunks), call.name,
            "tiles used for the wrong tokens");
    }
    if (!one_hot) check_values(call, bias);
    for (int64_t i = 0; one_hot && i < tokens * model.N; ++i) {
      unsigned char want[2];
      encode(model.w[i % model.N * model.K + columns[i / model.N]], call.dtype, want);
      check(!std::memcmp(call.y_at(i / model.N, i % model.N), want, 2), call.name, "not the bits of W");
    }
    check(call.run(kThreads) == first, call.name, "1 and 3 threads differ");
  }
#else
  (void)bands, (void)tokens, (void)seed, (void)label;
#endif
}

struct ColumnCase {
  int64_t K, group_size;
};

// Full steps, a tail of 1, 2 and 3 chunks with and without full steps, one group over everything, groups that begin and
// end inside a chunk so that the tail changes from block to block.
const ColumnCase kColumns[] = {{256, 64}, {192, 32}, {64, 16},   {192, 48},  {384, 128}, {400, 400}, {320, 160},
                               {172, 43}, {63, 7},   {172, 172}, {130, 130}, {640, 80},  {1, 1},     {290, 145}};
const int64_t kTokens[] = {16, 17, 33, 129, 31, 48, 3, 7};
const int64_t kRows[] = {1, 63, 65, 172, 64};

int check_uniform() {
  int cases = 0;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const ColumnCase& columns : kColumns) {
      for (int zero_kind = 0; zero_kind < kZeroKinds; ++zero_kind, ++cases) {
        const int64_t N = kRows[(cases + cases / 5) % 5];
        const std::string label = "bits=" + std::to_string(bits) + " N=" + std::to_string(N) +
                                  " K=" + std::to_string(columns.K) + " group=" + std::to_string(columns.group_size) +
                                  " zero=" + std::to_string(zero_kind);
        const int64_t tokens = kTokens[(cases + cases / 8) % 8];
        check_model({{N, {{columns.K, bits, columns.group_size, zero_kind}}}}, tokens, below(1 << 20), label);
        check_pairs({{N, {{columns.K, bits, columns.group_size, zero_kind}}}}, tokens, below(1 << 20), label);
      }
    }
  }
  return cases;
}

int check_segments() {
  int cases = 0;
  for (const auto& bands : mixed_weights()) {
    for (const int64_t tokens : {1, 4, 5, 15, 16, 17, 33, 129, 401}) {
      check_model(bands, tokens, 5 * cases, "segments " + std::to_string(cases));
      check_pairs(bands, tokens, 5 * cases, "segments " + std::to_string(cases));
      ++cases;
    }
  }
  // Many row blocks: tokens are not split among work items.
  check_model({{1100, {{128, 4, 64, kZeroInt}}}}, 40, 3, "tall");
  return cases + 1;
}

TileConfig shapes(int rows, int bytes) {
  TileConfig config{};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(rows);
    config.bytes[t] = static_cast<uint16_t>(bytes);
  }
  return config;
}

// The simulation notices what the processor would refuse, and nothing else.
int check_misuse() {
  unsigned char memory[16 * 64] = {};
  const auto misuses = [&](auto use) {
    const long before = tile_counts.misuses;
    {
      SimulatedTiles tiles;
      use(tiles);
    }
    return tile_counts.misuses - before;
  };
  const auto with = [&](auto change) {
    TileConfig config = shapes(16, 64);
    change(config);
    return misuses([&](SimulatedTiles& tiles) { tiles.configure(config), tiles.release(); });
  };
  const auto multiply = [&](auto change) {
    TileConfig config = shapes(16, 64);
    change(config);
    return misuses([&](SimulatedTiles& tiles) {
      tiles.configure(config);
      tiles.dot_bytes<0, 1, 2>();
      tiles.dot_pairs<0, 1, 2>();
      tiles.release();
    });
  };
  const std::pair<const char*, std::pair<long, bool>> cases[] = {
      {"right configuration", {with([](TileConfig&) {}), false}},
      {"palette", {with([](TileConfig& c) { c.palette = 2; }), true}},
      {"reserved", {with([](TileConfig& c) { c.reserved[13] = 1; }), true}},
      {"rows", {with([](TileConfig& c) { c.rows[3] = 17; }), true}},
      {"bytes", {with([](TileConfig& c) { c.bytes[3] = 65; }), true}},
      {"rows without bytes", {with([](TileConfig& c) { c.bytes[7] = 0; }), true}},
      {"register 8", {with([](TileConfig& c) { c.rows[8] = c.bytes[8] = 4; }), true}},
      {"not configured", {misuses([&](SimulatedTiles& tiles) { tiles.load<0>(memory, 64); }), true}},
      {"not released", {misuses([&](SimulatedTiles& tiles) { tiles.configure(shapes(16, 64)); }), true}},
      {"released twice", {misuses([&](SimulatedTiles& tiles) { tiles.release(); }), true}},
      {"right product", {multiply([](TileConfig&) {}), false}},
      {"right small product",
       {multiply([](TileConfig& c) { c.rows[0] = c.rows[1] = 3, c.bytes[1] = 20, c.rows[2] = 5; }), false}},
      {"rows of x", {multiply([](TileConfig& c) { c.rows[1] = 15; }), true}},
      {"columns of W", {multiply([](TileConfig& c) { c.bytes[2] = 60; }), true}},
      {"depth", {multiply([](TileConfig& c) { c.bytes[1] = 60; }), true}},
      {"depth in bytes", {multiply([](TileConfig& c) { c.bytes[1] = 62, c.rows[2] = 15; }), true}},
      {"register of no rows", {multiply([](TileConfig& c) { c.rows[2] = c.bytes[2] = 0; }), true}},
  };
  for (const auto& [name, found] : cases) check((found.first > 0) == found.second, "misuse", name);
  return static_cast<int>(std::size(cases));
}

#if defined(__x86_64__) && defined(__linux__)
volatile int sink;
volatile std::sig_atomic_t told = 0;

// What happens in the child stays there: no signal, no child to wait for, and its memory is its own.
int check_trials() {
  std::signal(SIGCHLD, [](int) { told = 1; });
  check(try_in_child([] {
          sink = 1;
          return sink == 1;
        }) == Trial::kRight,
        "trial", "right");
  check(try_in_child([] { return sink == 1; }) == Trial::kWrong, "trial", "wrong, or memory shared");
  check(try_in_child([] { return kill(getpid(), SIGSEGV) != 0; }) == Trial::kFaulted, "trial", "no memory");
  check(try_in_child([]() -> bool { __builtin_trap(); }) == Trial::kFaulted, "trial", "no such instruction");
  for (const auto multiplies : {amx_multiplies_bytes, amx_multiplies_pairs}) {
    const Trial found = try_in_child(multiplies);
    if (supported(Isa::amx)) check(found == Trial::kRight, "trial", "AMX");
    if (!supported(Isa::amx))
      check(found == Trial::kFaulted || found == Trial::kWrong, "trial", "AMX where there is none");
  }
  check(waitpid(-1, nullptr, __WALL) == -1 && errno == ECHILD, "trial", "a child is left");
  check(!told, "trial", "SIGCHLD");
  std::signal(SIGCHLD, SIG_DFL);
  return 6;
}
#else
int check_trials() { return 0; }
#endif

}  // namespace

int main() {
  const int uniform_cases = check_uniform(), segment_cases = check_segments();
  check(tile_counts.misuses == 0, "kernels", "would fault");
  check(tile_counts.configured > 0 && tile_counts.released > 0, "kernels", "never released");
  check(simulated_multiplies() && !signed_multiplies(), "trial product", "does not tell right from wrong");
  const int misuse_cases = check_misuse(), trials = check_trials();
  const char* refusal = isa_refusal(Isa::amx);
  const char* trapped = supported(Isa::avx512vnni) ? "trapped: " : "not checked: ";
  std::printf("amx: %s%s\n", refusal ? trapped : "checked", refusal ? refusal : "");
  std::printf("%d uniform, %d segmented weights, %ld tile products, %d misuses, %d trials\n", uniform_cases,
              segment_cases, tile_counts.dots.load(), misuse_cases, trials);
  std::printf("%ld checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
