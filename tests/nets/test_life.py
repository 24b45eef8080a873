"""The life of a model, in any order of events, beside the textbook."""

import copy
import io
import pickle

import pytest
import torch
from counting import FUZZ, drawing, tried
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from published import PUBLISHED
from textbook import Textbook, assert_same
from torch import nn

from singd import SINGD

F64 = torch.float64
ADAMW = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
INPUT = (2, 4)

OPTIONS = {
    "lr": st.sampled_from([0.0, 0.01, 0.05]),
    "momentum": st.sampled_from([0.0, 0.9]),
    "damping": st.sampled_from([1e-3, 0.1]),
    "alpha1": st.sampled_from([0.0, 0.5]),
    "weight_decay": st.sampled_from([0.0, 0.01]),
    "T": st.integers(1, 3),
    "loss_average": st.sampled_from([None, "batch"]),
    "lr_cov": st.sampled_from([0.01, 0.1]),
    "kfac_approx": st.sampled_from(["expand", "reduce"]),
    "kfac_like": st.booleans(),
    "normalize_lr_cov": st.booleans(),
}
STRUCTURES = st.tuples(
    *[st.sampled_from(["dense", "diagonal", "block2diagonal", "hierarchical1_1", "triltoeplitz"])]
    * 2
)


@st.composite
def models(draw):
    """A convolution or none, linear layers and norms; nothing that a layer's rows would not say."""
    parts: list[nn.Module] = []
    width = 8
    if draw(st.booleans()):
        parts.append(nn.Conv1d(2, 3, draw(st.integers(1, 3)), padding=1, bias=draw(st.booleans())))
        width = 3 * (4 + 2 - parts[0].kernel_size[0] + 1)
    parts += [nn.Tanh(), nn.Flatten()]
    for _ in range(draw(st.integers(0, 2))):
        wider = draw(st.integers(1, 5))
        parts += [nn.Linear(width, wider, draw(st.booleans())), nn.Tanh()]
        width = wider
        if draw(st.booleans()):
            parts.append(nn.LayerNorm(width))
    return nn.Sequential(*parts, nn.Linear(width, 3, draw(st.booleans()))).to(F64)


