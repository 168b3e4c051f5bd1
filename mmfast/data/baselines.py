"""What a model must beat: retrieval that looks at nothing but how long things are."""

from __future__ import annotations

import torch

from .stamps import StampSet


def recall_from_scores(scores: torch.Tensor, target: torch.Tensor, at: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Recall among candidates, in percent; equal scores count with their chance, not in the query's favour.

    Args:
        scores: float [queries, candidates], higher is better.
        target: int64 [queries], the right candidate.
        at: ranks to report.

    Returns:
        {"R@1": ..., "R@5": ...}.
    """
    right = scores.gather(1, target[:, None])
    better = (scores > right).sum(1).double()
    equal = (scores == right).sum(1).double()  # the right one included
    return {f"R@{k}": 100 * float(((k - better) / equal).clamp(0, 1).mean()) for k in at}


def length_only(
    seconds: torch.Tensor,
    characters: torch.Tensor,
    target: torch.Tensor,
    fit_seconds: torch.Tensor,
    fit_characters: torch.Tensor,
) -> dict[str, float]:
    """Find a clip's text by its duration alone.

    The line seconds = a + b * characters is fitted by least squares on the fit pairs; the score of a text is
    -|seconds - (a + b * characters)|.

    Args:
        seconds: float [queries], durations of the clips.
        characters: [candidates], lengths of the texts.
        target: int64 [queries], the right text.
        fit_seconds, fit_characters: [pairs], from training.

    Returns:
        As `recall_from_scores`, with the number of candidates under "candidates".
    """
    design = torch.stack([torch.ones(len(fit_characters)).double(), fit_characters.double()], dim=1)
    line = torch.linalg.lstsq(design, fit_seconds.double()[:, None]).solution[:, 0]
    expected = line[0] + line[1] * characters.double()
    scores = -(seconds.double()[:, None] - expected).abs()
    return {**recall_from_scores(scores, target), "candidates": len(characters)}


def stamps_length_baseline(
    stamps: StampSet, language: str, split: str = "test", fit: str = "train"
) -> dict[str, float]:
    """`length_only` for the spoken captions of one language: clips of `split`, the line fitted on the clips of `fit`.

    The candidates are the different captions of that split in that language; stamps that share one count as right.

    Raises:
        ValueError: no clips of that language with a caption in one of the splits.
    """

    def pairs(name: str) -> tuple[torch.Tensor, list[str]]:
        rows = [
            (10e-3 * int(stamps.mel_offsets[i + 1] - stamps.mel_offsets[i]), text)
            for i in stamps.clip_rows(language, name).tolist()
            if (text := _caption(stamps, stamps.clips[i][0], language))
        ]
        if not rows:
            raise ValueError(
                f"stamps_length_baseline: no clip in {language!r} in {name!r}; load_stamps(speech=True, languages=...)"
            )
        return torch.tensor([r[0] for r in rows]), [r[1] for r in rows]

    seconds, texts = pairs(split)
    fit_seconds, fit_texts = pairs(fit)
    candidates = sorted(set(texts))
    return length_only(
        seconds,
        torch.tensor([len(t) for t in candidates]),
        torch.tensor([candidates.index(t) for t in texts]),
        fit_seconds,
        torch.tensor([len(t) for t in fit_texts]),
    )


def _caption(stamps: StampSet, stamp: int, language: str) -> str | None:
    return stamps.caption[stamp] if language == "en" else stamps.captions[stamp].get(language)
