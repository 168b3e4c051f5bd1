"""rotary beside the usual torch form.

    pytest benchmarks/bench_rotary.py

Each contestant by itself; `mmfast bench --only rotary` interleaves them, which a busy machine needs.
"""

from contestants import benchmarks_of

from mmfast.testing.cases import rotary

test_rotary = benchmarks_of(rotary)
