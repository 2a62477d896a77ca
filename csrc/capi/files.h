// The tensors of a checkpoint directory: one safetensors file, or several and an index. Mapped, every header checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "capi/json.h"

namespace mpq {

// A file mapped for reading.
class Mapped {
 public:
  explicit Mapped(const std::string& path);  // throws FileError
  ~Mapped();
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  const char* data;
  size_t bytes;
};

// Path of the regular file `name` of `directory`. Throws FileError for names and links that lead out of it.
std::string contained_file(const std::string& directory, const std::string& name);

// The object in a JSON file. Throws FileError.
Json read_json(const std::string& path);

struct TensorFiles {
  std::vector<std::unique_ptr<Mapped>> files;
  std::map<std::string, StoredTensor> tensors;

  explicit TensorFiles(const std::string& directory);  // throws FileError

 private:
  void add(const std::string& path);
};

}  // namespace mpq
