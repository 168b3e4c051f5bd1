"""Drop-in layers on packed tokens, and fusion of one vector per modality."""

from mmfast.nn.attention_map import AttentionMap, attention_map
from mmfast.nn.block import PackedTransformer, PackedTransformerBlock
from mmfast.nn.cross_attention import CrossModalAttention
from mmfast.nn.fusion import AttentionFusion, ConcatFusion, WeightedFusion
from mmfast.nn.pooling import segment_mean

__all__ = [
    "AttentionFusion",
    "AttentionMap",
    "ConcatFusion",
    "CrossModalAttention",
    "PackedTransformer",
    "PackedTransformerBlock",
    "WeightedFusion",
    "attention_map",
    "segment_mean",
]
