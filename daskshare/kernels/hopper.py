"""CUDA C++ for the tensor cores of compute capability 9.0: building blocks and loading.

Operands lie in shared memory in planes: the eight channels that a matrix instruction reads at once
of one pixel after another. A convolution's taps then are the same planes read from a later pixel
on, so that no input is ever copied into the shape of a matrix.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from daskshare.errors import ConfigurationError
from daskshare.kernels.cupy_kernel import cupy_stream

__all__ = ["SHARED_BYTES", "HopperKernel", "is_hopper", "prelude"]

#: Shared memory of a multiprocessor, of which each block takes 1 KiB for itself.
SHARED_BYTES = 228 * 1024


def _wgmma(columns: int, *, a_in_registers: bool) -> str:
    """A device function: one asynchronous matrix instruction of 64 x ``columns`` x 16."""
    count = columns // 2
    outputs = ", ".join(f"%{i}" for i in range(count))
    binds = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if a_in_registers:
        name = f"mma_registers_{columns}"
        a = ", ".join(f"%{count + i}" for i in range(4))
        operands = f"{{{a}}}, %{count + 4}"
        predicate, tail = count + 5, "1, 1, 0"
        parameters = "const u32 (&a)[4], u64 b"
        inputs = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)'
    else:
        name = f"mma_{columns}"
        operands = f"%{count}, %{count + 1}"
        predicate, tail = count + 2, "1, 1, 0, 0"
        parameters = "u64 a, u64 b"
        inputs = '"l"(a), "l"(b), "r"(accumulate)'
    return f"""
__device__ __forceinline__ void {name}(
    float (&d)[{count}], {parameters}, int accumulate)
{{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{predicate}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32." TYPE "." TYPE "\\n"
        "{{{outputs}}}, {operands}, p, {tail};\\n}}\\n"
        : {binds} : {inputs});
}}
"""


_PRELUDE = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

__device__ __forceinline__ u32 shared_address(const void* pointer)
{
    return (u32)__cvta_generic_to_shared(pointer);
}

// K-major operand without swizzle: groups of 8 rows x 16 bytes; `along_k` bytes to the next eight
// values of the inner dimension, 128 bytes to the next eight rows.
__device__ __forceinline__ u64 operand(u32 address, u32 along_k)
{
    return (u64)(address >> 4) | (u64)(along_k >> 4) << 16 | (u64)(128 >> 4) << 32;
}

__device__ __forceinline__ void mma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void mma_end()
{
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// The tensor cores read shared memory by another way than stores write it.
__device__ __forceinline__ void publish()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void copy_4(u32 target, const void* source, bool present)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(target), "l"(source), "r"(present ? 4 : 0) : "memory");
}

__device__ __forceinline__ void copies_end()
{
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ u32 pack(float low, float high)
{
    u32 both;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

__device__ __forceinline__ void unpack(u32 both, float& low, float& high)
{
#if BF16
    low = __uint_as_float(both << 16);
    high = __uint_as_float(both & 0xffff0000u);
#else
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high) : "r"(both));
#endif
}

__device__ __forceinline__ float leaky(float x) { return fmaxf(x, x * 0.1f); }

__device__ __forceinline__ u32 leaky_pair(u32 x)
{
    u32 out;
#if BF16
    asm("{\n.reg .b32 t;\nmul.rn.bf16x2 t, %1, %2;\nmax.bf16x2 %0, %1, t;\n}"
        : "=r"(out) : "r"(x), "r"(0x3dcd3dcdu));
#else
    asm("{\n.reg .b32 t;\nmul.rn.f16x2 t, %1, %2;\nmax.f16x2 %0, %1, t;\n}"
        : "=r"(out) : "r"(x), "r"(0x2e662e66u));
#endif
    return out;
}

// Four 8 x 8 matrices; each lane gives the address of one row of 16 bytes.
__device__ __forceinline__ void store_matrices(u32 at, u32 a, u32 b, u32 c, u32 d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Waits for the four warps of a group alone.
__device__ __forceinline__ void group_barrier(int group)
{
    asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory");
}

// Four lanes hold two columns each of four groups of eight; afterwards each holds one whole group.
__device__ __forceinline__ void quad_transpose(u32 (&v)[4], int lane)
{
    u32 a = lane & 1 ? v[0] : v[1];
    u32 b = lane & 1 ? v[2] : v[3];
    a = __shfl_xor_sync(0xffffffffu, a, 1);
    b = __shfl_xor_sync(0xffffffffu, b, 1);
    if (lane & 1) { v[0] = a; v[2] = b; } else { v[1] = a; v[3] = b; }
    a = lane & 2 ? v[0] : v[2];
    b = lane & 2 ? v[1] : v[3];
    a = __shfl_xor_sync(0xffffffffu, a, 2);
    b = __shfl_xor_sync(0xffffffffu, b, 2);
    if (lane & 2) { v[0] = a; v[1] = b; } else { v[2] = a; v[3] = b; }
}

__device__ __forceinline__ void add_pairs(u32 (&v)[4], uint4 other)
{
    const u32 others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float a, b, c, d;
        unpack(v[i], a, b);
        unpack(others[i], c, d);
        v[i] = pack(a + c, b + d);
    }
}
"""


