// A packed directory as mpq_model: config.json and every tensor that it names are checked, then pointers are set.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "capi/files.h"
#include "capi/json.h"
#include "capi/place.h"
#include "format/ids.h"
#include "generated/layout.h"
#include "include/mpq_model.h"

namespace {

using mpq::FileError;
using mpq::Json;

constexpr int64_t kMaxExtent = INT32_MAX;
constexpr std::string_view kFloatDtypes[] = {"F32", "F16", "BF16"};  // by mpq_dtype

// One of quantization_config's layouts.
struct Layout {
  int64_t N, K;
  int32_t scale_dtype;
  bool permuted;
  std::vector<mpq_segment> segments;
  mpq::Places end;  // elements in all
  std::string zeros_dtype;
};

// A module's own memory; what mpq_module points to.
struct Held {
  std::string name;
  std::vector<std::string> member_names;
  std::vector<mpq_member> members;
};

[[noreturn]] void fail(const std::string& where, const std::string& what) {
  throw FileError{MPQ_ERROR_FORMAT, where + ": " + what};
}

const Json& need(const Json& object, std::string_view key, Json::Kind kind, const std::string& where) {
  const Json* value = object.find(key);
  if (!value || !value->is(kind)) fail(where, std::string(key) + " is missing, or of another kind");
  return *value;
}

int64_t need_extent(const Json& object, std::string_view key, const std::string& where) {
  const int64_t value = need(object, key, Json::kInteger, where).integer;
  if (value < 1 || value > kMaxExtent) fail(where, std::string(key) + " is out of range");
  return value;
}

bool need_bool(const Json& object, std::string_view key, const std::string& where) {
  return need(object, key, Json::kBool, where).integer != 0;
}

template <size_t count>
int32_t index_of(const std::string& name, const char* const (&names)[count], const std::string& where) {
  for (size_t i = 0; i < count; ++i) {
    if (name == names[i]) return static_cast<int32_t>(i);
  }
  fail(where, name + " is unknown");
}

mpq_segment segment_of(const Json& item, int64_t N, int64_t K, const std::string& where) {
  if (!item.is(Json::kArray) || item.items.size() != 7 || !item.items[6].is(Json::kString))
    fail(where, "a segment is not [n0, n1, k0, k1, bits, group_size, zero]");
  std::array<int64_t, 6> v{};
  for (size_t i = 0; i < v.size(); ++i) {
    v[i] = item.items[i].integer;
    if (!item.items[i].is(Json::kInteger) || v[i] < 0 || v[i] > kMaxExtent) fail(where, "a segment is out of range");
  }
  const mpq_segment s{
      v[0], v[1], v[2], v[3], v[5], static_cast<int32_t>(v[4]), index_of(item.items[6].text, mpq::kZeroNames, where)};
  if (!mpq::fits(s, N, K)) fail(where, "a segment does not fit the weight");
  return s;
}

Layout layout_of(const Json& item, const std::string& where) {
  Layout out{};
  out.N = need_extent(item, "out_features", where);
  out.K = need_extent(item, "in_features", where);
  out.scale_dtype = index_of(need(item, "scale_dtype", Json::kString, where).text, mpq::kScaleDtypeNames, where);
  out.permuted = need_bool(item, "permuted", where);
  int64_t row = 0, col = 0;
  for (const Json& one : need(item, "segments", Json::kArray, where).items) {
    const mpq_segment s = segment_of(one, out.N, out.K, where);
    if (s.n0 != row || s.k0 != col || (col && s.n1 != out.segments.back().n1)) fail(where, "segments leave a gap");
    if (mpq::stores_zeros(s.zero)) {
      const bool bytes = mpq::kZeroStored[s.zero] == 1;
      const std::string dtype = bytes ? "U8" : std::string(kFloatDtypes[out.scale_dtype]);
      if (!out.zeros_dtype.empty() && out.zeros_dtype != dtype) fail(where, "zeros of two dtypes");
      out.zeros_dtype = dtype;
    }
    out.end.add(s);
    out.segments.push_back(s);
    col = s.k1 % out.K;
    if (!col) row = s.n1;
  }
  if (row != out.N || col) fail(where, "segments do not cover the weight");
  return out;
}

}  // namespace

struct mpq_model {
  mpq::TensorFiles files;
  std::deque<Layout> layouts;
  std::deque<Held> held;
  std::vector<mpq_module> modules;
  std::map<std::string_view, size_t> by_name;
  std::set<std::string> used;  // tensors of packed modules

