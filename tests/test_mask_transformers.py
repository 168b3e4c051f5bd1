"""The constructors of ModalityMask against the masks that transformers makes for the same models."""

from __future__ import annotations

import types

import pytest
import torch

from mmfast import Layout, ModalityMask
from mmfast.testing.shapes import interleaved

pytest.importorskip("transformers", minversion="5.24", reason="the mask functions compared with are those of 5.24 on")

from transformers import CLIPTextConfig, DynamicCache, MistralConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3TextConfig,
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)
from transformers.models.idefics.processing_idefics import (
    IMAGE_TOKEN,
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

TEXT, IMAGE = 0, 1
# Per document (modality, rows): text before any image, images in a row, text after the last one, no image, no text.
DOCUMENTS = [
    [(TEXT, 3), (IMAGE, 6), (TEXT, 2), (IMAGE, 1), (TEXT, 4)],
    [(IMAGE, 9), (TEXT, 5)],
    [(TEXT, 7)],
    [(TEXT, 1), (IMAGE, 12)],
]


def tiny(kind, **options):
    return kind(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, attn_implementation="eager", **options)


def padded(layout: Layout, values: torch.Tensor | None = None) -> torch.Tensor:
    """Rows as [B, longest], padded on the right with 0; without values, 1 where a row exists."""
    lengths = layout.lengths().tolist()
    rows = torch.ones(layout.total, dtype=torch.long) if values is None else values.long()
    return torch.nn.utils.rnn.pad_sequence(rows.split(lengths), batch_first=True)


def arguments(layout: Layout, config) -> dict:
    exists = padded(layout)
    return {
        "config": config,
        "inputs_embeds": torch.zeros(*exists.shape, 8),
        "attention_mask": exists,
        "position_ids": torch.arange(exists.shape[1])[None].expand_as(exists),
    }


def assert_same(layout: Layout, mask: ModalityMask, theirs: torch.Tensor) -> None:
    """`theirs` is additive, [B, 1, longest, longest]; only rows that exist are compared."""
    ours = mask.visible(layout)
    for sample, n in enumerate(layout.lengths().tolist()):
        rows = slice(int(layout.cu_seqlens[sample]), int(layout.cu_seqlens[sample]) + n)
        assert torch.equal(ours[rows, rows], theirs[sample, 0, :n, :n] == 0), f"sample {sample}"
        assert not (theirs[sample, 0, :n, n:] == 0).any()


def with_images(kind: str) -> Layout:
    return interleaved(DOCUMENTS, ("text", "image")).with_time(kind, modalities=("image",))


def test_causal_decoder():
    layout = Layout.from_lengths([7, 1, 12])
    config = tiny(MistralConfig, sliding_window=4)
    theirs = create_causal_mask(cache=None, **arguments(layout, config))
    assert_same(layout, ModalityMask.causal(), theirs)
    theirs = create_sliding_window_causal_mask(cache=None, **arguments(layout, config))
    assert_same(layout, ModalityMask.causal(window=(3, -1)), theirs)


@pytest.mark.parametrize("past, new", [(5, 1), (5, 3), (1, 6)])
def test_causal_decoder_with_a_cache(past, new):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, past, 8), torch.zeros(1, 1, past, 8), 0)
    theirs = create_causal_mask(
        config=tiny(MistralConfig, sliding_window=None),
        inputs_embeds=torch.zeros(1, new, 8),
        attention_mask=torch.ones(1, past + new, dtype=torch.long),
        cache=cache,
        allow_is_causal_skip=False,
    )
    queries = Layout(torch.tensor([0, new], dtype=torch.int32), start=torch.tensor([past], dtype=torch.int32))
    ours = ModalityMask.causal().visible(queries, Layout.from_lengths([past + new]))
    assert torch.equal(ours, theirs[0, 0] == 0)


