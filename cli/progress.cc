#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <thread>
#include <utility>

namespace thriftattn::cli {
namespace {

std::atomic<bool> g_interrupted{false};

}  // namespace

// No handler: it would run on the stack of whichever thread computes, and oneDNN's products keep their stack pointer in
// memory from the heap, where a signal's frame overwrites what lies below.
void handle_signals() {
  std::signal(SIGINT, SIG_DFL);
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupt, nullptr);  // in all threads that this one starts
  std::thread([interrupt] {
    int signal = 0;
    sigwait(&interrupt, &signal);
    g_interrupted = true;
    pthread_sigmask(SIG_UNBLOCK, &interrupt, nullptr);  // the second Ctrl-C meets the default, here
    while (true) pause();
  }).detach();
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