  explicit mpq_model(const std::string& directory) : files(directory) {
    const std::string where = mpq::contained_file(directory, "config.json");
    const Json config = mpq::read_json(where);
    const Json& packing = need(config, "quantization_config", Json::kObject, where);
    check_versions(packing, where);
    for (const Json& item : need(packing, "layouts", Json::kArray, where).items) {
      layouts.push_back(layout_of(item, where + ": layout " + std::to_string(layouts.size())));
    }
    const Json& named = need(packing, "modules", Json::kObject, where);
    modules.reserve(named.fields.size());
    for (const auto& [name, item] : named.fields) add(name, item, where + ": module " + name);
    for (size_t i = 0; i < modules.size(); ++i) by_name.emplace(modules[i].name, i);
    if (const Json* floats = packing.find("float8")) {
      for (const auto& [name, item] : floats->fields) use_float8(name, item, where + ": float8 " + name);
    }
    check_others(where);
  }

  static void check_versions(const Json& packing, const std::string& where) {
    if (need(packing, "quant_method", Json::kString, where).text != "mpq") fail(where, "quant_method is not mpq");
    if (need(packing, "format_version", Json::kInteger, where).integer != mpq::kFormatVersion)
      fail(where, "format_version is not that of this library, " + std::to_string(mpq::kFormatVersion));
    const std::string& id = need(packing, "layout_id", Json::kString, where).text;
    if (id != mpq::kLayoutId) fail(where, "layout_id is " + id + ", and this library has " + mpq::kLayoutId);
  }

  const mpq::StoredTensor& tensor(const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape,
                                  const std::string& where) {
    const auto found = files.tensors.find(name);
    if (found == files.tensors.end()) fail(where, "the tensor " + name + " is missing");
    if (found->second.dtype != dtype || found->second.shape != shape)
      fail(where, "the tensor " + name + " has another dtype or shape than the layout says");
    used.insert(name);
    return found->second;
  }

  // Dtype of a bias, which is the model's.
  std::string_view bias_dtype(const std::string& name, const std::string& where) const {
    const auto found = files.tensors.find(name);
    if (found == files.tensors.end()) fail(where, "the tensor " + name + " is missing");
    for (const std::string_view dtype : kFloatDtypes) {
      if (found->second.dtype == dtype) return dtype;
    }
    fail(where, "the bias is not of a floating-point dtype of 16 or 32 bits");
  }

  void add(const std::string& name, const Json& item, const std::string& where) {
    const int64_t index = need(item, "layout", Json::kInteger, where).integer;
    if (index < 0 || index >= static_cast<int64_t>(layouts.size())) fail(where, "there is no such layout");
    const Layout& layout = layouts[index];
    held.push_back({name, {}, {}});
    mpq_module out{};
    out.name = held.back().name.c_str();
    set_weight(out, layout, where);
    if (need_bool(item, "bias", where)) {
      const std::string_view dtype = bias_dtype(name + ".bias", where);
      const mpq::StoredTensor& bias = tensor(name + ".bias", dtype, {layout.N}, where);
      out.bias = bias.data;
      out.bias_bytes = bias.bytes;
      out.bias_dtype = static_cast<int32_t>(std::find(std::begin(kFloatDtypes), std::end(kFloatDtypes), dtype) -
                                            std::begin(kFloatDtypes));
    }
    if (const Json* members = item.find("members"); members && !members->is(Json::kNull))
      set_members(out, *members, held.back(), where);
    out.embedding = item.find("embedding") != nullptr;
    if (const Json* experts = item.find("experts")) {
      const int64_t count = need_extent(*experts, "count", where);
      const int64_t rows = layout.N / count;
      const bool apart =
          layout.N % count == 0 && std::all_of(layout.segments.begin(), layout.segments.end(),
                                               [&](const mpq_segment& s) { return s.n0 / rows == (s.n1 - 1) / rows; });
      if (!apart) fail(where, "its rows do not share out among its experts");
      out.num_experts = static_cast<int32_t>(count);
    }
    modules.push_back(out);
  }

  void set_weight(mpq_module& out, const Layout& layout, const std::string& where) {
    const std::string name = out.name;
    const mpq::StoredTensor& qweight = tensor(name + ".qweight", "I32", {layout.end.words}, where);
    const mpq::StoredTensor& scales =
        tensor(name + ".scales", kFloatDtypes[layout.scale_dtype], {layout.end.scales}, where);
    mpq_weight& w = out.weight;
    w.out_features = layout.N;
    w.in_features = layout.K;
    w.qweight = qweight.data;
    w.scales = scales.data;
    w.segments = layout.segments.data();
    w.num_segments = static_cast<int32_t>(layout.segments.size());
    w.scale_dtype = layout.scale_dtype;
    out.qweight_bytes = qweight.bytes;
    out.scales_bytes = scales.bytes;
    if (layout.end.zeros) {
      const mpq::StoredTensor& zeros = tensor(name + ".zeros", layout.zeros_dtype, {layout.end.zeros}, where);
      w.zeros = zeros.data;
      out.zeros_bytes = zeros.bytes;
    }
    if (layout.permuted) {
      const mpq::StoredTensor& perm = tensor(name + ".perm", "I32", {layout.K}, where);
      w.perm = reinterpret_cast<const int32_t*>(perm.data);
      out.perm_bytes = perm.bytes;
    }
  }

