// Counters for calls that may run at the same time (include/mpq.h): one set for each stream and, because a graph may be
// replayed on any stream, one for each stream of each capture.
//
// The memory is the library's own. Blocks of torch's allocator that outlive a call make torch.compile's graph trees
// refuse a recording (mode="reduce-overhead"): everything that lives in the pool of a graph must be known to them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace mpq {

// Machine, for the current device: Stream and Graph, types; capture_of(stream) -> {id, graph}, id 0 outside of a
// capture; zeroed(bytes) -> memory that is kept for ever, zero for every stream, also inside a capture;
// when_gone(graph, call, argument) calls call(argument), which calls nothing of the machine, once neither the graph nor
// anything made of it can run.
template <class Machine, size_t kSetBytes>
class CounterSets {
  using Stream = typename Machine::Stream;

 public:
  static constexpr size_t kSetsOfASlab = 64;

  // A set of zeros that nothing else uses which may run beside the next call on `stream`, of device `device`.
  void* of(int32_t device, Stream stream) {
    const auto capture = Machine::capture_of(stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    take_back();
    void*& set = sets_[{device, {stream, capture.id}}];
    if (set) return set;
    std::vector<char*>& free = free_[device];
    if (free.empty()) {
      char* slab = static_cast<char*>(Machine::zeroed(kSetBytes * kSetsOfASlab));
      for (size_t i = kSetsOfASlab; i-- > 0;) free.push_back(slab + i * kSetBytes);
    }
    if (capture.id) Machine::when_gone(capture.graph, give_back, new Lease{this, {device, {stream, capture.id}}});
    set = free.back();
    free.pop_back();
    return set;
  }

 private:
  using Key = std::pair<int32_t, std::pair<Stream, unsigned long long>>;
  struct Lease {
    CounterSets* owner;
    Key key;
  };

  // Called by a thread of the driver: it must not wait for one that is inside of the driver, so this lock is never held
  // around a call of the machine.
  static void give_back(void* argument) {
    Lease* lease = static_cast<Lease*>(argument);
    const std::lock_guard<std::mutex> lock(lease->owner->returned_mutex_);
    lease->owner->returned_.push_back(lease->key);
    delete lease;
  }

  // Every call leaves its counters zero, so a set needs no clearing between two owners.
  void take_back() {
    const std::lock_guard<std::mutex> lock(returned_mutex_);
    for (const Key& key : returned_) {
      const auto found = sets_.find(key);
      free_[key.first].push_back(static_cast<char*>(found->second));
      sets_.erase(found);
    }
    returned_.clear();
  }

  std::mutex mutex_, returned_mutex_;
  std::map<Key, void*> sets_;
  std::map<int32_t, std::vector<char*>> free_;
  std::vector<Key> returned_;
};

}  // namespace mpq
