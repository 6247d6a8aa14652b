#include "model/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace thriftattn::model {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// A folder of its own for every test.
class SafetensorsTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::path(testing::TempDir()) /
           (std::string("safetensors_") + testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }

  void write(const std::string& bytes, const std::string& name = "model.safetensors") const {
    std::ofstream(dir_ / name, std::ios::binary) << bytes;
  }
  Result<Safetensors> open() const { return Safetensors::open(dir_.string()); }

  // Expects the file `bytes` to be refused with a one-line message that holds every one of `words`.
  void expect_refused(const std::string& bytes, const std::vector<std::string>& words) const {
    write(bytes);
    const auto file = open();
    ASSERT_FALSE(file.ok()) << "lacks the error " << testing::PrintToString(words);
    for (const std::string& word : words) {
      EXPECT_NE(file.status().message().find(word), std::string::npos) << file.status().message() << "\nlacks " << word;
    }
    EXPECT_EQ(file.status().message().find('\n'), std::string::npos);
  }

  fs::path dir_;
};

std::string file_of(const std::string& header, const std::string& data, uint64_t header_bytes) {
  std::string out(8, '\0');
  std::memcpy(out.data(), &header_bytes, 8);
  return out + header + data;
}
std::string file_of(const Json& header, const std::string& data) {
  const std::string text = header.dump();
  return file_of(text, data, text.size());
}
Json entry(const char* dtype, const Json& shape, int64_t from, int64_t to) {
  return {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {from, to}}};
}

TEST_F(SafetensorsTest, EveryDtypeReadsItsExactValues) {
  const float f32[] = {1.5f, -0.25f};
  const uint16_t f16[] = {0x3c00, 0xc100}, bf16[] = {0x3f80, 0xc020};  // 1, -2.5
  std::string data(reinterpret_cast<const char*>(f32), 8);
  data.append(reinterpret_cast<const char*>(f16), 4).append(reinterpret_cast<const char*>(bf16), 4).append(8, '\0');
  write(file_of({{"__metadata__", {{"format", "pt"}}},
                 {"a", entry("F32", {2, 1}, 0, 8)},
                 {"b", entry("F16", {2}, 8, 12)},
                 {"c", entry("BF16", {2}, 12, 16)},
                 {"ids", entry("I64", {1}, 16, 24)},
                 {"empty", entry("F32", {0, 7}, 24, 24)}},
                data));
  const auto file = open();
  ASSERT_TRUE(file.ok()) << file.status().message();
  float out[2];
  const auto a = file->find("a", {2, 1}), b = file->find("b", {2}), c = file->find("c", {2});
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  a->read(0, 2, out);
  EXPECT_EQ(out[0], 1.5f);
  EXPECT_EQ(out[1], -0.25f);
  b->read(0, 2, out);
  EXPECT_EQ(out[0], 1.0f);
  EXPECT_EQ(out[1], -2.5f);
  c->read(1, 1, out);
  EXPECT_EQ(out[0], -2.5f);
  EXPECT_NE(file->find("a", {1, 2}).status().message().find("[2, 1]"), std::string::npos);  // wrong shape
  EXPECT_EQ(file->find("d", {1}).status().code(), Code::not_found);
  EXPECT_EQ(file->find("ids", {1}).status().code(), Code::unsupported);
}

