"""Models built from blocks."""

from moe.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
