#include "capi/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "include/mpq_model.h"

namespace mpq {

namespace {

namespace fs = std::filesystem;

constexpr char kSingle[] = "model.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";

struct Dtype {
  std::string_view name;
  int64_t bytes;
};
constexpr Dtype kDtypes[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
                             {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},     {"I32", 4},
                             {"F32", 4},  {"U64", 8}, {"I64", 8}, {"F64", 8},     {"C64", 8}};

[[noreturn]] void fail(const std::string& where, const std::string& what, int status = MPQ_ERROR_FORMAT) {
  throw FileError{status, where + ": " + what};
}

bool lies_in(const fs::path& path, const fs::path& folder) {
  return std::mismatch(folder.begin(), folder.end(), path.begin(), path.end()).first == folder.end();
}

// As linked_home and contained_file of mpq_kernels/files/strict.py: a link may lead out of a directory in Hugging
// Face's cache, and from a directory of links to the file of the same name beside that which its config.json is a link
// to.
bool may_lie_at(const fs::path& target, const fs::path& directory, const std::string& name) {
  const fs::path root = fs::canonical(directory);
  if (lies_in(target, root)) return true;
  const auto cache_of = [](const fs::path& snapshot) { return snapshot.parent_path().parent_path() / "blobs"; };
  if (root.parent_path().filename() == "snapshots" && fs::is_directory(cache_of(root)) &&
      lies_in(target, cache_of(root)))
    return true;
  const fs::path config = directory / "config.json";
  if (!fs::is_symlink(config)) return false;
  const fs::path home = fs::canonical(config).parent_path();
  if (target == fs::weakly_canonical(home / name)) return true;
  return home.filename() == "blobs" && fs::is_directory(home.parent_path() / "snapshots") && lies_in(target, home);
}

bool naturals(const Json* list) {
  return list && list->is(Json::kArray) && std::all_of(list->items.begin(), list->items.end(), [](const Json& item) {
           return item.is(Json::kInteger) && item.integer >= 0;
         });
}

// A tensor of a header; `data`: what follows the header.
StoredTensor entry_of(const Json& field, std::string_view data, const std::string& where) {
  const Json *dtype = field.find("dtype"), *shape = field.find("shape"), *offsets = field.find("data_offsets");
  if (!dtype || !dtype->is(Json::kString) || !naturals(shape) || !naturals(offsets) || field.fields.size() != 3)
    fail(where, "no dtype, shape and data_offsets");
  const auto* known =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& one) { return one.name == dtype->text; });
  if (known == std::end(kDtypes)) fail(where, "unknown dtype " + dtype->text);
  if (offsets->items.size() != 2) fail(where, "data_offsets are not [begin, end]");
  const int64_t begin = offsets->items[0].integer, end = offsets->items[1].integer;
  if (begin > end || end > static_cast<int64_t>(data.size()))
    fail(where, "its data lie outside of the file: truncated");
  int64_t bytes = known->bytes;
  StoredTensor tensor{dtype->text, {}, data.data() + begin, static_cast<size_t>(end - begin)};
  for (const Json& size : shape->items) {
    tensor.shape.push_back(size.integer);
    if (__builtin_mul_overflow(bytes, size.integer, &bytes)) fail(where, "its shape is out of range");
  }
  if (bytes != end - begin) fail(where, "its shape does not take the bytes that data_offsets give");
  return tensor;
}

}  // namespace

Mapped::Mapped(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (file < 0 || fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
    const std::string why = file < 0 ? std::strerror(errno) : "not a regular file";
    if (file >= 0) ::close(file);
    fail(path, "cannot be read (" + why + ")", MPQ_ERROR_FILE);
  }
  size_ = static_cast<size_t>(status.st_size);
  if (size_) data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  ::close(file);
  if (data_ == MAP_FAILED) fail(path, "cannot be mapped", MPQ_ERROR_FILE);
}

Mapped::~Mapped() {
  if (data_) munmap(data_, size_);
}

std::string contained_file(const std::string& directory, const std::string& name) {
  const std::string where = directory + ": file name " + name;
  if (name.empty() || name == "." || name == ".." || name.find_first_of(std::string_view("/\\\0", 3)) != name.npos)
    fail(where, "is not a plain name; files must lie in the directory itself");
  try {
    const fs::path path = fs::path(directory) / name;
    if (!may_lie_at(fs::canonical(path), directory, name)) fail(where, "is a link to a place outside of the directory");
    return path.string();
  } catch (const fs::filesystem_error&) {
    fail(where, "there is no such file", MPQ_ERROR_FILE);
  }
}

Json read_json(const std::string& path) {
  const Mapped file(path);
  if (static_cast<int64_t>(file.bytes().size()) > kMaxJsonBytes) fail(path, "is too large for a JSON file");
  Json value = parse_json(file.bytes(), path);
  if (!value.is(Json::kObject)) fail(path, "holds no JSON object");
  return value;
}

TensorFiles::TensorFiles(const std::string& directory) {
  std::error_code none;
  if (fs::exists(fs::path(directory) / kSingle, none)) {
    add(contained_file(directory, kSingle));
    return;
  }
  const std::string index = contained_file(directory, kIndex);
  const Json json = read_json(index);
  const Json* placed = json.find("weight_map");
  if (!placed || !placed->is(Json::kObject)) fail(index, "weight_map must map tensors to files");
  std::set<std::string> names;
  for (const auto& [name, file] : placed->fields) names.insert(file.text);
  for (const std::string& name : names) {
    if (!name.ends_with(".safetensors")) fail(index, name + " is not a .safetensors file");
    add(contained_file(directory, name));
  }
  for (const auto& [name, file] : placed->fields) {
    if (!tensors.count(name)) fail(index, "no file holds the tensor " + name);
  }
}

void TensorFiles::add(const std::string& path) {
  files.push_back(std::make_unique<Mapped>(path));
  const std::string_view bytes = files.back()->bytes();
  uint64_t length = 0;
  if (bytes.size() >= 8) {
    for (int i = 8; i-- > 0;) length = length << 8 | static_cast<unsigned char>(bytes[i]);
  }
  if (bytes.size() < 8 || length > kMaxJsonBytes || length > bytes.size() - 8)
    fail(path, "is truncated, or no safetensors file");
  const Json header = parse_json(bytes.substr(8, length), path);
  if (!header.is(Json::kObject)) fail(path, "has no JSON object as its header");
  const std::string_view data = bytes.substr(8 + length);
  std::vector<std::pair<const char*, size_t>> parts;
  for (const auto& [name, field] : header.fields) {
    if (name == "__metadata__") continue;
    StoredTensor tensor = entry_of(field, data, path + ": tensor " + name);
    parts.emplace_back(tensor.data, tensor.bytes);
    if (!tensors.emplace(name, std::move(tensor)).second) fail(path, "tensor " + name + " is in another file too");
  }
  std::sort(parts.begin(), parts.end());
  const char* at = data.data();
  for (const auto& [begin, size] : parts) {
    if (begin != at) fail(path, "tensors overlap, or leave a gap");
    at += size;
  }
  if (at != data.data() + data.size()) fail(path, "has bytes that belong to no tensor");
}

}  // namespace mpq