def test_dual_encoder():
    layout = Layout.from_lengths([7, 1, 12], name="text")
    config = tiny(CLIPTextConfig)
    assert_same(layout, ModalityMask.dual_encoder(image=1), create_causal_mask(cache=None, **arguments(layout, config)))
    given = {name: value for name, value in arguments(layout, config).items() if name != "position_ids"}
    assert_same(layout, ModalityMask.dual_encoder(image=1, causal_text=False), create_bidirectional_mask(**given))


@pytest.mark.parametrize("kind, window", [("full_attention", (-1, -1)), ("sliding_attention", (3, -1))])
def test_gemma_3(kind, window):
    layout = with_images("segment_start")
    blocks = get_block_sequence_ids_for_mask(padded(layout, layout.modality))
    config = tiny(Gemma3TextConfig, sliding_window=4, head_dim=8, layer_types=[kind])
    theirs = create_masks_for_vision_model(cache=None, block_sequence_ids=blocks, **arguments(layout, config))
    assert_same(layout, ModalityMask.early_fusion(window=window), theirs[kind])


def test_paligemma():
    layout = Layout.from_lengths([9, 4, 12]).with_time("prefix", lengths=torch.tensor([5, 4, 0]))
    suffix = (layout.positions() >= torch.tensor([5, 4, 0])[layout.samples()]).long()  # its token type is 1
    config = tiny(MistralConfig, sliding_window=None)
    blocks = torch.where(padded(layout, suffix) == 0, 0, -1)
    theirs = create_causal_mask(cache=None, block_sequence_ids=blocks, **arguments(layout, config))
    assert_same(layout, ModalityMask.prefix_lm(), theirs)


def image_tokens() -> Layout:
    """One row an image, as these models write an image into the text."""
    one = [[(modality, 1 if modality == IMAGE else rows) for modality, rows in document] for document in DOCUMENTS]
    return interleaved(one, ("text", "image")).with_time("media_count", modalities=("image",))


def test_idefics():
    layout = image_tokens()
    tokenizer = types.SimpleNamespace(
        convert_tokens_to_ids={IMAGE_TOKEN: IMAGE}.__getitem__, eos_token_id=99, unk_token_id=98
    )
    latest, _ = image_attention_mask_for_packed_input_ids(padded(layout, layout.modality), tokenizer, "pt")
    images = max(sum(m == IMAGE for m, _ in document) for document in DOCUMENTS)
    theirs = incremental_to_binary_attention_mask(latest, "pt", num_classes=images)
    ours = ModalityMask.flamingo().visible(layout)
    for sample, n in enumerate(layout.lengths().tolist()):
        rows = slice(int(layout.cu_seqlens[sample]), int(layout.cu_seqlens[sample]) + n)
        text = layout.modality[rows] == TEXT
        count = int((~text).sum())
        assert torch.equal(ours[rows, rows][text][:, ~text], theirs[sample, :n][text][:, :count].bool())


def test_mllama():
    layout = image_tokens()
    ours = ModalityMask.flamingo().visible(layout)
    for sample, n in enumerate(layout.lengths().tolist()):
        rows = slice(int(layout.cu_seqlens[sample]), int(layout.cu_seqlens[sample]) + n)
        modality = layout.modality[rows]
        theirs = torch.zeros(n, n, dtype=torch.bool)
        for begin, end in get_cross_attention_token_mask(modality.tolist(), IMAGE):
            theirs[begin : n if end == -1 else end, begin] = True
        theirs[modality == IMAGE] = False  # our image rows see nothing
        assert torch.equal(ours[rows, rows], theirs)


def test_q_former_matching():
    layout = interleaved([[(0, 4), (1, 3)], [(0, 4), (1, 9)]], ("query", "text"))
    given = {name: x for name, x in arguments(layout, tiny(CLIPTextConfig)).items() if name != "position_ids"}
    assert_same(layout, ModalityMask.q_former("matching"), create_bidirectional_mask(**given))
