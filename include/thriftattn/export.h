// Marks what a shared library shows: the functions and classes of these headers, and nothing behind them. For C too.
#pragma once

#if defined(__GNUC__)
#define THRIFTATTN_API __attribute__((visibility("default")))
#else
#define THRIFTATTN_API
#endif
