"""Models built from blocks."""

from moe.models.decoder import Decoder, DecoderConfig, Predictions

__all__ = ["Decoder", "DecoderConfig", "Predictions"]
