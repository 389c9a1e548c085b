"""What PyTorch's caches of compiled graphs have to know: which code made a graph, and that it may be kept.

Models of this field switch autocast off and on inside, as before their heads, and heads over many frames are loops.
AOTAutograd's cache refuses graphs that hold such calls, since their functions are private ones of torch and loops are
new to it; but all that they depend on is in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._higher_order_ops.scan import scan_op
from torch._higher_order_ops.while_loop import while_loop_op
from torch.amp import autocast_mode

from vggt_compile.sources import source_hash


@contextmanager
def told() -> Iterator[None]:
    """Compiles inside the block are kept, and found again where sources and autocast are the same.

    Both go into a setting of Inductor's that is part of every key. `torch.compiler.config.cache_key_tag` is not for
    this: it also names the files of how a kernel was cut best, and the processes that compile kernels do not have it,
    so a second process looked for other files and tried everything out again.

    What torch keeps under TORCH_CACHING_PRECOMPILE is found by name and line of a function, whatever the backend and
    its options. Another plan would get these graphs, so they are not kept there.
    """
    functions = (autocast_mode._enter_autocast, autocast_mode._exit_autocast)
    kept = {f"{function.__module__}.{function.__name__}": torch.__version__ for function in functions}
    kept |= {f"{loop.__module__}.{loop.__name__}": torch.__version__ for loop in (scan_op, while_loop_op)}
    known = torch._inductor.config.unsafe_marked_cacheable_functions
    own = "-".join(filter(None, (source_hash(), autocast())))
    with (
        torch._inductor.config.patch(unsafe_marked_cacheable_functions={**kept, **known, "vggt_compile": own}),
        torch._dynamo.config.patch(caching_precompile=False),
    ):
        yield


def autocast() -> str:
    """Devices and dtypes, which torch 2.11 leaves out of its key: it knows whether there is autocast at all."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return ",".join(f"{device}:{torch.get_autocast_dtype(device)}" for device in devices)
