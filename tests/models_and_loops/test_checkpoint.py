"""Checkpoints: plain values, a bit-exact resume, snapshots that nothing changes, and clear refusals."""

import copy
import io
from pathlib import Path

import make_checkpoint as made
import pytest
import torch
from published import SINGD
from small import OPTIONS, Small, batch, build, train
from torch import nn

from singd import structure
from singd.groups import FORMAT

STORED = Path(__file__).parent.parent / "data" / "checkpoint_format_1.pt"
FILES = sorted(STORED.parent.glob("checkpoints_of_format_*.pt"))


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value, path=()):
    """Every plain value of a nested dict or list, with its path."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, (*path, k))]
    if isinstance(value, (list, tuple)) and any(isinstance(v, (dict, torch.Tensor)) for v in value):
        return [leaf for i, v in enumerate(value) for leaf in leaves(v, (*path, i))]
    return [(path, value)]


def assert_identical(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    for path, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[path].dtype, path
            assert torch.equal(value, b[path]), path
        else:
            assert value == b[path], path


# -- resume --------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, factors",
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, (torch.float32, None)),
        (torch.float16, None),
        (torch.float16, torch.float32),
        (torch.float16, (torch.bfloat16, torch.float64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("at", [3, 4])
def test_resume_is_bit_exact(dtype, factors, at):
    model, optimizer = build(dtype=dtype, preconditioner_dtype=factors)
    train(model, optimizer, range(at))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(at, 9))
    for seed in (1, 2):  # any number of times, from the very same dict
        other, resumed = build(seed=seed, dtype=dtype, preconditioner_dtype=factors)
        if seed == 2:
            train(other, resumed, range(20, 23))  # into one that has a history of its own
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        train(other, resumed, range(at, 9))
        assert_identical(model.state_dict(), other.state_dict())
        assert_identical(optimizer.state_dict(), resumed.state_dict())


def test_state_of_half_precision_layers_keeps_its_dtypes():
    model, optimizer = build(dtype=torch.bfloat16, preconditioner_dtype=(torch.float32, None))
    train(model, optimizer, range(2))
    other, resumed = build(dtype=torch.bfloat16, preconditioner_dtype=(torch.float32, None))
    resumed.load_state_dict(optimizer.state_dict())
    state = resumed.state[other[4].weight]
    assert {k: v.dtype for k, v in state.items() if isinstance(v, torch.Tensor)} == {
        "K": torch.float32, "m_K": torch.float32, "C": torch.bfloat16, "m_C": torch.bfloat16,
        "momentum_buffer": torch.bfloat16,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_into_a_model_of_another_dtype(dtype):
    model, optimizer = build()
    train(model, optimizer, range(4))
    saved = through_a_file(optimizer.state_dict())
    other, resumed = build(dtype=dtype)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    K, theirs = resumed.factors("4").K, optimizer.factors("4").K
    assert K.dtype == torch.float32 and torch.equal(K.dense(), theirs.dense())
    assert resumed.state[other[4].weight]["momentum_buffer"].dtype == dtype
    train(other, resumed, range(4, 8))
    assert all(torch.isfinite(p).all() and p.dtype == dtype for p in other.parameters())
    train(model, optimizer, range(4, 8))
    rounding = max(
        torch.finfo(d).eps for d in (dtype, torch.float32)
    )  # of weights around 1, per step
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q.float(), rtol=0, atol=4 * rounding)


def test_onto_another_device():
    model, optimizer = build()
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    with torch.device("meta"):
        other = Small()
    resumed = SINGD(other, **OPTIONS)
    resumed.load_state_dict(saved)
    for step in range(2):
        x, y = batch(step)
        nn.functional.cross_entropy(other(x.to("meta")), y.to("meta")).backward()
        resumed.step()  # the meta device refuses to work with tensors that were left on the CPU
    assert {v.device.type for _, v in leaves(saved["state"]) if isinstance(v, torch.Tensor)} == {
        "cpu"
    }


def test_the_rest_of_a_group_is_loaded_as_torch_does():
    model, optimizer = build()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, range(1))
    schedule.step()
    _, resumed = build(lr=1.0, damping=7.0)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for mine, theirs in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert {**mine, "params": None} == {**theirs, "params": None}
    assert resumed.param_groups[0]["lr"] == 0.025


def test_a_callable_is_not_saved_and_the_loaders_own_is_kept():
    model, optimizer = build(lr_cov=lambda step: 0.1 / (1 + step))
    train(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    assert "lr_cov" not in saved["param_groups"][0]
    other, resumed = build(lr_cov=lambda step: 0.1 / (1 + step))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_identical(model.state_dict(), other.state_dict())


# -- a checkpoint is plain and a snapshot --------------------------------------


def test_only_plain_values():
    model, optimizer = build(structures=(structure("diagonal"), "dense"))
    train(model, optimizer, range(1))
    plain = (int, float, bool, str, type(None), torch.Tensor, torch.dtype, tuple, list)
    for path, value in leaves(optimizer.state_dict()):
        assert type(value) in plain, path
    for group in optimizer.state_dict()["param_groups"]:
        assert group["format"] == 2 and group["structures"] == ("diagonal", "dense")


def test_keys_are_complete_from_the_first_step_on():
    model, optimizer = build()
    train(model, optimizer, range(1))
    first = [path for path, _ in leaves(optimizer.state_dict())]
    train(model, optimizer, range(1, 6))
    assert [path for path, _ in leaves(optimizer.state_dict())] == first
    names = {p: n for n, p in model.named_parameters()}
    weight = {"step", "last_update", "updates", "K", "C", "m_K", "m_C", "momentum_buffer"}
    assert {names[p]: set(s) for p, s in optimizer.state.items()} == {
        **dict.fromkeys(("0.weight", "4.weight", "6.weight"), weight),
        **{n: {"momentum_buffer"} for n in ("0.bias", "6.bias")},
        **{n: {"step", "exp_avg", "exp_avg_sq"} for n in ("2.weight", "2.bias")},
    }  # fmt: skip


def test_training_on_changes_no_snapshot_and_no_loaded_dict():
    model, optimizer = build(lr=torch.tensor(0.05))
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)

    def train_on(model, optimizer):
        train(model, optimizer, range(3, 6))
        optimizer.param_groups[0]["lr"].fill_(
            0.5
        )  # as a scheduler does with an lr that is a tensor

    train_on(model, optimizer)
    assert_identical(saved, kept)
    other, resumed = build(lr=torch.tensor(0.05))
    resumed.load_state_dict(saved)
    assert_identical(saved, kept)
    train_on(other, resumed)
    assert_identical(saved, kept)


def test_before_the_first_step():
    model, optimizer = build()
    other, resumed = build()
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, optimizer, range(3))
    train(other, resumed, range(3))
    assert_identical(model.state_dict(), other.state_dict())


def test_loading_throws_away_the_statistics_of_gradients_of_before():
    model, optimizer = build()
    train(model, optimizer, range(2))
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    x, y = batch(50)
    nn.functional.cross_entropy(model(x), y).backward()
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    model.zero_grad()
    train(model, optimizer, range(2, 4))
    other, resumed = build()
    train(other, resumed, range(4))
    assert_identical(model.state_dict(), other.state_dict())


def test_hooks_of_torch_on_state_dicts_run():
    model, optimizer = build()
    train(model, optimizer, range(1))
    seen = []
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saved", "loading", "loaded"]


# -- refusals ------------------------------------------------------------------


def other_sizes():
    model = Small()
    model[6] = nn.Linear(4, 5)
    return SINGD(model, **OPTIONS)


def other_kernel():
    model = Small()
    model[0] = nn.Conv1d(2, 3, 4, padding=1)
    return SINGD(model, **OPTIONS)


def fewer_parameters():
    return SINGD(Small(), **{**OPTIONS, "fallback": None}, warn_unsupported=False)


REFUSED = {
    "structures": (
        lambda: build(structures=("diagonal", "dense"))[1],
        r"The checkpoint has structures \('block2diagonal', 'dense'\) for layer '0', but this optimizer has "
        r"\('diagonal', 'dense'\).",
    ),
    "a layer of another size": (other_sizes, r"The checkpoint's? .* '6(\.weight)?'"),
    "a kernel of another size": (other_kernel, r"The checkpoint's? .* '0(\.weight)?'"),
    "groups": (
        fewer_parameters,
        r"The checkpoint has groups of \[5, 2\] parameters, but .* \[5\].",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(name):
    make, sentence = REFUSED[name]
    model, optimizer = build()
    train(model, optimizer, range(2))
    refusing = make()
    before = copy.deepcopy(refusing.state_dict())
    with pytest.raises(ValueError, match=sentence) as raised:
        refusing.load_state_dict(optimizer.state_dict())
    assert "\n" not in str(raised.value)
    assert_identical(refusing.state_dict(), before)


def test_a_checkpoint_of_another_optimizer_is_refused():
    model, optimizer = build()
    saved = torch.optim.SGD([{"params": g["params"]} for g in optimizer.param_groups], momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    saved.step()
    with pytest.raises(ValueError, match="The checkpoint has nothing for K of layer '0'"):
        optimizer.load_state_dict(saved.state_dict())


def test_a_checkpoint_of_a_later_format_is_refused():
    _, optimizer = build()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["format"] = 99
    with pytest.raises(
        ValueError, match="The checkpoint has format 99; this version of singd reads up to"
    ):
        optimizer.load_state_dict(saved)


# -- a stored one --------------------------------------------------------------


def assert_goes_on(pair, saved, later, steps, atol=1e-5):
    """What was saved is loaded to the bit, and training goes on as it did then."""
    model, optimizer = pair
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for index, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for key, value in saved["optimizer"]["state"][index].items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value)), (
                key
            )
    train(model, optimizer, steps)
    for key, value in model.state_dict().items():  # of another machine's arithmetic
        torch.testing.assert_close(value, saved[later][key], rtol=0, atol=atol)


def test_a_stored_checkpoint_of_format_1_stays_readable():
    """Made by tests/data/make_checkpoint.py; never remade for this format."""
    saved = torch.load(STORED, weights_only=True)
    steps = range(saved["step"], saved["step"] + 4)
    assert_goes_on(build(seed=5), saved, "model 4 steps later", steps)


def stored(path, case):
    return torch.load(path, weights_only=True)[case]


@pytest.mark.parametrize("case", made.CASES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_past_versions_wrote_stays_readable(path, case):
    """Of each rule, and of several structures and dtypes."""
    steps = range(made.STEPS, made.STEPS + made.LATER)
    atol = 1e-4 if case == "half" else 1e-5
    assert_goes_on(made.build(case, seed=5), stored(path, case), "later", steps, atol)


@pytest.mark.parametrize("case", made.CASES)
def test_what_this_version_writes_is_stored(case):
    """Else it writes something that no test will read: run tests/data/make_checkpoint.py again."""
    newest = max(path for path in FILES if path.stem.split("_")[3] == str(FORMAT))
    then = stored(newest, case)["optimizer"]
    model, optimizer = made.build(case)
    train(model, optimizer, range(made.STEPS))
    now = optimizer.state_dict()
    assert [list(g) for g in now["param_groups"]] == [list(g) for g in then["param_groups"]]
    for index, entry in now["state"].items():
        for key, value in entry.items():
            old = then["state"][index][key]
            assert type(value) is type(old)
            if torch.is_tensor(value):
                assert (value.dtype, value.shape) == (old.dtype, old.shape)
        assert entry.keys() == then["state"][index].keys()
