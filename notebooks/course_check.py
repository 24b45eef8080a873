"""Tells you whether your answer to an exercise of the course is right, and if not, what to look at.

    from course_check import check

    check("06.1", my_function)

The number is the lesson's, then the exercise's. An answer is a number, a tensor or a function. A function is
called with random inputs, so an answer that only fits the page's own example is found out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Exercise:
    """What an answer is compared with.

    Attributes:
        right: The right answer: a number, a tensor, or a function of the same arguments as the reader's.
        inputs: Makes the arguments of a function from a generator; unused where the answer is no function.
        hint: One sentence for an answer that is wrong in a way that nobody foresaw.
        mistakes: Wrong answers that readers give, each with the sentence that helps.
        rtol: How far, relative to the largest entry, an answer may be off.
    """

    right: Any
    hint: str
    inputs: Callable[[torch.Generator], tuple] | None = None
    mistakes: tuple[tuple[Any, str], ...] = ()
    rtol: float = 1e-4


EXERCISES: dict[str, Exercise] = {}


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().double()


def _close(a: torch.Tensor, b: torch.Tensor, rtol: float) -> bool:
    scale = b.abs().max().clamp(min=1e-12)
    return a.shape == b.shape and bool((a - b).abs().max() <= rtol * scale)


def _results(answer: Any, exercise: Exercise) -> list[torch.Tensor]:
    """The answer as tensors, one for each trial."""
    if not callable(exercise.right):
        return [_tensor(answer)]
    results = []
    for seed in range(3):
        arguments = exercise.inputs(torch.Generator().manual_seed(seed))
        arguments = [a.clone() if torch.is_tensor(a) else a for a in arguments]
        results.append(_tensor(answer(*arguments)))
    return results


def _verdict(exercise: Exercise, answer: Any) -> str | None:
    """None for a right answer, else the sentence that helps."""
    if callable(exercise.right) and not callable(answer):
        return "The answer is a function: give its name, without calling it."
    if not callable(exercise.right) and callable(answer):
        return "The answer is a number or a tensor, not a function: call it first."
    right = _results(exercise.right, exercise)
    try:
        given = _results(answer, exercise)
    except NotImplementedError:
        return "It is not written yet."
    except Exception as error:  # whatever a reader's function does, they are told
        return f"It stops with {type(error).__name__}: {error}"
    for a, b in zip(given, right, strict=True):
        if a.shape != b.shape:
            return f"Its shape is {tuple(a.shape)}, and should be {tuple(b.shape)}."
        if not a.isfinite().all():
            return "It holds an entry that is not finite."
    if all(_close(a, b, exercise.rtol) for a, b in zip(given, right, strict=True)):
        return None
    for wrong, hint in exercise.mistakes:
        guesses = _results(wrong, exercise)
        if all(_close(a, b, exercise.rtol) for a, b in zip(given, guesses, strict=True)):
            return hint
    return exercise.hint


def check(name: str, answer: Any) -> bool:
    """Say whether an answer is right, and give a hint if it is not.

    Args:
        name: Lesson and exercise, as ``"06.1"``.
        answer: A number, a tensor, or a function, as the exercise asks for.

    Returns:
        Whether it is right.

    Raises:
        ValueError: If there is no such exercise.
    """
    if name not in EXERCISES:
        raise ValueError(f"no exercise is called {name!r}; there are {', '.join(EXERCISES)}")
    message = _verdict(EXERCISES[name], answer)
    print(f"{name}: right." if message is None else f"{name}: not yet. {message}")
    return message is None
