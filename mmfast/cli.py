"""The command `mmfast`: train, eval, demo, bench, data, info."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence

DEFAULT_OUT = "runs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one sentence on stderr and status 1, interrupts status 130."""
    parser = _parser()
    args = parser.parse_args(argv)
    if getattr(args, "run", None) is None:
        parser.print_help()
        return 2
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'mmfast: interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) is gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            print(
                f"mmfast: the disk is full ({error.filename or error}); free some space and start again",
                file=sys.stderr,
            )
            return 1
        raise
    except (ValueError, RuntimeError, ImportError) as error:
        if args.traceback:
            raise
        print(f"mmfast: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmfast", description="Multimodal models without padding.")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_demo(commands)
    _add_bench(commands)
    from mmfast.data.cli import add_commands

    add_commands(commands)
    info = commands.add_parser("info", help="what this machine can run, and why not the rest")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


# train


def _add_train(commands) -> None:
    train = commands.add_parser("train", help="train a model on one of the data sets")
    sets = train.add_subparsers(title="data sets", metavar="SET", required=True)
    emoji = sets.add_parser("emoji", help="image-text model on emoji, one artist held out")
    emoji.add_argument("--held-out", default="noto", help="artist that is never trained on (default noto)")
    emoji.set_defaults(run=_train_emoji)
    stamps = sets.add_parser("stamps", help="16 classes of stamps, and retrieval")
    stamps.add_argument("--init", metavar="CKPT", help="start from the weights of this run or checkpoint")
    stamps.add_argument(
        "--modalities", default="image,text", help="some of image,text,audio (default image,text; audio: speech)"
    )
    stamps.add_argument("--fusion", choices=("concat", "weighted", "attention"), default="concat")
    stamps.add_argument(
        "--multitask",
        choices=("none", "equal", "uncertainty"),
        default="none",
        help="train retrieval too, with losses weighted so",
    )
    stamps.add_argument("--languages", default="fr", help="of the speech, for example fr,ru (default fr)")
    stamps.set_defaults(run=_train_stamps)
    for parser, steps, batch, lr in ((emoji, 800, 256, 1.5e-3), (stamps, 200, 64, 5e-4)):
        parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run; an interrupted one goes on")
        parser.add_argument("--steps", type=_positive, default=steps, help=f"(default {steps})")
        parser.add_argument("--batch-size", type=_positive, default=batch, help=f"samples per step (default {batch})")
        parser.add_argument("--lr", type=float, default=lr, help=f"peak learning rate (default {lr})")
        parser.add_argument("--weight-decay", type=float, default=0.05)
        parser.add_argument("--warmup", type=int, default=None, metavar="STEPS", help="(default a tenth of the steps)")
        parser.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
        parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm, 0 for none (default 1)")
        parser.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="precision (default auto)")
        parser.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, 0 for none (default)")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--compile", action="store_true", help="run through torch.compile")
        parser.add_argument("--nonfinite", choices=("stop", "skip"), default="stop", help="at a loss that is no number")
        parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
        parser.add_argument("--keep", type=_positive, default=2, help="checkpoints that stay (default 2)")
        parser.add_argument("--log-every", type=_positive, default=10, metavar="STEPS")
        parser.add_argument("--eval-every", type=int, default=0, metavar="STEPS", help="0: at the end only (default)")
        parser.add_argument("--tensorboard", action="store_true")
        parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 ... (default cuda where there is one)")
        parser.add_argument("--fresh", action="store_true", help="start anew instead of going on with --out")


def _config(args):
    from mmfast.train import TrainConfig

    warmup = args.steps // 10 if args.warmup is None else args.warmup
    same = ("steps", "lr", "weight_decay", "schedule", "clip", "amp", "ema", "seed", "compile", "nonfinite")
    more = ("checkpoint_every", "keep", "log_every", "eval_every", "tensorboard")
    return TrainConfig(warmup=warmup, **{name: getattr(args, name) for name in (*same, *more)})


def _device(name: str | None):
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _train_emoji(args) -> int:
    import torch

    from mmfast.data import load_emoji
    from mmfast.train.recipes.emoji import EmojiData, EmojiRecipe

    recipe = EmojiRecipe(held_out=args.held_out, batch_size=args.batch_size)
    data = EmojiData(load_emoji(), recipe)
    torch.manual_seed(args.seed)
    return _fit(args, recipe, recipe.model(), recipe.task(), data.train_batches(args.seed), data.evaluate)


