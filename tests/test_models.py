"""Encoders and the multimodal model: every sample as if it were alone, absent modalities, gradients."""

import pytest
import torch
import torch._dynamo.testing

from mmfast import Layout, ModalityMask
from mmfast.models import (
    AudioEncoder,
    AudioInput,
    ImageEncoder,
    ImageInput,
    MultimodalModel,
    TextEncoder,
    TextInput,
)
from mmfast.models.stem import ConvStem
from mmfast.nn import PackedTransformer, segment_mean
from mmfast.testing.padded import PaddedModel, pad_input

DIM = 32
SMALL = {"dim": DIM, "heads": 4, "depth": 1, "mlp_ratio": 2}
GRIDS = [(1, 2), (0, 0), (3, 1), (1, 1)]  # rows and columns of regions of each image
WORDS = [3, 1, 0, 5]
FRAMES = [20, 0, 8, 3]


def make_images(seed=0, size=32):
    torch.manual_seed(seed)
    places = [(r, c) for rows, columns in GRIDS for r in range(rows) for c in range(columns)]
    lengths = torch.tensor([r * c for r, c in GRIDS], dtype=torch.int32)
    return ImageInput(torch.randn(len(places), 3, size, size), lengths, torch.tensor(places, dtype=torch.int32))


def make_texts(seed=1):
    torch.manual_seed(seed)
    ids_per_word = torch.randint(1, 4, (sum(WORDS),))
    ids = torch.randint(0, 50, (int(ids_per_word.sum()),))
    return TextInput(ids, ids_per_word.cumsum(0) - ids_per_word, torch.tensor(WORDS, dtype=torch.int32))


def make_audio(seed=2):
    torch.manual_seed(seed)
    return AudioInput(torch.randn(sum(FRAMES), 80), torch.tensor(FRAMES, dtype=torch.int32))


def make_inputs():
    return {"image": make_images(), "text": make_texts(), "audio": make_audio()}


def only(name, x, b):
    """Sample b alone."""
    first = int(x.lengths[:b].sum())
    rows = slice(first, first + int(x.lengths[b]))
    lengths = x.lengths[b : b + 1]
    if name == "image":
        return ImageInput(x.regions[rows], lengths, x.positions[rows])
    if name == "audio":
        return AudioInput(x.frames[rows], lengths)
    ends = torch.cat([x.offsets, torch.tensor([x.ids.shape[0]])])
    ids = x.ids[ends[rows.start] : ends[rows.stop]]
    return TextInput(ids, x.offsets[rows] - ends[rows.start], lengths)


def make_model(**options):
    torch.manual_seed(4)
    encoders = {
        "image": ImageEncoder(**SMALL, stem_widths=(8, 8, 16, 24), max_grid=8),
        "text": TextEncoder(**SMALL, vocab=50, max_length=4),
        "audio": AudioEncoder(**SMALL),
    }
    return MultimodalModel(encoders, DIM, 16, **options)


@pytest.mark.parametrize("name", ["image", "text", "audio"])
def test_a_sample_does_not_know_its_batch(name):
    encoder, x = make_model().eval().encoders[name], make_inputs()[name]
    tokens, layout = encoder(x)
    assert tokens.shape == (int(layout.cu_seqlens[-1]), DIM)
    lengths = {"image": [4 * r * c for r, c in GRIDS], "text": WORDS, "audio": [3, 0, 1, 1]}[name]
    assert layout.lengths().tolist() == lengths
    for b, part in enumerate(tokens.split(lengths)):
        alone, _ = encoder(only(name, x, b))
        torch.testing.assert_close(alone, part, rtol=1e-4, atol=1e-5)


