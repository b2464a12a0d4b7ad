"""Stand between a model and one of its modules, and leave no trace afterwards.

A `Tap` takes the place of one child module.  Its handler gets the module and the arguments of
each call and returns the output; whether it calls the module is its own decision.  Everything
else that is asked of the tap (parameters, attributes, `state_dict`) is answered by the module,
so a model reads and saves the same with taps as without.  No class is changed.

Compiled blocks stay compiled: the tap is outside of the compiled code, where a decision that
differs from step to step costs no recompilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]  # inner, args, kwargs -> output

_CALL = "_compiled_call_impl"  # if not None, nn.Module.__call__ calls it

# what parameters(), named_modules() and state_dict() of the inner module are made of
_SHARED = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_modules",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Tap(nn.Module):
    """A stand-in for `inner` whose calls go to `handler(inner, args, kwargs)`."""

    inner: nn.Module
    handler: Handler

    def __init__(self, inner: nn.Module, handler: Handler) -> None:
        super().__init__()
        own = vars(self)
        # not by setattr: a registered child would put "inner." into the keys of state_dict
        own.update(inner=inner, handler=handler)
        own.update({name: vars(inner)[name] for name in _SHARED})
        del own["training"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self.inner, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "inner" in vars(self):
            setattr(self.inner, name, value)
        else:  # during construction
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.inner, name)


@contextmanager
def tapped(root: nn.Module, handlers: Mapping[str, Handler]) -> Iterator[dict[str, Tap]]:
    """Put a tap on each module path of `root`; yield the taps, and restore every module.

    Blocks and parts of those blocks can be tapped together, and contexts can be nested.
    """
    places = []
    for path in handlers:
        above, _, name = path.rpartition(".")
        parent = root.get_submodule(above)
        places.append((parent, name, parent.get_submodule(name)))
    taps = {}
    try:
        for (parent, name, module), (path, handler) in zip(places, handlers.items(), strict=True):
            taps[path] = parent._modules[name] = Tap(module, handler)
        yield taps
    finally:
        for parent, name, module in places:
            parent._modules[name] = module


@contextmanager
def intercepted(module: nn.Module, handler: Handler) -> Iterator[None]:
    """Route every call of a module that has no parent, a whole denoiser, through `handler`.

    Its `inner` is not a module but what computes the output, compiled if the module is.  The
    call is caught where `nn.Module.compile` puts its own: `forward` is exchanged by accelerate
    after each run of an offloaded pipeline.
    """
    before = vars(module).get(_CALL)
    inner = before or module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(inner, args, kwargs)

    vars(call)[_CALL] = before
    with replaced(module, {_CALL: call}):
        yield


def compiled(module: nn.Module) -> bool:
    """Whether the module itself, not one inside or around it, runs compiled code."""
    call = vars(module).get(_CALL)
    while call is not None and _CALL in vars(call):  # one of `intercepted`
        call = vars(call)[_CALL]
    return call is not None or "_orig_mod" in module._modules


@contextmanager
def replaced(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes on one instance; on leaving, its `__dict__` is as before."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


class Watched:
    """Stands in for a scheduler's method; deep copies of the scheduler get the method itself.

    Pipelines that denoise sound along with video step a copy of their scheduler for it.
    """

    def __init__(self, scheduler: Any, name: str, around: Handler) -> None:
        self.scheduler, self.name, self.around = scheduler, name, around
        self.inner = getattr(scheduler, name)
        functools.update_wrapper(self, self.inner, updated=())  # pipelines read its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.inner, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self.scheduler)]
        return getattr(type(copied), self.name).__get__(copied)