def _train_stamps(args) -> int:
    import torch

    from mmfast.data import load_stamps
    from mmfast.train.recipes.emoji import EmojiRecipe
    from mmfast.train.recipes.stamps import StampsData, StampsRecipe
    from mmfast.train.recipes.transfer import encoders_of, start_from

    modalities = tuple(args.modalities.split(","))
    recipe = StampsRecipe(
        modalities=modalities,
        fusion=args.fusion if len(modalities) > 1 else None,
        multitask=args.multitask,
        encoders=encoders_of(args.init) if args.init else EmojiRecipe(),
        batch_size=args.batch_size,
        languages=tuple(args.languages.split(",")) if "audio" in modalities else (),
    )
    stamps = load_stamps(speech="audio" in modalities, languages=recipe.languages)
    data = StampsData(stamps, recipe)
    torch.manual_seed(args.seed)
    model, task = recipe.model(), recipe.task(len(stamps.classes))
    if args.init:
        fresh = {name.split(".")[1] for name in start_from(model, args.init) if name.startswith("encoders.")}
        print(f"weights from {args.init}" + (f"; new: {', '.join(sorted(fresh))}" if fresh else ""))
    return _fit(args, recipe, model, task, data.train_batches(args.seed), lambda m: data.evaluate(m, task))


def _fit(args, recipe, model, task, batches, evaluate) -> int:
    from mmfast.train import Trainer
    from mmfast.train.recipes.transfer import describe

    trainer = Trainer(
        model,
        task,
        batches,
        _config(args),
        args.out,
        recipe=describe(recipe) | ({"init": args.init} if getattr(args, "init", None) else {}),
        evaluate=evaluate,
        device=_device(args.device),
    )
    trainer.fit(resume=not args.fresh)
    _print(trainer.run_evaluation())
    print(f"run: {args.out}")
    return 0


def _print(scores: dict) -> None:
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name.ljust(width)}  {value:.2f}" if isinstance(value, float) else f"{name.ljust(width)}  {value}")


# eval, demo, bench, info


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="figures of a checkpoint on its test data")
    parser.add_argument("checkpoint", metavar="CKPT", help="folder of a run, or of one checkpoint")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="of the stamps (default test)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_eval)


def _eval(args) -> int:
    import torch

    from mmfast.train.recipes.transfer import evaluate_checkpoint

    with torch.no_grad():
        scores = evaluate_checkpoint(args.checkpoint, split=args.split, device=_device(args.device))
    print(json.dumps(scores, indent=1)) if args.json else _print(scores)
    return 0


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo", help="train, test, transfer, fuse, attack and report on real data in a quarter of an hour"
    )
    parser.add_argument("--out", default=os.path.join(DEFAULT_OUT, "demo"), metavar="DIR", help="(default runs/demo)")
    parser.add_argument("--quick", action="store_true", help="all of it in small, in under three minutes")
    parser.add_argument(
        "--no-features", action="store_true", help="leave the frozen EfficientNet and MiniLM features out (101 MB)"
    )
    parser.add_argument("--no-speed", action="store_true", help="leave the timing of the train step out")
    parser.set_defaults(run=_demo)


def _demo(args) -> int:
    import dataclasses

    from mmfast.train.demo.run import run_demo
    from mmfast.train.demo.stage import QUICK, Sizes

    sizes = QUICK if args.quick else dataclasses.replace(Sizes(), features=not args.no_features)
    run_demo(args.out, sizes, speed=not args.no_speed)
    return 0


def _add_bench(commands) -> None:
    parser = commands.add_parser("bench", help="every op beside its peers and this machine's ceilings")
    parser.add_argument("--suite", choices=("cpu", "gpu", "train"), default="cpu", help="(default cpu)")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: at most three minutes")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="cases whose name holds this, such as attention or bf16"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads (default torch's)")
    parser.add_argument("--out", default=os.path.join(DEFAULT_OUT, "bench"), metavar="DIR", help="(default runs/bench)")
    parser.set_defaults(run=_bench)


def _bench(args) -> int:
    from mmfast.testing.command import bench

    return bench(args.suite, args.out, quick=args.quick, only=args.only, threads=args.threads)


def _info(args) -> int:
    from mmfast import info

    print(json.dumps(info.collect(), indent=1)) if args.json else info.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
