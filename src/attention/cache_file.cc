// Saved sequences. One file holds one sequence, as its cache stores it; numbers are little-endian.
//
//   magic "THRIFTKV" | version u32 | zero u32 | header bytes u64 | file bytes u64
//   layers, h_kv, d, d_v, sink, recent: i32 each
//   high_dtype, storage, format, scales, centring, page_scale, mean, min_max, variance, zero: u8 each
//   count u64 (0 or layers x h_kv), storage_by_head [count] u8
//   tokens i64 | released [layers] i64: pages [sink, released) of a layer have left its 16-bit window
//   forms [layers, pages, h_kv] u8: bit 0 fp4, 1 residual, 2 high, 3 summary
//   count u64, metadata [count] | checksum u64 of all that stands before it           <- header bytes count up to here
//   for every layer, page, KV head: the records that `forms` names, in the order of its bits | checksum u64
//
// Records are those of format/page_layout.h, byte for byte. Slots of the tail beyond the last token are zero, so equal
// sequences give equal files and no unused memory leaves the process. Checksums are XXH3-64; that of a block is seeded
// with the header's plus the block's index, so that a block out of another file or place is noticed.
//
// A page may be stored in 16 bit outside the window of its own sequence, because a fork holds it: results depend on
// what is stored, so it is saved, and stays for as long as the page does.
#include "attention/cache_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <utility>

#include "attention/cache_state.h"
#include "thriftattn/cache.h"

namespace thriftattn {
namespace {

static_assert(std::endian::native == std::endian::little, "records are written as they stand in memory");
// Files hold these numbers.
static_assert(static_cast<int>(DType::bf16) == 2 && static_cast<int>(Storage::offload) == 5 &&
              static_cast<int>(Fp4Format::mxfp4) == 1 && static_cast<int>(Scales::four_over_six) == 1);

constexpr char kMagic[] = "THRIFTKV";
constexpr uint32_t kVersion = 1;
constexpr int64_t kPrefixBytes = 32;  // magic to file bytes
constexpr int64_t kChecksumBytes = 8;
constexpr int64_t kMaxHeaderBytes = int64_t{1} << 30;
constexpr int64_t kMaxMetadataBytes = int64_t{1} << 29;
constexpr size_t kBufferBytes = size_t{1} << 20;

struct Prefix {
  char magic[8] = {};
  uint32_t version = kVersion, zero = 0;
  uint64_t header_bytes = 0, file_bytes = 0;
};
static_assert(sizeof(Prefix) == kPrefixBytes);

struct Header : SequenceForms {
  CacheConfig config;
  std::string metadata;
};

// The two directions of `header_fields`.
struct Put {
  std::vector<uint8_t>& bytes;

  template <class T>
  void number(T& value) {
    const auto* at = reinterpret_cast<const uint8_t*>(&value);
    bytes.insert(bytes.end(), at, at + sizeof(value));
  }
  template <class List>
  void list(List& values, int64_t) {
    const auto* at = reinterpret_cast<const uint8_t*>(values.data());
    bytes.insert(bytes.end(), at, at + values.size() * sizeof(values[0]));
  }
  bool good() const { return true; }
};

struct Get {
  std::span<const uint8_t> bytes;
  bool short_of_bytes = false;

