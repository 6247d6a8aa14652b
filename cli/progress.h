// How far the work is, on a terminal; nothing at all in a pipe. And the one way to stop it: Ctrl-C.
#pragma once

#include <chrono>
#include <string>

namespace thriftattn::cli {

// From now on Ctrl-C asks the running work to end, and a second one ends the process at once; a limit on the size of
// files ends no process.
void handle_signals();
bool interrupted();

// One line on stderr that is redrawn in place. Draws only where stderr is a terminal.
class Progress {
 public:
  explicit Progress(bool enabled = true);
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // What is being done, e.g. "book.txt, thrift (5 of 6)". Restarts the clock of the estimate.
  void begin(std::string what);

  // `fraction` of it, in [0, 1], is done. False when the work is to stop: the caller hands that on.
  bool update(double fraction);

  // Removes the line, so that other output starts on a clean one.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  bool enabled_;
  bool drawn_ = false;
  std::string what_;
  Clock::time_point begin_, drawn_at_;
};

}  // namespace thriftattn::cli
