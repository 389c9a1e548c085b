"""Headers of torch are compiled while the graph is: to read them is half of what g++ does for a library's C++.

Torch can have them compiled too, before it starts g++ and while nothing else goes on. Here another core does it from
the beginning of a compile. Where g++ is asked for something else than was thought, it reads them as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from torch import Tensor
from torch._inductor import config
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.exc import CppCompileError
from torch._inductor.utils import determine_aoti_mmap_flags
from torch.fx import GraphModule

from vggt_compile.artifact.behind import Flags

log = logging.getLogger(__name__)

READ = (
    "torch/csrc/inductor/aoti_include/{device}.h",
    "torch/csrc/inductor/aoti_include/cpu.h",
    "torch/csrc/inductor/aoti_runtime/interface.h",
    "torch/csrc/inductor/aoti_runtime/model_container.h",
    "iostream",
)
"""By the C++ of a library, in this order."""


def asked(
    aot_mode: bool,
    device: str,
    flags: Flags,
    *,
    min_optimize: bool,
    compile_only: bool = False,
    precompiling: bool = False,
) -> CppTorchDeviceOptions:
    """What torch asks g++ for, of a library whose weights are where the flags say."""
    external, mapped = flags
    return CppTorchDeviceOptions(
        aot_mode=aot_mode,
        device_type=device,
        use_mmap_weights=mapped,
        use_mmap_weights_external=external,
        use_relative_path=False,
        vec_isa=pick_vec_isa(),
        min_optimize=min_optimize,
        compile_only=compile_only,
        precompiling=precompiling,
    )


class Headers:
    """Those of one compile, in a `with` statement around it."""

    def __init__(self, gm: GraphModule, device: str, settings: Mapping[str, Any]) -> None:
        self._folder = TemporaryDirectory(prefix="vggt_compile-")
        self._path = Path(self._folder.name) / "headers.h"
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="headers")
        self._made: Future[None] | None = None
        with config.patch(dict(settings)):
            if not config.aot_inductor.precompile_headers:
                self._begin(gm, device)

    def __enter__(self) -> Headers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._beside.shutdown()
        self._folder.cleanup()

    def read_by(self, options: CppTorchDeviceOptions) -> CppTorchDeviceOptions:
        """Options with which g++ reads compiled headers, if they are there."""
        if self._made is not None and self._made.done() and self._made.exception() is None:
            options.precompiled_header = str(self._path)
        return options

    def _begin(self, gm: GraphModule, device: str) -> None:
        self._path.write_text("".join(f"#include <{one.format(device=device)}>\n" for one in READ))
        weights = (x for x in (*gm.parameters(), *gm.buffers()) if isinstance(x, Tensor))
        size = sum(x.untyped_storage().nbytes() for x in weights)
        flags = determine_aoti_mmap_flags(size if config.aot_inductor.package_constants_in_so else 0)
        options = asked(True, device, flags, min_optimize=True, precompiling=True)
        builder = CppBuilder(str(self._path), str(self._path), options)
        self._made = self._beside.submit(_build, builder)


def _build(builder: CppBuilder) -> None:
    try:
        builder.build()
    except (CppCompileError, OSError):
        log.info("headers are not compiled ahead", exc_info=True)
        raise
