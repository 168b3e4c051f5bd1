"""A whole train step on ragged batches: mmfast beside the same model in padded PyTorch (`mmfast.testing.train_step`).

    python benchmarks/bench_train_step.py [--quick] [--json FILE] [--bf16] [--stamps | --equal] [--threads N]
    pytest benchmarks/bench_train_step.py

`mmfast bench --suite train` does ragged and equal lengths, float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from mmfast.testing import machine
from mmfast.testing.train_step import (
    PEERS,
    Learner,
    check_agreement,
    contenders,
    make_batches,
    padding_share,
    run,
    show,
)


@pytest.mark.parametrize("name", ["mmfast", *PEERS])
@pytest.mark.parametrize("lengths", ["ragged", "equal"])
def test_train_step(benchmark, name, lengths):
    """One train step of 16 samples; the losses of this way and the padded one agree first."""
    benchmark.group = f"train step, {lengths} lengths"
    torch.manual_seed(0)
    batches = make_batches(lengths, 16, 2)
    learner = Learner()
    learner.fix_statistics(batches[0][0])
    check_agreement(contenders(batches, learner, ["padded, SDPA", name]), 2)
    runs = contenders(batches, learner, [name])
    benchmark.extra_info["padding"] = padding_share(batches)
    benchmark.pedantic(lambda: runs[name].step(0), rounds=7, warmup_rounds=2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="samples of a batch")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each")
    parser.add_argument("--steps", type=int, default=32, help="steps over which the losses must agree")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--bf16", action="store_true", help="time under bfloat16 autocast")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--equal", action="store_const", const="equal", dest="lengths", help="equal lengths")
    lengths.add_argument("--stamps", action="store_const", const="stamps", dest="lengths", help="real stamps")
    parser.add_argument("--quick", action="store_true", help="few small steps: does it run?")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    (result,) = run(
        args.lengths or "ragged",
        samples=args.samples,
        rounds=args.rounds,
        steps=args.steps,
        bf16=(args.bf16,),
        quick=args.quick,
    )
    print(show(result))
    if args.json:
        Path(args.json).write_text(json.dumps(machine.describe() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
