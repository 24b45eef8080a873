"""The checker of the course's exercises knows right answers, known mistakes, and what is no answer at all."""

import importlib.util
import pathlib
import sys

import pytest
import torch

PATH = pathlib.Path(__file__).parent.parent / "notebooks" / "course_check.py"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("course_check", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["course_check"] = module  # where its dataclass looks for its own annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["course_check"]


@pytest.fixture
def ask(module, monkeypatch, capsys):
    """ask(answer) -> what the checker prints, for the exercise "x": the outer product of two vectors."""

    def vectors(generator):
        return torch.randn(3, generator=generator), torch.randn(2, generator=generator)

    outer = module.Exercise(
        asks="a function of a and g",
        right=lambda a, g: g[:, None] * a,
        inputs=vectors,
        hint="Start from one entry.",
        mistakes=((lambda a, g: 2 * g[:, None] * a, "There is no factor 2."),),
    )
    monkeypatch.setitem(module.EXERCISES, "x", outer)
    monkeypatch.setitem(module.EXERCISES, "y", module.Exercise("a number", "One more.", 41.0))
    word = module.Exercise(
        "a word", "One of the two.", "left", mistakes=(("Right", "Turn round."),)
    )
    monkeypatch.setitem(module.EXERCISES, "z", word)

    def ask(answer, name="x"):
        is_right = module.check(name, answer)
        printed = capsys.readouterr().out
        assert is_right == printed.endswith(": right.\n")
        return printed.strip()

    return ask


def test_a_right_answer(ask):
    assert ask(lambda a, g: torch.outer(g, a)) == "x: right."
    assert ask(41, "y") == ask(torch.tensor(41.0), "y") == "y: right."


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda a, g: torch.outer(2 * g, a), "There is no factor 2."),
        (lambda a, g: torch.outer(g, a) + 1, "Start from one entry."),
        (lambda a, g: torch.outer(a, g), "Its shape is (3, 2), and should be (2, 3)."),
        (lambda a, g: torch.outer(g, a) / 0, "It holds an entry that is not finite."),
        (lambda a, g: a @ g, "It stops with RuntimeError"),
        (lambda a: a, "It stops with TypeError"),
        (torch.ones(2, 3), "The answer is a function"),
    ],
)
def test_a_wrong_answer_gets_a_hint(ask, answer, hint):
    assert hint in ask(answer)


def test_an_answer_that_is_not_written_yet(ask):
    def later(a, g):
        raise NotImplementedError

    assert "not written yet" in ask(later)
    assert "call it first" in ask(later, "y")
    assert ask(40, "y") == "y: not yet. One more."


def test_an_answer_that_is_a_word(ask):
    assert ask("Left ", "z") == "z: right."
    assert ask("right", "z") == "z: not yet. Turn round."
    assert ask("up", "z") == "z: not yet. One of the two."


def test_an_answer_cannot_spoil_the_inputs_of_the_next_trial(ask):
    assert ask(lambda a, g: torch.outer(g.mul_(1), a.mul_(1))) == "x: right."


def test_an_unknown_name_is_an_error(module):
    with pytest.raises(ValueError, match=r"no exercise is called '99\.9'; there are"):
        module.check("99.9", 1)


def test_every_exercise_is_well_posed(module):
    """Its own answer is right, and each mistake that it foresees is wrong and has another sentence."""
    assert list(module.EXERCISES) == [f"{n:02d}.{i}" for n in range(1, 11) for i in (1, 2)]
    for name, exercise in module.EXERCISES.items():
        assert exercise.asks and exercise.hint.endswith((".", "?"))
        assert module._verdict(exercise, exercise.right) is None, name
        for wrong, hint in exercise.mistakes:
            assert module._verdict(exercise, wrong) == hint, name
