#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <utility>

namespace thriftattn::cli {
namespace {

std::atomic<bool> g_interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler may touch nothing else");

}  // namespace

void handle_signals() {
  struct sigaction action = {};
  action.sa_handler = [](int) { g_interrupted = true; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // the second Ctrl-C meets the default
  sigaction(SIGINT, &action, nullptr);
  // A file beyond the shell's limit is then an error of the write, which is reported and cleaned up after.
  std::signal(SIGXFSZ, SIG_IGN);
}

bool interrupted() { return g_interrupted; }

Progress::Progress(bool enabled) : enabled_(enabled && isatty(STDERR_FILENO)) {}

void Progress::begin(std::string what) {
  what_ = std::move(what);
  begin_ = Clock::now();
  drawn_at_ = {};
  update(0);
}

bool Progress::update(double fraction) {
  const auto now = Clock::now();
  if (enabled_ && now - drawn_at_ > std::chrono::milliseconds(100)) {
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    std::string line = fmt::format("\r\x1b[K{}: {:.0f}%", what_, 100 * fraction);
    if (fraction > 0.02 && seconds > 1) line += fmt::format(", {:.0f} s left", seconds / fraction - seconds);
    std::fputs(line.c_str(), stderr);
    std::fflush(stderr);
    drawn_ = true;
    drawn_at_ = now;
  }
  return !interrupted();
}

void Progress::clear() {
  if (!drawn_) return;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
  drawn_ = false;
}

}  // namespace thriftattn::cli
