// freezekit's side: single instructions in the emulator on operands that CuTe has laid out, and the Hopper kernels run there
// with every bulk copy noted.
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "core/shared_tile.h"
#include "emulator/tensor_copy.h"
#include "kernels/families.h"
#include "kernels/hopper/tensor_map.h"
#include "tests/truth/record.h"

using namespace freezekit;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

FK_DEVICE unsigned char* first_atom(unsigned char* shared) {
  return shared + (-ptx::shared_address(shared) & (kSwizzleAtom - 1));
}

// One warpgroup: d[thread][i] = its accumulators after `steps` products; descriptors count from the start of `tiles`.
template <class T, bool kMnMajor, int kCount>
__global__ void wgmma_kernel(const unsigned char* tiles, int bytes, int steps, const uint64_t* a, const uint64_t* b,
                             float* d) {
  FK_DYNAMIC_SHARED(shared);
  unsigned char* const at = first_atom(shared);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 128) at[i] = tiles[i];
  __syncthreads();
  const uint64_t start = ptx::shared_address(at) >> 4;
  float acc[kCount] = {};
  ptx::wgmma_fence();
  for (int step = 0; step < steps; ++step) ptx::wgmma<T, kMnMajor, kMnMajor>(acc, a[step] + start, b[step] + start);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kCount; ++i) d[static_cast<int>(threadIdx.x) * kCount + i] = acc[i];
}

struct WgmmaOperands {
  const unsigned char* tiles;
  int bytes, steps;
  const uint64_t *a, *b;
  float* d;
};

template <class T, bool kMnMajor, int kCount>
Status run_wgmma(const WgmmaOperands& of) {
  return FK_LAUNCH((wgmma_kernel<T, kMnMajor, kCount>), 1, 128, of.bytes + kSwizzleAtom, nullptr, of.tiles, of.bytes,
                   of.steps, of.a, of.b, of.d);
}

template <class T, bool kMnMajor>
Status run_wgmma_columns(int columns, const WgmmaOperands& of) {
  if (columns == 64) return run_wgmma<T, kMnMajor, 32>(of);
  return columns == 128 ? run_wgmma<T, kMnMajor, 64>(of) : run_wgmma<T, kMnMajor, 128>(of);
}

template <class T>
Status run_wgmma_of(int mn_major, int columns, const WgmmaOperands& of) {
  if constexpr (sizeof(T) == 2) {
    if (mn_major) return run_wgmma_columns<T, true>(columns, of);
  }
  return run_wgmma_columns<T, false>(columns, of);
}

__global__ void im2col_kernel(const __grid_constant__ ptx::TensorMap map, truth::Copy copy, int bytes,
                              unsigned char* out) {
  FK_DYNAMIC_SHARED(shared);
  FK_SHARED(uint64_t, full, [1]);
  unsigned char* const tile = first_atom(shared);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(full, static_cast<uint32_t>(bytes));
    ptx::copy_im2col(tile, &map, full, {copy.at[0], copy.at[1], copy.at[2], copy.at[3]}, copy.offset[0],
                     copy.offset[1]);
  }
  __syncthreads();
  ptx::mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 32) out[i] = tile[i];
}

// As the other side numbers them: 0 bf16, 1 f16, 2 tf32.
constexpr emulator::TensorType kMapTypes[] = {emulator::TensorType::bf16, emulator::TensorType::f16,
                                              emulator::TensorType::tf32};
constexpr DType kTypes[] = {DType::bf16, DType::f16, DType::f32};

// Notes of the running launch.
struct Notes {
  const void *gathered = nullptr, *other = nullptr;  // the tensors that it was given
  std::vector<emulator::TensorMap> maps;
  std::vector<truth::Copy> copies;
};
Notes notes;

void take_note(const emulator::TensorCopy& copy) {
  size_t map = 0;
  while (map < notes.maps.size() && std::memcmp(&notes.maps[map], &copy.map, sizeof copy.map) != 0) ++map;
  if (map == notes.maps.size()) notes.maps.push_back(copy.map);
  truth::Copy made{static_cast<int32_t>(map), static_cast<int32_t>(emulator::block_index.x), 0,
                   static_cast<int32_t>(copy.to)};
  for (int i = 0; i < copy.map.rank; ++i) made.at[i] = copy.at[i];
  if (copy.map.im2col) made.offset[0] = copy.offset[0], made.offset[1] = copy.offset[1];
  notes.copies.push_back(made);
}

