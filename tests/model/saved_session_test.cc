// A session's sequences in files: what comes back, and what must not.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "model/identity.h"
#include "model/session.h"

namespace thriftattn::model {
namespace {

namespace fs = std::filesystem;

class SavedSession : public ::testing::Test {
 protected:
  SavedSession() {
    std::string name = fs::temp_directory_path() / "saved_session_XXXXXX";
    folder_ = mkdtemp(name.data());
    tokens_.resize(250);
    for (size_t i = 0; i < tokens_.size(); ++i) tokens_[i] = static_cast<int32_t>(i * i % 293);
  }
  ~SavedSession() override { fs::remove_all(folder_); }

  std::string path(const std::string& name = "saved") const { return folder_ / name; }
  Model model(const std::string& dir) {
    auto loaded = Model::load(dir, Compute::f32, pool_);
    EXPECT_TRUE(loaded.ok()) << loaded.status().message();
    return std::move(*loaded);
  }
  static std::string tiny() { return THRIFTATTN_SOURCE_DIR "/tests/data/tiny-llama-f32-tied"; }
  Session session(const Model& of, const std::string& method = "thrift", SessionOptions options = {}) {
    auto made = Session::create(of, *parse_method(method), options, pool_);
    EXPECT_TRUE(made.ok()) << made.status().message();
    return std::move(*made);
  }
  // Logits of the last row.
  std::vector<float> feed(Session& session, SeqId seq, std::span<const int32_t> tokens, Phase phase) {
    std::vector<float> out;
    const Status status = session.forward(seq, tokens, phase, LogitRows::last, [&](int64_t, int64_t, const float* l) {
      out.assign(l, l + session.vocab());
    });
    EXPECT_TRUE(status.ok()) << status.message();
    return out;
  }
  void expect_refused(Session& session, Code code, const std::string& words) {
    const auto loaded = session.load(path());
    EXPECT_EQ(loaded.status().code(), code) << loaded.status().message();
    EXPECT_NE(loaded.status().message().find(words), std::string::npos) << loaded.status().message();
    EXPECT_EQ(session.cache().bytes().total(), 0);
  }

