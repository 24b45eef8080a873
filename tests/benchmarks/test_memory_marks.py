"""What the structures promise of memory, in exact bytes."""

import json
import pathlib

import contenders
import pytest
import torch
from marks import PEAK_SHARE, STATE_SHARE
from memory import kept_bytes, layer_state, peak_bytes
from timing import Contender
from workloads import WORKLOADS

import singd
from singd.structures import registered_structures

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "_data" / "what_it_costs.json"
LIGHT = ("diagonal", "triltoeplitz")


@pytest.mark.parametrize("name", LIGHT)
def test_light_structures_keep_half_of_what_adamw_keeps(name):
    (contender,) = contenders.ours(10, [name])
    _, state, adamw = layer_state(contender, WORKLOADS["vit"])
    assert state <= STATE_SHARE * adamw
    # the position embedding and the norms are AdamW's with either optimizer
    everything = kept_bytes(contender, WORKLOADS["vit"])
    (whole,) = (c for c in contenders.others() if c.name == "AdamW")
    rest = sum(
        p.numel()
        for n, p in WORKLOADS["vit"].model().named_parameters()
        if "norm" in n or n == "position"
    )
    assert everything - state == pytest.approx(8 * rest, abs=8 * 20)  # and counts of steps
    assert everything < 0.52 * kept_bytes(whole, WORKLOADS["vit"])


@pytest.mark.parametrize("name", ["dense", "diagonal", "block30diagonal", "triltoeplitz"])
def test_bfloat16_halves_the_factors(name):
    half = contenders.singd_of(singd.SINGD, name, 1, preconditioner_dtype=torch.bfloat16)
    (plain,) = contenders.ours(1, [name])
    factors = layer_state(plain, WORKLOADS["vit"])[0]
    assert factors > 0
    assert layer_state(Contender(name, half), WORKLOADS["vit"])[0] == factors / 2


def test_nothing_but_the_state_is_kept_between_updates():
    contender = contenders.without_cache()
    _, state, _ = layer_state(contender, WORKLOADS["mlp"])
    assert kept_bytes(contender, WORKLOADS["mlp"]) == state
    (cached,) = contenders.ours(10, ["dense"])
    # one product for each factor, without a gap behind its rows
    products = sum(4 * d**2 for d in (785, 1024, 1025, 1024, 1025, 10))
    extra = kept_bytes(cached, WORKLOADS["mlp"]) - state
    assert extra == products


@pytest.mark.parametrize("name", contenders.PUBLISHED_STRUCTURES["cnn"])
def test_the_peak_of_a_convolution_is_a_third_of_the_published_one(name):
    rows = json.loads(RESULTS.read_text())["memory"]["peak_on_cnn"]
    (published,) = (r["bytes"] for r in rows if r["name"] == f"published {name}, T=1")
    (contender,) = contenders.ours(1, [name])
    assert peak_bytes(contender, WORKLOADS["cnn"]) <= PEAK_SHARE * published


@pytest.mark.parametrize("name", registered_structures())
def test_no_structure_unfolds_a_whole_batch(name):
    (contender,), (diagonal,) = contenders.ours(1, [name]), contenders.ours(1, ["diagonal"])
    patches = 4 * 32 * 16 * 16 * 64 * 3 * 3  # bytes of those of the third layer
    over = peak_bytes(contender, WORKLOADS["cnn"]) - peak_bytes(diagonal, WORKLOADS["cnn"])
    assert over < patches / 2