pytestmark = [
    # a run that diverges is compared until it does
    pytest.mark.filterwarnings("ignore:The factors of layer"),
    # torch's own, inside of torch.compile after any graph break
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class Boom(Exception):
    """What is thrown."""


class Life(RuleBasedStateMachine):
    """Everything is done to a model with SINGD and to its twin with the textbook."""

    # -- building ------------------------------------------------------------------------------------

    @initialize(
        model=models(),
        options=st.fixed_dictionaries(OPTIONS),
        structures=STRUCTURES,
        keep_back=st.sets(st.integers(0, 3), max_size=2),
        seed=st.integers(0, 2**20),
    )
    def build(self, model, options, structures, keep_back, seed):
        torch.manual_seed(seed)
        self.model = copy.deepcopy(model)
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.5)
        self.twin = copy.deepcopy(self.model)
        self.defaults = {**PUBLISHED, **options, "structures": structures}
        self.layers = [
            i for i, m in enumerate(model) if isinstance(m, nn.Linear | nn.Conv1d)
        ]  # by their place
        waiting = {i for n, i in enumerate(self.layers) if n in keep_back and i != self.layers[-1]}
        self.norms = [i for i, m in enumerate(model) if isinstance(m, nn.LayerNorm)]
        self.groups = [([i for i in range(len(model)) if i not in waiting], {})]
        self.waiting, self.frozen = waiting, set()
        self.books = {i: self.book(i, self.defaults) for i in self.layers if i not in waiting}
        self.adamw = None
        if self.norms:
            params = [p for i in self.norms for p in self.twin[i].parameters()]
            self.adamw = torch.optim.AdamW(params, **ADAMW)
        self.optimizer = self.new_optimizer(self.model)
        self.scripted = self.model

    def book(self, i, options):
        return Textbook(self.twin[i], dict(options))

    def new_optimizer(self, model):
        """With the groups that there are by now, handed over one after the other."""

        def params(places):
            return [p for i in places for p in model[i].parameters()]

        (first, _), *rest = self.groups
        optimizer = SINGD(model, params(first), **{**self.defaults, "fallback": ADAMW})
        for places, own in rest:
            optimizer.add_param_group({"params": params(places), **own})
        return optimizer

    # -- training ------------------------------------------------------------------------------------

    def backward(self, model, x, y, share=1.0):
        (nn.functional.cross_entropy(model(x), y) * share).backward()

    def clear(self):
        self.optimizer.zero_grad()
        self.model.zero_grad()  # of layers that were not handed over as well
        self.twin.zero_grad()
        for book in self.books.values():
            book.clear()

    def step(self):
        self.optimizer.step()
        for book in self.books.values():
            book.step()
            book.clear()
        if self.adamw is not None:
            self.adamw.step()

    def batch(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, *INPUT, dtype=F64, generator=generator)
        return x, torch.randint(0, 3, (n,), generator=generator)

    @rule(
        parts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        clip=st.sampled_from([None, 0.1]),
        seed=st.integers(0, 2**20),
        steps=st.integers(1, 3),
    )
    def train(self, parts, clip, seed, steps):
        for n in range(steps):
            self.clear()
            x, y = self.batch(sum(parts), seed + n)
            for xs, ys in zip(x.split(parts), y.split(parts), strict=True):
                for model in (self.scripted, self.twin):
                    self.backward(model, xs, ys, share=len(xs) / len(x))
            if clip is not None:
                for model in (self.model, self.twin):
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
            self.step()

    # -- what is no training -------------------------------------------------------------------------

    @rule(
        how=st.sampled_from(["no_grad", "forward", "input's gradient", "thrown away", "a teacher"]),
        seed=st.integers(0, 2**20),
    )
    def evaluate(self, how, seed):
        x, y = self.batch(5, seed)
        if how == "no_grad":
            with torch.no_grad():
                self.model(x)
        elif how == "forward":
            self.model(x)
        elif how == "input's gradient":
            x.requires_grad_()
            torch.autograd.grad(nn.functional.cross_entropy(self.model(x), y), x)
        elif how == "thrown away":
            self.backward(self.model, 3 * x, y)
            self.optimizer.zero_grad()
        else:
            own = {k: p.detach().clone().requires_grad_() for k, p in self.model.named_parameters()}
            out = torch.func.functional_call(self.model, own, x)
            nn.functional.cross_entropy(out, y).backward()

    @rule(
        where=st.sampled_from(["forward", "backward", "closure", "batch"]),
        seed=st.integers(0, 2**20),
    )
    def throw(self, where, seed):
        x, y = self.batch(4, seed)

        def boom(*args):
            raise Boom

        self.optimizer.zero_grad()
        place = self.layers[seed % len(self.layers)]
        try:
            if where == "forward":
                handle = self.model[place].register_forward_pre_hook(boom)
                try:
                    self.model(x)
                finally:
                    handle.remove()
            elif where == "backward":
                out = self.model[: place + 1](x)
                if out.requires_grad:
                    out.register_hook(boom)
                self.backward(self.model[place + 1 :], out, y)
            elif where == "closure":

                def closure():
                    self.backward(self.model, x, y)
                    raise Boom

                self.optimizer.step(closure)
            else:
                self.model(x.reshape(4, 8, 1, 1))
        except (Boom, RuntimeError):
            pass
        self.optimizer.zero_grad()

    # -- what happens to parameters ------------------------------------------------------------------

    def both(self, i):
        return [*self.model[i].parameters(), *self.twin[i].parameters()]

    @precondition(lambda self: len(self.frozen) < len(self.layers) - 1)
    @rule(data=st.data())
    def freeze(self, data):
        i = data.draw(st.sampled_from([i for i in self.layers[:-1] if i not in self.frozen]))
        self.frozen.add(i)
        self.clear()
        for p in self.both(i):
            p.requires_grad_(False)

    @precondition(lambda self: self.frozen)
    @rule(data=st.data())
    def unfreeze(self, data):
        i = data.draw(st.sampled_from(sorted(self.frozen)))
        self.frozen.discard(i)
        for p in self.both(i):
            p.requires_grad_(True)

    @precondition(lambda self: self.waiting - self.frozen)
    @rule(data=st.data(), own=st.fixed_dictionaries({}, optional=OPTIONS), structures=STRUCTURES)
    def hand_over(self, data, own, structures):
        i = data.draw(st.sampled_from(sorted(self.waiting - self.frozen)))
        self.waiting.discard(i)
        self.clear()
        own = {**own, "structures": structures}
        self.groups.append(([i], own))
        self.books[i] = self.book(i, {**self.defaults, **own})
        self.optimizer.add_param_group({"params": list(self.model[i].parameters()), **own})

    @rule(data=st.data())
    def set_an_option(self, data):
        name = data.draw(st.sampled_from(sorted(OPTIONS.keys() - {"kfac_like", "alpha1"})))
        value = data.draw(OPTIONS[name])
        for group in self.optimizer.param_groups:
            if group["algorithm"] == "singd":
                group[name] = value
        for book in self.books.values():
            book.options[name] = value

    # -- copies and checkpoints ----------------------------------------------------------------------

    @rule(how=st.sampled_from(["deepcopy", "pickle", "assign", "checkpoint"]))
    def renew(self, how):
        self.clear()
        if how == "deepcopy":
            self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        elif how == "pickle":
            self.model, self.optimizer = pickle.loads(pickle.dumps((self.model, self.optimizer)))
        elif how == "assign":
            self.model.load_state_dict(copy.deepcopy(self.model.state_dict()), assign=True)
            self.optimizer.zero_grad()
        else:
            file = io.BytesIO()
            torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
            file.seek(0)
            weights, state = torch.load(file, weights_only=True)
            model = copy.deepcopy(self.model).requires_grad_(True)
            model.load_state_dict({k: torch.zeros_like(v) for k, v in weights.items()})
            self.optimizer = self.new_optimizer(model)
            model.load_state_dict(weights)
            self.optimizer.load_state_dict(state)
            self.model = model
            for i in self.frozen:
                model[i].requires_grad_(False)
        self.scripted = self.model

    @precondition(lambda self: FUZZ)
    @rule()
    def compile(self):
        torch.compiler.reset()
        self.scripted = torch.compile(self.model, backend="eager")

    # -- the law -------------------------------------------------------------------------------------

    @invariant()
    def is_the_textbooks(self):
        if not hasattr(self, "books") or self.diverged():
            return
        books = [(b, self.model[i]) for i, b in self.books.items()]
        assert_same(books, self.optimizer, rtol=1e-8)
        tolerance = dict(rtol=0, atol=1e-8 * max(float(b.largest) for b, _ in books))
        for p, q in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, **tolerance)

    def diverged(self):
        """Numbers that grow without bound carry rounding along with them; no law is tested on those."""
        return any(b.largest > 1e4 for b in self.books.values())

    def teardown(self):
        if hasattr(self, "books"):
            tried("lives of a model" + (", until they diverged" if self.diverged() else ""))


Life.TestCase.settings = drawing(1 / 3, stateful_step_count=12)
TestLife = Life.TestCase