  template <class T>
  void number(T& value) {
    if (bytes.size() < sizeof(value)) {
      short_of_bytes = true;
      return;
    }
    std::memcpy(&value, bytes.data(), sizeof(value));
    bytes = bytes.subspan(sizeof(value));
  }
  template <class List>
  void list(List& values, int64_t count) {  // allocates no more than there is
    constexpr size_t size = sizeof(values[0]);
    if (short_of_bytes || count < 0 || static_cast<uint64_t>(count) > bytes.size() / size) {
      short_of_bytes = true;
      return;
    }
    values.resize(count);
    if (count > 0) std::memcpy(values.data(), bytes.data(), count * size);
    bytes = bytes.subspan(count * size);
  }
  bool good() const { return !short_of_bytes; }
};

// A bool or an enum as one byte. An unknown value stays what it was and is told by `known`.
template <class Io, class T>
void byte(Io& io, T& value, uint8_t last, bool& known) {
  uint8_t code = static_cast<uint8_t>(value);
  io.number(code);
  known &= code <= last;
  if (code <= last) value = static_cast<T>(code);
}

// Everything between the prefix and the header's checksum. Returns what is wrong, empty where nothing is.
template <class Io>
std::string header_fields(Io& io, Header& h) {
  CacheConfig& c = h.config;
  for (int* field : {&c.layers, &c.h_kv, &c.d, &c.d_v, &c.sink, &c.recent}) io.number(*field);
  bool known = true, zero = false;
  byte(io, c.high_dtype, static_cast<uint8_t>(DType::bf16), known);
  byte(io, c.storage, static_cast<uint8_t>(Storage::offload), known);
  byte(io, c.format, static_cast<uint8_t>(Fp4Format::mxfp4), known);
  byte(io, c.scales, static_cast<uint8_t>(Scales::four_over_six), known);
  for (bool* flag : {&c.centring, &c.page_scale, &c.mean, &c.min_max, &c.variance}) byte(io, *flag, 1, known);
  byte(io, zero, 0, known);
  uint64_t by_head = c.storage_by_head.size();
  io.number(by_head);
  io.list(c.storage_by_head, static_cast<int64_t>(by_head));
  for (const Storage storage : c.storage_by_head) known &= storage <= Storage::offload;
  io.number(h.tokens);
  if (!io.good()) return "its header is too short for what it announces";
  if (!known) return "its header holds an option that does not exist";
  // KvCache::create says whether the config can be; here only what the counts below need.
  const int64_t heads = int64_t{c.layers} * c.h_kv;
  if (c.layers < 1 || c.h_kv < 1 || h.tokens < 0 || h.tokens > INT64_MAX - kPageTokens || h.pages() > INT64_MAX / heads)
    return fmt::format("its header announces {} layers, {} KV heads and {} tokens", c.layers, c.h_kv, h.tokens);
  io.list(h.released, c.layers);
  io.list(h.forms, heads * h.pages());
  uint64_t metadata = h.metadata.size();
  io.number(metadata);
  io.list(h.metadata, static_cast<int64_t>(metadata));
  return io.good() ? "" : "its header is too short for what it announces";
}

int64_t block_bytes(const PageLayout& l, uint8_t forms) {
  return (forms & kFp4Form ? l.fp4_bytes : 0) + (forms & kResidualForm ? l.fp4_bytes : 0) +
         (forms & kHighForm ? l.high_bytes : 0) + (forms & kSummaryForm ? l.summary_bytes : 0);
}

int64_t file_bytes(const PageLayout& l, int64_t header_bytes, const Header& h) {
  int64_t bytes = header_bytes;
  for (const uint8_t forms : h.forms) bytes += block_bytes(l, forms) + kChecksumBytes;
  return bytes;
}

uint64_t checksum(std::span<const uint8_t> bytes, uint64_t seed) {
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed);
}

Status io_error(const std::string& path, const char* what, int error) {
  return Status(Code::io, fmt::format("{}: cannot {}: {}", path, what, std::generic_category().message(error)));
}

// --- Writing

// A new file beside `path`, or beside the file that a link there leads to, which takes its place on `commit` and is
// removed otherwise. Who may use it, both the umask and the file that was there allow.
class Replacement {
 public:
  explicit Replacement(const std::string& path) : path_(path), target_(path) { buffer_.reserve(kBufferBytes); }
  Replacement(const Replacement&) = delete;
  Replacement& operator=(const Replacement&) = delete;
  ~Replacement() {
    if (file_ >= 0) ::close(file_);
    if (!name_.empty()) ::unlink(name_.c_str());
    if (folder_fd_ >= 0) ::close(folder_fd_);
  }

