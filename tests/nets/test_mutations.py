"""The nets notice an error of one line: a net with holes would let all of these through."""

import pytest
from counting import tried
from mutations import MUTATIONS, Mutation, apply, is_caught

EXAMPLES = 30


def test_nothing_is_noticed_where_nothing_is_wrong(tmp_path):
    apply(Mutation("rules/singd.py", *['"""The rule of SINGD'] * 2), tmp_path)
    assert not is_caught(tmp_path, EXAMPLES)


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_error_of_one_line_is_noticed(name, tmp_path):
    apply(MUTATIONS[name], tmp_path)
    assert is_caught(tmp_path, EXAMPLES)
    tried("mutations")
