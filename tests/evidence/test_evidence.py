"""The harness of `make evidence` runs, searches rates as it says, and counts steps to a target rightly."""

import gc
import json
import math
import pathlib

import evidence
import pytest
import torch
from methods import ABLATIONS, METHODS, PEERS, ScaledIdentity, half_decade
from tasks import BATCH_TASKS, SPLITS, TASKS, curves
from trial import Run, share, train

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "_data" / "evidence.json"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_measures_splits_of_its_own(name):
    task = TASKS[name](True)
    run = train(task, METHODS["AdamW"].make, Run(name, "AdamW", 30, 1e-2, 0), measures=3)
    assert run.step == [0, 10, 20, 30] and run.seconds == run.at[-1] > 0
    assert run.final == {s: run.curves[s][-1] for s in SPLITS}
    assert run.curves["train"][-1] < run.curves["train"][0]
    held = [id(task.held[s]) for s in SPLITS]
    assert len(set(held)) == (1 if name == "regression" else 3)


@pytest.mark.parametrize("name", BATCH_TASKS)
def test_tasks_of_several_batch_sizes_draw_as_many(name):
    task = BATCH_TASKS[name](True)
    (x,) = next(task.batches(0))
    assert len(x) == int(name.removeprefix("batch "))
    run = train(task, METHODS["SINGD"].make, Run(name, "SINGD", 4, 1e-2, 0))
    assert run.step == [0, 1, 2, 3, 4]
    assert run.final["train"] < run.curves["train"][0]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains(name):
    task = BATCH_TASKS["batch 32"](True)
    run = train(task, ABLATIONS[name].make, Run(task.name, name, 10, 1e-3, 0), measures=1)
    assert run.final["train"] < run.curves["train"][0]


def test_a_scaled_identity_obeys_the_laws_of_structures():
    eye = ScaledIdentity.eye(5, dtype=torch.float64)
    A, B = eye * 2.0, eye * -3.0
    Y = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal((A @ B).dense(), -6.0 * torch.eye(5, dtype=torch.float64))
    assert torch.allclose(A.mm(Y), A.dense() @ Y) and A.trace() == 10
    # 1/2 P(N) = argmin over s of the Frobenius norm of 2 s I - N, so P(N) = tr(N) / n I
    N = Y @ Y.T
    assert torch.allclose(eye.project(Y).dense(), N.trace() / 5 * torch.eye(5).double())
    assert torch.allclose(A.gram().dense(), 4 * torch.eye(5).double())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_every_kind_of_layer(name):
    if name == "published singd" and not PEERS.is_dir():
        pytest.skip("the published package is put into build/peers by make evidence")
    pytest.importorskip("pytorch_optimizer")
    task = TASKS["transformer"](True)
    run = train(task, METHODS[name].make, Run("transformer", name, 3, 1e-3, 0), measures=1)
    assert run.final and run.final["train"] < 5


def test_the_same_seed_gives_the_same_run():
    task, make = TASKS["CNN"](True), METHODS["SINGD 0.1"].make
    first, second, other = (train(task, make, Run("CNN", "", 4, 1e-2, s)) for s in (0, 0, 1))
    assert first.curves == second.curves != other.curves


def test_a_run_that_diverges_ends_and_says_so():
    run = train(
        TASKS["regression"](True), METHODS["SGD"].make, Run("regression", "SGD", 400, 1e6, 0)
    )
    assert run.final == {} and run.step[-1] < 400
    assert evidence.compared(run) == math.inf


def test_the_schedule():
    shares = [share(t, 400) for t in range(400)]
    assert shares[0] == 1 / 8 and shares[7:200] == [1] * 193
    assert shares[300] == 0.5 and shares[399] == 1 / 200


def test_half_decades():
    assert [half_decade(1e-2, k) for k in (-2, -1, 0, 1)] == [1e-3, 3e-3, 1e-2, 3e-2]
    assert half_decade(0.0031) == 3e-3 and half_decade(3.0, 1) == 10.0


