"""Data sets that ordinary package registries carry, and what feeds them to a model."""

from .audio import log_mel
from .baselines import length_only, recall_from_scores, stamps_length_baseline
from .emoji import EmojiSet, emoji_names, load_emoji
from .image import augment
from .install import InstallError, cache_dir, install, installed
from .sampler import BatchSampler
from .stamps import StampSet, load_stamps
from .text import ByteTokenizer, Tokens, WordTokens, WordTrigramTokenizer, take_ragged

__all__ = [
    "BatchSampler",
    "ByteTokenizer",
    "EmojiSet",
    "InstallError",
    "StampSet",
    "Tokens",
    "WordTokens",
    "WordTrigramTokenizer",
    "augment",
    "cache_dir",
    "emoji_names",
    "install",
    "installed",
    "length_only",
    "load_emoji",
    "load_stamps",
    "log_mel",
    "recall_from_scores",
    "stamps_length_baseline",
    "take_ragged",
]
