"""pack and unpack beside torch indexing, adds and norm.

    pytest benchmarks/bench_packing.py

Each contestant by itself; `mmfast bench --only pack` interleaves them, which a busy machine needs.
"""

from contestants import benchmarks_of

from mmfast.testing.cases import packing

test_packing = benchmarks_of(packing)
