"""One step of an attack beside the forms that people use today.

    pytest benchmarks/bench_perturbation.py

Each contestant by itself; `mmfast bench --only perturb` interleaves them, which a busy machine needs.
"""

from contestants import benchmarks_of

from mmfast.testing.cases import perturbation

test_perturbation = benchmarks_of(perturbation)
