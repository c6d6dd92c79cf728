#include <cstdio>

#include "kernels/last_error.h"

namespace {

thread_local char text_of_last_error[1024] = "";

}  // namespace

namespace freezekit {

void set_last_error(const char* text) { std::snprintf(text_of_last_error, sizeof text_of_last_error, "%s", text); }

}  // namespace freezekit

extern "C" __attribute__((visibility("default"))) const char* freezekit_last_error() { return text_of_last_error; }