def prelude(products: Iterable[tuple[int, bool]]) -> str:
    """Device functions for kernels; products by their columns and whether A is in registers."""
    return _PRELUDE + "".join(_wgmma(n, a_in_registers=held) for n, held in sorted(set(products)))


def is_hopper(device: torch.device) -> bool:
    """Whether the kernels of this module run on ``device``: compute capability 9.0 exactly."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


class HopperKernel:
    """A kernel of compute capability 9.0, compiled for given constants.

    Parameters
    ----------
    source : str
        CUDA C++ without includes that follows :func:`prelude`.
    name : str
        The ``extern "C"`` kernel.
    constants : dict of str to int or str
        Macros of the source.
    products : iterable of (int, bool)
        Matrix instructions that it needs: columns, and whether the first operand is in registers.
    threads : int
        Of a block.
    shared_bytes : int
        Dynamic shared memory of a block.

    Notes
    -----
    Launches go to the calling thread's current torch stream and can be captured in a CUDA graph.
    """

    def __init__(
        self,
        source: str,
        name: str,
        *,
        constants: dict[str, int | str],
        products: Iterable[tuple[int, bool]],
        threads: int,
        shared_bytes: int,
    ) -> None:
        self._name = name
        self.threads = threads
        self.shared_bytes = shared_bytes
        defines = "".join(f"#define {key} {value}\n" for key, value in constants.items())
        self._source = defines + prelude(products) + source
        self._function: Any = None
        self.blocks = 0

    def compile(self, device: torch.device) -> None:
        """Compile and load for ``device``; nothing when that was done.

        Raises
        ------
        ConfigurationError
            When CuPy is not installed.
        """
        if self._function is not None:
            return
        try:
            cupy: Any = importlib.import_module("cupy")
        except ImportError as error:
            raise ConfigurationError(
                f"CuPy cannot be imported here ({error}); expected it wherever a model runs on a "
                "GPU. Install daskshare's extra: pip install 'daskshare[gpu]'.",
                option="cupy",
            ) from error
        with cupy.cuda.Device(device.index):
            module = cupy.cuda.function.Module()
            module.load(_cubin(self._source))
            function = module.get_function(self._name)
            driver: Any = importlib.import_module("cupy_backends.cuda.api.driver")
            driver.funcSetAttribute(
                function.ptr,
                driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.shared_bytes,
            )
            resident = driver.occupancyMaxActiveBlocksPerMultiprocessor(
                function.ptr, self.threads, self.shared_bytes
            )
        if resident < 1:
            raise RuntimeError(f"{self._name} does not fit: {self.shared_bytes} bytes shared")
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.blocks = resident * processors
        self._module, self._function = module, function

    def __call__(self, num_tiles: int, *args: Any, device: torch.device) -> None:
        """Launch as many blocks as run at once, at most ``num_tiles``."""
        cupy: Any = importlib.import_module("cupy")
        values = tuple(
            np.uint64(arg.data_ptr()) if isinstance(arg, torch.Tensor) else np.int32(arg)
            for arg in args
        )
        stream = torch.cuda.current_stream(device).cuda_stream
        with cupy.cuda.Device(device.index), cupy_stream(stream):
            self._function(
                (min(self.blocks, num_tiles), 1, 1),
                (self.threads, 1, 1),
                values,
                shared_mem=self.shared_bytes,
            )


_CUBINS: dict[str, bytes] = {}
_COMPILING = threading.Lock()


def _cubin(source: str) -> bytes:
    key = hashlib.sha256(source.encode()).hexdigest()
    with _COMPILING:
        if key not in _CUBINS:
            nvrtc: Any = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
            program = nvrtc.createProgram(source, "daskshare.cu", (), ())
            try:
                # The plain target of CuPy's own compiling lacks these matrix instructions.
                nvrtc.compileProgram(program, ("-arch=sm_90a", "-std=c++17"))
                _CUBINS[key] = nvrtc.getCUBIN(program)
            except nvrtc.NVRTCError as error:
                log = nvrtc.getProgramLog(program)
                raise RuntimeError(f"{error}: {log}") from error
            finally:
                nvrtc.destroyProgram(program)
        return _CUBINS[key]
