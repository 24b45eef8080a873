"""Interrupted at any line, a step has happened or has not, layer by layer, and training goes on."""

import copy
import io

import pytest
import torch
from counting import FUZZ, tried
from interrupting import interrupted, places
from published import FAST
from torch import nn

from singd import SINGD

F64 = torch.float64
EVERY = 31
"""One line in so many is interrupted; in `make fuzz` also each line of code, where it first and last runs."""

LAYERS = ("0", "3", "5")


def build(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 4, bias=False), nn.Tanh(),
        nn.Linear(4, 3),
    ).to(F64)  # fmt: skip
    return model, SINGD(
        model, **{**FAST, "T": 2, "structures": ("block2diagonal", "dense"), **options}
    )


def backward(model, step):
    torch.manual_seed(100 + step)
    x = torch.randn(6, 2, 4, dtype=F64)
    nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def parts(model, optimizer):
    """The state of each layer's factors, as one comparable value per layer."""
    found = {}
    for name in LAYERS:
        state = optimizer.state.get(model.get_parameter(f"{name}.weight"), {})
        found[name] = {
            key: state[key].clone() if torch.is_tensor(state[key]) else state[key]
            for key in ("step", "last_update", "K", "C", "m_K", "m_C")
            if state.get("step", 0) > 0  # at zero they are the identities, as where there are none
        }
    return found


def moved(model, optimizer):
    """Each parameter with what is kept of its steps, as one comparable value per parameter."""
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state.get(p, {})
        kept = ("momentum_buffer", "exp_avg", "exp_avg_sq")
        found[name] = {"p": p.detach().clone(), **{k: state[k].clone() for k in kept if k in state}}
        if "exp_avg" in state:
            found[name]["step"] = state["step"].clone()
    return found


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a
    )


def ready(steps, **options):
    """A model and its optimizer after some steps; gradients of the next one are there."""
    model, optimizer = build(**options)
    train(model, optimizer, range(steps))
    optimizer.zero_grad()
    return model, optimizer


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def content(value):
    """All that a checkpoint holds, to the bit, as something that can be a key."""
    if torch.is_tensor(value):
        return value.dtype, tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return tuple((name, content(v)) for name, v in value.items())
    return tuple(map(content, value)) if isinstance(value, list | tuple) else value


def lines(call_of, start=0):
    """Interrupt a call at every line that is tried: yields what was copied for it, after the interruption."""
    for _ in range(2):  # what is kept for all, such as resolved names, is not to shift the lines
        case, call = call_of()
        run = places(call)
    chosen = set(range(start, len(run), EVERY))
    if FUZZ:
        last = {place: i for i, place in enumerate(run)}
        first = {place: i for i, place in reversed(list(enumerate(run)))}
        chosen |= {*first.values(), *last.values()}
    for at in sorted(chosen):
        case, call = call_of()
        assert interrupted(call, at)
        yield at, case


class Resumed:
    """What a new optimizer makes of a checkpoint. It knows nothing else, so that once is enough for equal ones."""

    steps = (7, 8, 9)

    def __init__(self, **options):
        self.options = options
        self.known = {}

    def weights(self, checkpoint):
        key = content(checkpoint)
        if key not in self.known:
            weights, state = through_a_file(checkpoint)
            model, optimizer = build(**self.options)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            train(model, optimizer, self.steps)
            self.known[key] = list(model.parameters())
        return self.known[key]

    def assert_goes_on(self, model, optimizer):
        """That training goes on, to the same bits as from the checkpoint of this moment."""
        resumed = self.weights([model.state_dict(), optimizer.state_dict()])
        train(model, optimizer, self.steps)
        for p, q in zip(model.parameters(), resumed, strict=True):
            assert p.isfinite().all()
            assert torch.equal(p, q)


# an update with no state yet, no update, an update
CASES = [(0, "gradient"), (1, "direction"), (1, "gradient"), (2, "direction")]
MORE = [(0, "direction"), (2, "gradient")] if FUZZ else []


@pytest.mark.parametrize(("steps", "momentum_on"), CASES + MORE)
def test_step(steps, momentum_on):
    own = dict(momentum_on=momentum_on, nesterov=True, weight_decay=0.01)
    base = ready(steps, **own)

    def with_gradients():
        model, optimizer = copy.deepcopy(base)
        backward(model, steps)
        return model, optimizer

    model, optimizer = with_gradients()
    looks = (parts, moved)
    before = [look(model, optimizer) for look in looks]
    optimizer.step()
    after = [look(model, optimizer) for look in looks]

    def case():
        pair = with_gradients()
        return pair, pair[1].step

    resumed = Resumed(**own)
    count = 0
    for at, (model, optimizer) in lines(case, start=steps):
        count += 1
        now = [look(model, optimizer) for look in looks]
        for old, current, new in zip(before, now, after, strict=True):
            for name in current:
                undone, done = same(current[name], old[name]), same(current[name], new[name])
                assert undone or done, (at, name)
        if (
            count % 2
        ):  # the same gradients once more: what was left undone is done, and nothing twice
            optimizer.step()
            for look, new in zip(looks, after, strict=True):
                again = look(model, optimizer)
                assert all(same(again[name], new[name]) for name in new), at
        resumed.assert_goes_on(model, optimizer)
    assert count > 10
    tried("interruptions of step", count)


def test_backward():
    """Where statistics are gathered: the user clears the gradients and begins again."""
    base = ready(2)
    model, optimizer = copy.deepcopy(base)
    train(model, optimizer, range(2, 5))
    expected = parts(model, optimizer)

    def case():
        model, optimizer = copy.deepcopy(base)
        return (model, optimizer), lambda: backward(model, 2)

    resumed = Resumed()
    count = 0
    for at, (model, optimizer) in lines(case):
        count += 1
        train(model, optimizer, range(2, 5))
        done = parts(model, optimizer)
        assert all(same(done[name], expected[name]) for name in LAYERS), at
        resumed.assert_goes_on(model, optimizer)
    assert count > 5
    tried("interruptions of backward", count)


@pytest.mark.parametrize("steps", [0, 3])
def test_load_state_dict(steps):
    trained = ready(5)[1]
    saved = trained.state_dict()
    base = ready(steps)

    def case():
        model, optimizer = copy.deepcopy(base)
        return (model, optimizer), lambda: optimizer.load_state_dict(saved)

    before = parts(*copy.deepcopy(base))
    model, optimizer = copy.deepcopy(base)
    optimizer.load_state_dict(saved)
    after = parts(model, optimizer)
    resumed = Resumed()
    count = 0
    for at, (model, optimizer) in lines(case):
        count += 1
        now = parts(model, optimizer)
        for name in LAYERS:
            assert same(now[name], before[name]) or same(now[name], after[name]), (at, name)
        if count % 2:
            optimizer.load_state_dict(saved)
            done = parts(model, optimizer)
            assert all(same(done[name], after[name]) for name in LAYERS), at
        resumed.assert_goes_on(model, optimizer)
    assert count > 5
    tried("interruptions of load_state_dict", count)