def test_tokens_of_a_region_are_where_they_are_in_the_image():
    """A stem with no context beyond its 16 pixels: cutting an image into regions must not move its tokens."""
    encoder = make_model().eval().encoders["image"]
    encoder.transformer = PackedTransformer(0, DIM, 4)
    image = torch.randn(3, 64, 32)
    regions = torch.stack([image[:, :32], image[:, 32:]])
    two = torch.tensor([[0, 0], [1, 0]], dtype=torch.int32)
    x = ImageInput(regions, torch.tensor([2], dtype=torch.int32), two)
    _, layout = encoder(x)
    assert layout.position.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1]]
    tokens = encoder.stem(regions)
    for i, (row, column) in enumerate(layout.position.tolist()):
        grid = encoder.stem.proj(encoder.stem.layers(regions[row // 2 : row // 2 + 1])[0, :, row % 2, column])
        torch.testing.assert_close(tokens[i], grid, rtol=1e-4, atol=1e-5)


def test_words_are_sums_of_embeddings_at_their_place():
    encoder, x = make_model().encoders["text"], make_texts()
    encoder.transformer = PackedTransformer(0, DIM, 4)
    tokens, _ = encoder(x)
    ends = [*x.offsets.tolist(), x.ids.shape[0]]
    word = 0
    for length in WORDS:
        for place in range(length):
            total = encoder.embedding[x.ids[ends[word] : ends[word + 1]]].sum(0) + encoder.place[min(place, 3)]
            torch.testing.assert_close(tokens[word], encoder.transformer.norm(total), rtol=1e-4, atol=1e-5)
            word += 1


def test_frames_are_grouped_within_their_clip():
    encoder, x = make_model().encoders["audio"], make_audio()
    tokens, lengths = encoder.stem(*x)
    groups = []
    for clip in x.frames.split(FRAMES):
        padded = torch.nn.functional.pad(clip, (0, 0, 0, -clip.shape[0] % 8))
        groups.append(padded.reshape(-1, 8 * 80))
    torch.testing.assert_close(tokens, encoder.stem.layers(torch.cat(groups)), rtol=1e-4, atol=1e-5)
    assert lengths.tolist() == [3, 0, 1, 1]
    known, _ = encoder.stem(x.frames, x.lengths, groups=5)
    assert torch.equal(known, tokens)


def _backward(model, inputs, joint):
    model.zero_grad()
    pooled = model(inputs)
    loss = sum(model.project(name, x).square().sum(0).max() + x.sum() for name, x in pooled.items())
    if joint:
        loss = loss + model.forward_joint(inputs).sum()
    (loss * model.logit_scale.exp()).backward()
    return pooled


@pytest.mark.parametrize("missing", ["image", "text", "audio"])
@pytest.mark.parametrize("how", ["key", "lengths"])
def test_absent_modalities_have_zero_gradients(missing, how):
    model = make_model(backbone=PackedTransformer(1, DIM, 4))
    before = {name: b.clone() for name, b in model.named_buffers()}
    inputs = make_inputs()
    if how == "key":
        del inputs[missing]
    else:
        inputs[missing] = model.encoders[missing].empty(len(GRIDS))
    pooled = _backward(model, inputs, joint=True)
    assert not pooled[missing].any()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if f".{missing}." in name:
            assert not p.grad.any(), name
    if missing == "image":
        for name, b in model.named_buffers():
            assert torch.equal(b, before[name]), name


def test_all_parameters_learn():
    model = make_model(backbone=PackedTransformer(1, DIM, 4))
    _backward(model, make_inputs(), joint=True)
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert not still


def test_an_empty_batch():
    model = make_model(backbone=PackedTransformer(1, DIM, 4))
    pooled = model({name: e.empty(0) for name, e in model.encoders.items()})
    assert all(x.shape == (0, DIM) for x in pooled.values())


def test_pooled_vectors_and_projections():
    model, inputs = make_model().eval(), make_inputs()
    pooled = model(inputs)
    for name, (tokens, layout) in model.encode(inputs).items():
        assert torch.equal(pooled[name], segment_mean(tokens, layout))
        here = layout.lengths() > 0
        assert not pooled[name][~here].any()
        norms = model.project(name, pooled[name]).norm(dim=1)
        torch.testing.assert_close(norms, here.float(), rtol=1e-5, atol=1e-6)


MASKS = {
    "full": {},
    "early fusion": {"mask": ModalityMask.early_fusion(), "time_modalities": ("image", "audio")},
    "co-attention": {"mask": ModalityMask.co_attention("text", "image")},
}


@pytest.mark.parametrize("mask", MASKS)
def test_joint_is_the_backbone_over_all_tokens_of_a_sample(mask):
    options = MASKS[mask]
    model = make_model(backbone=PackedTransformer(2, DIM, 4), **options).eval()
    inputs = make_inputs()
    _, layout = model.fuse(model.encode(inputs))
    assert layout.names == ("image", "text", "audio")
    joint = model.forward_joint(inputs)
    for b in range(len(GRIDS)):
        alone = model.forward_joint({name: only(name, x, b) for name, x in inputs.items()})
        torch.testing.assert_close(alone[0], joint[b], rtol=1e-4, atol=1e-5)
    for b in range(len(GRIDS)):
        rows = slice(*layout.cu_seqlens[b : b + 2].tolist())
        counts = torch.bincount(layout.modality[rows].long(), minlength=3).tolist()
        assert counts == [4 * GRIDS[b][0] * GRIDS[b][1], WORDS[b], [3, 0, 1, 1][b]]


def test_masks_decide_what_mixes():
    torch.manual_seed(0)
    inputs = make_inputs()
    changed = {**inputs, "text": make_texts()._replace(ids=(make_texts().ids + 1) % 50)}

    def image_rows(mask):
        model = make_model(backbone=PackedTransformer(2, DIM, 4), mask=mask).eval()
        out = []
        for x in (inputs, changed):
            tokens, layout = model.fuse(model.encode(x))
            out.append(tokens[(layout.modality == 0) & (layout.samples() == 0)])
        return out

    assert torch.equal(*image_rows(ModalityMask({(m, m): "full" for m in ("image", "text", "audio")})))
    assert not torch.equal(*image_rows(ModalityMask.full()))


def test_autocast_and_backward():
    model = make_model(backbone=PackedTransformer(1, DIM, 4))
    with torch.autocast("cpu", torch.bfloat16):
        pooled = _backward(model, make_inputs(), joint=True)
    assert all(x.dtype == torch.float32 for x in pooled.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_channels_stay_last_through_the_stem():
    stem = ConvStem((8, 8, 16, 32), 32)
    copy = ConvStem((8, 8, 16, 32), 32)
    copy.load_state_dict({name: x.contiguous() for name, x in stem.state_dict().items()})
    assert copy.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = stem.layers(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert stem(torch.randn(2, 3, 64, 64)).shape == (2 * 16, 32)


def test_inputs_move():
    for x in make_inputs().values():
        assert x.batch == 4
        moved = x.to("cpu", torch.bfloat16)
        assert type(moved) is type(x)
        for a, b in zip(x, moved):
            if isinstance(a, torch.Tensor):
                assert b.dtype == (torch.bfloat16 if a.is_floating_point() else a.dtype)
    assert AudioInput.empty(3).groups == 0


def test_errors_name_what_is_wrong():
    model, inputs = make_model(), make_inputs()
    with pytest.raises(ValueError, match="no encoder for video"):
        model({**inputs, "video": inputs["image"]})
    with pytest.raises(ValueError, match="no inputs"):
        model({})
    with pytest.raises(ValueError, match="same number of samples"):
        model({**inputs, "text": TextInput.empty(3)})
    with pytest.raises(ValueError, match="needs a backbone"):
        model.forward_joint(inputs)
    with pytest.raises(ValueError, match=r"S a multiple of 16, got \[2, 3, 20, 20\]"):
        model.encoders["image"].stem(torch.zeros(2, 3, 20, 20))
    with pytest.raises(ValueError, match="4 halvings"):
        ConvStem((8, 16), 16)


@pytest.mark.parametrize("parts", [1, 2, None])
@pytest.mark.parametrize("attention", ["sdpa", "bmm"])
def test_equals_the_padded_model(parts, attention):
    model = make_model().double().eval()
    inputs = {name: x.to("cpu", torch.float64) for name, x in make_inputs().items()}
    peer = PaddedModel(model, attention)
    theirs = {name: pad_input(x, parts) for name, x in inputs.items()}
    results = []
    for run in (lambda: model(inputs), lambda: peer(theirs, len(GRIDS))):
        model.zero_grad()
        pooled = run()
        sum(model.project(name, x).cumsum(0).square().sum() for name, x in pooled.items()).backward()
        # A sample alone leaves out those that are absent, so that unused parameters may lack a gradient.
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((pooled, grads))
    (ours, our_grads), (expected, grads) = results
    for name, x in expected.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-9, atol=1e-10)
    for name, g in grads.items():
        torch.testing.assert_close(our_grads[name], g, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_compiles_to_one_graph_for_ragged_batches():
    model = make_model(backbone=PackedTransformer(1, DIM, 4)).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model.backbone, backend=counter, fullgraph=True, dynamic=True)
    for seed in range(4):
        torch.manual_seed(seed)
        lengths = torch.randint(0, 20, (3 + seed,))
        layout = Layout.from_lengths(lengths)
        x = torch.randn(int(lengths.sum()), DIM, requires_grad=True)
        out = compiled(x, layout)
        torch.testing.assert_close(out, model.backbone(x, layout), rtol=1e-4, atol=1e-5)
        out.sum().backward()
    assert counter.frame_count <= 2
