"""Audio features against numpy, patches against a loop, augmentation, and pictures that must be refused."""

import io
import math
import struct
import time
import zlib

import numpy as np
import pytest
import torch

from mmfast.data.audio import hertz_to_mel, log_mel, mel_filters, mel_to_hertz, resample
from mmfast.data.baselines import length_only, recall_from_scores
from mmfast.data.image import augment


def numpy_log_mel(x):
    """The documented formula, frame by frame in float64."""
    window = np.sin(np.pi * np.arange(400) / 400) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    bins = np.arange(513) * 16000 / 1024
    filters = np.zeros((513, 80))
    for m in range(80):
        low, centre, high = edges[m : m + 3]
        for k, f in enumerate(bins):
            filters[k, m] = max(0.0, min((f - low) / (centre - low), (high - f) / (high - centre)))
    padded = np.concatenate([np.zeros(200), x, np.zeros(400)])
    frames = [padded[160 * t : 160 * t + 400] * window for t in range(1 + len(x) // 160)]
    power = np.abs(np.fft.rfft(np.stack(frames), n=1024)) ** 2
    return np.log(power @ filters + 1e-6)


@pytest.mark.parametrize("samples", [1, 159, 160, 1000, 4096])
def test_log_mel_equals_numpy(samples):
    x = np.random.default_rng(samples).normal(size=samples).astype(np.float32) * 0.1
    got = log_mel(torch.from_numpy(x), 16_000)
    assert got.shape == (1 + samples // 160, 80) and got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), numpy_log_mel(x.astype(np.float64)), atol=2e-4)


def test_log_mel_of_a_tone_peaks_at_its_filter():
    x = torch.sin(2 * math.pi * 1000 * torch.arange(44_100) / 44_100)
    centres = mel_to_hertz(torch.linspace(0, float(hertz_to_mel(torch.tensor(8000.0))), 82))[1:-1]
    out = log_mel(torch.stack([x, x], dim=1), 44_100)
    assert out.shape[0] == 101
    assert int(out[50].argmax()) == int((centres - 1000).abs().argmin())
    torch.testing.assert_close(out, log_mel(x, 44_100))


def test_every_filter_holds_a_bin():
    assert (mel_filters().amax(0) > 0.2).all() and (mel_filters() <= 1).all()


def test_log_mel_refuses():
    with pytest.raises(ValueError, match="divide int16 samples by 32768"):
        log_mel(torch.zeros(100, dtype=torch.int16), 16_000)
    with pytest.raises(ValueError, match="sample_rate is 100"):
        log_mel(torch.zeros(100), 100)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resample_keeps_a_tone_and_drops_what_would_alias(rate):
    def tone(hertz, at):
        return torch.sin(2 * math.pi * hertz * torch.arange(at, dtype=torch.float64) / at).float()

    got = resample(tone(440, rate), rate)
    assert len(got) == 16_000
    assert (got - tone(440, 16_000))[500:-500].abs().max() < 2e-3
    if rate > 20_000:
        assert resample(tone(9_000, rate), rate)[500:-500].abs().max() < 2e-3


def test_augment_without_strength_is_the_image():
    images = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    out = augment(images, shift=0, degrees=0, scale=0, colour=0, grey=0)
    torch.testing.assert_close(out, images.float() / 255, atol=1e-5, rtol=0)


def test_augment_is_seeded_and_stays_in_range():
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    one, two, other = (augment(images, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert one.equal(two) and not one.equal(other)
    assert one.min() >= 0 and one.max() <= 1 and one.dtype == torch.float32


def test_augment_turns_pixels_not_the_grid():
    """A disc in a wide picture stays a disc under rotation, which it would not without the aspect correction."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(96), indexing="ij")
    disc = (((y - 15.5) ** 2 + (x - 47.5) ** 2) > 100).to(torch.uint8) * 255
    images = disc.expand(8, 3, 32, 96).contiguous()
    out = augment(images, shift=0, degrees=90, scale=0, colour=0, grey=0, generator=torch.Generator().manual_seed(0))
    assert (out - images.float() / 255).abs().mean() < 0.01


def test_augment_fills_with_white_and_greys_some():
    black = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    out = augment(black, shift=0.5, degrees=0, scale=0, colour=0, grey=0)
    assert (out.amax(dim=(1, 2, 3)) > 0.9).float().mean() > 0.95
    assert ((out < 0.1) | (out > 0.9)).float().mean() > 0.85
    red = torch.zeros(400, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 255
    out = augment(red, shift=0, degrees=0, scale=0, colour=0, grey=0.15, generator=torch.Generator().manual_seed(0))
    is_grey = (out.amax(1) - out.amin(1)).amax(dim=(1, 2)) < 1e-5
    assert 30 < int(is_grey.sum()) < 95
    torch.testing.assert_close(out[is_grey].mean(), torch.tensor(0.299))
    with pytest.raises(ValueError, match="expected uint8"):
        augment(red.float())


def png_header_bomb(side):
    """A few kilobytes that say they are side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_small_file_of_81_megapixels_is_refused_before_decoding():
    pytest.importorskip("PIL")
    from mmfast.data.render import decode

    bomb = png_header_bomb(9000)
    assert len(bomb) < 12_000
    begin = time.process_time()
    with pytest.raises(ValueError, match="9000x9000 pixels, expected at most"):
        decode(bomb, name="bomb.png")
    assert time.process_time() - begin < 0.5
    assert decode(png_header_bomb(64)).size == (64, 64)


def test_alpha_goes_onto_white_and_broken_pictures_are_named():
    image_module = pytest.importorskip("PIL.Image")
    from mmfast.data.render import decode, fit, square, to_tensor

    picture = image_module.new("RGBA", (40, 20), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255, 128))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    tensor = to_tensor(decode(buffer.getvalue()))
    assert tensor[:, 5, 5].tolist() == [255, 255, 255] and tensor[:, 0, 0].tolist() == [127, 127, 255]
    assert fit(decode(buffer.getvalue()), 10).size == (10, 5) and fit(decode(buffer.getvalue()), 99).size == (40, 20)
    assert square(decode(buffer.getvalue()), 16).size == (16, 16)
    with pytest.raises(ValueError, match=r"cut\.png cannot be used"):
        decode(buffer.getvalue()[:-30], name="cut.png")
    with pytest.raises(ValueError, match="cannot be used"):
        decode(b"BM" + bytes(100))


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ('width="30" height="60"', (10, 20)),
        ('width="30pt" height="60pt"', (10, 20)),
        ('viewBox="0 0 100 50"', (20, 10)),
        ('width="100%" height="100%" viewBox="0 0 5 10"', (10, 20)),
        ("", (20, 20)),
    ],
)
def test_svg_sizes(attributes, size):
    pytest.importorskip("resvg_py")
    from mmfast.data.render import render_svg

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}><rect width="999" height="999" fill="#00f"/></svg>'
    image = render_svg(svg, max_side=20)
    assert image.size == size and image.getpixel((2, 2)) == (0, 0, 255)
    with pytest.raises(ValueError, match=r"bad\.svg cannot be used"):
        render_svg("<svg", max_side=20, name="bad.svg")


def test_recall_counts_ties_by_chance():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 0.0], [5.0, 1.0, 1.0, 0.0]])
    got = recall_from_scores(scores, torch.tensor([2, 1, 1]), at=(1, 2))
    assert got["R@1"] == pytest.approx(100 * (0.25 + 1 + 0) / 3)
    assert got["R@2"] == pytest.approx(100 * (0.5 + 1 + 0.5) / 3)


def test_length_only_finds_what_length_tells():
    characters = torch.tensor([10, 20, 30, 40])
    seconds = 0.5 + 0.1 * characters
    got = length_only(seconds, characters, torch.arange(4), seconds, characters)
    assert got == {"R@1": 100.0, "R@5": 100.0, "candidates": 4}
    got = length_only(seconds.flip(0), characters, torch.arange(4), seconds, characters)
    assert got["R@1"] == 0.0
