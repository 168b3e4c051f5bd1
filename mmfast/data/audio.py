"""Speech features in plain PyTorch: resampling and log-mel spectrograms."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

SAMPLE_RATE = 16_000
N_MELS = 80
WINDOW = 400  # 25 ms
HOP = 160  # 10 ms
N_FFT = 1024  # zero-padded beyond the window, so that even the narrowest low filters hold a bin
LOG_FLOOR = 1e-6


def hertz_to_mel(hertz: torch.Tensor) -> torch.Tensor:
    """The HTK mel scale: mel = 2595 log10(1 + f / 700). Source: the HTK book, section 5.4."""
    return 2595.0 * torch.log10(1.0 + hertz / 700.0)


def mel_to_hertz(mel: torch.Tensor) -> torch.Tensor:
    """The inverse of `hertz_to_mel`."""
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


@lru_cache(maxsize=8)
def mel_filters(n_mels: int = N_MELS, n_fft: int = N_FFT, sample_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Triangular filters with centres equally spaced in mel from 0 to half the sample rate, peak 1, no area norm.

    With edges f_0 < ... < f_{n+1} filter m weighs frequency f by
    max(0, min((f - f_{m-1}) / (f_m - f_{m-1}), (f_{m+1} - f) / (f_{m+1} - f_m))).

    Returns:
        float32 [n_fft // 2 + 1, n_mels].
    """
    top = hertz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64))
    edges = mel_to_hertz(torch.linspace(0.0, float(top), n_mels + 2, dtype=torch.float64))
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    up = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(up, down).clamp_min(0).float()


@lru_cache(maxsize=16)
def _sinc_kernel(up: int, down: int, zeros: int, rolloff: float) -> tuple[torch.Tensor, int]:
    """Kernel [up, 1, K] of `resample`: one Hann-windowed sinc for each of the `up` output phases."""
    cutoff = min(up, down) * rolloff
    width = math.ceil(zeros * down / cutoff)
    offset = torch.arange(-width, width + down, dtype=torch.float64) / down
    phase = torch.arange(0, -up, -1, dtype=torch.float64)[:, None] / up
    t = ((offset + phase) * cutoff).clamp(-zeros, zeros)
    window = torch.cos(t * math.pi / zeros / 2) ** 2
    return (torch.sinc(t) * window * (cutoff / down)).float()[:, None], width


def resample(waveform: torch.Tensor, sample_rate: int, target: int = SAMPLE_RATE) -> torch.Tensor:
    """Band-limited resampling with a Hann-windowed sinc of 16 zero crossings, cut at 0.945 of the lower Nyquist rate.

    y[n] = sum_k x[k] h(n / target - k / sample_rate). Source: J. O. Smith, Digital Audio Resampling.

    Args:
        waveform: float [samples].
        sample_rate, target: in Hz.

    Returns:
        float32 [ceil(samples * target / sample_rate)].
    """
    if sample_rate == target or not len(waveform):
        return waveform.float()
    common = math.gcd(sample_rate, target)
    down, up = sample_rate // common, target // common
    kernel, width = _sinc_kernel(up, down, 16, 0.945)
    padded = F.pad(waveform.float(), (width, width + down))
    out = F.conv1d(padded[None, None], kernel, stride=down)[0]
    return out.t().reshape(-1)[: math.ceil(len(waveform) * up / down)]


def log_mel(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Log-mel spectrogram: 80 bins, 16 kHz, Hann window of 25 ms, a frame every 10 ms.

    X[t, k] = sum_n w[n] x[160 t + n - 200] exp(-2 pi i k n / 1024), w[n] = sin^2(pi n / 400), x zero outside;
    out[t, m] = ln(sum_k |X[t, k]|^2 filter[k, m] + 1e-6), filters as in `mel_filters` (HTK scale). Frame t is
    centred on the time 10 t ms.

    Args:
        waveform: float [samples] or [samples, channels], full scale at 1; channels are averaged.
        sample_rate: in Hz, 4,000 to 192,000; other rates than 16 kHz are resampled.

    Returns:
        float32 [1 + samples at 16 kHz // 160, 80].

    Raises:
        ValueError: shape or rate outside these.
    """
    if waveform.ndim not in (1, 2) or not waveform.is_floating_point():
        raise ValueError(
            f"log_mel: waveform is {waveform.dtype} {list(waveform.shape)}, expected float [samples] or "
            f"[samples, channels]; divide int16 samples by 32768"
        )
    if not 4_000 <= sample_rate <= 192_000:
        raise ValueError(f"log_mel: sample_rate is {sample_rate}, expected 4000 to 192000 Hz")
    mono = waveform.mean(dim=1) if waveform.ndim == 2 else waveform
    x = resample(mono, int(sample_rate))
    window = torch.hann_window(WINDOW, periodic=True)
    spectrum = torch.stft(
        x, N_FFT, HOP, WINDOW, window, center=True, pad_mode="constant", return_complex=True
    )  # [513, frames]
    power = spectrum.real.square() + spectrum.imag.square()
    return (power.t() @ mel_filters() + LOG_FLOOR).log()
