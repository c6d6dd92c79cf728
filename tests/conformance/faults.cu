// Kernels with one fault each, that a tool of compute-sanitizer must find before its silence about others means anything.
//
//   faults memcheck | racecheck | synccheck | initcheck
#include <cstdio>
#include <cstring>

namespace {

__global__ void write_beyond_the_end(int* out) { out[64 + threadIdx.x] = 1; }

__global__ void read_what_another_writes(int* out) {
  __shared__ int tile[64];
  tile[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = tile[63 - threadIdx.x];  // no barrier between
}

__global__ void part_of_a_warp_meets(int* out) {
  if (threadIdx.x % 2) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void read_what_nobody_wrote(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x]; }

}  // namespace

int main(int argc, char** argv) {
  int *in = nullptr, *out = nullptr;
  if (argc != 2 || cudaMalloc(&in, 64 * sizeof(int)) != cudaSuccess) return 2;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 2;
  if (!std::strcmp(argv[1], "memcheck")) write_beyond_the_end<<<1, 64>>>(out);
  if (!std::strcmp(argv[1], "racecheck")) read_what_another_writes<<<1, 64>>>(out);
  if (!std::strcmp(argv[1], "synccheck")) part_of_a_warp_meets<<<1, 64>>>(out);
  if (!std::strcmp(argv[1], "initcheck")) read_what_nobody_wrote<<<1, 64>>>(in, out);
  std::printf("%s: %s\n", argv[1], cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