  Status open() {
    if (path_.empty()) return invalid_argument("an empty name is no file");
    struct stat there;
    const bool exists = ::stat(path_.c_str(), &there) == 0;
    if (exists && !S_ISREG(there.st_mode))
      return invalid_argument(fmt::format("{}: cannot be replaced: it is {}", path_,
                                          S_ISDIR(there.st_mode) ? "a directory" : "not a regular file"));
    if (exists) {
      const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path_.c_str(), nullptr), std::free);
      if (!real) return io_error(path_, "resolve", errno);
      target_ = real.get();
    }
    const std::string folder =
        target_.find('/') == std::string::npos ? "./" : target_.substr(0, target_.rfind('/') + 1);
    folder_fd_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_fd_ < 0) return io_error(path_, "open its folder", errno);
    for (int i = 0; file_ < 0; ++i) {  // mode 0666, so that the umask says who may read it
      const std::string name = fmt::format("{}.thriftattn-{}-{}.tmp", folder, ::getpid(), i);  // any name may be long
      file_ = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (file_ >= 0) name_ = name;
      if (file_ < 0 && errno != EEXIST && errno != EINTR) return io_error(path_, "create a file beside it", errno);
    }
    struct stat made;
    if (exists && (::fstat(file_, &made) != 0 || ::fchmod(file_, made.st_mode & there.st_mode & 0777) != 0))
      return io_error(path_, "keep its permissions", errno);
    return {};
  }

  Status write(std::span<const uint8_t> bytes) {
    while (!bytes.empty()) {
      const size_t n = std::min(bytes.size(), kBufferBytes - buffer_.size());
      buffer_.insert(buffer_.end(), bytes.begin(), bytes.begin() + n);
      bytes = bytes.subspan(n);
      if (buffer_.size() == kBufferBytes) THRIFTATTN_RETURN_IF_ERROR(flush());
    }
    return {};
  }

  Status commit() {
    THRIFTATTN_RETURN_IF_ERROR(flush());
    if (::fsync(file_) != 0) return io_error(path_, "write", errno);
    const int fd = std::exchange(file_, -1);
    if (::close(fd) != 0) return io_error(path_, "write", errno);
    if (::rename(name_.c_str(), target_.c_str()) != 0) return io_error(path_, "replace", errno);
    name_.clear();
    // Some file systems have nothing to sync of a folder and say EINVAL.
    if (::fsync(folder_fd_) != 0 && errno != EINVAL) return io_error(path_, "sync its folder", errno);
    return {};
  }

 private:
  Status flush() {
    for (size_t done = 0; done < buffer_.size();) {
      const ssize_t n = ::write(file_, buffer_.data() + done, buffer_.size() - done);
      if (n < 0 && errno != EINTR) return io_error(path_, "write", errno);
      done += n > 0 ? n : 0;
    }
    buffer_.clear();
    return {};
  }

  std::string path_, target_, name_;
  int folder_fd_ = -1, file_ = -1;
  std::vector<uint8_t> buffer_;
};

// Appends a 16-bit record of which the first `tokens` slots are in use; the others become zero.
void append_high(const PageLayout& l, const uint8_t* record, int64_t tokens, std::vector<uint8_t>& block) {
  const size_t at = block.size();
  block.resize(at + l.high_bytes);  // zeros
  for (int c = 0; c < l.d; ++c)
    std::memcpy(&block[at + 2 * l.high_k_at(0, c)], record + 2 * l.high_k_at(0, c), 2 * tokens);
  std::memcpy(block.data() + at + 2 * l.high_v, record + 2 * l.high_v, 2 * tokens * l.d_v);
}