  static void set_members(mpq_module& out, const Json& members, Held& own, const std::string& where) {
    if (!members.is(Json::kArray) || members.items.empty()) fail(where, "members are no list");
    own.member_names.reserve(members.items.size());
    int64_t row = 0;
    for (const Json& item : members.items) {
      if (!item.is(Json::kArray) || item.items.size() != 3 || !item.items[0].is(Json::kString) ||
          item.items[1].integer != row || item.items[2].integer <= row)
        fail(where, "a member is not [name, n0, n1] in order");
      row = item.items[2].integer;
      own.member_names.push_back(item.items[0].text);
      own.members.push_back({own.member_names.back().c_str(), item.items[1].integer, row});
    }
    if (row != out.weight.out_features) fail(where, "members do not cover the rows");
    out.members = own.members.data();
    out.num_members = static_cast<int32_t>(own.members.size());
  }

  void use_float8(const std::string& name, const Json& item, const std::string& where) {
    const int64_t N = need_extent(item, "out_features", where), K = need_extent(item, "in_features", where);
    tensor(name + ".qweight", "F8_E4M3", {N, K}, where);
    tensor(name + ".scales", "F32", {N}, where);
    if (need_bool(item, "bias", where)) tensor(name + ".bias", bias_dtype(name + ".bias", where), {N}, where);
  }

  // No tensor looks as if it were a packed module's and is not.
  void check_others(const std::string& where) const {
    for (const auto& [name, tensor] : files.tensors) {
      const size_t dot = name.rfind('.');
      if (used.count(name) || dot == std::string::npos) continue;
      const bool guard = tensor.shape == std::vector<int64_t>{0};
      if (name.substr(dot) == ".qweight" || (!guard && by_name.count(std::string_view(name).substr(0, dot))))
        fail(where, "has no place for the tensor " + name);
    }
  }

  const mpq_module* find(std::string_view name) const {
    const auto found = by_name.find(name);
    return found == by_name.end() ? nullptr : &modules[found->second];
  }
};

namespace {

void tell(char* message, size_t bytes, const std::string& text) {
  if (!message || !bytes) return;
  const size_t count = std::min(bytes - 1, text.size());
  std::memcpy(message, text.data(), count);
  message[count] = '\0';
}

}  // namespace

int mpq_model_open(uint32_t version, const char* directory, mpq_model** model, char* message, size_t message_bytes) {
  int status = MPQ_OK;
  std::string text;
  if (model) *model = nullptr;
  try {
    if (version != MPQ_CPU_VERSION) throw FileError{MPQ_ERROR_VERSION, mpq_cpu_error_text(MPQ_ERROR_VERSION)};
    if (!directory || !model) throw FileError{MPQ_ERROR_NULL, mpq_cpu_error_text(MPQ_ERROR_NULL)};
    *model = new mpq_model(directory);
  } catch (const FileError& error) {
    status = error.status;
    text = error.text;
  } catch (const std::exception& error) {  // no memory, or what the system says of a file
    status = dynamic_cast<const std::bad_alloc*>(&error) ? MPQ_ERROR_MEMORY : MPQ_ERROR_FILE;
    text = error.what();
  }
  tell(message, message_bytes, text);
  return status;
}

void mpq_model_close(mpq_model* model) { delete model; }

int64_t mpq_model_count(const mpq_model* model) { return model ? static_cast<int64_t>(model->modules.size()) : 0; }

const mpq_module* mpq_model_module(const mpq_model* model, int64_t index) {
  return 0 <= index && index < mpq_model_count(model) ? &model->modules[index] : nullptr;
}

const mpq_module* mpq_model_find(const mpq_model* model, const char* name) {
  return model && name ? model->find(name) : nullptr;
}

int mpq_model_tensor(const mpq_model* model, const char* name, mpq_tensor* tensor) {
  if (!model || !name || !tensor) return MPQ_ERROR_NULL;
  const auto found = model->files.tensors.find(name);
  if (found == model->files.tensors.end()) return MPQ_ERROR_NAME;
  const mpq::StoredTensor& t = found->second;
  *tensor = {t.dtype.c_str(), t.shape.data(), static_cast<int32_t>(t.shape.size()), t.data, t.bytes};
  return MPQ_OK;
}
