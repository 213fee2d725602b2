"""Models built from blocks."""

from moe.models.decoder import Decoder, DecoderConfig
from moe.models.output import Predictions

__all__ = ["Decoder", "DecoderConfig", "Predictions"]
