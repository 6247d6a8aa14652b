// thriftattn completion: a shell's completion script, made from the tree of commands and options, so that it knows
// exactly those.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "commands.h"

namespace thriftattn::cli {
namespace {

std::vector<const CLI::App*> commands_of(const CLI::App* app) {
  return app->get_subcommands([](const CLI::App*) { return true; });
}

std::vector<std::string> options_of(const CLI::App* app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app->get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : " ") + word;
  return out;
}

// Calls visit(path, words) for the program and every command: "eval", "bench attention", and what may follow there.
void visit(const CLI::App* app, const std::string& path,
           const std::function<void(const std::string& path, const CLI::App* app)>& call) {
  call(path, app);
  for (const CLI::App* command : commands_of(app)) {
    visit(command, path.empty() ? command->get_name() : path + " " + command->get_name(), call);
  }
}

std::string words_of(const CLI::App* app) {
  std::vector<std::string> words;
  for (const CLI::App* command : commands_of(app)) words.push_back(command->get_name());
  for (const std::string& option : options_of(app)) words.push_back(option);
  return joined(words);
}

// bash; zsh runs the same function through its bashcompinit.
std::string bash(const CLI::App* app) {
  std::string cases;
  visit(app, "", [&](const std::string& path, const CLI::App* command) {
    cases += fmt::format("    \"{}\") words=\"{}\" ;;\n", path, words_of(command));
  });
  return "_thriftattn() {\n"
         "  local current=${COMP_WORDS[COMP_CWORD]} path= words= word i\n"
         "  for ((i = 1; i < COMP_CWORD; i++)); do\n"
         "    word=${COMP_WORDS[i]}\n"
         "    [[ $word == [a-z]* ]] || break\n"
         "    path+=\"${path:+ }$word\"\n"
         "  done\n"
         "  case $path in\n" +
         cases +
         "  esac\n"
         "  COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n"
         "  [[ $current == -* || $path == \"\" ]] || COMPREPLY+=($(compgen -f -- \"$current\"))\n"
         "}\n"
         "complete -o filenames -F _thriftattn thriftattn\n";
}

std::string fish(const CLI::App* app) {
  std::string out = "complete -c thriftattn -f -n __fish_use_subcommand\n";
  const auto quoted = [](std::string text) {
    for (size_t i = 0; (i = text.find_first_of("\\'", i)) != text.npos; i += 2) text.insert(i, "\\");
    return "'" + text + "'";
  };
  visit(app, "", [&](const std::string& path, const CLI::App* command) {
    std::string when = "-n __fish_use_subcommand";
    if (!path.empty()) when = fmt::format("-n '__fish_seen_subcommand_from {}'", path.substr(path.rfind(' ') + 1));
    for (const CLI::App* next : commands_of(command)) {
      out += fmt::format("complete -c thriftattn {} -a {} -d {}\n", when, next->get_name(),
                         quoted(next->get_description()));
    }
    for (const CLI::Option* option : command->get_options()) {
      for (const std::string& name : option->get_lnames()) {
        out += fmt::format("complete -c thriftattn {} -l {} -d {}\n", when, name, quoted(option->get_description()));
      }
    }
  });
  return out;
}

}  // namespace

Command add_completion(CLI::App* app) {
  auto shell = std::make_shared<std::string>();
  CLI::App* command = app->add_subcommand("completion", "a completion script for bash, zsh or fish");
  command->add_option("shell", *shell, "bash, zsh or fish")->required()->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->footer("Example: source <(thriftattn completion bash)");
  return {command, [app, shell] {
            if (*shell == "zsh") fmt::print("autoload -U +X bashcompinit && bashcompinit\n");
            fmt::print("{}", *shell == "fish" ? fish(app) : bash(app));
            return Status();
          }};
}

}  // namespace thriftattn::cli