@pytest.mark.parametrize("first", [1e-3, 1e-2, 1.0])
def test_the_search_ends_between_worse_neighbours(first):
    tried = []

    def work(lr):
        tried.append(lr)
        worse = abs(math.log10(lr / 0.03))
        return Run("", "", 0, lr, 0, final={} if lr > 0.5 else {"validation": worse})

    assert evidence.tune(first, work, 9).lr == 0.03
    assert {0.01, 0.03, 0.1} <= set(tried) and len(tried) == len(set(tried)) <= 10


def test_an_optimum_between_two_rates_is_found():
    def work(lr):
        return Run("", "", 0, lr, 0, final={"validation": abs(math.log10(lr / 0.018))})

    assert evidence.tune(0.03, work, 9).lr == pytest.approx(0.018, rel=0.1)
    assert evidence.tune(0.03, work, 9, fine=False).lr in (0.01, 0.03)


def test_a_search_begins_where_one_of_the_nearest_length_ended(tmp_path):
    known = [
        Run("t", "m", steps, lr, 0, final={"validation": v})
        for steps, lr, v in ((400, 0.1, 2.0), (400, 0.3, 1.0), (2000, 0.1, 1.0), (2000, 0.3, 2.0))
    ]
    runs = evidence.Runs(tmp_path, [run.as_dict() for run in known])
    assert runs.best_rate("t", "m", 200) == runs.best_rate("t", "m", 2000) == 0.3
    assert runs.best_rate("t", "m", 5000) == 0.1 and runs.best_rate("t", "other", 200) is None


def test_rates_that_are_given_are_compared_with_those_that_were_tried(tmp_path):
    """The best of all gets the seeds; with no rate given, the best of those that were tried."""
    runs = evidence.Runs(tmp_path)

    def tried(lrs, seeds):
        evidence.compare(
            *(TASKS["CNN"](True), "AdamW", METHODS["AdamW"], runs),
            **{"steps": 10, "seeds": seeds, "rates": 1, "default": False, "fine": False},
            lrs=lrs,
        )
        return {(lr, seed) for *_, lr, seed in runs.known}

    first = {(1e-2, 0), (1e-5, 0)}
    assert tried([1e-2, 1e-5], 1) == first
    assert tried([], 2) == first | {(1e-2, 1)}


def test_the_search_stops_after_the_most_rates():
    tried = []
    evidence.tune(
        1e-5, lambda lr: tried.append(lr) or Run("", "", 0, lr, 0, final={"validation": -lr}), 4
    )
    assert len(tried) == 4 + 2  # and two beside the best


def made(method, lr, seed, values, seconds=1.0):
    """A run that was measured after 0, 10, 20 ... steps, a second each."""
    curves = dict.fromkeys(SPLITS, values)
    steps = [10 * i for i in range(len(values))]
    final = dict.fromkeys(SPLITS, values[-1]) if values else {}
    at = [seconds * i for i in range(len(values))]
    return Run("t", method, 20, lr, seed, 2 * seconds, final, steps, at, curves)


def test_the_summary_counts_steps_to_adamws_tuned_value():
    runs = [
        made("AdamW", 1e-3, 0, [9, 5, 4]),
        made("AdamW", 1e-2, 0, [9, 4, 2]),  # the better rate; 3 is the median of its ends
        made("AdamW", 1e-2, 1, [9, 5, 4]),
        made("other", 1e-1, 0, [9, 2.5, 1], 3.0),
        made("lost", 1e-1, 0, []),
    ]
    rows = {row["method"]: row for row in evidence.summary(runs)}
    assert rows["AdamW"]["lr"] == 1e-2 and rows["AdamW"]["train"] == [2, 3, 4]
    assert (rows["AdamW"]["rates"], rows["AdamW"]["seeds"]) == (2, 2)
    assert rows["other"]["steps to train target"] == 10
    assert rows["other"]["seconds to train target"] == 3.0
    assert rows["lost"]["steps to train target"] is None and rows["lost"]["diverged"] == 1
    assert "lost" in evidence.table(list(rows.values()))


