"""A process in which the kernel for Hopper is launched twice for the same operands, by Triton and as in an artifact.

Called by tests/test_hopper_launch.py with a folder; the driver is tests/fake_cuda.c. MACHINE_CODE_DIR is a cache of
Triton's in which kernels made ahead of time may lie. It prints a JSON line for each case: both launches as the driver
saw them.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from attention_cases import Case, operands
from torch.utils.cpp_extension import include_paths, library_paths
from triton import knobs

from vggt_compile.ops import attention_hopper_kernel as kernels
from vggt_compile.ops.hopper_code_kernel import PARAMETERS, code, parameters
from vggt_compile.ops.hopper_launch import source
from vggt_compile.ops.hopper_variant import variant
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.tiles import longest_first

SIZES = {"map": 128, "u32": 4, "u64": 8, "f32": 4}
BF16 = Case(batch=2, queries=300, always=70, patches=500, head_dim=64, q_block=128, k_block=64, dtype=torch.bfloat16)
CASES = {
    "lists": BF16,
    "views of one projection": replace(BF16, fused=True, seed=1),
    "no lists": replace(BF16, density=None, fused=True),
    "own keys": replace(BF16, own=True, fused=True),
    "own keys, no lists": replace(BF16, own=True, density=None),
    "blocks of two": replace(BF16, q_block=256, k_block=128, fused=True),
    "heads of 32": replace(BF16, head_dim=32, fused=True),
    "heads of 128, float16": replace(BF16, head_dim=128, own=True, dtype=torch.float16),
    "one scene": replace(BF16, batch=1, queries=129, fused=True),
}


class Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("function", "grid", "block", "shared", "stream")),
        ("arguments", ctypes.c_uint8 * 1024),
    )


@dataclass
class Driver:
    """The fake one, with how many bytes each argument of the next kernel has."""

    library: ctypes.CDLL

    def expect(self, kinds: tuple[str, ...]) -> None:
        sizes = (ctypes.c_int * 64).in_dll(self.library, "sizes_of_arguments")
        sizes[: len(kinds)] = [SIZES[kind] for kind in kinds]
        ctypes.c_int.in_dll(self.library, "count_of_arguments").value = len(kinds)

    def fail(self, failing: bool) -> None:
        ctypes.c_int.in_dll(self.library, "failing").value = failing

    def last(self, kinds: tuple[str, ...]) -> dict[str, Any]:
        count = ctypes.c_int.in_dll(self.library, "launched").value
        one = (Launch * 64).in_dll(self.library, "launches")[count - 1]
        left, values = bytes(one.arguments), []
        for kind in kinds:
            value, left = left[: SIZES[kind]], left[SIZES[kind] :]
            values.append(value.hex() if kind == "map" else _number(kind, value))
        return {name: getattr(one, name) for name in ("grid", "block", "shared", "stream")} | {"arguments": values}


def _number(kind: str, value: bytes) -> float:
    return struct.unpack("<f", value)[0] if kind == "f32" else int.from_bytes(value, "little", signed=True)


def built(folder: Path) -> tuple[Driver, ctypes.CDLL]:
    """The fake driver, and the C++ of an artifact with the kernels of all cases but one."""
    driver, shim, text = folder / "libcuda.so.1", folder / "shim.so", folder / "shim.cpp"
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    fake, library = Path(__file__).with_name("fake_cuda.c"), ("-shared", "-fPIC")
    subprocess.run(["gcc", *library, f"-I{headers}", "-Wl,-soname,libcuda.so.1", fake, "-o", driver], check=True)
    made_for = {variant(operands(case)) for case in CASES.values()}
    with knobs.cache.scope():
        knobs.cache.dir = os.environ["MACHINE_CODE_DIR"]
        text.write_text(source([code(one) for one in made_for if one is not None]))
    flags = [*(f"-I{path}" for path in [headers, *include_paths()]), "-DUSE_CUDA", "-std=c++20", "-Wall", "-Werror"]
    libraries = [driver, *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *library, *flags, text, *libraries, "-o", shim], check=True)
    return Driver(ctypes.CDLL(str(driver), ctypes.RTLD_GLOBAL)), ctypes.CDLL(str(shim))


class Recorder:
    """The kernel; what it is launched with is compiled before, so that the driver knows its arguments."""

    def __init__(self, kernel: Any, driver: Driver) -> None:
        self.kernel, self.driver = kernel, driver
        self.kinds: tuple[str, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**given: Any) -> Any:
            self.kinds = parameters(self.kernel.warmup(grid=grid, **given).asm["ptx"])
            self.driver.expect(self.kinds)
            return self.kernel[grid](**given)

        return launch


def without_gpu() -> Any:
    """Triton's driver, which believes that there is an H100."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Fake(CudaDriver):
        def __init__(self) -> None:
            triton.runtime.driver.set_active(self)
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0x51

    return Fake()


def in_artifact(shim: ctypes.CDLL, x: Operands, order: Any, longest: torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """What the C function returns, and its tensor."""
    handles: list[Any] = []

    def handle(tensor: torch.Tensor) -> ctypes.c_void_p:
        (made,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        return ctypes.c_void_p(pointer(made, None))

    def maybe(tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return None
        handles.append(handle(tensor))
        return ctypes.byref(handles[-1])

    out = ctypes.c_void_p()
    numbers = (ctypes.c_int64(x.always), ctypes.c_int64(x.q_block), ctypes.c_int64(x.k_block))
    lists = map(maybe, (x.block_index, x.block_count, order))
    own = map(maybe, (x.own_k, x.own_v, x.own))
    tensors = map(handle, (x.q, x.k, x.v))
    scale = ctypes.c_double(x.scale)
    call = shim.aoti_torch_cuda_attention_hopper
    status = call(*tensors, *lists, handle(longest), *numbers, *own, scale, ctypes.byref(out))
    if status:
        return status, None
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return status, torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(out, None, None))


def main(folder: Path) -> None:
    driver, shim = built(folder)
    without_gpu()
    kernels.attention_hopper = recorder = Recorder(kernels.attention_hopper, driver)
    for name, case in CASES.items():
        x = operands(case)
        order = None if x.block_count is None else longest_first(x.block_count)
        longest = torch.rand(x.q.shape[:2])
        want = kernels.launch(x, order, longest)
        by_triton = driver.last(recorder.kinds)
        driver.expect(PARAMETERS)
        status, got = in_artifact(shim, x, order, longest)
        assert got is not None, status
        both = {"triton": by_triton, "artifact": driver.last(PARAMETERS)}
        for launch, out in zip(both.values(), (want, got), strict=True):
            assert launch["arguments"][27] == out.data_ptr()
            launch["arguments"][27] = "out"
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        print(json.dumps({"case": name} | both))
    driver.fail(True)
    print(json.dumps({"case": "the driver refuses", "status": in_artifact(shim, x, order, longest)[0]}))
    driver.fail(False)
    other = operands(replace(BF16, k_block=192))
    print(json.dumps({"case": "unknown", "status": in_artifact(shim, other, other.block_count, longest)[0]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # nothing that a driver would have to clean up
