"""How kernels pick a configuration, and how they run where there is no device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

_interpreting = False


def has_device() -> bool:
    """Return whether triton can launch on a device here."""
    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        return False
    return True


def autotune(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable:
    """Return triton.autotune over configs, or over the first alone where none can be timed.

    The winners are kept in triton's cache folder, so that a second process doesn't time again. The
    tuner's `every_config` holds all of them wherever it is, for whoever compiles ahead of time.
    """
    untimed = triton.knobs.runtime.interpret or not has_device()
    tuner = triton.autotune(
        list(configs[:1] if untimed else configs), list(key), cache_results=True
    )

    def tuned(fn):
        kernel = tuner(fn)
        kernel.every_config = list(configs)
        return kernel

    return tuned


@contextmanager
def pinned(kernel: Autotuner, config: triton.Config) -> Iterator[None]:
    """Launch kernel with this configuration inside, whatever its tuner would pick."""
    with mock.patch.object(kernel, "configs", [config]):
        yield


def interpreting() -> bool:
    """Return whether launches run in the interpreter: `interpreted` or TRITON_INTERPRET=1.

    There `tl.dot` takes bfloat16 operands for integers, so kernels are told to widen them.
    """
    return _interpreting or triton.knobs.runtime.interpret


@contextmanager
def interpreted() -> Iterator[None]:
    """Run every kernel launched inside on CPU tensors, with its first configuration.

    TRITON_INTERPRET=1 does this for a whole process, and must be set before triton is imported;
    nothing can be compiled in that process. This context leaves the process able to compile.
    Not for threads: it replaces methods of triton's classes until it is left.
    """
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang

    def launch(self, *args, grid, warmup, **kwargs):
        return InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(self, *args, **kwargs):  # a jitted helper called by a kernel
        scope = _patch_lang(self.fn)
        try:
            return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)
        finally:
            scope.restore()  # else the language stays patched and the next compilation fails

    def first(self, *args, **kwargs):
        self.best_config = self.configs[0]
        return self.fn.run(*args, **kwargs, **self.best_config.all_kwargs())

    global _interpreting
    with (
        mock.patch.multiple(JITFunction, run=launch, __call__=call),
        mock.patch.object(Autotuner, "run", first),
    ):
        outside, _interpreting = _interpreting, True
        try:
            yield
        finally:
            _interpreting = outside
