"""The harness of `make bench` runs, and its arithmetic is right."""

import json
import math
import pathlib
import subprocess
import sys
from itertools import chain

import contenders
import defaults
import pytest
import timing
import torch
from floors import operations, sides
from marks import MARKS
from memory import LiveBytes, kept_bytes
from widths import crossing, fitted_exponent, theoretical_exponents
from workloads import SMALL, WORKLOADS

import singd

HERE = pathlib.Path(__file__).parent


def test_a_quick_run(tmp_path):
    file = tmp_path / "results.json"
    run = subprocess.run(
        [sys.executable, HERE / "run.py", "--quick", file], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(file.read_text())
    for name, part in results["training"].items():
        found = {row["name"] for row in part["contenders"]}
        assert {"AdamW", "Muon", "SOAP, T=10", "Shampoo, T=10", "dense, T=1"} <= found, name
        for row in part["contenders"]:
            assert row["ms"] > 0 and row["iterations"] >= 3
    assert [(r["workload"], r["structure"], r["T"]) for r in results["marks"]] == [
        (m.workload, m.structure, m.T) for m in MARKS
    ]
    assert all(r["gflop"] > 0 for r in results["marks"])
    assert set(results["widths"]["structures"]) == set(results["memory"]["layers_on_vit"])
    assert results["hook"]["call_us"] > 0
    for name in SMALL:
        rows = {row["name"]: row for row in results["defaults"][name]["contenders"]}
        assert set(rows) == {"AdamW", *defaults.OURS} and all(r["ms"] > 0 for r in rows.values())
    assert results["defaults"]["tiny"]["SINGD step_ms"] > 0
    assert "Overhead over SGD against the marks" in run.stdout


def test_updates_of_a_schedule_are_counted_as_the_optimizer_makes_them():
    model = torch.nn.Linear(3, 2)
    optimizer = singd.SINGD(model, T=singd.Growing(5, 3))
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    made = optimizer.state[model.weight]["updates"]
    assert defaults.updates(singd.Growing(5, 3), 40) == made > 40 / 5


def test_the_published_package_does_not_take_the_place_of_ours(tmp_path):
    package = tmp_path / "singd" / "optim"
    package.mkdir(parents=True)
    (tmp_path / "singd" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "optimizer.py").write_text("from singd.optim import other\nSINGD = other.Peer\n")
    (package / "other.py").write_text("class Peer: pass\n")
    before = dict(sys.modules)
    assert contenders.published_singd(tmp_path).__name__ == "Peer"
    assert sys.modules["singd"] is before["singd"] is singd
    assert "singd.optim" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_a_missing_peer_is_an_error_that_says_where_it_comes_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="make bench"):
        contenders.published_singd(tmp_path)


def test_a_period_is_the_mean_of_its_phases():
    phases = [[9.0, 11.0, 100.0], [1.0], [2.0, 4.0]]
    assert timing.over_period(phases) == pytest.approx((11 + 1 + 3) / 3)
    assert timing.over_period([[9.0], [1.0], []]) == pytest.approx((9 + 1 + 1) / 3)
    assert timing.quantile_of([4.0, 1.0, 2.0, 3.0, 5.0], 0.25) == 2.0


def test_turns_pair_each_iteration_with_one_of_sgd():
    fields = [timing.Contender("a", contenders.SGD_CONTENDER.make, 3), contenders.others()[0]]
    runs, sgd = timing.interleaved(
        fields, contenders.SGD_CONTENDER, SMALL["mlp"], seconds=0.0, rounds=1
    )
    assert [len(s) for s in runs["a"].seconds] == [1, 1, 1]
    assert [len(s) for s in runs["AdamW"].overheads] == [3]
    assert len(sgd) == 2 + 2 * 2  # one in each warm-up, and before every second iteration
    for run in runs.values():
        for spent, over in zip(chain(*run.seconds), chain(*run.overheads), strict=True):
            assert any(spent - over == pytest.approx(s) for s in sgd)


