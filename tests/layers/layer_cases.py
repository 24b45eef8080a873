"""The layers on which the laws are tested: every kind with every option, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {1: (9,), 2: (7, 8), 3: (5, 7, 6)}
"""Input sizes of convolutions by their number of axes: odd and even, all different."""

MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass
class Case:
    """A layer, the shape of its input, and the keywords of its forward."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None  # the vocabulary, if the input are tokens

    def run(self) -> tuple[nn.Module, Tensor, Tensor]:
        """One forward and backward: the layer with gradients, the input, the output gradient."""
        torch.manual_seed(0)
        layer = self.make().double()
        if self.tokens is None:
            x = torch.randn(self.shape, dtype=torch.float64)
        else:
            x = torch.randint(self.tokens, self.shape)
        with warnings.catch_warnings():
            # torch says that it copies the input; it does what it is asked for
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
            y = layer(x, **self.kwargs)
        g = torch.randn_like(y)
        y.backward(g)
        return layer, x, g


def conv_options(axes: int) -> dict[str, dict[str, Any]]:
    """Options of convolutions by name; channels are added by the caller."""
    options: dict[str, dict[str, Any]] = {
        "plain": dict(kernel_size=3),
        "kernel1": dict(kernel_size=1),
        "kernel1-stride2": dict(kernel_size=1, stride=2),
        "even": dict(kernel_size=2),
        "whole": dict(kernel_size=SIZES[axes]),
        "padding": dict(kernel_size=3, padding=1),
        "wide-padding": dict(kernel_size=2, padding=3),
        "stride2": dict(kernel_size=3, stride=2, padding=1),
        "stride3": dict(kernel_size=4, stride=3, padding=2),
        "stride-over-kernel": dict(kernel_size=2, stride=3),
        "dilation": dict(kernel_size=2, dilation=3, padding=1),
        "dilation-stride2": dict(kernel_size=3, dilation=2, stride=2, padding=2),
        "dilation3-stride2": dict(kernel_size=3, dilation=3, stride=2, padding=3),
        "mixed": dict(
            kernel_size=(2, 3, 1)[:axes],
            stride=(1, 2, 1)[:axes],
            dilation=(2, 1, 2)[:axes],
            padding=(1, 0, 2)[:axes],
        ),
        "mixed-last": dict(kernel_size=(1, 2, 3)[-axes:], padding=(0, 1, 1)[-axes:]),
        "valid": dict(kernel_size=2, padding="valid"),
        "same": dict(kernel_size=3, padding="same"),
        "same-even": dict(kernel_size=4, padding="same"),
        "same-even-dilated": dict(kernel_size=2, dilation=3, padding="same"),
        "no-bias": dict(kernel_size=3, bias=False),
        "groups": dict(kernel_size=3, groups=2, padding=1),
        "groups-all": dict(kernel_size=2, groups=2, stride=2, dilation=2, bias=False),
        "depthwise": dict(kernel_size=3, groups=4, padding=1),
    }
    for mode in MODES[1:]:
        options[f"{mode}"] = dict(kernel_size=3, padding=2, stride=2, padding_mode=mode)
        options[f"{mode}-same"] = dict(kernel_size=4, padding="same", padding_mode=mode)
        options[f"{mode}-valid"] = dict(kernel_size=2, padding="valid", padding_mode=mode)
    return options


def transposed_options(axes: int) -> dict[str, dict[str, Any]]:
    """Options of transposed convolutions by name."""
    return {
        "plain": dict(kernel_size=3),
        "kernel1": dict(kernel_size=1, padding=0),
        "cropped": dict(kernel_size=1, padding=1),
        "padding": dict(kernel_size=3, padding=1),
        "wide-padding": dict(kernel_size=2, padding=2, stride=2),
        "stride2": dict(kernel_size=3, stride=2, padding=1),
        "stride-over-kernel": dict(kernel_size=2, stride=3),
        "output-padding": dict(kernel_size=2, stride=3, output_padding=2, padding=1),
        "dilation": dict(kernel_size=2, dilation=3),
        "dilation-output-padding": dict(kernel_size=2, dilation=3, output_padding=1, padding=2),
        "mixed": dict(
            kernel_size=(2, 3, 1)[:axes],
            stride=(1, 2, 2)[:axes],
            dilation=(2, 1, 2)[:axes],
            padding=(1, 0, 1)[:axes],
        ),
        "no-bias": dict(kernel_size=3, bias=False),
        "groups": dict(kernel_size=3, groups=2, stride=2),
        "depthwise": dict(kernel_size=2, groups=4, padding=1),
    }


def conv_cases() -> dict[str, Case]:
    """Convolutions and transposed convolutions of 1 to 3 axes."""
    cases = {}
    for axes, size in SIZES.items():
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        for name, options in conv_options(axes).items():
            cases[f"conv{axes}d-{name}"] = Case(_maker(conv, options), (3, 4, *size))
        small = tuple(n - 2 for n in size)
        conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        for name, options in transposed_options(axes).items():
            cases[f"transposed{axes}d-{name}"] = Case(_maker(conv, options), (3, 4, *small))
        for name, options in (("conv", {}), ("transposed", {})):
            cls = getattr(nn, f"{'Conv' if name == 'conv' else 'ConvTranspose'}{axes}d")
            make = _maker(cls, dict(kernel_size=3, padding=1, stride=2) | options)
            cases[f"{name}{axes}d-unbatched"] = Case(make, (4, *size))
            cases[f"{name}{axes}d-empty-batch"] = Case(make, (0, 4, *size))
        make = _maker(conv, dict(kernel_size=2, stride=3))
        largest = [3 * n + 1 for n in small]  # two more than without the keyword
        cases[f"transposed{axes}d-output-size"] = Case(
            make, (3, 4, *small), {"output_size": largest}
        )
    return cases


def _maker(cls: type[nn.Module], options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: cls(4, 8, **options)


def linear_cases() -> dict[str, Case]:
    """Linear layers on inputs of any number of dimensions."""
    shapes = {
        "1-D": (3,),
        "2-D": (5, 3),
        "3-D": (5, 2, 3),
        "4-D": (2, 3, 4, 3),
        "one-row": (1, 3),
        "empty-batch": (0, 3),
        "empty-batch-3-D": (0, 4, 3),
        "no-positions": (4, 0, 3),
    }
    cases = {f"linear-{name}": Case(lambda: nn.Linear(3, 4), s) for name, s in shapes.items()}
    cases["linear-no-bias"] = Case(lambda: nn.Linear(3, 4, bias=False), (5, 2, 3))
    cases["linear-one-output"] = Case(lambda: nn.Linear(3, 1), (5, 3))
    return cases


def embedding_cases() -> dict[str, Case]:
    """Embeddings on tokens of any number of dimensions."""
    make = {
        "plain": lambda: nn.Embedding(7, 3),
        "padding": lambda: nn.Embedding(7, 3, padding_idx=2),
        "padding-last": lambda: nn.Embedding(7, 3, padding_idx=-1),
        "max-norm": lambda: nn.Embedding(7, 3, max_norm=0.5),
    }
    cases = {f"embedding-{k}": Case(m, (4, 5), tokens=7) for k, m in make.items()}
    for name, shape in {"0-D": (), "1-D": (20,), "3-D": (2, 3, 4), "empty": (0, 5)}.items():
        cases[f"embedding-{name}"] = Case(make["padding"], shape, tokens=7)
    return cases


CASES = linear_cases() | conv_cases() | embedding_cases()
