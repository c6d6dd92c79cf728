// The text behind the last Status::launch_failed of this thread, in either build of the kernels.
#pragma once

namespace freezekit {

void set_last_error(const char* text);  // copies, at most 1023 characters

}  // namespace freezekit

extern "C" const char* freezekit_last_error();
