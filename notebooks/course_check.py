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
        asks: What to give to the checker, as the notebook says it.
        hint: One sentence for an answer that is wrong in a way that nobody foresaw.
        right: The right answer: a number, a word, a tensor, or a function of the same arguments as the reader's.
        inputs: Makes the arguments of a function from a generator; unused where the answer is no function.
        mistakes: Wrong answers that readers give, each with the sentence that helps.
        rtol: How far, relative to the largest entry, an answer may be off.
        holds: Where many answers are right: whether this one is.
    """

    asks: str
    hint: str
    right: Any
    inputs: Callable[[torch.Generator], tuple] | None = None
    mistakes: tuple[tuple[Any, str], ...] = ()
    rtol: float = 1e-4
    holds: Callable[[torch.Tensor], bool] | None = None


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().double()


def _close(a: torch.Tensor, b: torch.Tensor, rtol: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= rtol * b.abs().max().clamp(min=1e-2))


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
    if isinstance(exercise.right, str):
        known = {exercise.right: None, **{w.casefold(): h for w, h in exercise.mistakes}}
        return known.get(str(answer).strip().casefold(), exercise.hint)
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
    if exercise.holds is not None:
        return None if exercise.holds(given[0]) else exercise.hint
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


# ---- the exercises, in the order of the lessons


def _randn(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _positive(g: torch.Generator, n: int) -> torch.Tensor:
    """A symmetric positive definite matrix [n, n] with different eigenvalues."""
    A = _randn(g, n, n)
    return A @ A.T + torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64))


def _logistic_hessian(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows = torch.stack([x, torch.ones_like(x)], 1)
    p = torch.sigmoid(rows @ theta)
    return (rows * (p * (1 - p))[:, None]).T @ rows / len(x)


def _damped_solve(G: torch.Tensor, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    whole = torch.kron(G, U) + 0.1 * torch.eye(len(G) * len(U), dtype=G.dtype)
    return torch.linalg.solve(whole, V.flatten()).view_as(V)


def _factored_solve(G: torch.Tensor, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    def damped(M: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(M + 0.1**0.5 * torch.eye(len(M), dtype=M.dtype))

    return damped(G) @ V @ damped(U)


def _nearest_error(B: torch.Tensor, m: int, n: int) -> torch.Tensor:
    blocks = B.view(m, n, m, n).transpose(1, 2).reshape(m * m, n * n)
    return torch.linalg.svdvals(blocks)[1:].square().sum().sqrt()


def _circulant_product(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.fft.ifft(torch.fft.fft(v) * torch.fft.fft(w)).real


def _is_witness(pair: torch.Tensor) -> bool:
    """Two symmetric matrices whose product is not."""
    A, B = pair
    both = torch.equal(A, A.mT) and torch.equal(B, B.mT)
    return both and not torch.allclose(A @ B, (A @ B).mT)


EXERCISES: dict[str, Exercise] = {
    "01.1": Exercise(
        asks="a function of theta [2] and x [150] that returns the Hessian of the mean loss [2, 2]",
        right=_logistic_hessian,
        inputs=lambda g: (_randn(g, 2), _randn(g, 150)),
        hint="Differentiate softplus(w x + b) twice: the label has dropped out.",
        mistakes=(
            (lambda t, x: 150 * _logistic_hessian(t, x), "The loss is a mean over the data."),
        ),
    ),
    "01.2": Exercise(
        asks="how many times smaller the gap of the two paths is if the rate is halved",
        right=2.0,
        rtol=0.1,
        hint="Take half the rate and twice the steps, and divide the two gaps.",
        mistakes=((1.0, "They differ: a straight step in s is a bent one in w."),),
    ),
    "02.1": Exercise(
        asks="a function of residuals [n] and sigma: empirical Fisher over Fisher, if J is constant",
        right=lambda r, sigma: r.square().mean() / sigma**2,
        inputs=lambda g: (
            _randn(g, 40),
            0.3 + 2 * torch.rand((), generator=g, dtype=torch.float64),
        ),
        hint="One gradient is J (f - y) / sigma^2; the Fisher matrix is J^T J / sigma^2.",
        mistakes=(
            (lambda r, sigma: r.square().mean(), "The gradient of this loss has a 1 / sigma^2."),
            (
                lambda r, sigma: r.square().mean() / sigma**4,
                "The Fisher matrix has a 1 / sigma^2 too.",
            ),
        ),
    ),
    "02.2": Exercise(
        asks='"Hessian" or "Gauss-Newton": which one can have negative eigenvalues',
        right="hessian",
        hint="Answer by one of the two words.",
        mistakes=(("Gauss-Newton", "For a convex loss it is a mean of squares."),),
    ),
    "03.1": Exercise(
        asks="a function of G, U and V that returns the solution, of V's shape",
        right=_damped_solve,
        inputs=lambda g: (_positive(g, 3), _positive(g, 4), _randn(g, 3, 4)),
        hint="Go into the eigenvectors of G and U, divide, and come back.",
        mistakes=((_factored_solve, "This is factored damping, an approximation of it."),),
    ),
    "03.2": Exercise(
        asks="a function of B [m n, m n], m and n: the distance of B to the nearest Kronecker product",
        right=_nearest_error,
        inputs=lambda g: (_randn(g, 6, 6), 2, 3),
        hint="Each n x n block of B becomes a row; then keep the largest singular value.",
    ),
    "04.1": Exercise(
        asks="a function of the number S of positions: by what G grows if they are summed, not averaged",
        right=lambda S: S**2,
        inputs=lambda g: (torch.randint(2, 50, (), generator=g),),
        hint="First say by what each g grows.",
        mistakes=((lambda S: S, "That is by what g grows; G is its second moment."),),
    ),
    "04.2": Exercise(
        asks='"expand", "reduce" or "neither"',
        right="neither",
        hint='Answer by "expand", "reduce" or "neither".',
        mistakes=(
            ("expand", "It averages a over all tokens, and only one matters."),
            ("reduce", "It averages a over all tokens, and only one matters."),
        ),
    ),
    "05.1": Exercise(
        asks="a function of the loss before, the loss after and the promised loss: the trust",
        right=lambda before, after, promised: (before - after) / (before - promised),
        inputs=lambda g: tuple(torch.tensor([3.0, 1.5, 0.5]) + torch.rand(3, generator=g)),
        hint="Divide the decrease that was delivered by the one that was promised.",
        mistakes=(
            (lambda b, a, p: (b - p) / (b - a), "That is promised over delivered: turn it over."),
            (lambda b, a, p: a / p, "Divide decreases, not losses."),
        ),
    ),
    "05.2": Exercise(
        asks="a function of the gradient V and a very large lambda: the step",
        right=lambda V, lam: V / lam,
        inputs=lambda g: (_randn(g, 3, 4), 1e9),
        hint="Beside lambda, U and G do not count.",
        mistakes=(
            (lambda V, lam: V, "It points there, but how long is it?"),
            (
                lambda V, lam: V / lam**0.5,
                "Each factor divides by the root of lambda, and there are two.",
            ),
        ),
    ),
    "06.1": Exercise(
        asks="a function of U, G and N that returns F N by torch.kron, of N's shape",
        right=lambda U, G, N: G @ N @ U,
        inputs=lambda g: (_positive(g, 4), _positive(g, 3), _randn(g, 3, 4)),
        hint="Flatten N, multiply by a Kronecker product, and view the result as N.",
        mistakes=(
            (
                lambda U, G, N: (torch.kron(U, G) @ N.flatten()).view_as(N),
                "N is flattened by rows, so that the index of U counts faster: which one comes first?",
            ),
        ),
    ),
    "06.2": Exercise(
        asks='"above" or "below": where the error ends, compared with the mean image',
        right="above",
        hint='Answer by "above" or "below".',
        mistakes=(("below", "Train it, and print the error of the last epoch."),),
    ),
    "07.1": Exercise(
        asks="k after the first step",
        right=0.0,
        hint="Put s into k - beta_1 k (s k^2 - 1) / 2 with k = 1.",
        mistakes=(
            (1.0, "That is where it starts."),
            (-1.0, "That is at the limit, 1 + 4 / beta_1."),
        ),
    ),
    "07.2": Exercise(
        asks="the number c of the term c beta_1^2 m_K^2",
        right=1.5,
        hint="Square I - x + c x^2 and compare with I - 2 x + 4 x^2.",
        mistakes=((0.5, "That is the exponential's; we want the inverse."),),
    ),
    "08.1": Exercise(
        asks="the least value that an eigenvalue of I - M + M^2 / 2 can have",
        right=0.5,
        hint="For an eigenvalue x of M it is 1 - x + x^2 / 2: where is its minimum?",
        mistakes=((1.0, "That is at x = 0; move x to the right."), (0.0, "Complete the square.")),
    ),
    "08.2": Exercise(
        asks="a function of M [n, n]: the determinant of exp(-M), without an exponential of a matrix",
        right=lambda M: torch.exp(-M.trace()),
        inputs=lambda g: (0.3 * _randn(g, 4, 4),),
        hint="The eigenvalues of exp(-M) are exp(-x); multiply them.",
        mistakes=(
            (lambda M: torch.exp(M.trace()), "Mind the sign."),
            (
                lambda M: torch.exp(-M.trace() / 4),
                "Here Tr is the sum of the diagonal, not its mean.",
            ),
        ),
    ),
    "09.1": Exercise(
        asks="a function of u and g: what all products become without damping",
        right=lambda u, g: 1 / (u * g),
        inputs=lambda g: tuple(0.1 + torch.rand(2, generator=g, dtype=torch.float64)),
        hint="KFAC without damping divides by u and by g.",
        mistakes=((lambda u, g: (u * g) ** -0.5, "K K^T is 1 / u, not its root."),),
    ),
    "09.2": Exercise(
        asks="k / c at the end of the run",
        right=9.0,
        hint="For scalars m_K = m_C, so both are multiplied by the same number at each step.",
        mistakes=((1.0, "It does not forget its start."),),
    ),
    "10.1": Exercise(
        asks="two symmetric matrices, torch.stack([A, B]), whose product is not symmetric",
        right=torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]]),
        holds=_is_witness,
        hint="Both must be symmetric, and must not commute: try a diagonal matrix and a swap.",
        mistakes=(
            (
                torch.stack([torch.eye(2)] * 2),
                "Both must be symmetric, and must not commute: try a diagonal matrix and a swap.",
            ),
        ),
    ),
    "10.2": Exercise(
        asks="a function of v and w [n]: the first row of the product of their circulant matrices",
        right=_circulant_product,
        inputs=lambda g: (_randn(g, 7), _randn(g, 7)),
        hint="Its entry j is the sum over k of v_k w_(j - k), with indices modulo n.",
        mistakes=(
            (
                lambda v, w: v * w,
                "Entries do not multiply one by one; their Fourier transforms do.",
            ),
        ),
    ),
}
