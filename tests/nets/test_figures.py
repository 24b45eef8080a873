"""The page "What is tested, and what is not" shows the figures of the last long run."""

import json

from figures import DATA, NETS, PAGE, with_table


def test_the_page_shows_the_figures_of_the_last_long_run():
    figures = json.loads(DATA.read_text())
    assert set(figures["tried"]) == set(NETS)
    assert figures["failed"] == 0
    assert all(number for net, number in figures["tried"].items() if "diverged" not in net)
    page = PAGE.read_text()
    assert with_table(page, figures) == page
