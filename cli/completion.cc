// thriftattn completion: a shell's completion script, made from the tree of commands and options, so that it knows
// exactly those.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
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

// The values that an option takes where they are a few words, which CLI11 keeps as "{f32,bf16}" in the type's name.
std::string choices_of(const CLI::Option* option) {
  const std::string type = option->get_type_name();
  const size_t open = type.find('{'), close = type.find('}');
  if (open == type.npos || close == type.npos) return "";
  std::string words = type.substr(open + 1, close - open - 1);
  std::replace(words.begin(), words.end(), ',', ' ');
  return words;
}

// What may follow a command: its own commands, the words that its positional takes, its options.
std::string words_of(const CLI::App* app) {
  std::vector<std::string> words;
  for (const CLI::App* command : commands_of(app)) words.push_back(command->get_name());
  for (const CLI::Option* option : app->get_options()) {
    const std::string choices = option->get_positional() ? choices_of(option) : "";
    if (!choices.empty()) words.push_back(choices);
  }
  for (const std::string& option : options_of(app)) words.push_back(option);
  return joined(words);
}

// bash; zsh runs the same function through its bashcompinit.
std::string bash(const CLI::App* app) {
  std::string paths, cases, values;
  visit(app, "", [&](const std::string& path, const CLI::App* command) {
    if (!path.empty()) paths += fmt::format("{}\"{}\"", paths.empty() ? "" : " | ", path);
    cases += fmt::format("    \"{}\") words=\"{}\" ;;\n", path, words_of(command));
    for (const CLI::Option* option : command->get_options()) {
      const std::string choices = choices_of(option);
      if (choices.empty()) continue;
      for (const std::string& name : option->get_lnames()) {
        values += fmt::format("    \"{} --{}\") words=\"{}\" only=1 ;;\n", path, name, choices);
      }
    }
  });
  return "_thriftattn() {\n"
         "  local current=${COMP_WORDS[COMP_CWORD]} path= words= only= next i\n"
         "  for ((i = 1; i < COMP_CWORD; i++)); do\n"
         "    next=\"$path${path:+ }${COMP_WORDS[i]}\"\n"
         "    case $next in\n"
         "    " +
         paths +
         ") path=$next ;;\n"
         "    *) break ;;\n"
         "    esac\n"
         "  done\n"
         "  case $path in\n" +
         cases +
         "  esac\n"
         "  case \"$path ${COMP_WORDS[COMP_CWORD - 1]}\" in\n" +
         values +
         "  esac\n"
         "  COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n"
         "  [[ $only || $current == -* || $path == \"\" ]] || COMPREPLY+=($(compgen -f -- \"$current\"))\n"
         "}\n"
         "complete -o filenames -F _thriftattn thriftattn\n";
}

std::string fish(const CLI::App* app) {
  std::string out = "complete -c thriftattn -f -n __fish_use_subcommand\n";
  const auto quoted = [](const std::string& text) {
    std::string quotes = "'";
    for (const char c : text) {
      if (c == '\\' || c == '\'') quotes += '\\';
      quotes += c;
    }
    return quotes + '\'';
  };
  visit(app, "", [&](const std::string& path, const CLI::App* command) {
    std::string when = "-n __fish_use_subcommand";
    if (!path.empty()) when = fmt::format("-n '__fish_seen_subcommand_from {}'", path.substr(path.rfind(' ') + 1));
    for (const CLI::App* next : commands_of(command)) {
      out += fmt::format("complete -c thriftattn {} -a {} -d {}\n", when, next->get_name(),
                         quoted(next->get_description()));
    }
    for (const CLI::Option* option : command->get_options()) {
      const std::string choices = choices_of(option),
                        values = choices.empty() ? "" : fmt::format(" -x -a '{}'", choices);
      if (option->get_positional() && !choices.empty())
        out += fmt::format("complete -c thriftattn {} -f -a '{}'\n", when, choices);
      for (const std::string& name : option->get_lnames()) {
        out += fmt::format("complete -c thriftattn {} -l {}{} -d {}\n", when, name, values,
                           quoted(option->get_description()));
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
