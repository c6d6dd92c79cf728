// Dense NCHW <-> dense NHWC: for every image, the transpose of a C x (H W) matrix, or of its transpose.
//
// A block of 32 x 8 threads moves a 32 x 32 tile through shared memory, so that reads and writes both run along memory.
// Only the size of an element matters: 2, 4 or 8 bytes.
#include <algorithm>

#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kTile = 32;
constexpr int kRowLanes = 8;

// to[image][j][i] = from[image][i][j], i < rows, j < columns.
template <class Word>
__global__ void __launch_bounds__(kTile* kRowLanes)
    transpose_images_kernel(const Word* __restrict__ from, Word* __restrict__ to, int64_t images, int64_t rows,
                            int64_t columns) {
  FK_SHARED(Word, tile, [kTile][kTile + 1]);
  const int64_t row_tiles = (rows + kTile - 1) / kTile, column_tiles = (columns + kTile - 1) / kTile;
  const int64_t tiles = images * row_tiles * column_tiles;
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  for (int64_t block = blockIdx.x; block < tiles; block += gridDim.x) {
    const int64_t column0 = block % column_tiles * kTile, row0 = block / column_tiles % row_tiles * kTile;
    const int64_t image = block / column_tiles / row_tiles * rows * columns;
    for (int i = y; i < kTile; i += kRowLanes) {
      if (row0 + i < rows && column0 + x < columns) {
        tile[i][x] = load_global(from + image + (row0 + i) * columns + column0 + x);
      }
    }
    __syncthreads();
    for (int i = y; i < kTile; i += kRowLanes) {
      if (column0 + i < columns && row0 + x < rows) {
        store_global(to + image + (column0 + i) * rows + row0 + x, tile[x][i]);
      }
    }
    __syncthreads();  // the next tile overwrites this one
  }
}

template <class Word>
Status launch(const ActivationSize& size, bool to_nhwc, const void* from, void* to, Stream stream) {
  const int64_t plane = size.h * size.w, rows = to_nhwc ? size.c : plane, columns = to_nhwc ? plane : size.c;
  const int64_t tiles = size.n * ceil_div(rows, kTile) * ceil_div(columns, kTile);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tiles, kMaxGridX)));
  return FK_LAUNCH(transpose_images_kernel<Word>, grid, dim3(kTile, kRowLanes), 0, stream,
                   static_cast<const Word*>(from), static_cast<Word*>(to), size.n, rows, columns);
}

}  // namespace

Status launch_layout_change(LayoutChange change, const ActivationSize& size, DType dtype, const void* from, void* to,
                            Stream stream) {
  if (size.n < 0 || size.c < 0 || size.h < 0 || size.w < 0) return Status::invalid_argument;
  if (size.n * size.c * size.h * size.w == 0) return Status::success;
  if (!from || !to || from == to) return Status::invalid_argument;
  const bool to_nhwc = change == LayoutChange::nchw_to_nhwc;
  switch (size_of(dtype)) {
    case 2:
      return launch<uint16_t>(size, to_nhwc, from, to, stream);
    case 4:
      return launch<uint32_t>(size, to_nhwc, from, to, stream);
    default:
      return launch<uint64_t>(size, to_nhwc, from, to, stream);
  }
}

}  // namespace freezekit
