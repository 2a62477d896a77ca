#include "capi/json.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "include/mpq_model.h"

namespace mpq {

namespace {

constexpr int kMaxDepth = 100;
constexpr int64_t kMaxValues = 10'000'000;

class Parser {
 public:
  Parser(std::string_view data, const std::string& where) : data_(data), where_(where) {}

  Json whole() {
    Json value = read(0);
    skip_space();
    if (at_ != data_.size()) fail("more than one value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw FileError{MPQ_ERROR_FORMAT, where_ + ": not valid JSON (" + what + " at byte " + std::to_string(at_) + ")"};
  }

  void skip_space() {
    while (at_ < data_.size() && std::string_view(" \t\n\r").find(data_[at_]) != std::string_view::npos) ++at_;
  }

  char peek() const { return at_ < data_.size() ? data_[at_] : '\0'; }

  bool take(std::string_view word) {
    if (data_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json read(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    if (++values_ > kMaxValues) fail("too many values");
    skip_space();
    Json value;
    if (peek() == '{') return object(depth);
    if (peek() == '[') return array(depth);
    if (peek() == '"') {
      value.kind = Json::kString;
      value.text = string();
    } else if (take("true") || take("false")) {
      value.kind = Json::kBool;
      value.integer = data_[at_ - 2] == 'u';
    } else if (take("NaN") || take("Infinity") || take("-Infinity")) {
      value.kind = Json::kReal;
    } else if (!take("null")) {
      return number();
    }
    return value;
  }

  Json object(int depth) {
    Json value;
    value.kind = Json::kObject;
    ++at_;
    for (skip_space(); !take("}"); skip_space()) {
      if (!value.fields.empty() && !take(",")) fail("no comma");
      skip_space();
      if (peek() != '"') fail("no name");
      std::string name = string();
      skip_space();
      if (!take(":")) fail("no colon");
      value.fields.emplace_back(std::move(name), read(depth + 1));
    }
    std::vector<std::string_view> names;
    for (const auto& field : value.fields) names.push_back(field.first);
    std::sort(names.begin(), names.end());
    if (std::adjacent_find(names.begin(), names.end()) != names.end()) fail("a name appears twice");
    return value;
  }

  Json array(int depth) {
    Json value;
    value.kind = Json::kArray;
    ++at_;
    for (skip_space(); !take("]"); skip_space()) {
      if (!value.items.empty() && !take(",")) fail("no comma");
      value.items.push_back(read(depth + 1));
    }
    return value;
  }

  bool digits() {
    const size_t first = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ > first;
  }

  Json number() {
    Json value;
    const size_t first = at_;
    take("-");
    const char lead = peek();
    const size_t start = at_;
    if (!digits() || (lead == '0' && at_ - start > 1)) fail("no value");
    const size_t end = at_;
    if (take(".") && !digits()) fail("no digits");
    if (take("e") || take("E")) {
      if (!take("+")) take("-");
      if (!digits()) fail("no digits");
    }
    value.kind = at_ == end ? Json::kInteger : Json::kReal;
    if (value.kind == Json::kInteger) {
      const auto result = std::from_chars(data_.data() + first, data_.data() + end, value.integer);
      if (result.ec != std::errc()) fail("an integer is out of range");
    }
    return value;
  }

  unsigned hex4() {
    unsigned code = 0;
    const std::string_view text = data_.substr(at_, 4);
    const auto result = std::from_chars(text.data(), text.data() + text.size(), code, 16);
    if (text.size() != 4 || result.ptr != text.data() + 4) fail("no code point");
    at_ += 4;
    return code;
  }

  void append_escape(std::string& to) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
    const char name = peek();
    ++at_;
    if (name != 'u') {
      const size_t i = kNames.find(name);
      if (i == std::string_view::npos || name == '\0') fail("no escape");
      to += kValues[i];
      return;
    }
    unsigned code = hex4();
    if (code >= 0xdc00 && code < 0xe000) fail("half a surrogate pair");
    if (code >= 0xd800 && code < 0xdc00) {
      const unsigned low = take("\\u") ? hex4() : 0;
      if (low < 0xdc00 || low >= 0xe000) fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    const auto put = [&to](unsigned byte) { to += static_cast<char>(byte); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xc0 | code >> 6);
    } else {
      if (code < 0x10000) {
        put(0xe0 | code >> 12);
      } else {
        put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 0x3f));
      }
      put(0x80 | (code >> 6 & 0x3f));
    }
    put(0x80 | (code & 0x3f));
  }

  std::string string() {
    std::string out;
    for (++at_; !take("\"");) {
      if (at_ >= data_.size()) fail("an open string");
      const char next = data_[at_];
      if (static_cast<unsigned char>(next) < 0x20) fail("a control character");
      ++at_;
      if (next == '\\') {
        append_escape(out);
      } else {
        out += next;
      }
    }
    return out;
  }

  std::string_view data_;
  const std::string& where_;
  size_t at_ = 0;
  int64_t values_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (const auto& field : fields) {
    if (field.first == key) return &field.second;
  }
  return nullptr;
}

Json parse_json(std::string_view data, const std::string& where) { return Parser(data, where).whole(); }

}  // namespace mpq
