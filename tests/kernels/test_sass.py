"""tools/sass.py reads what the compiler prints, and calls a fault a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.place import find_nvcc
from tools.sass import Kernel, compile_one, count_instructions, demangle, read_ptxas

UNFENCED = """
#include "kernels/hopper/ptx_sm90.h"
extern "C" __global__ void unfenced(float* out, uint64_t a, uint64_t b) {
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = out[i];
  freezekit::ptx::wgmma<freezekit::bf16, false, false>(d, a, b);
  for (int i = 0; i < 32; ++i) out[i] = d[i];
}
"""
UNBOUNDED = """
#include "kernels/hopper/ptx_sm90.h"
extern "C" __global__ void unbounded(float* out) {
  freezekit::ptx::take_registers<232>();
  out[threadIdx.x] = 1;
}
"""

PTXAS = """
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers, 8 bytes cumulative stack size, 2816 bytes smem, 504 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1mv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
SASS = """
\t.section\t.text._Z1kPf,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/              @!PT LDSM.16.M88.4 R8, [R20] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0040*/                   STL [R1], R5 ;
"""


def test_reads_ptxas_and_sass() -> None:
    kernels = read_ptxas(PTXAS)
    count_instructions(SASS, kernels)
    spilled, clean = kernels.values()
    assert (spilled.registers, spilled.shared, spilled.spills) == (56, 2816, 16)
    assert (clean.registers, clean.shared, clean.spills) == (32, 0, 0)
    assert {name: n for name, n in spilled.counts.items() if n} == {
        **{"all": 5, "HMMA": 1, "LDSM": 1, "LDGSTS": 1},
        "local": 1,
    }
    assert spilled.faults() == ["spills 16 bytes", "1 local loads or stores"]
    assert clean.faults() == []


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("conv2d_implicit_gemm_kernel<float, GemmTile<64, 64, 2, 4>, (Access)1, 15>", ["HMMA", "LDSM", "LDGSTS"]),
        ("conv2d_implicit_gemm_kernel<__half, GemmTile<64, 64, 2, 4>, (Access)2, 15>", ["HMMA", "LDSM"]),
        ("conv2d_wgrad_gemm_kernel<__half, WgradTile<64, 64, 2>, true, false>", ["HMMA", "LDSM", "LDGSTS"]),
        ("conv2d_wgrad_gemm_kernel<float, WgradTile<64, 64, 2>, true, true>", ["HMMA", "LDGSTS"]),
        ("conv2d_wgrad_gemm_kernel<__half, WgradTile<64, 64, 2>, false, false>", ["HMMA", "LDSM"]),
        ("depthwise_forward_kernel<__half, 3, 1>", ["LDGSTS"]),
        ("ordered_reduce_kernel<float>", []),
    ],
)
def test_a_missing_instruction_is_a_fault(name: str, missing: list[str]) -> None:
    assert Kernel(name).faults() == [f"no {instruction}" for instruction in missing]


def test_a_hopper_kernel_is_empty_but_for_sm_90a() -> None:
    name = "conv2d_hopper_gemm_kernel<__nv_bfloat16, HopperTile<__nv_bfloat16, 128>, 15>"
    assert Kernel(name, "sm_80").faults() == []
    kernel = Kernel(name, "sm_90a")
    assert kernel.faults() == ["no HGMMA", "no UTMALDG", "no IM2COL", "no SYNCS", "no USETMAXREG"]
    listing = "\t.section\t.text.k,"
    for opcode in ("HGMMA.64x128x16.F32.BF16", "UTMALDG.4D.IM2COL", "SYNCS.ARRIVE.TRANS64", "USETMAXREG.DEALLOC"):
        listing += f"\n        /*0000*/      @!UP0 {opcode} R1 ;"
    count_instructions(listing, {"k": kernel})
    assert kernel.faults() == []


def test_names_lose_their_arguments() -> None:
    mangled = "_ZN9freezekit12_GLOBAL__N_121ordered_reduce_kernelIfEEvPKfPT_li"
    assert demangle([mangled])[mangled] == "ordered_reduce_kernel<float>"


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("text", "says"),
    [(UNFENCED, r"\(C75\d\d\)[^\n]*warpgroup"), (UNBOUNDED, r"\(C75\d\d\)[^\n]*'setmaxnreg' ignored")],
    ids=["wgmma serialised", "setmaxnreg ignored"],
)
def test_a_message_of_ptxas_about_hopper_is_a_fault(text: str, says: str, tmp_path: Path) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(text)
    with pytest.raises(SystemExit, match=rf"planted.cu for sm_90a:[^$]*{says}"):
        compile_one(source, "sm_90a", "nvdisasm is not reached", tmp_path)