Status write_sequence(const CacheState& s, const Sequence& q, int64_t tokens, const std::string& path,
                      std::string_view metadata) {
  Header h;
  h.config = s.config;
  h.tokens = tokens;
  h.released = q.released;
  h.metadata = metadata;
  for (int l = 0; l < s.config.layers; ++l)
    for (const int32_t page : q.pages)
      for (int g = 0; g < s.config.h_kv; ++g) {
        const PageForms& f = s.forms_of(page, l)[g];
        h.forms.push_back(static_cast<uint8_t>((f.fp4 >= 0 ? kFp4Form : 0) | (f.residual >= 0 ? kResidualForm : 0) |
                                               (f.high >= 0 ? kHighForm : 0) | (f.summary >= 0 ? kSummaryForm : 0)));
      }
  std::vector<uint8_t> header(kPrefixBytes);
  Put put{header};
  header_fields(put, h);
  Prefix prefix;
  std::memcpy(prefix.magic, kMagic, sizeof(prefix.magic));
  prefix.header_bytes = header.size() + kChecksumBytes;
  prefix.file_bytes = file_bytes(s.layout, static_cast<int64_t>(prefix.header_bytes), h);
  std::memcpy(header.data(), &prefix, sizeof(prefix));
  if (static_cast<int64_t>(prefix.header_bytes) > kMaxHeaderBytes)
    return unsupported(fmt::format("{}: a header of {} bytes is not supported: up to {} are", path, prefix.header_bytes,
                                   kMaxHeaderBytes));
  uint64_t sum = checksum(header, 0), seed = sum;
  put.number(sum);

  Replacement file(path);
  THRIFTATTN_RETURN_IF_ERROR(file.open());
  THRIFTATTN_RETURN_IF_ERROR(file.write(header));
  std::vector<uint8_t> block;
  Put put_block{block};
  for (int l = 0; l < s.config.layers; ++l)
    for (int64_t p = 0; p < h.pages(); ++p)
      for (int g = 0; g < s.config.h_kv; ++g) {
        const PageForms& f = s.forms_of(q.pages[p], l)[g];
        const auto append = [&](const RecordPool& pool, int32_t record) {
          if (record >= 0) block.insert(block.end(), pool.at(record), pool.at(record) + pool.record_bytes());
        };
        block.clear();
        append(s.fp4, f.fp4);
        append(s.residual, f.residual);
        if (f.high >= 0)
          append_high(s.layout, s.high.at(f.high), std::min<int64_t>(kPageTokens, tokens - p * kPageTokens), block);
        append(s.summary, f.summary);
        sum = checksum(block, seed++ + 1);
        put_block.number(sum);
        THRIFTATTN_RETURN_IF_ERROR(file.write(block));
      }
  return file.commit();
}

// --- Reading

struct Descriptor {
  int fd = -1;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

struct SavedFile {
  Descriptor file;
  std::string path;
  uint64_t seed = 0;  // of the first block's checksum
  Header header;
  PageLayout layout;
  int64_t bytes = 0;
  std::vector<uint8_t> block;  // the last that was read

