#include "model/safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <set>
#include <string_view>

#include "format/codecs.h"
#include "model/json_file.h"

namespace thriftattn::model {

static_assert(std::endian::native == std::endian::little,
              "safetensors files are little-endian and are mapped as they are");

// A whole file, mapped for reading.
struct Safetensors::Mapping {
  unsigned char* data = nullptr;
  int64_t size = 0;
  ~Mapping() {
    if (data) munmap(data, size);
  }

  static Result<std::shared_ptr<const Mapping>> open(const std::string& path) {
    const auto failed = [&](Code code) {
      return Status(code, fmt::format("cannot open {}: {}", path, std::strerror(errno)));
    };
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe without a writer would block
    if (fd < 0) return failed(Code::not_found);
    auto mapping = std::make_shared<Mapping>();
    struct stat info = {};
    const bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    if (regular && info.st_size > 0) {
      void* data = mmap(nullptr, info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
      if (data != MAP_FAILED) {
        mapping->data = static_cast<unsigned char*>(data);
        mapping->size = info.st_size;
      }
    }
    const bool mapped = mapping->data != nullptr || (regular && info.st_size == 0);
    const Status status = mapped    ? Status()
                          : regular ? failed(errno == ENOMEM ? Code::out_of_memory : Code::io)
                                    : data_loss(fmt::format("{} is a folder or a device, not a file", path));
    close(fd);
    if (!status.ok()) return status;
    return std::shared_ptr<const Mapping>(std::move(mapping));
  }
};

namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

struct Element {
  const char* name;
  int64_t bytes;
};
constexpr Element kElements[] = {{"F64", 8}, {"F32", 4}, {"F16", 2},  {"BF16", 2},    {"I64", 8},
                                 {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},     {"U32", 4},
                                 {"U16", 2}, {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};

// Bytes of a tensor; -1 where they overflow.
int64_t bytes_of(const std::vector<int64_t>& shape, int64_t element) {
  int64_t bytes = element;
  for (const int64_t n : shape) {
    if (__builtin_mul_overflow(bytes, n, &bytes)) return -1;
  }
  return bytes;
}

// A list of non-negative integers; false where `json` is something else.
bool read_list(const Json& json, std::vector<int64_t>* out) {
  if (!json.is_array()) return false;
  for (const Json& n : json) {
    if (!n.is_number_unsigned() || n.get<uint64_t>() > INT64_MAX) return false;
    out->push_back(n.get<int64_t>());
  }
  return true;
}

// One entry of the header; `data` is the file's data section of `size` bytes.
Result<Tensor> read_entry(const std::string& path, const std::string& name, const Json& entry,
                          const unsigned char* data, int64_t size) {
  const auto bad = [&](const std::string& what) {
    return data_loss(fmt::format("{}: tensor {}: {}", path, name, what));
  };
  Tensor t;
  t.name = name;
  t.file = path;
  std::vector<int64_t> offsets;
  const Json &dtype = member(entry, "dtype"), &shape = member(entry, "shape");
  if (!dtype.is_string()) return bad(fmt::format("dtype {} is not a string", shown(dtype)));
  if (!read_list(shape, &t.shape)) return bad(fmt::format("shape {} is not a list of sizes", shown(shape)));
  if (!read_list(member(entry, "data_offsets"), &offsets) || offsets.size() != 2) {
    return bad(fmt::format("data_offsets {} are not two offsets", shown(member(entry, "data_offsets"))));
  }
  if (offsets[0] > offsets[1] || offsets[1] > size) {
    return bad(fmt::format("data_offsets [{}, {}] are outside the {} bytes of data", offsets[0], offsets[1], size));
  }
  t.dtype_name = dtype.get<std::string>();
  t.dtype = t.dtype_name == "BF16" ? DType::bf16 : t.dtype_name == "F16" ? DType::f16 : DType::f32;
  t.data = data + offsets[0];
  t.bytes = offsets[1] - offsets[0];
  const auto* element = std::find_if(std::begin(kElements), std::end(kElements),
                                     [&](const Element& e) { return t.dtype_name == e.name; });
  if (element == std::end(kElements)) return t;  // refused when it is asked for
  if (const int64_t want = bytes_of(t.shape, element->bytes); want != t.bytes) {
    return bad(
        fmt::format("shape {} in {} does not fill its {} bytes", shape_to_string(t.shape), t.dtype_name, t.bytes));
  }
  return t;
}

}  // namespace

std::string shape_to_string(const std::vector<int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

int64_t Tensor::elements() const { return bytes / size_of(dtype); }

void Tensor::read(int64_t first, int64_t count, float* out) const {
  const unsigned char* from = data + first * size_of(dtype);
  if (dtype == DType::f32) {
    std::memcpy(out, from, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    out[i] = dtype == DType::bf16 ? bf16_decode(half) : f16_decode(half);
  }
}

Tensor Tensor::at(int64_t i) const {
  Tensor t = *this;
  t.bytes = bytes / shape[0];
  t.data = data + i * t.bytes;
  t.shape.erase(t.shape.begin());
  return t;
}

Result<std::vector<Tensor>> parse_safetensors(std::string_view bytes, const std::string& path) {
  if (bytes.size() < 8) return data_loss(fmt::format("{}: {} bytes are too few for a header", path, bytes.size()));
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  if (header_bytes > std::min<uint64_t>(kMaxHeaderBytes, bytes.size() - 8)) {
    return data_loss(fmt::format("{}: a header of {} bytes does not fit into a file of {} (at most {} are allowed)",
                                 path, header_bytes, bytes.size(), kMaxHeaderBytes));
  }
  THRIFTATTN_ASSIGN_OR_RETURN(header, parse_object(bytes.substr(8, header_bytes), path + ": header"));

  const auto* data = reinterpret_cast<const unsigned char*>(bytes.data()) + 8 + header_bytes;
  const auto size = static_cast<int64_t>(bytes.size() - 8 - header_bytes);
  std::vector<Tensor> found;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    THRIFTATTN_ASSIGN_OR_RETURN(tensor, read_entry(path, name, entry, data, size));
    found.push_back(std::move(tensor));
  }
  // Laid end to end, the tensors cover the data exactly: neither overlaps nor bytes that nobody checks.
  std::sort(found.begin(), found.end(),
            [](const Tensor& a, const Tensor& b) { return std::pair(a.data, a.bytes) < std::pair(b.data, b.bytes); });
  const unsigned char* end = data;
  for (const Tensor& t : found) {
    if (t.data != end) {
      return data_loss(fmt::format("{}: tensor {}: its bytes {} at offset {}, expected {}", path, t.name,
                                   t.data < end ? "overlap another tensor's" : "leave a gap", t.data - data,
                                   end - data));
    }
    end += t.bytes;
  }
  if (end != data + size) {
    return data_loss(fmt::format("{}: {} bytes follow the last tensor", path, data + size - end));
  }
  return found;
}

namespace {

// A name that cannot lead out of a folder.
bool is_file_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find_first_of(std::string_view("/\0", 2)) == name.npos;
}

}  // namespace

Result<std::map<std::string, std::string>> parse_index(std::string_view text, const std::string& path) {
  THRIFTATTN_ASSIGN_OR_RETURN(index, parse_object(text, path));
  const Json& map = member(index, "weight_map");
  if (!map.is_object()) return data_loss(fmt::format("{}: weight_map is missing", path));
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, file] : map.items()) {
    if (!file.is_string() || !is_file_name(file.get<std::string>())) {
      return data_loss(
          fmt::format("{}: tensor {}: {} is not the name of a file in the folder", path, tensor, shown(file)));
    }
    shards.emplace(tensor, file.get<std::string>());
  }
  return shards;
}