// Its address is not yet an offset.
truth::Map described(const emulator::TensorMap& map) {
  truth::Map out{map.im2col, 0, map.rank};
  while (kMapTypes[out.type] != static_cast<emulator::TensorType>(map.type)) ++out.type;
  out.address = reinterpret_cast<intptr_t>(map.address);
  for (int i = 0; i < map.rank; ++i) {
    out.sizes[i] = map.sizes[i], out.traversal[i] = map.element_strides[i], out.box[i] = map.box[i];
    if (i > 0) out.strides[i - 1] = static_cast<int64_t>(map.strides[i - 1]);
  }
  for (int i = 0; i < 2; ++i) out.lower[i] = map.lower[i], out.upper[i] = map.upper[i];
  out.channels = map.channels, out.pixels = map.pixels;
  return out;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory zeros(int64_t elements, int64_t size) {
  const auto bytes = static_cast<size_t>((elements * size + 255) / 256 * 256);
  Memory memory(std::aligned_alloc(256, bytes));
  std::memset(memory.get(), 0, bytes);
  return memory;
}

Conv2dProblem problem_of(const truth::Problem& from) {
  Conv2dProblem p;
  p.n = from.n, p.c = from.c, p.h = from.h, p.w = from.w, p.k = from.k, p.r = from.r, p.s = from.s;
  p.pad_h = from.pad_h, p.pad_w = from.pad_w, p.stride_h = from.stride_h, p.stride_w = from.stride_w;
  p.dilation_h = from.dilation_h, p.dilation_w = from.dilation_w;
  p.p = output_size(p.h, p.r, p.pad_h, p.stride_h, p.dilation_h);
  p.q = output_size(p.w, p.s, p.pad_w, p.stride_w, p.dilation_w);
  return p;
}

Status run_kernel(int config, Operator op, const Conv2dProblem& p, DType dtype) {
  const int64_t size = size_of(dtype);
  const Memory x = zeros(p.x_numel(), size), filter = zeros(p.filter_numel(), size), y = zeros(p.y_numel(), size);
  notes.gathered = op == Operator::dgrad ? y.get() : x.get();
  notes.other = op == Operator::wgrad ? y.get() : filter.get();
  const Conv2dTensors tensors{x.get(), filter.get(), y.get()};
  const Epilogue epilogue;
  Conv2dLaunch launch{op, {}, p, dtype, tensors, epilogue, nullptr, nullptr};
  launch.selection.config = config;
  if (op == Operator::wgrad) return launch_hopper_wgrad_kernel(launch);
  const auto run = dtype == DType::f32   ? launch_hopper_gemm_of<float>
                   : dtype == DType::f16 ? launch_hopper_gemm_of<f16>
                                         : launch_hopper_gemm_of<bf16>;
  return run(launch, filter.get());
}

}  // namespace

EXPORT uint32_t truth_swizzled(uint32_t at) { return swizzled(at); }

EXPORT uint64_t truth_descriptor(int mn_major, uint32_t tile, uint32_t panel, int step) {
  return mn_major ? mn_major_descriptor(tile, panel, step) : k_major_descriptor(tile, step);
}

// type: 0 bf16, 1 f16, 2 tf32.
EXPORT int truth_wgmma(int type, int mn_major, int columns, const unsigned char* tiles, int bytes, int steps,
                       const uint64_t* a, const uint64_t* b, float* d) {
  const WgmmaOperands of{tiles, bytes, steps, a, b, d};
  if (type == 2) return static_cast<int>(run_wgmma_of<float>(mn_major, columns, of));
  if (type == 1) return static_cast<int>(run_wgmma_of<f16>(mn_major, columns, of));
  return static_cast<int>(run_wgmma_of<bf16>(mn_major, columns, of));
}

// What an im2col copy by a map brings of `data`: pixels x 128 bytes, as shared memory holds them.
EXPORT int truth_im2col(int type, const void* data, const truth::Map* of, const truth::Copy* copy, unsigned char* out) {
  uint64_t sizes[4], strides[3];
  uint32_t traversal[4];
  for (int i = 0; i < 4; ++i) {
    sizes[i] = static_cast<uint64_t>(of->sizes[i]), traversal[i] = static_cast<uint32_t>(of->traversal[i]);
    if (i > 0) strides[i - 1] = static_cast<uint64_t>(of->strides[i - 1]);
  }
  const int lower[2] = {static_cast<int>(of->lower[0]), static_cast<int>(of->lower[1])};
  const int upper[2] = {static_cast<int>(of->upper[0]), static_cast<int>(of->upper[1])};
  ptx::TensorMap map;
  if (!emulator::encode_im2col(&map, kMapTypes[type], 4, data, sizes, strides, lower, upper,
                               static_cast<uint32_t>(of->channels), static_cast<uint32_t>(of->pixels), traversal)) {
    return static_cast<int>(Status::launch_failed);
  }
  const int bytes = static_cast<int>(of->pixels) * static_cast<int>(kTileRow);
  return static_cast<int>(FK_LAUNCH(im2col_kernel, 1, 32, bytes + kSwizzleAtom, nullptr, map, *copy, bytes, out));
}

// Columns of the output tile of a config of the Hopper family; 0 where it has no such config.
EXPORT int truth_columns(int config) {
  return config < static_cast<int>(std::size(kHopperTiles)) ? kHopperTiles[config].columns : 0;
}

// Whether the Hopper family takes the problem (1, or 0), the maps and copies of its launch, and where the tensors began that
// are gathered and the other; -1 if it failed.
EXPORT int truth_plan(const truth::Problem* problem, int config, truth::Map* maps, int* map_count, truth::Copy* copies,
                      int room, int* copy_count, int64_t* tensors) {
  const Conv2dProblem p = problem_of(*problem);
  const DType dtype = kTypes[problem->type];
  const auto op = static_cast<Operator>(problem->op);
  if (!hopper_takes(op, p, dtype)) return 0;
  notes = {};
  emulator::on_tensor_copy = take_note;
  const Status status = run_kernel(config, op, p, dtype);
  emulator::on_tensor_copy = nullptr;
  if (status != Status::success || static_cast<int>(notes.copies.size()) > room || notes.maps.size() > 5) return -1;
  *map_count = static_cast<int>(notes.maps.size()), *copy_count = static_cast<int>(notes.copies.size());
  for (size_t i = 0; i < notes.maps.size(); ++i) maps[i] = described(notes.maps[i]);
  tensors[0] = reinterpret_cast<intptr_t>(notes.gathered), tensors[1] = reinterpret_cast<intptr_t>(notes.other);
  std::memcpy(copies, notes.copies.data(), notes.copies.size() * sizeof(truth::Copy));
  return 1;
}