def test_a_run_is_made_once_and_kept(tmp_path, capsys):
    file, folder = tmp_path / "out.json", tmp_path / "runs"
    options = [
        "--quick",
        "--tasks",
        "CNN",
        "--methods",
        "AdamW",
        "--folder",
        str(folder),
        str(file),
    ]
    evidence.main(options)
    first, paths = file.read_text(), sorted(folder.iterdir())
    assert len(paths) == 2 and all(p.stat().st_size for p in paths)  # two rates, the default is one
    for path in paths:
        path.unlink()
    evidence.main(options)  # the results know them
    assert file.read_text() == first and not list(folder.iterdir())
    found = json.loads(first)
    assert found["summary"][0]["method"] == "AdamW" and "AdamW" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="choose from SGD"):
        evidence.main(["--methods", "Adam", str(file)])


def test_methods_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from methods import METHODS, Method\nMETHODS = {'mine': METHODS['SGD']}\n")
    assert list(evidence.more_methods(file)) == ["mine"]
    with pytest.raises(FileNotFoundError, match="no Python file"):
        evidence.more_methods(tmp_path / "none.py")


def test_curves_are_curves():
    x = curves(20)
    assert x.shape == (20, 784) and x.min() >= 0 and x.max() <= 1
    assert (x.mean(1) > 0.01).all() and (x.mean(1) < 0.3).all()


@pytest.mark.parametrize("kind", ["", "_ablations", "_batch"])
def test_the_committed_results_are_those_of_these_tasks(kind):
    found = json.loads(RESULTS.with_stem(RESULTS.stem + kind).read_text())
    tasks = TASKS | BATCH_TASKS
    assert {row["task"] for row in found["summary"]} <= set(tasks)
    for name, told in found["tasks"].items():
        task = tasks[name](False)
        assert told == {"says": task.says, "unit": task.unit}
    for row in found["summary"]:
        assert row["method"] != "AdamW" or row["diverged"] == 0


def bytes_alive():
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() > 1]
    storages = [t.untyped_storage() for t in tensors if not t.is_meta]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_the_whole_state_on_each_task_is_what_the_comparison_page_says():
    """All that is kept between steps, wherever: factors, products, momenta, and the state of the fallback."""

    def kept(task, method):
        model, batch = task.model(), next(task.batches(0))
        few = tuple(t[:20] for t in batch)
        before = bytes_alive()
        optimizer = (METHODS | ABLATIONS)[method].make(model, 1e-3, task.options)
        for _ in range(2):
            optimizer.zero_grad()
            task.loss(model, few).backward()
            optimizer.step()
        optimizer.zero_grad()
        return bytes_alive() - before

    pages = ("docs/comparison.md", "README.md")
    text, readme = (" ".join((ROOT / page).read_text().split()) for page in pages)
    more = []
    for name in ("autoencoder", "CNN", "ViT", "transformer", "regression"):
        task = TASKS[name](False)
        adamw = kept(task, "AdamW")
        share = kept(task, "SINGD") / adamw
        assert f"{share:.2f} on the {name}" in text
        assert 0.5 < kept(task, "SINGD, diagonal") / adamw < 0.535
        assert kept(task, "narrow blocks") / adamw < 1.0005
        if share > 1:
            more.append(name)
            assert f"{share:.2f} on the {name}" in readme
    assert more == ["CNN", "regression"]


def test_what_narrower_blocks_would_cost_is_what_the_comparison_page_says():
    text = " ".join((ROOT / "docs/comparison.md").read_text().split())
    tried = json.loads(RESULTS.with_stem(RESULTS.stem + "_ablations").read_text())["summary"]
    ends = {(r["task"], r["method"]): r["test"] for r in tried if r["steps"] == 400}
    for name in ("autoencoder", "batch 128"):
        mine, narrow = (ends[name, method] for method in ("SINGD", "narrow blocks"))
        assert mine[1] < narrow[1] < 1.03 * mine[1]
    found = [f"{ends['CNN', method][1]:.2f}" for method in ("SINGD", "narrow blocks")]
    assert "the CNN's test loss rises from {} to {}".format(*found) in text
