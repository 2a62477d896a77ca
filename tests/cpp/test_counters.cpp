// csrc/torch/counters.h over a machine of the test's own: which calls share counters, and when a set is free again.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>

#include "torch/counters.h"

namespace {

#define EXPECT(condition)                                             \
  if (!(condition)) {                                                 \
    std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
    std::exit(1);                                                     \
  }

struct Graph {
  std::vector<std::function<void()>> when_gone;
  void destroy() {
    for (auto& call : when_gone) call();
    when_gone.clear();
  }
};

struct Capture {
  unsigned long long id = 0;
  Graph* graph = nullptr;
};

struct FakeMachine {
  using Stream = int;
  static inline Capture capture;
  static inline int slabs = 0;
  static inline bool full = false;

  static Capture capture_of(Stream) { return capture; }
  static void* zeroed(size_t bytes) {
    if (full) throw std::runtime_error("no memory");
    ++slabs;
    return std::calloc(bytes, 1);  // kept for ever, as on a device
  }
  static void when_gone(Graph* graph, void (*call)(void*), void* argument) {
    graph->when_gone.push_back([=] { call(argument); });
  }
};

using Sets = mpq::CounterSets<FakeMachine, 1024>;

void capture(unsigned long long id, Graph* graph) { FakeMachine::capture = {id, graph}; }
void no_capture() { FakeMachine::capture = {}; }

void streams_and_devices_have_their_own() {
  Sets sets;
  void* first = sets.of(0, 1);
  EXPECT(sets.of(0, 1) == first);
  EXPECT(sets.of(0, 2) != first);
  EXPECT(sets.of(1, 1) != first);
  EXPECT(std::abs(static_cast<char*>(sets.of(0, 2)) - static_cast<char*>(first)) >= 1024);
}

void captures_have_their_own_on_each_stream() {
  Sets sets;
  Graph one, two;
  void* eager = sets.of(0, 1);
  capture(7, &one);
  void* captured = sets.of(0, 1);
  EXPECT(captured != eager && sets.of(0, 1) == captured);
  EXPECT(sets.of(0, 2) != captured && sets.of(0, 2) != eager);
  EXPECT(one.when_gone.size() == 2);
  capture(8, &two);
  EXPECT(sets.of(0, 1) != captured && sets.of(0, 1) != eager);
  no_capture();
  EXPECT(sets.of(0, 1) == eager);
}

void a_graph_gives_its_sets_back() {
  Sets sets;
  const int before = FakeMachine::slabs;
  std::set<void*> seen;
  for (unsigned long long id = 1; id <= 10000; ++id) {
    Graph graph;
    capture(id, &graph);
    void* set = sets.of(0, 1);
    for (int i = 0; i < 1024; ++i) EXPECT(static_cast<char*>(set)[i] == 0);
    seen.insert(set);
    graph.destroy();
  }
  no_capture();
  EXPECT(FakeMachine::slabs == before + 1);
  EXPECT(seen.size() <= Sets::kSetsOfASlab);
}

void living_graphs_never_share() {
  Sets sets;
  std::vector<Graph> graphs(500);
  std::set<void*> seen;
  for (size_t i = 0; i < graphs.size(); ++i) {
    capture(i + 1, &graphs[i]);
    seen.insert(sets.of(0, 1));
  }
  no_capture();
  EXPECT(seen.size() == graphs.size());
}

void a_full_device_is_asked_again() {
  Sets sets;
  FakeMachine::full = true;
  bool thrown = false;
  try {
    sets.of(0, 1);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  FakeMachine::full = false;
  EXPECT(thrown && sets.of(0, 1) != nullptr);
}

}  // namespace

int main() {
  streams_and_devices_have_their_own();
  captures_have_their_own_on_each_stream();
  a_graph_gives_its_sets_back();
  living_graphs_never_share();
  a_full_device_is_asked_again();
}
