// Dependencies point down only (docs/design.md, section 4).
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>

namespace {

namespace fs = std::filesystem;

// What each folder may include from the folders beside it, and the public headers that make up its level.
const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"core", {}},
    {"format", {}},
    {"oracle", {}},
    {"cpu", {"core", "format"}},
    {"cuda", {"core", "format", "attention"}},
    {"attention", {"core", "format"}},
    {"model", {"core", "format"}},
    {"c_api", {}},
};

TEST(Layers, EveryFolderIncludesOnlyWhatLiesBelowIt) {
  const fs::path root = fs::path(THRIFTATTN_SOURCE_DIR) / "src";
  int includes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    if (!entry.is_regular_file()) continue;
    const std::string folder = fs::relative(entry.path(), root).begin()->string();
    ASSERT_TRUE(kMayInclude.contains(folder)) << "src/" << folder << " has no place in the layers";
    std::ifstream file(entry.path());
    int line_number = 0;
    for (std::string line; std::getline(file, line);) {
      ++line_number;
      const std::string prefix = "#include \"";
      const size_t slash = line.find('/');
      if (!line.starts_with(prefix) || slash == std::string::npos) continue;
      ++includes;
      const std::string target = line.substr(prefix.size(), slash - prefix.size());
      if (target == folder || target == "thriftattn") continue;
      const bool dispatch =
          folder == "attention" && entry.path().filename() == "dispatch.cc" && (target == "cpu" || target == "cuda");
      EXPECT_TRUE(kMayInclude.at(folder).contains(target) || dispatch)
          << fs::relative(entry.path(), root).string() << ":" << line_number << " includes " << target;
    }
  }
  EXPECT_GT(includes, 50) << "the scan found nothing to check";
}

}  // namespace