  ThreadPool pool_{2};
  fs::path folder_;
  std::vector<int32_t> tokens_;
};

TEST_F(SavedSession, GoesOnBitForBit) {
  const Model m = model(tiny());
  const std::span<const int32_t> all(tokens_), context = all.first(170), step = all.subspan(170, 1),
                                               chunk = all.subspan(171, 70);
  for (const char* method : {"thrift", "fp16", "fp4", "thrift:storage=dual"}) {
    Session a = session(m, method), b = session(m, method);
    const SeqId seq = a.new_sequence();
    feed(a, seq, context, Phase::prefill);
    ASSERT_TRUE(a.save(seq, path()).ok());
    const auto loaded = b.load(path());
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    EXPECT_TRUE(std::ranges::equal(b.tokens(*loaded), context));
    EXPECT_EQ(feed(a, seq, step, Phase::decode), feed(b, *loaded, step, Phase::decode)) << method;
    EXPECT_EQ(feed(a, seq, chunk, Phase::prefill), feed(b, *loaded, chunk, Phase::prefill)) << method;
    EXPECT_TRUE(std::ranges::equal(b.tokens(*loaded), all.first(241)));
  }
}

TEST_F(SavedSession, TokensFollowForksCutsAndCopies) {
  const Model m = model(tiny());
  Session a = session(m), high = session(m, "fp16");
  const std::span<const int32_t> all(tokens_);
  const SeqId seq = high.new_sequence();
  feed(high, seq, all.first(200), Phase::prefill);
  const auto copy = a.copy_from(high, seq);
  ASSERT_TRUE(copy.ok());
  const auto fork = a.fork(*copy);
  ASSERT_TRUE(fork.ok());
  feed(a, *fork, all.subspan(200, 10), Phase::decode);
  ASSERT_TRUE(a.truncate(*copy, 128).ok());
  EXPECT_TRUE(std::ranges::equal(a.tokens(*copy), all.first(128)));
  EXPECT_TRUE(std::ranges::equal(a.tokens(*fork), all.first(210)));
  ASSERT_TRUE(a.free(*copy).ok());
  EXPECT_TRUE(a.tokens(*copy).empty());
  EXPECT_TRUE(a.tokens(a.new_sequence()).empty());
  EXPECT_EQ(a.save(99, path()).code(), Code::not_found);
}

TEST_F(SavedSession, FitsItsModelMethodAndLengthAlone) {
  const Model m = model(tiny());
  Session a = session(m);
  const SeqId seq = a.new_sequence();
  feed(a, seq, std::span(tokens_).first(100), Phase::prefill);
  ASSERT_TRUE(a.save(seq, path()).ok());

  Session other_method = session(m, "thrift:budget=0.1");
  expect_refused(other_method, Code::invalid_argument, R"(saved with method "thrift", this session runs)");
  Session other_prefill = session(m, "thrift", {.prefill_method = parse_method("thrift:budget=0.2").value()});
  expect_refused(other_prefill, Code::invalid_argument, R"(saved with prefill "thrift", this session runs)");
  Session shorter = session(m, "thrift", {.max_tokens = 99});
  expect_refused(shorter, Code::invalid_argument, "100 tokens are more than the 99");

  // The same weights under another config, and one changed weight under the same.
  const fs::path copy = folder_ / "model";
  fs::copy(tiny(), copy, fs::copy_options::recursive);
  EXPECT_EQ(*identity(model(copy)), *identity(m));
  std::ofstream(copy / "config.json", std::ios::app) << "\n";
  EXPECT_NE(*identity(model(copy)), *identity(m));
  fs::copy(fs::path(tiny()) / "config.json", copy / "config.json", fs::copy_options::overwrite_existing);
  std::fstream weights(copy / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
  weights.seekg(-1, std::ios::end);
  const int last = weights.get();
  weights.seekp(-1, std::ios::end);
  weights.put(static_cast<char>(last ^ 1));
  weights.close();
  const Model changed = model(copy);
  Session of_changed = session(changed);
  expect_refused(of_changed, Code::invalid_argument, "saved by another model");
}

TEST_F(SavedSession, MetadataThatLiesIsRefused) {
  const Model m = model(tiny());
  Session a = session(m), b = session(m);
  const SeqId seq = a.new_sequence();
  feed(a, seq, std::span(tokens_).first(10), Phase::prefill);
  const auto save = [&](const std::string& tokens) {
    const std::string metadata = R"({"model":")" + *identity(m) +
                                 R"(","compute":"f32","method":"thrift","prefill":"thrift","tokens":)" + tokens + "}";
    ASSERT_TRUE(a.cache().save(seq, path(), metadata).ok());
  };
  save("[1,2,3,4,5,6,7,8,9,10]");
  EXPECT_TRUE(session(m).load(path()).ok());
  for (const char* tokens : {"[1,2,3]", "null", "{}", "7", "[]"}) {
    save(tokens);
    expect_refused(b, Code::data_loss, "its metadata names");
  }
  for (const char* token : {"-1", "300", "1.5", "\"x\"", "1e99", "18446744073709551615", "[[[]]]"}) {
    save(std::string("[1,2,3,4,5,6,7,8,9,") + token + "]");
    expect_refused(b, Code::data_loss, "is no token");
  }
  for (const char* metadata : {"", "[]", "{", "\xff"}) {
    ASSERT_TRUE(a.cache().save(seq, path(), metadata).ok());
    expect_refused(b, Code::data_loss, "metadata: not a JSON object");
  }
  ASSERT_TRUE(a.cache().save(seq, path(), "{}").ok());
  expect_refused(b, Code::invalid_argument, "saved by another model");
}

}  // namespace
}  // namespace thriftattn::model
