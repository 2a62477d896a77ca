// JSON of files that may come from anybody: bounded in bytes, values and depth; no key twice.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mpq {

// What is wrong with a file. Caught at the edge of the C interface.
struct FileError {
  int status;  // mpq_status
  std::string text;
};

struct Json {
  enum Kind { kNull, kBool, kInteger, kReal, kString, kArray, kObject };

  Kind kind = kNull;
  int64_t integer = 0;  // of kInteger, and 0 or 1 of kBool; the value of a kReal is not kept
  std::string text;     // of kString
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> fields;

  // A field of an object; null where there is none, or no object.
  const Json* find(std::string_view key) const;
  bool is(Kind wanted) const { return kind == wanted; }
};

constexpr int64_t kMaxJsonBytes = 100'000'000;  // as mpq_kernels/files/strict.py

// Throws FileError, which begins with `where`. NaN and Infinity are values: configs of some models hold them.
Json parse_json(std::string_view data, const std::string& where);

}  // namespace mpq
