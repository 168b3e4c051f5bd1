"""The contrastive losses beside the eager formula and torch.compile.

    pytest benchmarks/bench_contrastive.py

Each contestant by itself; `mmfast bench --only contrastive` interleaves them, which a busy machine needs.
"""

from contestants import benchmarks_of

from mmfast.testing.cases import contrastive

test_contrastive = benchmarks_of(contrastive)