  explicit SavedFile(std::string p)
      : file{::open(p.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)}, path(std::move(p)) {}  // a FIFO must not block
  Status lost(const std::string& what) const { return data_loss(fmt::format("{}: {}", path, what)); }
  Status read(std::span<uint8_t> to) {
    while (!to.empty()) {
      const ssize_t n = ::read(file.fd, to.data(), to.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return io_error(path, "read", errno);
      if (n == 0) return lost("is cut short");
      to = to.subspan(n);
    }
    return {};
  }
  Status read_header();
  Status check_forms() const;
};

Result<PageLayout> layout_of(const CacheConfig& config) {
  THRIFTATTN_ASSIGN_OR_RETURN(cache, KvCache::create(config));
  return cache.state().layout;
}

Status SavedFile::read_header() {
  if (file.fd < 0 && errno == ENOENT) return not_found(fmt::format("{}: no such file", path));
  if (file.fd < 0) return io_error(path, "open", errno);
  struct stat there;
  if (::fstat(file.fd, &there) != 0) return io_error(path, "read", errno);
  if (!S_ISREG(there.st_mode))
    return invalid_argument(
        fmt::format("{}: is {}", path, S_ISDIR(there.st_mode) ? "a directory" : "not a regular file"));
  bytes = there.st_size;
  if (bytes == 0) return lost("is empty");
  if (bytes < kPrefixBytes) return lost(fmt::format("is cut short: {} bytes hold no header", bytes));
  std::vector<uint8_t> raw(kPrefixBytes);
  THRIFTATTN_RETURN_IF_ERROR(read(raw));
  Prefix prefix;
  std::memcpy(&prefix, raw.data(), sizeof(prefix));
  if (std::memcmp(prefix.magic, kMagic, sizeof(prefix.magic)) != 0)
    return invalid_argument(fmt::format("{}: is not a saved sequence", path));
  if (prefix.version != kVersion)
    return unsupported(fmt::format("{}: version {} is not supported: {} is", path, prefix.version, kVersion));
  if (prefix.file_bytes != static_cast<uint64_t>(bytes))
    return lost(fmt::format("has {} bytes, its header says {}", bytes, prefix.file_bytes));
  if (prefix.header_bytes < kPrefixBytes + kChecksumBytes ||
      prefix.header_bytes > static_cast<uint64_t>(std::min(bytes, kMaxHeaderBytes)))
    return lost(fmt::format("a header of {} bytes does not fit into {} (at most {} are allowed)", prefix.header_bytes,
                            bytes, kMaxHeaderBytes));
  raw.resize(prefix.header_bytes);
  THRIFTATTN_RETURN_IF_ERROR(read(std::span(raw).subspan(kPrefixBytes)));
  const std::span<const uint8_t> covered(raw.data(), raw.size() - kChecksumBytes);
  std::memcpy(&seed, raw.data() + covered.size(), sizeof(seed));
  if (checksum(covered, 0) != seed) return lost("the header is damaged: its checksum differs");

  Get get{covered.subspan(kPrefixBytes)};
  const std::string wrong = header_fields(get, header);
  if (!wrong.empty()) return lost(wrong);
  if (prefix.zero != 0 || !get.bytes.empty()) return lost("its header holds more than it announces");
  auto known = layout_of(header.config);
  if (!known.ok()) return lost(fmt::format("its config cannot be: {}", known.status().message()));
  layout = *known;
  THRIFTATTN_RETURN_IF_ERROR(check_forms());
  if (const int64_t want = file_bytes(layout, static_cast<int64_t>(raw.size()), header); want != bytes)
    return lost(fmt::format("has {} bytes, its pages need {}", bytes, want));
  return {};
}

// Which forms a page is stored in follows from the config, the length and what has been released; a 16-bit form more
// may be there for a fork's sake.
Status SavedFile::check_forms() const {
  const CacheConfig& c = header.config;
  CacheState rules;  // for its rules alone
  rules.config = c;
  rules.layout = layout;
  const int64_t full = header.tokens / kPageTokens;
  for (int l = 0; l < c.layers; ++l) {
    const int64_t released = header.released[l];
    if (released < c.sink || released > std::max<int64_t>(c.sink, full))
      return lost(fmt::format("layer {} has released pages [{}, {}) of {}", l, c.sink, released, full));
    for (int64_t p = 0; p < header.pages(); ++p)
      for (int g = 0; g < c.h_kv; ++g) {
        const uint8_t want = stored_forms(rules, l, g, p, header.tokens, released), spare = p < full ? kHighForm : 0;
        const uint8_t forms = header.forms[(l * header.pages() + p) * c.h_kv + g];
        if ((forms | spare) != (want | spare) || (want & ~forms) != 0)
          return lost(fmt::format("layer {}, page {}, KV head {}: forms {:#x}, expected {:#x}", l, p, g, forms, want));
      }
  }
  return {};
}

// Ok where the file's config is the cache's; else names the first field that differs.
Status check_config(const std::string& path, const CacheConfig& file, const CacheConfig& cache) {
  const auto dtype = [](DType type) { return type == DType::bf16 ? "bf16" : "f16"; };
  const auto scales = [](Scales s) { return s == Scales::six ? "6" : "4over6"; };
  const auto list = [&](const CacheConfig& c) {
    std::vector<std::pair<const char*, std::string>> fields = {
        {"layers", std::to_string(c.layers)},
        {"h_kv", std::to_string(c.h_kv)},
        {"d", std::to_string(c.d)},
        {"d_v", std::to_string(c.d_v)},
        {"high_dtype", dtype(c.high_dtype)},
        {"storage", to_string(c.storage)},
        {"format", to_string(c.format)},
        {"scales", scales(c.scales)},
        {"centring", fmt::format("{}", c.centring)},
        {"page_scale", fmt::format("{}", c.page_scale)},
        {"mean", fmt::format("{}", c.mean)},
        {"min_max", fmt::format("{}", c.min_max)},
        {"variance", fmt::format("{}", c.variance)},
        {"sink", std::to_string(c.sink)},
        {"recent", std::to_string(c.recent)},
    };
    return fields;
  };
  const auto theirs = list(file), ours = list(cache);
  const auto refuse = [&](const std::string& name, const std::string& a, const std::string& b) {
    return invalid_argument(fmt::format("{}: saved with {} {}, this cache has {}", path, name, a, b));
  };
  for (size_t i = 0; i < ours.size(); ++i)
    if (theirs[i].second != ours[i].second) return refuse(ours[i].first, theirs[i].second, ours[i].second);
  for (int l = 0; l < cache.layers; ++l)
    for (int g = 0; g < cache.h_kv; ++g)
      if (file.storage_at(l, g) != cache.storage_at(l, g))
        return refuse(fmt::format("storage of layer {}, KV head {}:", l, g), to_string(file.storage_at(l, g)),
                      to_string(cache.storage_at(l, g)));
  return {};
}

// Ok where every kernel can read the page.
bool has_sane_exponents(const uint8_t* summary) {
  PageSummary facts;
  std::memcpy(&facts, summary, sizeof(facts));
  for (int plane = 0; plane < 2; ++plane)
    if (std::abs(facts.k_exponent[plane]) > kPageExponentMax || std::abs(facts.v_exponent[plane]) > kPageExponentMax)
      return false;
  return true;
}

// Reads the next block of the file into the records of its page and head.
Status read_records(SavedFile& from, const CacheState& s, int layer, int64_t page, int kv_head, const PageForms& to) {
  const Header& h = from.header;
  const auto where = [&] { return fmt::format("layer {}, page {}, KV head {}", layer, page, kv_head); };
  const int64_t index = (layer * h.pages() + page) * h.config.h_kv + kv_head;
  from.block.resize(block_bytes(s.layout, h.forms[index]) + kChecksumBytes);
  THRIFTATTN_RETURN_IF_ERROR(from.read(from.block));
  const std::span<const uint8_t> records(from.block.data(), from.block.size() - kChecksumBytes);
  uint64_t sum;
  std::memcpy(&sum, from.block.data() + records.size(), sizeof(sum));
  if (checksum(records, from.seed + 1 + index) != sum)
    return from.lost(fmt::format("{} is damaged: its checksum differs", where()));
  const uint8_t* at = records.data();
  const auto copy = [&](const RecordPool& pool, int32_t record) {
    if (record < 0) return;
    std::memcpy(pool.at(record), at, pool.record_bytes());
    at += pool.record_bytes();
  };
  copy(s.fp4, to.fp4);
  copy(s.residual, to.residual);
  copy(s.high, to.high);
  copy(s.summary, to.summary);
  if (to.summary >= 0 && !has_sane_exponents(s.summary.at(to.summary)))
    return from.lost(fmt::format("{}: a page scale is beyond 2^+-{}", where(), kPageExponentMax));
  return {};
}

}  // namespace

void reseal(std::span<uint8_t> file) {
  Prefix prefix;
  if (file.size() < kPrefixBytes + kChecksumBytes) return;
  std::memcpy(&prefix, file.data(), sizeof(prefix));
  if (prefix.header_bytes < kPrefixBytes + kChecksumBytes || prefix.header_bytes > file.size()) return;
  const auto seal = [](std::span<uint8_t> bytes, uint64_t seed) {
    const uint64_t sum = checksum(bytes.first(bytes.size() - kChecksumBytes), seed);
    std::memcpy(bytes.data() + bytes.size() - kChecksumBytes, &sum, sizeof(sum));
    return sum;
  };
  const auto raw = file.first(prefix.header_bytes);
  uint64_t seed = seal(raw, 0);
  Header h;
  Get get{raw.subspan(kPrefixBytes, raw.size() - kPrefixBytes - kChecksumBytes)};
  if (!header_fields(get, h).empty()) return;
  const auto layout = layout_of(h.config);
  if (!layout.ok()) return;
  file = file.subspan(raw.size());
  for (const uint8_t forms : h.forms) {
    const auto size = static_cast<size_t>(block_bytes(*layout, forms) + kChecksumBytes);
    if (size > file.size()) return;
    seal(file.first(size), ++seed);
    file = file.subspan(size);
  }
}

namespace {

// A path ends at its first NUL for the system, and would be another file's.
Status check_path(const std::string& path) {
  if (path.find('\0') == std::string::npos) return {};
  return invalid_argument(fmt::format("{}: a path has no NUL", path.c_str()));
}

}  // namespace

Status KvCache::save(SeqId seq, const std::string& path, std::string_view metadata) const {
  THRIFTATTN_RETURN_IF_ERROR(check_path(path));
  const Sequence* q = state_->find(seq);
  if (!q) return unknown_sequence(seq);
  const int64_t tokens = length(seq);
  for (int l = 0; l < state_->config.layers; ++l)
    if (length(seq, l) != tokens)
      return invalid_argument(
          fmt::format("sequence {} cannot be saved in the middle of a step: layer {} holds {} tokens, another one {}",
                      seq, l, length(seq, l), tokens));
  if (static_cast<int64_t>(metadata.size()) > kMaxMetadataBytes)
    return invalid_argument(fmt::format("{}: {} bytes of metadata are not supported: up to {} are", path,
                                        metadata.size(), kMaxMetadataBytes));
  try {
    return write_sequence(*state_, *q, tokens, path, metadata);
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, fmt::format("{}: no memory left to save sequence {}", path, seq));
  }
}