TEST_F(SafetensorsTest, HeadersThatLieAreRefused) {
  const std::string data(16, '\0');
  expect_refused("", {"model.safetensors", "0 bytes"});
  expect_refused("1234567", {"7 bytes"});
  expect_refused(file_of("{}", "", 3), {"header of 3"});  // cut short
  expect_refused(file_of("{}", "", UINT64_MAX), {"header of 18446744073709551615"});
  expect_refused(file_of("{]", "", 2), {"JSON"});
  expect_refused(file_of("[]", "", 2), {"JSON"});
  expect_refused(file_of({{"a", 3}}, data), {"tensor a"});
  expect_refused(file_of({{"a", entry("F32", {4}, 0, 20)}}, data), {"tensor a", "20", "outside"});
  expect_refused(file_of({{"a", entry("F32", {4}, 16, 0)}}, data), {"tensor a", "outside"});
  expect_refused(file_of({{"a", entry("F32", {4}, -16, 0)}}, data), {"tensor a", "data_offsets"});
  expect_refused(file_of({{"a", entry("F32", {5}, 0, 16)}}, data), {"tensor a", "[5]", "16 bytes"});
  expect_refused(file_of({{"a", entry("F32", {-4}, 0, 16)}}, data), {"tensor a", "shape"});
  expect_refused(file_of({{"a", entry("F32", {2.5}, 0, 16)}}, data), {"tensor a", "shape"});
  expect_refused(file_of({{"a", {{"dtype", 3}, {"shape", {4}}, {"data_offsets", {0, 16}}}}}, data),
                 {"tensor a", "dtype"});
  // 2^62 * 4 * 4 bytes overflow to 0.
  expect_refused(file_of({{"a", entry("F32", {int64_t{1} << 62, 4}, 0, 0)}, {"b", entry("F32", {4}, 0, 16)}}, data),
                 {"tensor a"});
}

TEST_F(SafetensorsTest, TensorsMustTileTheData) {
  const std::string data(16, '\0');
  expect_refused(file_of({{"a", entry("F32", {2}, 0, 8)}, {"b", entry("F32", {3}, 4, 16)}}, data),
                 {"tensor b", "overlap"});
  expect_refused(file_of({{"a", entry("F32", {2}, 0, 8)}, {"b", entry("F32", {1}, 12, 16)}}, data),
                 {"tensor b", "gap"});
  expect_refused(file_of({{"a", entry("F32", {2}, 0, 8)}}, data), {"8 bytes follow"});
}

TEST_F(SafetensorsTest, EveryPrefixOfAFileIsRefused) {
  const std::string whole = file_of({{"a", entry("F32", {4}, 0, 16)}}, std::string(16, '\0'));
  for (size_t n = 0; n < whole.size(); ++n) {
    write(whole.substr(0, n));
    EXPECT_FALSE(open().ok()) << n;
  }
  write(whole);
  EXPECT_TRUE(open().ok());
}

TEST_F(SafetensorsTest, ShardsAreThoseThatTheIndexNames) {
  const std::string a = file_of({{"a", entry("F32", {4}, 0, 16)}}, std::string(16, '\0'));
  const std::string b = file_of({{"b", entry("F32", {4}, 0, 16)}}, std::string(16, '\0'));
  write(a, "1.safetensors");
  write(b, "2.safetensors");
  const auto index = [&](const Json& map) { write(Json{{"weight_map", map}}.dump(), "model.safetensors.index.json"); };
  index({{"a", "1.safetensors"}, {"b", "2.safetensors"}});
  ASSERT_TRUE(open().ok()) << open().status().message();
  EXPECT_TRUE(open()->contains("b"));
  index({{"a", "2.safetensors"}, {"b", "2.safetensors"}});  // not where it says
  EXPECT_FALSE(open().ok());
  index({{"a", "1.safetensors"}, {"b", "3.safetensors"}});  // no such file
  EXPECT_EQ(open().status().code(), Code::not_found);
  index({{"a", "../1.safetensors"}});  // out of the folder
  EXPECT_FALSE(open().ok());
  index(Json::array());
  EXPECT_FALSE(open().ok());
  write(a, "2.safetensors");  // the same tensor twice
  index({{"a", "1.safetensors"}, {"b", "2.safetensors"}});
  EXPECT_FALSE(open().ok());
}

TEST_F(SafetensorsTest, AFolderWithoutWeightsIsNotFound) { EXPECT_EQ(open().status().code(), Code::not_found); }

}  // namespace
}  // namespace thriftattn::model
