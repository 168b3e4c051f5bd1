"""Encoders and the multimodal model, on packed inputs."""

from mmfast.models.encoders import AudioEncoder, ImageEncoder, TextEncoder
from mmfast.models.inputs import AudioInput, ImageInput, TextInput
from mmfast.models.multimodal import MultimodalModel

__all__ = [
    "AudioEncoder",
    "AudioInput",
    "ImageEncoder",
    "ImageInput",
    "MultimodalModel",
    "TextEncoder",
    "TextInput",
]