Status Safetensors::add_file(const std::string& path) {
  THRIFTATTN_ASSIGN_OR_RETURN(mapping, Mapping::open(path));
  const std::string_view bytes(reinterpret_cast<const char*>(mapping->data), mapping->size);
  THRIFTATTN_ASSIGN_OR_RETURN(found, parse_safetensors(bytes, path));
  for (Tensor& t : found) {
    const std::string name = t.name;
    const auto [at, fresh] = tensors_.emplace(name, std::move(t));
    if (!fresh) return data_loss(fmt::format("{}: tensor {} is also in {}", path, name, at->second.file));
  }
  mappings_.push_back(std::move(mapping));
  return {};
}

Result<Safetensors> Safetensors::open(const std::string& dir) {
  Safetensors out;
  out.dir_ = dir;
  const std::string single = dir + "/model.safetensors", index_path = dir + "/model.safetensors.index.json";
  if (access(single.c_str(), F_OK) == 0) {
    THRIFTATTN_RETURN_IF_ERROR(out.add_file(single));
    return out;
  }
  if (access(index_path.c_str(), F_OK) != 0) {
    return not_found(fmt::format("{} has neither model.safetensors nor model.safetensors.index.json", dir));
  }
  THRIFTATTN_ASSIGN_OR_RETURN(text, read_file(index_path));
  THRIFTATTN_ASSIGN_OR_RETURN(index, parse_index(text, index_path));
  std::set<std::string> shards;
  for (const auto& [tensor, file] : index) shards.insert(file);
  for (const std::string& file : shards) THRIFTATTN_RETURN_IF_ERROR(out.add_file(dir + "/" + file));
  for (const auto& [tensor, file] : index) {
    const auto it = out.tensors_.find(tensor);
    const std::string path = dir + "/" + file;
    if (it == out.tensors_.end() || it->second.file != path) {
      return data_loss(fmt::format("{}: tensor {} is not in {}", index_path, tensor, path));
    }
  }
  return out;
}

Result<Tensor> Safetensors::find(const std::string& name, const std::vector<int64_t>& shape) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) return not_found(fmt::format("{}: tensor {} is missing", dir_, name));
  const Tensor& t = it->second;
  if (t.dtype_name != "F32" && t.dtype_name != "F16" && t.dtype_name != "BF16") {
    return unsupported(
        fmt::format("{}: tensor {}: dtype {} is not supported: F32, F16 and BF16 are", t.file, name, t.dtype_name));
  }
  if (t.shape != shape) {
    return data_loss(fmt::format("{}: tensor {}: shape {} does not fit config.json: {} expected", t.file, name,
                                 shape_to_string(t.shape), shape_to_string(shape)));
  }
  return t;
}

}  // namespace thriftattn::model
