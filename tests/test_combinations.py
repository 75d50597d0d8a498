"""What ``make test`` leaves to ``make test-all`` of a test over combinations."""

import itertools

from combinations import pairs_first, values_first

AXES = ("abc", range(4), (False, True), ("x", "y", "z"))


def every_run(parameters):
    return [parameter.values for parameter in parameters if not parameter.marks]


def test_every_pair_of_values_is_in_every_run_and_no_case_is_lost():
    cases = list(itertools.product(*AXES))
    parameters = pairs_first(cases)
    assert [parameter.values for parameter in parameters] == cases
    often = every_run(parameters)
    for (m, xs), (n, ys) in itertools.combinations(enumerate(AXES), 2):
        for x, y in itertools.product(xs, ys):
            assert any(case[m] == x and case[n] == y for case in often), (x, y)
    assert 12 <= len(often) <= 16  # of 72; there are 12 pairs of the longest two
    rest = [parameter for parameter in parameters if parameter.marks]
    assert {mark.name for parameter in rest for mark in parameter.marks} == {"slow_suite"}


def test_every_value_is_in_every_run():
    often = every_run(values_first(itertools.product(*AXES)))
    assert [set(values) for values in zip(*often, strict=True)] == [set(axis) for axis in AXES]
    assert len(often) == 4


def test_a_pair_that_no_case_has_is_not_asked_for():
    cases = [case for case in itertools.product("ab", "cd", "ef") if case[:2] != ("a", "c")]
    often = every_run(pairs_first(cases))
    assert {case[:2] for case in often} == {("a", "d"), ("b", "c"), ("b", "d")}


def test_pairs_are_of_what_a_case_is_made_of():
    names = [f"{kind}_{size}" for kind in "abc" for size in range(3)]
    cases = list(itertools.product(names, "xyz"))
    often = every_run(pairs_first(cases, lambda name, last: (*name.split("_"), last)))
    assert len(every_run(pairs_first(cases))) == 27  # a name of each with each letter
    assert len({(name[0], last) for name, last in often}) == 9
    assert len({(name[2], last) for name, last in often}) == 9
    assert len(often) < 15