def test_live_bytes_rise_and_fall():
    with LiveBytes() as count:
        a = torch.zeros(1000)
        view = a[:10]
        assert count.live() == 4000
        b = a + 1
        assert count.live() == 8000
        del a
        assert count.live() == 8000  # the view keeps it
        del view, b
        assert count.live() == 0
    assert count.peak == 8000


def test_an_optimizer_keeps_what_it_says():
    sgd = kept_bytes(contenders.SGD_CONTENDER, SMALL["mlp"])
    numbers = sum(p.numel() for p in SMALL["mlp"].model().parameters())
    assert sgd == 4 * numbers
    (adamw,) = (c for c in contenders.others() if c.name == "AdamW")
    assert kept_bytes(adamw, SMALL["mlp"]) == 8 * numbers + 4 * 4  # and four counts of steps


def test_sides_of_the_networks():
    mlp = sides(WORKLOADS["mlp"])
    assert [(s.d, s.rows, s.columns) for s in mlp[:2]] == [(785, 128, 1024), (1024, 128, 785)]
    cnn = sides(WORKLOADS["cnn"])
    assert (cnn[2].d, cnn[2].rows) == (32 * 9 + 1, 32 * 16 * 16)  # its second layer, stride 2
    assert cnn[4].gram == cnn[4].rows * cnn[4].d ** 2 / 3  # its third, stride 1


def test_floors_of_one_dense_case_by_hand():
    total = 0
    for d, columns in (
        (785, 1024),
        (1024, 785),
        (1025, 1024),
        (1024, 1025),
        (1025, 10),
        (10, 1025),
    ):
        rows_first, gram_first = 3 * 128 * d**2, 128 * d**2 + 3 * d**3
        total += min(rows_first, gram_first) + d**3 + 2 * d**3  # K^T K, K m_K
        total += min(d**3 + 2 * d**2 * columns, 4 * d**2 * columns)
    assert operations(WORKLOADS["mlp"], "dense", 1) == total


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_every_marked_case_has_a_floor(mark):
    every = operations(WORKLOADS[mark.workload], mark.structure, 1)
    rarely = operations(WORKLOADS[mark.workload], mark.structure, 10)
    assert 0 < rarely < every


def test_no_floor_is_invented():
    with pytest.raises(ValueError, match="No floor"):
        operations(WORKLOADS["mlp"], "trilrank4first", 1)


def test_exponents_and_crossings():
    widths = [64, 128, 256, 512]
    assert fitted_exponent(widths, [3 * d**2.5 for d in widths]) == pytest.approx(2.5)
    cheap, dear = [100.0 * d for d in widths], [d**2 for d in widths]
    assert crossing(widths, cheap, dear) == pytest.approx(100)
    assert crossing(widths, dear, cheap) is None
    assert crossing(widths, [1.0] * 4, dear) == 64
    update, gradient = theoretical_exponents(singd.structure("dense"), widths)
    assert 2 < update < 3 and gradient == pytest.approx(2)
    assert theoretical_exponents(singd.structure("diagonal"), widths) == pytest.approx((1, 1))
    log = theoretical_exponents(singd.structure("triltoeplitz"), widths)[1] - 1
    assert log == pytest.approx(1 / math.log(math.sqrt(64 * 512)), rel=0.05)


def test_those_in_focus_take_further_turns():
    fields = [timing.Contender("a", contenders.SGD_CONTENDER.make), contenders.others()[0]]
    runs, _ = timing.interleaved(
        fields,
        contenders.SGD_CONTENDER,
        SMALL["mlp"],
        seconds=0.0,
        focus={"a"},
        focus_seconds=60.0,
        rounds=2,
    )
    # the time of the common rounds is up after one of them
    assert len(runs["AdamW"].seconds[0]) == 3
    assert len(runs["a"].seconds[0]) == 3 + 2 * 3
