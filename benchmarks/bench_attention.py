"""Attention beside PyTorch's: workloads, growth with the tokens, the cost of a call.

    pytest benchmarks/bench_attention.py

Each contestant by itself; `mmfast bench --only attention` interleaves them, which a busy machine needs.
"""

from contestants import benchmarks_of

from mmfast.testing.cases import attention, overhead, scaling

test_attention = benchmarks_of(attention, overhead, scaling)
