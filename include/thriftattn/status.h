// Errors as values. The library never prints, aborts or throws across its API: every call that can fail returns a
// Status or a Result<T>, whose message names the offending value and what is supported.
#pragma once

#include <optional>
#include <string>
#include <utility>

namespace thriftattn {

enum class Code {
  ok,
  invalid_argument,  // the caller's value is wrong: shape, option, range, NaN
  unsupported,       // a valid problem that no kernel or storage here serves
  not_found,         // a file, tensor or sequence that does not exist
  data_loss,         // a file that is cut short, lies or is corrupt
  out_of_memory,     // the page pool's or the machine's limit
  io,                // the operating system refused
  cancelled,         // the caller asked to stop
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == Code::ok; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::ok;
  std::string message_;
};

inline Status invalid_argument(std::string message) { return {Code::invalid_argument, std::move(message)}; }
inline Status unsupported(std::string message) { return {Code::unsupported, std::move(message)}; }
inline Status not_found(std::string message) { return {Code::not_found, std::move(message)}; }
inline Status data_loss(std::string message) { return {Code::data_loss, std::move(message)}; }

// A value, or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}          // NOLINT: implicit, so that `return value;` works
  Result(Status status) : status_(std::move(status)) {}  // NOLINT: implicit, so that `return status;` works

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& value() { return *value_; }
  const T& value() const { return *value_; }
  T& operator*() { return *value_; }
  const T& operator*() const { return *value_; }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }

 private:
  std::optional<T> value_;
  Status status_;
};

// Returns from the enclosing function when `expression`, a Status, is an error.
#define THRIFTATTN_RETURN_IF_ERROR(expression)             \
  do {                                                     \
    ::thriftattn::Status thriftattn_status = (expression); \
    if (!thriftattn_status.ok()) return thriftattn_status; \
  } while (0)

// Declares `variable` from `expression`, a Result, or returns its Status from the enclosing function.
#define THRIFTATTN_ASSIGN_OR_RETURN(variable, expression)         \
  auto variable##_result = (expression);                          \
  if (!variable##_result.ok()) return variable##_result.status(); \
  auto variable = std::move(variable##_result.value())

}  // namespace thriftattn
