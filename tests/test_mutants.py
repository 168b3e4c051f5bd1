"""What the tests of the kernels are worth: each wrong version in mutants.py must make one of them fail."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, TESTS, build, verdicts

from mmfast._native import cpu_refusal

pytestmark = [
    pytest.mark.skipif(cpu_refusal is not None, reason=str(cpu_refusal)),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return build(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("op", TESTS)
def test_every_mutant_is_noticed(tree, op):
    found = verdicts(tree, [op])
    unchanged = [found.pop(name) for name in list(found) if name.startswith(f"{op}: unchanged, ")]
    assert unchanged and not any(unchanged)
    assert len(found) == sum(mutant[0] == op for mutant in MUTANTS)
    assert not [name for name, test in found.items() if not test]
