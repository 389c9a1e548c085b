"""A model is compiled once, and later processes neither trace nor compile it: its graphs are in a file.

PyTorch's own caches save a later process the work of Inductor, but Dynamo traces the model again to find out what to
look for. Here the conditions of its trace, its code and the compiled graph are kept together, and found by the file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable, SerializableCallable
from torch._dynamo.guards import CheckFunctionManager
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map_only

from vggt_compile import __version__
from vggt_compile.backend import Options, vggt_sparse
from vggt_compile.caches import autocast
from vggt_compile.errors import BadInput, PlanError
from vggt_compile.families import trace
from vggt_compile.garbage import few_collections
from vggt_compile.graph.scalar_code import scalar_beside_a_gpu
from vggt_compile.kept import Kept, sources
from vggt_compile.sources import source_hash

GUARDED = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
"""torch.compile asks of hooks when it traces, and not again. Nobody traces what comes from a file."""


def compile_once(
    model: nn.Module, path: str | os.PathLike[str], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What calls `model.forward` as `torch.compile(model, backend="vggt_sparse", options=options)` does.

    A call that no graph serves compiles one and adds it to the file; the number of frames is dynamic. A file that was
    made of something else is written anew: of another version, plan, device, setting of torch or source of the model.
    Reading a file runs what is in it, so read none that others can write.

    Args:
        path: where the graphs are, or will be.
        options: see `Options`.

    Raises:
        PlanError: options that cannot be meant, or that measure.
        BadInput: a model whose forward is not a method of its class.
    """
    return _CompiledOnce(model, path, dict(options or {}))


class _CompiledOnce:
    def __init__(self, model: nn.Module, path: str | os.PathLike[str], options: dict[str, Any]) -> None:
        self.chosen = Options.read(options)
        if self.chosen.densities or self.chosen.plan.probe:
            raise PlanError("compile_once keeps nothing that measures: ask for no densities and no probe")
        if not inspect.ismethod(model.forward):
            raise BadInput(f"the forward of {type(model).__name__} is not a method of its class: use torch.compile")
        self.model, self.options = model, options
        self._read = functools.cache(lambda: Kept(path, made_of(model, self.chosen)))
        self._runs: dict[str, list[Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _unmarked(args, kwargs)
        state = around()
        if state not in self._runs:
            self._runs[state] = self._loaded(state, args, kwargs)
        for run in self._runs[state]:
            if run.guard_check(self.model, *args, **kwargs):
                return run(self.model, *args, **kwargs)
        run = self._compiled(state, args, kwargs)
        self._runs[state].append(run)
        return run(self.model, *args, **kwargs)

    def _loaded(self, state: str, args: Any, kwargs: Any) -> list[Any]:
        """Graphs of the file that were compiled under what is around now: their guards on tensors get it from there."""
        trace.arm()  # guards are on the traceable form of methods, also of classes that were imported after us
        forward: Any = self.model.forward
        load: Any = functools.partial(torch.compiler.load_compiled_function, f_globals=forward.__globals__)
        runs = []
        for graph in self._read().under(state):
            try:
                beside = scalar_beside_a_gpu([*self.model.parameters(), *_tensors(args, kwargs)])
                with GUARDED, _as_if_tracing(), beside:
                    run = load(io.BytesIO(graph))
            except Exception as problem:  # whatever torch says of what it wrote itself, there is another way
                self._read().drop(graph, f"{type(problem).__name__}: {problem}")
            else:
                run.disable_guard_check()  # `__call__` asks before it takes one
                runs.append(run)
        return runs

    @few_collections()
    def _compiled(self, state: str, args: Any, kwargs: Any) -> Any:
        args, kwargs = _unmarked(args, kwargs)
        for x in filter(_of_frames, _tensors(args, kwargs)):
            torch._dynamo.maybe_mark_dynamic(x, x.ndim - 4)
        backend = functools.partial(_serializable, options=self.options)
        with GUARDED, torch._dynamo.config.patch(enable_aot_compile=True):
            lazy: Any = torch.compile(
                self.model.forward, backend=backend, fullgraph=True, options={"guard_filter_fn": _portable}
            )
            run = lazy.aot_compile((args, kwargs))
        run.disable_guard_check()
        with tempfile.TemporaryDirectory() as folder:
            saved = run.save_compiled_function(os.path.join(folder, "graph"))
        seen = run.source_info().inlined_sources
        self._read().add(state, saved.serialized_data, sources((one.module, one.content) for one in seen))
        return run


def around() -> str:
    """Modes that are around a call."""
    modes = {"grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled()}
    return " ".join([*(name for name, on in modes.items() if on), autocast()])


def made_of(model: nn.Module, chosen: Options) -> dict[str, str]:
    """Everything but the code of the model and what the guards of a graph compare."""
    kind, some = type(model), next(model.parameters(), None)
    device = some.device if some is not None else torch.device("cpu")
    settings = {
        "inductor": torch._inductor.config.save_config_portable(),
        "functorch": torch._functorch.config.save_config_portable(),
    }
    return {
        "version of vggt_compile": f"{__version__} {source_hash()}",
        "version of torch": torch.__version__,
        "version of Python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "plan": json.dumps(chosen.plan.to_json(), sort_keys=True),
        "options": repr((chosen.strict, chosen.outline, chosen.outline_heads, sorted(chosen.inductor.items()))),
        "settings of torch": hashlib.sha256(repr(settings).encode()).hexdigest(),
    }


def _serializable(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any]
) -> SerializableCallable:
    """As torch 2.13 does by itself."""
    return BundledAOTAutogradSerializableCallable(vggt_sparse(gm, example_inputs, options=options))


def _portable(guards: Sequence[Any]) -> list[bool]:
    """Guards that another process can check: those that torch keeps, less those on defaults of functions.

    torch 2.11 reads back no guard on a default. `Kept` compares the code that holds them.
    """
    unsupported = CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES
    return [
        not (guard.is_global or guard.guard_type in unsupported or "defaults__" in guard.orig_guard.name)
        for guard in guards
    ]


@contextlib.contextmanager
def _as_if_tracing() -> Iterator[None]:
    """What is read inside the block may note guards, as what a trace imported does whenever it is made: nobody asks."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        yield


def _unmarked(args: Any, kwargs: Any) -> Any:
    """The same memory as other tensors: marks of dynamic sizes are on tensors, and guards from a file know none."""
    return tree_map_only(Tensor, lambda x: x.detach() if _of_frames(x) else x, (args, kwargs))


def _of_frames(x: Tensor) -> bool:
    """Whether it may be images, [..., frames, 3, height, width]."""
    return x.ndim > 3 and not x.requires_grad


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
