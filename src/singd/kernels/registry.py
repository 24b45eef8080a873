"""The door: each piece of arithmetic has a plain form, and perhaps faster ones for some devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

In = ParamSpec("In")
Out = TypeVar("Out")

CHOICES = ("fast", "plain")
KERNELS: dict[str, Kernel[Any, Any]] = {}
"""All kernels by name."""

_in_use = ["fast"]


class Twin(NamedTuple):
    """A faster form of a kernel.

    Attributes:
        run: Takes and returns what the plain form does, up to rounding and memory layout.
        pays: Whether it takes less time, asked with the same arguments; None: always.
    """

    run: Callable[..., Any]
    pays: Callable[..., bool] | None


class Kernel(Generic[In, Out]):
    """A function that runs in its plain form, or in a faster one where that pays.

    The device of the first argument decides which ones there are.

    Attributes:
        plain: The mathematics.
        twins: Faster forms by device type; "any" for all that have none of their own.
    """

    def __init__(self, plain: Callable[In, Out]) -> None:
        self.plain = plain
        self.twins: dict[str, Twin] = {}
        update_wrapper(self, plain)

    def __call__(self, *args: In.args, **kwargs: In.kwargs) -> Out:
        if _in_use[0] == "fast" and self.twins:
            device: Any = args[0].device  # type: ignore[attr-defined]
            twin = self.twins.get(device.type) or self.twins.get("any")
            if twin is not None and (twin.pays is None or twin.pays(*args, **kwargs)):
                return twin.run(*args, **kwargs)
        return self.plain(*args, **kwargs)


def kernel(plain: Callable[In, Out]) -> Kernel[In, Out]:
    """Make a kernel of its plain form (a decorator); its first argument has a ``device``."""
    KERNELS[plain.__name__] = made = Kernel(plain)
    return made


def register_kernel(
    name: str, device: str, run: Callable[..., Any], pays: Callable[..., bool] | None = None
) -> None:
    """Give a kernel a faster form on one type of devices.

    Args:
        name: The kernel's.
        device: A device type, such as "cuda", or "any" for all without a form of their own.
        run: The faster form.
        pays: Whether it takes less time, asked with the same arguments; None: always.

    Raises:
        ValueError: If there is no such kernel; the sentence lists the choices.
    """
    if name not in KERNELS:
        raise ValueError(f"Unknown kernel {name!r}; choose from {', '.join(sorted(KERNELS))}.")
    KERNELS[name].twins[device] = Twin(run, pays)


class use:
    """Choose between the plain forms and the faster ones, from now on or in a ``with`` block.

    Args:
        which: "fast" (the default of the library), or "plain".

    Raises:
        ValueError: If it is neither.

    Example:
        >>> from singd import kernels
        >>> with kernels.use("plain"):
        ...     pass  # here nothing but the mathematics runs
    """

    def __init__(self, which: str) -> None:
        if which not in CHOICES:
            raise ValueError(f"kernels.use takes {' or '.join(map(repr, CHOICES))}, got {which!r}.")
        self._before, _in_use[0] = _in_use[0], which

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        _in_use[0] = self._before
