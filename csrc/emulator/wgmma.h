// wgmma, for the emulator's own files.
#pragma once

namespace freezekit::emulator {

void begin_wgmma();               // of a block
void check_no_wgmma_in_flight();  // of the running thread, which ends

}  // namespace freezekit::emulator