Result<SeqId> KvCache::load(const std::string& path, std::string* metadata) {
  CacheState& s = *state_;
  THRIFTATTN_RETURN_IF_ERROR(check_path(path));
  try {
    SavedFile from(path);
    THRIFTATTN_RETURN_IF_ERROR(from.read_header());
    THRIFTATTN_RETURN_IF_ERROR(check_config(path, from.header.config, s.config));
    const auto read_page = [&](int layer, int64_t page, int kv_head, const PageForms& to) {
      return read_records(from, s, layer, page, kv_head, to);
    };
    THRIFTATTN_ASSIGN_OR_RETURN(seq, bring_in(*this, from.header, path, read_page));
    if (metadata) *metadata = std::move(from.header.metadata);
    return seq;
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, fmt::format("{}: no memory left to load it", path));
  }
}

Result<SavedSequence> inspect_saved(const std::string& path) {
  THRIFTATTN_RETURN_IF_ERROR(check_path(path));
  try {
    SavedFile from(path);
    THRIFTATTN_RETURN_IF_ERROR(from.read_header());
    SavedSequence saved;
    saved.version = kVersion;
    saved.tokens = from.header.tokens;
    saved.file_bytes = from.bytes;
    saved.bytes = memory_needed(from.layout, from.header.config, from.header);
    saved.config = std::move(from.header.config);
    saved.metadata = std::move(from.header.metadata);
    return saved;
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, fmt::format("{}: no memory left to read its header", path));
  }
}

}  // namespace thriftattn
