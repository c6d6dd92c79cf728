#pragma once
// CUTLASS includes nvcuda::wmma here, which g++ cannot read and nothing here uses.
